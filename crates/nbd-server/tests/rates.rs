//! The rate limit and the idle timeout.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    CloseReason, Export, Negotiated, ReadError, ReplyMode, Segment, SessionError, SessionStats,
    Span, Throttle, TransmitLimits, transmit,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::raw::{CMD_CACHE, Request, SIMPLE_SUCCESS};

const LENGTH: u32 = 4096;
const REPLY: usize = 16 + LENGTH as usize;
/// Offset that takes [`WORK`] to read.
const SLOW: u64 = 1 << 20;
const WORK: Duration = Duration::from_secs(100);

struct Sevens;

impl Export for Sevens {
    fn name(&self) -> &'static str {
        "sevens"
    }

    fn size(&self) -> u64 {
        1 << 30
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        if span.offset == SLOW {
            tokio::time::sleep(WORK).await;
        }
        part(span.offset, Segment::Data(Bytes::from(vec![7; span.length as usize])));
        Ok(())
    }
}

/// A client, the trigger of its server's shutdown, and the outcome.
struct Session {
    client: DuplexStream,
    shutdown: oneshot::Sender<()>,
    ended: JoinHandle<Result<SessionStats, SessionError>>,
}

fn session(limits: &TransmitLimits) -> Session {
    let (client, server) = tokio::io::duplex(64 * 1024);
    let chosen = Negotiated {
        export: Arc::new(Sevens),
        reply_mode: ReplyMode::Simple,
        contexts: Vec::new(),
    };
    let limits = limits.clone();
    let (shutdown, stopped) = oneshot::channel();
    let ended = tokio::spawn(async move {
        transmit(server, chosen, &limits, async { stopped.await.unwrap_or_default() }).await
    });
    Session { client, shutdown, ended }
}

impl Session {
    async fn send(&mut self, requests: impl IntoIterator<Item = Request>) {
        let bytes: Vec<u8> = requests.into_iter().flat_map(Request::encode).collect();
        self.client.write_all(&bytes).await.unwrap();
    }

    async fn receive_reply(&mut self) {
        let mut reply = [0; REPLY];
        self.client.read_exact(&mut reply).await.unwrap();
        assert!(reply[..8] == SIMPLE_SUCCESS && reply[16..] == [7; 4096]);
    }

    async fn close_reason(self) -> CloseReason {
        self.ended.await.unwrap().unwrap().close_reason
    }
}

fn read(cookie: u64) -> Request {
    Request::read(cookie, 0, LENGTH)
}

fn limits() -> TransmitLimits {
    TransmitLimits::new(Budget::new(1 << 25, 1 << 23))
}

fn throttled(bytes: u64, requests: u64) -> TransmitLimits {
    let throttle = Throttle::new(NonZeroU64::new(bytes), NonZeroU64::new(requests));
    TransmitLimits { throttle: Some(Arc::new(throttle)), ..limits() }
}

/// The paused clock advances only when nothing else can be done, so this takes no time.
#[tokio::test(start_paused = true)]
async fn requests_and_bytes_are_admitted_at_their_rate() {
    const REQUESTS: u64 = 500;
    // A hundred per second; the first second's worth at once.
    for limits in [throttled(100 * u64::from(LENGTH), 0), throttled(0, 100)] {
        let mut session = session(&limits);
        let started = Instant::now();
        session.send((0..REQUESTS).map(read)).await;
        for _ in 0..REQUESTS {
            session.receive_reply().await;
        }
        let taken = started.elapsed().as_secs_f64();
        assert!((3.9..4.1).contains(&taken), "{taken}");
        // A client that disconnects does not wait for the limit.
        session.send((0..3).map(read).chain([Request::disc()])).await;
        for _ in 0..3 {
            session.receive_reply().await;
        }
        let before = Instant::now();
        assert_eq!(session.client.read(&mut [0]).await.unwrap(), 0);
        assert!(before.elapsed() < Duration::from_millis(20));
        drop(session.client);
        assert_eq!(session.ended.await.unwrap().unwrap().requests, REQUESTS + 3);
    }
}

/// Otherwise, a client could have the whole disk read again and again at no charge.
#[tokio::test(start_paused = true)]
async fn cache_requests_are_charged() {
    const SIMPLE_REPLY: usize = 16;
    let mut session = session(&throttled(100 * u64::from(LENGTH), 0));
    let started = Instant::now();
    let cache = |cookie| Request { command: CMD_CACHE, ..read(cookie) };
    session.send((0..500).map(cache)).await;
    session.client.read_exact(&mut [0; 500 * SIMPLE_REPLY]).await.unwrap();
    let taken = started.elapsed().as_secs_f64();
    assert!((3.9..4.1).contains(&taken), "{taken}");
}

