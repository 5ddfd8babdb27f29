//! "Terminating the transmission phase": what a shutdown answers, and what it leaves to be asked
//! again.

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

use crate::support::client::Request;

const LENGTH: u32 = 512;
const REPLY: usize = 16 + LENGTH as usize;
/// Requests of one connection that are worked on at once, and how many more a buffer holds at
/// least behind them.
const IN_FLIGHT: u64 = 256;
const BUFFERED: u64 = 24;

/// An export that says when it is read, and reads when it is let.
struct Gate {
    asked: watch::Sender<u64>,
    open: Semaphore,
}

impl Export for Gate {
    fn name(&self) -> &'static str {
        "gate"
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
        self.asked.send_modify(|asked| *asked += 1);
        self.open.acquire().await.unwrap().forget();
        part(span.offset, Segment::Data(Bytes::from(vec![7; span.length as usize])));
        Ok(())
    }
}

/// A client of a server that shuts down at the first read.
struct Talk {
    client: DuplexStream,
    gate: Arc<Gate>,
    ended: JoinHandle<Result<SessionStats, SessionError>>,
}

fn talk(limits: &TransmitLimits, capacity: usize) -> Talk {
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
    Talk { client, gate, ended }
}

fn limits() -> TransmitLimits {
    TransmitLimits::new(Budget::new(1 << 25, 1 << 23))
}

fn reads(cookies: std::ops::Range<u64>) -> Vec<u8> {
    cookies.flat_map(|cookie| Request::read(cookie, 0, LENGTH).encode()).collect()
}

