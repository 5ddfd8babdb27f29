//! How fast a client has to read.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::time::Instant;

use crate::nbd::SessionError;
use crate::nbd::budget::Share;

/// How fast a client has to read. It may stand still for ever while nobody is hurt by it;
/// but once its replies keep memory from others, it has to take some of them in each
/// period, and more of them the more memory that is, so that nobody holds it by reading a
/// byte now and then.
#[derive(Debug)]
pub(super) struct Pace {
    period: Duration,
    /// Since when it has been in the way, and what had been sent by then.
    in_the_way: Option<(Instant, u64)>,
}

impl Pace {
    /// Bytes that have to be read in a period at least.
    const LEAST: u64 = 1024 * 1024;
    /// In so many periods as much has to be read as is kept from others.
    const PERIODS: u64 = 8;

    pub(super) fn new(period: Duration) -> Self {
        Self { period, in_the_way: None }
    }

    /// Waits for progress on the stream.
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
    use crate::nbd::budget::Budget;
    use crate::nbd::wire::MAX_PAYLOAD;
    use std::pin::Pin;
    use std::sync::Arc;
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;

    const PERIOD: Duration = Duration::from_secs(10);
    const FOR_EVER: Duration = Duration::from_secs(3600);

    /// Sends what has no end, into a pipe that holds little, while `held` bytes of the pool
    /// are kept.
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

    /// Reads so many bytes a second until the sender ends; at most for an hour.
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

    /// How long a client that keeps `held` bytes of a full pool from somebody else may read
    /// so slowly.
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
        // What would be enough of little is too little of much.
        assert!(patience(MAX_PAYLOAD, 150_000).await < 3 * PERIOD);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_dropped_while_nobody_waits() {
        let share = Arc::new(Share::new(Budget::new(MAX_PAYLOAD, MAX_PAYLOAD)));
        let (client, sender) = sending(share, MAX_PAYLOAD).await;
        assert!(read_slowly(client, 1, &sender).await >= FOR_EVER);
    }
}