/// Throttled requests are not read, so the stream exerts backpressure.
#[tokio::test(start_paused = true)]
async fn throttled_client_is_not_read_from() {
    let mut session = session(&throttled(0, 1));
    let flood: Vec<u8> = (0..100_000).flat_map(|cookie| read(cookie).encode()).collect();
    // The pipe has room for 64 KiB, the server's buffer for a page.
    let flooding = tokio::time::timeout(Duration::from_secs(10), session.client.write_all(&flood));
    assert!(flooding.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn connections_share_a_throttle_fairly() {
    const SECONDS: u64 = 20;
    let limits = throttled(0, 100);
    let mut counting = Vec::new();
    for together in [1, 2, 64] {
        let mut session = session(&limits);
        counting.push(tokio::spawn(async move {
            let until = Instant::now() + Duration::from_secs(SECONDS);
            let mut replies: u64 = 0;
            while Instant::now() < until {
                session.send((0..together).map(read)).await;
                for _ in 0..together {
                    session.receive_reply().await;
                    replies += u64::from(Instant::now() < until);
                }
            }
            replies
        }));
    }
    let fair = 100 * SECONDS / 3;
    let mut all = 0;
    for replies in counting {
        let replies = replies.await.unwrap();
        // The first second's burst may go to any connection.
        assert!((fair - 70..fair + 110).contains(&replies), "{replies} of {fair}");
        all += replies;
    }
    assert!((100 * SECONDS..=100 * (SECONDS + 1) + 5).contains(&all), "{all}");
}

/// Draining does not bypass the limit, nor does a restart wait for it.
#[tokio::test(start_paused = true)]
async fn throttled_request_is_left_unanswered_at_shutdown() {
    let mut session = session(&throttled(0, 1));
    session.send((0..6).map(read)).await;
    session.receive_reply().await;
    session.receive_reply().await;
    session.shutdown.send(()).unwrap();
    assert_eq!(session.client.read(&mut [0]).await.unwrap(), 0);
    drop(session.client);
    let stats = session.ended.await.unwrap().unwrap();
    assert_eq!((stats.close_reason, stats.requests), (CloseReason::ShutDown, 2));
}

const IDLE: Duration = Duration::from_secs(60);

fn idle() -> TransmitLimits {
    TransmitLimits { idle: Some(IDLE), ..limits() }
}

#[tokio::test(start_paused = true)]
async fn idle_client_is_disconnected() {
    // From the start, and from the last reply on.
    for requests in [0, 3] {
        let mut session = session(&idle());
        for cookie in 0..requests {
            tokio::time::sleep(IDLE - Duration::from_secs(1)).await;
            session.send([read(cookie)]).await;
            session.receive_reply().await;
        }
        let started = Instant::now();
        assert_eq!(session.client.read(&mut [0]).await.unwrap(), 0);
        let taken = started.elapsed();
        assert!((IDLE..IDLE + Duration::from_secs(1)).contains(&taken), "{taken:?}");
        assert_eq!(session.close_reason().await, CloseReason::IdleTimeout);
    }
}

/// A byte now and then is not a request.
#[tokio::test(start_paused = true)]
async fn partial_request_does_not_restart_the_idle_timeout() {
    let mut session = session(&idle());
    let started = Instant::now();
    for byte in &read(1).encode()[..27] {
        if session.client.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(IDLE / 20).await;
    }
    assert!(started.elapsed() >= IDLE);
    assert_eq!(session.client.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(session.close_reason().await, CloseReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn client_waiting_for_a_reply_is_not_idle() {
    // A reply that takes long, one that the client does not read, and one that is throttled.
    let mut waiting = session(&idle());
    waiting.send([Request::read(1, SLOW, LENGTH)]).await;
    let mut not_reading = session(&idle());
    not_reading.send((0..64).map(read)).await;
    let TransmitLimits { throttle, .. } = throttled(u64::from(LENGTH) / 100, 0);
    let mut throttled_read = session(&TransmitLimits { throttle, ..idle() });
    throttled_read.send([read(1), read(2)]).await;
    tokio::time::sleep(WORK - Duration::from_secs(1)).await;
    waiting.receive_reply().await;
    for _ in 0..64 {
        not_reading.receive_reply().await;
    }
    throttled_read.receive_reply().await;
    throttled_read.receive_reply().await;
    let sessions = [waiting, not_reading, throttled_read];
    assert!(sessions.iter().all(|session| !session.ended.is_finished()));
    for session in sessions {
        assert_eq!(session.close_reason().await, CloseReason::IdleTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn idle_client_is_kept_without_a_timeout() {
    let mut session = session(&limits());
    tokio::time::sleep(Duration::from_secs(1_000_000)).await;
    session.send([read(1)]).await;
    session.receive_reply().await;
    session.send([Request::disc()]).await;
    drop(session.client.read(&mut [0]).await);
    drop(session.client);
    assert_eq!(session.ended.await.unwrap().unwrap().close_reason, CloseReason::Disconnected);
}