impl Talk {
    async fn ask(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).await.unwrap();
    }

    /// Waits until the export is read, which begins the shutdown; then until the engine has
    /// noticed that.
    async fn shuts_down(&self) {
        let mut asked = self.gate.asked.subscribe();
        asked.wait_for(|asked| *asked > 0).await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }

    fn open(&self) {
        self.gate.open.add_permits(10_000);
    }

    /// The cookies of all replies, each of them whole and with data, up to an orderly end.
    async fn answers(&mut self) -> Vec<u64> {
        let mut bytes = Vec::new();
        self.client.read_to_end(&mut bytes).await.unwrap();
        let (replies, []) = bytes.as_chunks::<REPLY>() else { panic!("a reply was cut") };
        let cookie = |reply: &[u8; REPLY]| {
            assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
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
/// disconnect": those that are worked on, and those in the buffer behind them.
#[tokio::test(start_paused = true)]
async fn all_that_was_accepted_is_answered() {
    let mut talk = talk(&limits(), 1 << 20);
    talk.ask(&reads(0..IN_FLIGHT + BUFFERED)).await;
    talk.shuts_down().await;
    talk.open();
    assert!(talk.answers().await.into_iter().eq(0..IN_FLIGHT + BUFFERED));
    let summary = talk.end().await.unwrap();
    assert_eq!(summary.close_reason, CloseReason::ShutDown);
    assert_eq!((summary.requests, summary.unanswered), (IN_FLIGHT + BUFFERED, 0));
}

/// qemu hands NBD_ESHUTDOWN to its guest; what has no reply it asks again.
#[tokio::test(start_paused = true)]
async fn what_was_not_accepted_gets_no_reply() {
    let mut talk = talk(&limits(), 1 << 20);
    talk.ask(&reads(0..3)).await;
    talk.shuts_down().await;
    // Those come too late, and so does a part of one.
    talk.ask(&reads(3..2000)).await;
    talk.ask(&reads(2000..2001)[..20]).await;
    talk.open();
    assert_eq!(talk.answers().await, [0, 1, 2]);
    let summary = talk.end().await.unwrap();
    assert_eq!((summary.close_reason, summary.requests), (CloseReason::ShutDown, 3));
}

/// Work may take as long as it does: who shuts down has a deadline of its own.
#[tokio::test(start_paused = true)]
async fn reads_that_take_long_are_waited_for() {
    let mut talk = talk(&limits(), 1 << 20);
    talk.ask(&reads(0..20)).await;
    talk.shuts_down().await;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    assert!(!talk.ended.is_finished());
    talk.open();
    assert!(talk.answers().await.into_iter().eq(0..20));
    assert_eq!(talk.end().await.unwrap().unanswered, 0);
}

/// A restart waits for no rate limit.
#[tokio::test(start_paused = true)]
async fn what_is_held_back_is_not_accepted() {
    let throttle = Throttle::new(None, std::num::NonZeroU64::new(1));
    let mut talk =
        talk(&TransmitLimits { throttle: Some(Arc::new(throttle)), ..limits() }, 1 << 20);
    talk.ask(&reads(0..100)).await;
    let mut asked = talk.gate.asked.subscribe();
    asked.wait_for(|asked| *asked > 0).await.unwrap();
    talk.open();
    let answers = talk.answers().await;
    assert!((1..10).contains(&answers.len()), "{answers:?}");
    assert!(answers.iter().copied().eq(0..answers.len() as u64));
    let summary = talk.end().await.unwrap();
    assert_eq!((summary.requests, summary.unanswered), (answers.len() as u64, 0));
}

/// A payload that never comes is not waited for, and what is refused is answered.
#[tokio::test(start_paused = true)]
async fn a_payload_that_never_comes_delays_nothing() {
    const EPERM: u8 = 1;
    let mut talk = talk(&limits(), 1 << 20);
    let write = Request { command: 1, cookie: 1, length: 5000, ..Request::default() };
    talk.ask(&[reads(0..1), write.encode().to_vec(), vec![0; 10]].concat()).await;
    talk.shuts_down().await;
    talk.open();
    let mut bytes = Vec::new();
    talk.client.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes.len(), 16 + REPLY);
    // At once; the read had to wait.
    assert_eq!(bytes[..16], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, EPERM, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(talk.end().await.unwrap().close_reason, CloseReason::ShutDown);
}

/// What a client asked before it broke the protocol is answered, also while that is found out
/// during a shutdown.
#[tokio::test(start_paused = true)]
async fn requests_before_a_broken_one_are_answered() {
    let mut talk = talk(&limits(), 1 << 20);
    let broken = vec![0x55; 28];
    talk.ask(&[reads(0..IN_FLIGHT + BUFFERED), broken].concat()).await;
    talk.shuts_down().await;
    talk.open();
    assert!(talk.answers().await.into_iter().eq(0..IN_FLIGHT + BUFFERED));
    let ended = talk.end().await;
    assert!(matches!(ended, Err(SessionError::Malformed(_))), "{ended:?}");
}

/// DISC that has been read already is what ends the session.
#[tokio::test(start_paused = true)]
async fn who_has_left_already_has_left() {
    let mut talk = talk(&limits(), 1 << 20);
    talk.ask(&[reads(0..IN_FLIGHT + BUFFERED), Request::disc().encode().to_vec()].concat()).await;
    talk.shuts_down().await;
    talk.open();
    assert!(talk.answers().await.into_iter().eq(0..IN_FLIGHT + BUFFERED));
    assert_eq!(talk.end().await.unwrap().close_reason, CloseReason::Disconnected);
}

/// The server ended the session; that the client went, or read nothing more, is no failure of
/// its own, but some requests stay unanswered.
#[tokio::test(start_paused = true)]
async fn who_does_not_wait_for_its_replies_is_shut_down_all_the_same() {
    for leaves in [true, false] {
        let mut talk = talk(&limits(), 4 * REPLY);
        talk.ask(&reads(0..20)).await;
        talk.shuts_down().await;
        if leaves {
            let (other, _) = tokio::io::duplex(1);
            drop(std::mem::replace(&mut talk.client, other));
        }
        talk.open();
        let summary = (&mut talk.ended).await.unwrap().unwrap();
        assert_eq!((summary.close_reason, summary.requests), (CloseReason::ShutDown, 20));
        let expected = if leaves { 20..21 } else { 10..20 };
        assert!(expected.contains(&summary.unanswered), "{summary:?}");
    }
}
