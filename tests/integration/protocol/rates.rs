//! How fast a client may ask, and how long it may ask for nothing.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    CloseReason, Export, Negotiated, ReadError, ReplyMode, Segment, SessionError, SessionStats,
    Span, Throttle, TransmitLimits, transmit,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant as Paused;

use super::BASE;
use crate::support::client::{CMD_CACHE, Request};
use crate::support::image;
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

const LENGTH: u32 = 4096;
const REPLY: usize = 16 + LENGTH as usize;
/// What takes this long to read.
const SLOW: u64 = 1 << 20;
const WORK: Duration = Duration::from_secs(100);

struct Sevens;

impl Export for Sevens {
    fn name(&self) -> &'static str {
        "sevens"
    }

    fn description(&self) -> &'static str {
        ""
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

/// A client, what tells its server to end, and how that ends.
struct Talk {
    client: DuplexStream,
    shutdown: oneshot::Sender<()>,
    ended: JoinHandle<Result<SessionStats, SessionError>>,
}

fn talk(limits: &TransmitLimits) -> Talk {
    let (client, server) = tokio::io::duplex(64 * 1024);
    let chosen = Negotiated {
        export: Arc::new(Sevens),
        reply_mode: ReplyMode::Simple,
        contexts: Vec::new(),
    };
    let limits = limits.clone();
    let (shutdown, told) = oneshot::channel();
    let ended = tokio::spawn(async move {
        transmit(server, chosen, &limits, async { told.await.unwrap_or_default() }).await
    });
    Talk { client, shutdown, ended }
}

impl Talk {
    async fn ask(&mut self, requests: impl IntoIterator<Item = Request>) {
        let bytes: Vec<u8> = requests.into_iter().flat_map(Request::encode).collect();
        self.client.write_all(&bytes).await.unwrap();
    }

