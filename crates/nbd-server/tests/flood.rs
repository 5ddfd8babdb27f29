//! Fairness between a client that floods the server with requests and others.

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

use super::raw::{CMD_CACHE, CMD_READ, Request, SIMPLE_SUCCESS};

/// Time that each read occupies the only decoder.
const WORK: Duration = Duration::from_millis(10);
const LENGTH: u32 = 512;
const FLOOD: u64 = 200;

/// An export that processes one request at a time, in order of arrival.
struct Slow {
    decoder: Semaphore,
    in_progress: AtomicUsize,
    most: AtomicUsize,
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self { decoder: Semaphore::new(1), in_progress: 0.into(), most: 0.into() })
    }

    async fn work(&self) {
        let in_progress = self.in_progress.fetch_add(1, Ordering::Relaxed) + 1;
        self.most.fetch_max(in_progress, Ordering::Relaxed);
        let _decoder = self.decoder.acquire().await.unwrap();
        tokio::time::sleep(WORK).await;
        self.in_progress.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Export for Slow {
    fn name(&self) -> &'static str {
        "slow"
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

/// Regression test: other clients' requests waited for all requests of the flood.
#[tokio::test(start_paused = true)]
async fn flood_of_requests_does_not_starve_other_clients() {
    // Maximum number of requests of the flood that another client waits for.
    const AT_ONCE: u32 = 16;
    let second = Duration::from_secs(1);
    let limits = TransmitLimits {
        stall: second,
        drain: second,
        ..TransmitLimits::new(Budget::new(1 << 25, 1 << 23))
    };
    for command in [CMD_READ, CMD_CACHE] {
        let export = Slow::new();
        let mut greedy = client(&export, &limits);
        let mut modest = client(&export, &limits);
        let request = |cookie| Request { command, length: LENGTH, cookie, ..Request::default() };
        let flood: Vec<u8> = (0..FLOOD).flat_map(|cookie| request(cookie).encode()).collect();
        greedy.write_all(&flood).await.unwrap();
        // The engine has read it.
        tokio::time::sleep(5 * WORK).await;

        let mut reply = vec![0; 16 + LENGTH as usize];
        for cookie in 0..3 {
            let started = Instant::now();
            modest.write_all(&Request::read(cookie, 0, LENGTH).encode()).await.unwrap();
            modest.read_exact(&mut reply).await.unwrap();
            assert!(started.elapsed() <= AT_ONCE * WORK, "{:?}", started.elapsed());
        }
        assert!(export.most.load(Ordering::Relaxed) <= AT_ONCE as usize);

        // All requests of the flood are answered.
        let length = if command == CMD_CACHE { 16 } else { reply.len() };
        for _ in 0..FLOOD {
            greedy.read_exact(&mut reply[..length]).await.unwrap();
            assert_eq!(reply[..8], SIMPLE_SUCCESS);
        }
        greedy.write_all(&Request::disc().encode()).await.unwrap();
        assert_eq!(greedy.read(&mut reply).await.unwrap(), 0);
    }
}
