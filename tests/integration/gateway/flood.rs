//! One client's flood of requests, and the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    Export, Negotiated, ReadError, ReplyMode, Segment, SelectedContext, Span, TransmitLimits,
    transmit,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::{plain, tls};
use crate::support::client::{CMD_CACHE, CMD_DISC, Request};
use crate::support::{IMAGE_SIZE, image};

/// What each read takes of the only decoder.
const WORK: Duration = Duration::from_millis(10);
const LENGTH: u32 = 512;
const FLOOD: u64 = 200;

/// An export that can do one thing at a time, in the order in which it is asked.
struct Slow {
    decoder: Semaphore,
    asked: AtomicUsize,
    most: AtomicUsize,
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self { decoder: Semaphore::new(1), asked: 0.into(), most: 0.into() })
    }

    async fn work(&self) {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(asked, Ordering::Relaxed);
        let _decoder = self.decoder.acquire().await.unwrap();
        tokio::time::sleep(WORK).await;
        self.asked.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Export for Slow {
    fn name(&self) -> &'static str {
        "slow"
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
        self.work().await;
        part(span.offset, Segment::Data(Bytes::from(vec![7; span.length as usize])));
        Ok(())
    }

    async fn cache(&self, _: u64, _: u64) -> Result<(), ReadError> {
        self.work().await;
        Ok(())
    }
}

fn client(export: &Arc<Slow>, limits: &TransmitLimits) -> DuplexStream {
    let (client, server) = tokio::io::duplex(1 << 20);
    let contexts: Vec<SelectedContext> = Vec::new();
    let chosen = Negotiated { export: Arc::clone(export), reply_mode: ReplyMode::Simple, contexts };
    let limits = limits.clone();
    tokio::spawn(async move {
        transmit(server, chosen, &limits, std::future::pending()).await.unwrap();
    });
    client
}

/// All that one client asked for stood in front of what others wanted.
#[tokio::test(start_paused = true)]
async fn a_flood_of_requests_leaves_room_for_others() {
    // Nobody waits longer than for this many of the flood.
    const AT_ONCE: u32 = 16;
    let second = Duration::from_secs(1);
    let limits = TransmitLimits {
        stall: second,
        drain: second,
        ..TransmitLimits::new(Budget::new(1 << 25, 1 << 23))
    };
    for command in [0, CMD_CACHE] {
        let export = Slow::new();
        let mut greedy = client(&export, &limits);
        let mut modest = client(&export, &limits);
        let request = |cookie| Request { command, length: LENGTH, cookie, ..Request::default() };
        let flood: Vec<u8> = (0..FLOOD).flat_map(|cookie| request(cookie).encode()).collect();
        greedy.write_all(&flood).await.unwrap();
        // It has been taken in.
        tokio::time::sleep(5 * WORK).await;

        let mut reply = vec![0; 16 + LENGTH as usize];
        for cookie in 0..3 {
            let asked = Instant::now();
            modest.write_all(&Request::read(cookie, 0, LENGTH).encode()).await.unwrap();
            modest.read_exact(&mut reply).await.unwrap();
            assert!(asked.elapsed() <= AT_ONCE * WORK, "{:?}", asked.elapsed());
        }
        assert!(export.most.load(Ordering::Relaxed) <= AT_ONCE as usize);

        // And all of the flood is answered.
        let length = if command == CMD_CACHE { 16 } else { reply.len() };
        for _ in 0..FLOOD {
            greedy.read_exact(&mut reply[..length]).await.unwrap();
            assert_eq!(reply[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        }
        let leave = Request { command: CMD_DISC, ..Request::default() };
        greedy.write_all(&leave.encode()).await.unwrap();
        assert_eq!(greedy.read(&mut reply).await.unwrap(), 0);
    }
}

/// One client could hold all memory for answers, until it was dropped for that: others
/// waited, and it was dropped for asking much at once.
#[test]
fn one_client_can_not_hold_all_memory() {
    for server in [plain(), tls()] {
        let server = server.start();
        let mut greedy = server.go("");
        // More than sockets have room for.
        let requests: Vec<u8> = (0..8)
            .flat_map(|cookie| Request::read(cookie, 0, IMAGE_SIZE as u32).encode())
            .collect();
        greedy.send(&requests);
        greedy.expect(&[0x67]);
        let mut other = server.go("");
        for _ in 0..3 {
            assert!(other.read_ok(0, IMAGE_SIZE as u32) == image());
        }
        other.disconnect();
        // The first one is still there, and gets all that it asked for.
        greedy.expect(&[0x44, 0x66, 0x98]);
        for left in (0..8).rev() {
            greedy.receive(12);
            assert!(greedy.receive(IMAGE_SIZE as usize) == image());
            if left > 0 {
                greedy.expect(&[0x67, 0x44, 0x66, 0x98]);
            }
        }
        greedy.disconnect();
        assert!(!server.log_text().contains("stopped reading"));
    }
}
