//! Graceful shutdown ("Terminating the transmission phase"): which requests are answered, and which
//! are left for the client to repeat.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    CloseReason, Export, Negotiated, ReadError, ReplyMode, Segment, SessionError, SessionStats,
    Span, Throttle, TransmitLimits, transmit,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use super::raw::{CMD_WRITE, Request, SIMPLE_SUCCESS};

const LENGTH: u32 = 512;
const REPLY: usize = 16 + LENGTH as usize;
/// Maximum number of requests in flight, and the minimum number of further ones in the buffer.
const IN_FLIGHT: u64 = 256;
const BUFFERED: u64 = 24;

/// An export that reports when it is read, and waits for permission to return data.
struct Gate {
    asked: watch::Sender<u64>,
    open: Semaphore,
}

impl Export for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn size(&self) -> u64 {
        1 << 30
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        self.asked.send_modify(|asked| *asked += 1);
        self.open.acquire().await.unwrap().forget();
        part(span.offset, Segment::Data(Bytes::from(vec![7; span.length as usize])));
        Ok(())
    }
}

/// A client of a server that shuts down at the first read.
struct Session {
    client: DuplexStream,
    gate: Arc<Gate>,
    ended: JoinHandle<Result<SessionStats, SessionError>>,
}

fn session(limits: &TransmitLimits, capacity: usize) -> Session {
    let (client, server) = tokio::io::duplex(capacity);
    let (asked, mut shutdown) = watch::channel(0);
    let gate = Arc::new(Gate { asked, open: Semaphore::new(0) });
    let chosen = Negotiated {
        export: Arc::clone(&gate),
        reply_mode: ReplyMode::Simple,
        contexts: Vec::new(),
    };
    let limits = limits.clone();
    let ended = tokio::spawn(async move {
        transmit(server, chosen, &limits, async { drop(shutdown.changed().await) }).await
    });
    Session { client, gate, ended }
}

fn limits() -> TransmitLimits {
    TransmitLimits::new(Budget::new(1 << 25, 1 << 23))
}

fn reads(cookies: std::ops::Range<u64>) -> Vec<u8> {
    cookies.flat_map(|cookie| Request::read(cookie, 0, LENGTH).encode()).collect()
}

impl Session {
    async fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).await.unwrap();
    }

    /// Waits until the export is read, which starts the shutdown, and until the engine has noticed.
    async fn wait_for_shutdown(&self) {
        let mut asked = self.gate.asked.subscribe();
        asked.wait_for(|asked| *asked > 0).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }

    fn open(&self) {
        self.gate.open.add_permits(10_000);
    }

    /// Receives replies until the end of the stream, checks that each is complete, and returns
    /// their cookies.
    async fn replies(&mut self) -> Vec<u64> {
        let mut bytes = Vec::new();
        self.client.read_to_end(&mut bytes).await.unwrap();
        let (replies, []) = bytes.as_chunks::<REPLY>() else { panic!("a reply was cut") };
        let cookie = |reply: &[u8; REPLY]| {
            assert_eq!(reply[..8], SIMPLE_SUCCESS);
            assert_eq!(reply[16..], [7; LENGTH as usize]);
            u64::from_be_bytes(reply[8..16].try_into().unwrap())
        };
        let mut cookies: Vec<u64> = replies.iter().map(cookie).collect();
        cookies.sort_unstable();
        cookies
    }

    async fn end(self) -> Result<SessionStats, SessionError> {
        drop(self.client);
        self.ended.await.unwrap()
    }
}

/// "the server SHOULD wait for inflight requests to be serviced prior to initiating a hard
/// disconnect": those being processed, and those in the buffer.
#[tokio::test(start_paused = true)]
async fn accepted_requests_are_answered() {
    let mut session = session(&limits(), 1 << 20);
    session.send(&reads(0..IN_FLIGHT + BUFFERED)).await;
    session.wait_for_shutdown().await;
    session.open();
    assert!(session.replies().await.into_iter().eq(0..IN_FLIGHT + BUFFERED));
    let stats = session.end().await.unwrap();
    assert_eq!(stats.close_reason, CloseReason::ShutDown);
    assert_eq!((stats.requests, stats.unanswered), (IN_FLIGHT + BUFFERED, 0));
}