    async fn answer(&mut self) {
        let mut reply = [0; REPLY];
        self.client.read_exact(&mut reply).await.unwrap();
        assert!(reply[..8] == [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] && reply[16..] == [7; 4096]);
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

/// The paused clock goes on only when nothing else can be done, so this takes no time.
#[tokio::test(start_paused = true)]
async fn requests_and_bytes_are_let_through_at_their_rate() {
    const REQUESTS: u64 = 500;
    // A hundred a second, the first of them at once.
    for limits in [throttled(100 * u64::from(LENGTH), 0), throttled(0, 100)] {
        let mut talk = talk(&limits);
        let started = Paused::now();
        talk.ask((0..REQUESTS).map(read)).await;
        for _ in 0..REQUESTS {
            talk.answer().await;
        }
        let taken = started.elapsed().as_secs_f64();
        assert!((3.9..4.1).contains(&taken), "{taken}");
        // Who leaves needn't wait for that.
        talk.ask((0..3).map(read).chain([Request::disc()])).await;
        for _ in 0..3 {
            talk.answer().await;
        }
        let before = Paused::now();
        assert_eq!(talk.client.read(&mut [0]).await.unwrap(), 0);
        assert!(before.elapsed() < Duration::from_millis(20));
        drop(talk.client);
        assert_eq!(talk.ended.await.unwrap().unwrap().requests, REQUESTS + 3);
    }
}

/// A client could have the whole disk read again and again, by CACHE, at no charge.
#[tokio::test(start_paused = true)]
async fn what_is_only_cached_is_charged_as_well() {
    const SIMPLE_REPLY: usize = 16;
    let mut talk = talk(&throttled(100 * u64::from(LENGTH), 0));
    let started = Paused::now();
    let cache = |cookie| Request { command: CMD_CACHE, ..read(cookie) };
    talk.ask((0..500).map(cache)).await;
    talk.client.read_exact(&mut [0; 500 * SIMPLE_REPLY]).await.unwrap();
    let taken = started.elapsed().as_secs_f64();
    assert!((3.9..4.1).contains(&taken), "{taken}");
}

/// What waits is not read, so the client is held up by its own stream.
#[tokio::test(start_paused = true)]
async fn who_asks_too_fast_is_not_read_from() {
    let mut talk = talk(&throttled(0, 1));
    let flood: Vec<u8> = (0..100_000).flat_map(|cookie| read(cookie).encode()).collect();
    // The pipe has room for 64 KiB, the server's buffer for a page.
    let flooding = tokio::time::timeout(Duration::from_secs(10), talk.client.write_all(&flood));
    assert!(flooding.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn connections_that_share_a_throttle_have_equal_shares() {
    const SECONDS: u64 = 20;
    let limits = throttled(0, 100);
    let mut counting = Vec::new();
    for together in [1, 2, 64] {
        let mut talk = talk(&limits);
        counting.push(tokio::spawn(async move {
            let until = Paused::now() + Duration::from_secs(SECONDS);
            let mut answers: u64 = 0;
            while Paused::now() < until {
                talk.ask((0..together).map(read)).await;
                for _ in 0..together {
                    talk.answer().await;
                    answers += u64::from(Paused::now() < until);
                }
            }
            answers
        }));
    }
    let fair = 100 * SECONDS / 3;
    let mut all = 0;
    for answers in counting {
        let answers = answers.await.unwrap();
        // The first second's may be anybody's.
        assert!((fair - 70..fair + 110).contains(&answers), "{answers} of {fair}");
        all += answers;
    }
    assert!((100 * SECONDS..=100 * (SECONDS + 1) + 5).contains(&all), "{all}");
}

/// Draining is no way round the limit, nor does a restart wait for it.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_held_back_is_left_unanswered_at_the_end() {
    let mut talk = talk(&throttled(0, 1));
    talk.ask((0..6).map(read)).await;
    talk.answer().await;
    talk.answer().await;
    talk.shutdown.send(()).unwrap();
    assert_eq!(talk.client.read(&mut [0]).await.unwrap(), 0);
    drop(talk.client);
    let summary = talk.ended.await.unwrap().unwrap();
    assert_eq!((summary.close_reason, summary.requests), (CloseReason::ShutDown, 2));
}

const IDLE: Duration = Duration::from_secs(60);

fn idle() -> TransmitLimits {
    TransmitLimits { idle: Some(IDLE), ..limits() }
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_nothing_is_closed_upon() {
    // Never; and later, from the last answer on.
    for requests in [0, 3] {
        let mut talk = talk(&idle());
        for cookie in 0..requests {
            tokio::time::sleep(IDLE - Duration::from_secs(1)).await;
            talk.ask([read(cookie)]).await;
            talk.answer().await;
        }
        let started = Paused::now();
        assert_eq!(talk.client.read(&mut [0]).await.unwrap(), 0);
        let taken = started.elapsed();
        assert!((IDLE..IDLE + Duration::from_secs(1)).contains(&taken), "{taken:?}");
        assert_eq!(talk.close_reason().await, CloseReason::IdleTimeout);
    }
}

/// A byte now and then is no request.
#[tokio::test(start_paused = true)]
async fn parts_of_a_request_are_nothing() {
    let mut talk = talk(&idle());
    let started = Paused::now();
    for byte in &read(1).encode()[..27] {
        if talk.client.write_all(&[*byte]).await.is_err() {
            break;
        }
        tokio::time::sleep(IDLE / 20).await;
    }
    assert!(started.elapsed() >= IDLE);
    assert_eq!(talk.client.read(&mut [0]).await.unwrap(), 0);
    assert_eq!(talk.close_reason().await, CloseReason::IdleTimeout);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_an_answer_is_not_idle() {
    // One that takes long; one that can't be sent, as nobody reads; one that is held back.
    let mut waiting = talk(&idle());
    waiting.ask([Request::read(1, SLOW, LENGTH)]).await;
    let mut reading_nothing = talk(&idle());
    reading_nothing.ask((0..64).map(read)).await;
    let TransmitLimits { throttle, .. } = throttled(u64::from(LENGTH) / 100, 0);
    let mut held_back = talk(&TransmitLimits { throttle, ..idle() });
    held_back.ask([read(1), read(2)]).await;
    tokio::time::sleep(WORK - Duration::from_secs(1)).await;
    waiting.answer().await;
    for _ in 0..64 {
        reading_nothing.answer().await;
    }
    held_back.answer().await;
    held_back.answer().await;
    let talks = [waiting, reading_nothing, held_back];
    assert!(talks.iter().all(|talk| !talk.ended.is_finished()));
    for talk in talks {
        assert_eq!(talk.close_reason().await, CloseReason::IdleTimeout);
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_limit_silence_is_no_reason() {
    let mut talk = talk(&limits());
    tokio::time::sleep(Duration::from_secs(1_000_000)).await;
    talk.ask([read(1)]).await;
    talk.answer().await;
    talk.ask([Request::disc()]).await;
    drop(talk.client.read(&mut [0]).await);
    drop(talk.client);
    assert_eq!(talk.ended.await.unwrap().unwrap().close_reason, CloseReason::Disconnected);
}

fn servers(args: &[&str]) -> [Server; 2] {
    let with = |server: Builder| server.archive(BASE).args(args.iter().copied()).start();
    [with(Server::builder()), with(Server::builder().tls(Pki::new()))]
}

#[test]
fn an_idle_client_is_closed_over_real_sockets() {
    for server in servers(&["--idle-timeout", "1s"]) {
        let mut client = server.go("");
        let started = Instant::now();
        client.read_ok(0, 1);
        client.expect_end();
        assert!(started.elapsed() >= Duration::from_secs(1));
        let line = server.wait_for_message("asked for nothing for too long (--idle-timeout)");
        assert_eq!(
            (line.json["level"].as_str(), line.json["requests"].as_u64()),
            (Some("INFO"), Some(1))
        );
        server.assert_alive();
    }
}

/// No more than this is let through; a busy machine may take longer.
#[test]
fn rates_are_kept_over_real_sockets() {
    for server in servers(&["--max-requests", "20", "--max-bandwidth", "1MiB"]) {
        let mut client = server.go("");
        let started = Instant::now();
        for _ in 0..50 {
            client.read_ok(0, 1);
        }
        assert!(started.elapsed() >= Duration::from_millis(1400), "{:?}", started.elapsed());
        client.disconnect();
        let mut client = server.go("");
        let started = Instant::now();
        // Three seconds' worth, of which one may come at once.
        assert!(client.read_ok(0, 3 << 20) == image()[..3 << 20]);
        client.read_ok(0, 1);
        assert!(started.elapsed() >= Duration::from_millis(1900), "{:?}", started.elapsed());
        client.disconnect();
    }
}
