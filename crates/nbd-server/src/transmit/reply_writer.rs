//! Sending of queued replies to the stream, and detection of clients that stall while holding
//! memory.

use std::future::Future;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::send_queue::SendQueue;
use crate::SessionError;
use crate::budget::ConnectionBudget;

/// Number of queued bytes from which on no further requests are accepted. A longer queue would not
/// be faster, and a client that does not read must be stopped from asking eventually.
const QUEUE_LIMIT: usize = 256 * 1024;

/// Number of bytes sent before yielding to other threads and to other connections of this thread.
const YIELD_INTERVAL: usize = 256 * 1024;

/// Maximum number of slices passed to one vectored write.
const MAX_SLICES: usize = 64;

/// Sender of replies; counts the requests that have been answered completely.
#[derive(Debug)]
pub(super) struct ReplyWriter<W> {
    writer: W,
    /// Queue to which replies are appended.
    pub(super) queue: SendQueue,
    is_flushed: bool,
    since_yield: usize,
    answered: u64,
    budget: Arc<ConnectionBudget>,
    stall_detector: StallDetector,
}

impl<W: AsyncWrite + Unpin> ReplyWriter<W> {
    pub(super) fn new(writer: W, budget: Arc<ConnectionBudget>, stall: Duration) -> Self {
        Self {
            writer,
            queue: SendQueue::default(),
            is_flushed: true,
            since_yield: 0,
            answered: 0,
            budget,
            stall_detector: StallDetector::new(stall),
        }
    }

    /// Returns true if another request may be accepted.
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < QUEUE_LIMIT
    }

    /// Returns true if all replies have been written and flushed.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.is_flushed
    }

    /// Returns the number of requests whose replies have been sent completely.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    /// Sends all queued replies, then flushes the stream.
    ///
    /// Cancel safe: bytes that were not sent remain in the queue.
    pub(super) async fn send(&mut self) -> Result<(), SessionError> {
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = self.queue.slices(&mut slices);
            let now = slices.get(..count).unwrap_or(&slices);
            self.is_flushed = false;
            let write = self.writer.write_vectored(now);
            let written = self.stall_detector.watch(&self.budget, write).await?;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            self.budget.record_sent(written);
            self.answered += self.queue.advance(written) as u64;
            self.since_yield += written;
            if self.since_yield >= YIELD_INTERVAL {
                self.since_yield = 0;
                // Yields to other threads first: if there are more threads than cores, one with
                // only a small reply to send would otherwise wait until this one's time slice ends.
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
        }
        if !self.is_flushed {
            self.stall_detector.watch(&self.budget, self.writer.flush()).await?;
            self.is_flushed = true;
        }
        Ok(())
    }

    /// Shuts down the stream, TLS included. Errors are ignored: the client may legitimately have
    /// gone already.
    pub(super) async fn close(&mut self) {
        self.writer.shutdown().await.unwrap_or_default();
    }
}

/// Minimum rate at which a client has to read. A client may pause indefinitely as long as no other
/// is affected. Once its replies occupy memory that others wait for, it must read some in each
/// period, and the more memory it holds, the more. A client therefore cannot hold memory by reading
/// a byte now and then.
#[derive(Debug)]
pub(super) struct StallDetector {
    period: Duration,
    /// Start of the current period, and the number of bytes sent until then, if others are waiting
    /// for memory that the client holds.
    blocking_since: Option<(Instant, u64)>,
}

impl StallDetector {
    /// Minimum number of bytes to be read per period.
    const MIN_BYTES_PER_PERIOD: u64 = 1024 * 1024;
    /// Number of periods in which a client has to read as much as it holds of the pool.
    const PERIODS_PER_POOLED_BYTES: u64 = 8;

    pub(super) fn new(period: Duration) -> Self {
        Self { period, blocking_since: None }
    }

    /// Waits for `progress` on the stream, checking the client's rate meanwhile.
    ///
    /// # Errors
    /// The stream failed, or the client reads too slowly ([`SessionError::Stalled`]).
    pub(super) async fn watch<T>(
        &mut self,
        budget: &ConnectionBudget,
        progress: impl Future<Output = io::Result<T>>,
    ) -> Result<T, SessionError> {
        let mut progress = std::pin::pin!(progress);
        loop {
            self.check(budget)?;
            if let Ok(done) = tokio::time::timeout(self.period / 4, &mut progress).await {
                return Ok(done?);
            }
        }
    }