/// qemu reports `NBD_ESHUTDOWN` to its guest, but repeats requests that got no reply.
#[tokio::test(start_paused = true)]
async fn unaccepted_requests_get_no_reply() {
    let mut session = session(&limits(), 1 << 20);
    session.send(&reads(0..3)).await;
    session.wait_for_shutdown().await;
    // These arrive too late, and so does a partial one.
    session.send(&reads(3..2000)).await;
    session.send(&reads(2000..2001)[..20]).await;
    session.open();
    assert_eq!(session.replies().await, [0, 1, 2]);
    let stats = session.end().await.unwrap();
    assert_eq!((stats.close_reason, stats.requests), (CloseReason::ShutDown, 3));
}

/// Processing is not limited in time: the caller has a deadline of its own.
#[tokio::test(start_paused = true)]
async fn slow_reads_are_waited_for() {
    let mut session = session(&limits(), 1 << 20);
    session.send(&reads(0..20)).await;
    session.wait_for_shutdown().await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert!(!session.ended.is_finished());
    session.open();
    assert!(session.replies().await.into_iter().eq(0..20));
    assert_eq!(session.end().await.unwrap().unanswered, 0);
}

/// A restart does not wait for a rate limit.
#[tokio::test(start_paused = true)]
async fn throttled_requests_are_not_accepted() {
    let throttle = Throttle::new(None, std::num::NonZeroU64::new(1));
    let mut session =
        session(&TransmitLimits { throttle: Some(Arc::new(throttle)), ..limits() }, 1 << 20);
    session.send(&reads(0..100)).await;
    let mut asked = session.gate.asked.subscribe();
    asked.wait_for(|asked| *asked > 0).await.unwrap();
    session.open();
    let replies = session.replies().await;
    assert!((1..10).contains(&replies.len()), "{replies:?}");
    assert!(replies.iter().copied().eq(0..replies.len() as u64));
    let stats = session.end().await.unwrap();
    assert_eq!((stats.requests, stats.unanswered), (replies.len() as u64, 0));
}

/// A payload that never arrives is not waited for, and its request is refused.
#[tokio::test(start_paused = true)]
async fn missing_payload_delays_nothing() {
    const EPERM: u8 = 1;
    let mut session = session(&limits(), 1 << 20);
    let write = Request { command: CMD_WRITE, cookie: 1, length: 5000, ..Request::default() };
    session.send(&[reads(0..1), write.encode().to_vec(), vec![0; 10]].concat()).await;
    session.wait_for_shutdown().await;
    session.open();
    let mut bytes = Vec::new();
    session.client.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len(), 16 + REPLY);
    // The refusal comes first; the read had to wait.
    assert_eq!(bytes[..16], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, EPERM, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(session.end().await.unwrap().close_reason, CloseReason::ShutDown);
}

/// Requests before a protocol violation are answered even if the violation is found during a
/// shutdown.
#[tokio::test(start_paused = true)]
async fn requests_before_a_malformed_one_are_answered() {
    let mut session = session(&limits(), 1 << 20);
    let malformed = vec![0x55; 28];
    session.send(&[reads(0..IN_FLIGHT + BUFFERED), malformed].concat()).await;
    session.wait_for_shutdown().await;
    session.open();
    assert!(session.replies().await.into_iter().eq(0..IN_FLIGHT + BUFFERED));
    let ended = session.end().await;
    assert!(matches!(ended, Err(SessionError::Malformed(_))), "{ended:?}");
}

/// A DISC that has been read before the shutdown ends the session.
#[tokio::test(start_paused = true)]
async fn buffered_disconnect_ends_the_session() {
    let mut session = session(&limits(), 1 << 20);
    session
        .send(&[reads(0..IN_FLIGHT + BUFFERED), Request::disc().encode().to_vec()].concat())
        .await;
    session.wait_for_shutdown().await;
    session.open();
    assert!(session.replies().await.into_iter().eq(0..IN_FLIGHT + BUFFERED));
    assert_eq!(session.end().await.unwrap().close_reason, CloseReason::Disconnected);
}

/// If the client leaves or stops reading during a shutdown, that is no failure, but some requests
/// are counted as unanswered.
#[tokio::test(start_paused = true)]
async fn lost_replies_are_no_error_of_the_server() {
    for leaves in [true, false] {
        let mut session = session(&limits(), 4 * REPLY);
        session.send(&reads(0..20)).await;
        session.wait_for_shutdown().await;
        if leaves {
            let (other, _) = tokio::io::duplex(1);
            drop(std::mem::replace(&mut session.client, other));
        }
        session.open();
        let stats = (&mut session.ended).await.unwrap().unwrap();
        assert_eq!((stats.close_reason, stats.requests), (CloseReason::ShutDown, 20));
        let expected = if leaves { 20..21 } else { 10..20 };
        assert!(expected.contains(&stats.unanswered), "{stats:?}");
    }
}
