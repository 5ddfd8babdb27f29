//! Detection of clients that stall while holding memory.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::time::Instant;

use crate::SessionError;
use crate::budget::Share;

/// Minimum rate at which a client has to read. A client may pause indefinitely as long as no other
/// is affected. Once its replies occupy memory that others wait for, it must read some in each
/// period, and the more memory it holds, the more. A client therefore cannot hold memory by reading
/// a byte now and then.
#[derive(Debug)]
pub(super) struct Pace {
    period: Duration,
    /// Start of the current period, and the number of bytes sent until then, if others are waiting
    /// for memory that the client holds.
    in_the_way: Option<(Instant, u64)>,
}

impl Pace {
    /// Minimum number of bytes to be read per period.
    const LEAST: u64 = 1024 * 1024;
    /// Number of periods in which a client has to read as much as it holds of the pool.
    const PERIODS: u64 = 8;

    pub(super) fn new(period: Duration) -> Self {
        Self { period, in_the_way: None }
    }

    /// Waits for `progress` on the stream, checking the client's rate meanwhile.
    ///
    /// # Errors
    /// The stream failed, or the client reads too slowly ([`SessionError::Stalled`]).
    pub(super) async fn keep<T>(
        &mut self,
        share: &Share,
        progress: impl Future<Output = io::Result<T>>,
    ) -> Result<T, SessionError> {
        let mut progress = std::pin::pin!(progress);
        loop {
            self.check(share)?;
            if let Ok(done) = tokio::time::timeout(self.period / 4, &mut progress).await {
                return Ok(done?);
            }
        }
    }

    fn check(&mut self, share: &Share) -> Result<(), SessionError> {
        let now = (Instant::now(), share.sent());
        self.in_the_way = match self.in_the_way {
            _ if !share.is_in_the_way() => None,
            Some((since, sent)) if since.elapsed() < self.period => Some((since, sent)),
            Some((_, sent)) if now.1 - sent < Self::LEAST.max(share.pooled() / Self::PERIODS) => {
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
    use std::sync::Arc;
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;

    const PERIOD: Duration = Duration::from_secs(10);
    const FOR_EVER: Duration = Duration::from_secs(3600);

    /// Sends endless data into a small pipe while holding `held` bytes of the pool.
    async fn sending(share: Arc<Share>, held: u32) -> (impl AsyncRead, JoinHandle<SessionError>) {
        let hold = share.take(held).await;
        let (client, server) = tokio::io::duplex(64 * 1024);
        let (mut server, mut pace) = (server, Pace::new(PERIOD));
        let sender = tokio::spawn(async move {
            let _hold = hold;
            loop {
                match pace.keep(&share, server.write(&[0; 64 * 1024])).await {
                    Ok(written) => share.note_sent(written),
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
        while !sender.is_finished() && started.elapsed() < FOR_EVER {
            client.read_exact(&mut buffer).await.unwrap_or_default();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        started.elapsed()
    }

    /// Returns how long a client that holds `held` bytes of a full pool, for which another waits,
    /// may read at the given rate.
    async fn patience(held: u32, bytes_a_second: usize) -> Duration {
        let budget = Budget::new(MAX_PAYLOAD, u32::MAX);
        let share = Arc::new(Share::new(Arc::clone(&budget)));
        let (client, sender) = sending(Arc::clone(&share), held).await;
        let other = Share::new(budget);
        let _rest = other.take(MAX_PAYLOAD - held).await;
        let waiting = tokio::spawn(async move { other.take(MAX_PAYLOAD).await });
        while !share.is_in_the_way() {
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
    async fn who_drips_is_dropped_while_others_wait() {
        for held in [1024 * 1024, MAX_PAYLOAD] {
            for bytes_a_second in [1, 1000, 50_000] {
                let patience = patience(held, bytes_a_second).await;
                assert!((PERIOD..3 * PERIOD).contains(&patience), "{patience:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_reads_steadily_is_not_dropped() {
        assert!(patience(1024 * 1024, 150_000).await >= FOR_EVER);
        assert!(patience(MAX_PAYLOAD, 600_000).await >= FOR_EVER);
        // A rate that is sufficient for a small amount of memory is too low for a large one.
        assert!(patience(MAX_PAYLOAD, 150_000).await < 3 * PERIOD);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_dropped_while_nobody_waits() {
        let share = Arc::new(Share::new(Budget::new(MAX_PAYLOAD, MAX_PAYLOAD)));
        let (client, sender) = sending(share, MAX_PAYLOAD).await;
        assert!(read_slowly(client, 1, &sender).await >= FOR_EVER);
    }
}