    fn check(&mut self, budget: &ConnectionBudget) -> Result<(), SessionError> {
        let now = (Instant::now(), budget.sent());
        self.blocking_since = match self.blocking_since {
            _ if !budget.blocks_others() => None,
            Some((since, sent)) if since.elapsed() < self.period => Some((since, sent)),
            Some((_, sent))
                if now.1 - sent
                    < Self::MIN_BYTES_PER_PERIOD
                        .max(budget.pooled() / Self::PERIODS_PER_POOLED_BYTES) =>
            {
                return Err(SessionError::Stalled);
            }
            _ => Some(now),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::wire::MAX_PAYLOAD;
    use std::pin::Pin;
    use tokio::io::{AsyncRead, AsyncReadExt};
    use tokio::task::JoinHandle;

    const PERIOD: Duration = Duration::from_secs(10);
    const FOREVER: Duration = Duration::from_secs(3600);

    /// Sends endless data into a small pipe while holding `held` bytes of the pool.
    async fn sending(
        budget: Arc<ConnectionBudget>,
        held: u32,
    ) -> (impl AsyncRead, JoinHandle<SessionError>) {
        let permit = budget.acquire(held).await;
        let (client, server) = tokio::io::duplex(64 * 1024);
        let (mut server, mut detector) = (server, StallDetector::new(PERIOD));
        let sender = tokio::spawn(async move {
            let _permit = permit;
            loop {
                match detector.watch(&budget, server.write(&[0; 64 * 1024])).await {
                    Ok(written) => budget.record_sent(written),
                    Err(error) => return error,
                }
            }
        });
        (client, sender)
    }

    /// Reads `bytes` bytes per second until the sender ends, for an hour at most. Returns the time
    /// elapsed.
    async fn read_slowly(
        client: impl AsyncRead,
        bytes: usize,
        sender: &JoinHandle<SessionError>,
    ) -> Duration {
        let mut client: Pin<Box<_>> = Box::pin(client);
        let (started, mut buffer) = (Instant::now(), vec![0; bytes]);
        while !sender.is_finished() && started.elapsed() < FOREVER {
            client.read_exact(&mut buffer).await.unwrap_or_default();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        started.elapsed()
    }

    /// Returns how long a client that holds `held` bytes of a full pool, for which another waits,
    /// may read at the given rate.
    async fn patience(held: u32, bytes_a_second: usize) -> Duration {
        let pool = Budget::new(MAX_PAYLOAD, u32::MAX);
        let budget = Arc::new(ConnectionBudget::new(Arc::clone(&pool)));
        let (client, sender) = sending(Arc::clone(&budget), held).await;
        let other = ConnectionBudget::new(pool);
        let _rest = other.acquire(MAX_PAYLOAD - held).await;
        let waiting = tokio::spawn(async move { other.acquire(MAX_PAYLOAD).await });
        while !budget.blocks_others() {
            tokio::task::yield_now().await;
        }
        let patience = read_slowly(client, bytes_a_second, &sender).await;
        waiting.abort();
        if sender.is_finished() {
            assert!(matches!(sender.await.unwrap(), SessionError::Stalled));
        }
        patience
    }

    #[tokio::test(start_paused = true)]
    async fn slow_reader_is_dropped_while_others_wait() {
        for held in [1024 * 1024, MAX_PAYLOAD] {
            for bytes_a_second in [1, 1000, 50_000] {
                let patience = patience(held, bytes_a_second).await;
                assert!((PERIOD..3 * PERIOD).contains(&patience), "{patience:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn steady_reader_is_not_dropped() {
        assert!(patience(1024 * 1024, 150_000).await >= FOREVER);
        assert!(patience(MAX_PAYLOAD, 600_000).await >= FOREVER);
        // A rate that is sufficient for a small amount of memory is too low for a large one.
        assert!(patience(MAX_PAYLOAD, 150_000).await < 3 * PERIOD);
    }

    #[tokio::test(start_paused = true)]
    async fn slow_reader_is_kept_while_no_others_wait() {
        let budget = Arc::new(ConnectionBudget::new(Budget::new(MAX_PAYLOAD, MAX_PAYLOAD)));
        let (client, sender) = sending(budget, MAX_PAYLOAD).await;
        assert!(read_slowly(client, 1, &sender).await >= FOREVER);
    }
}
