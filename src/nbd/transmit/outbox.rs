//! Replies on their way into the stream.

use std::future::Future;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::ticket::Reply;
use crate::nbd::budget::Share;
use crate::nbd::{Segment, SessionError};

/// Replies that are gathered for one write, at most.
const MAX_BATCH: usize = 64;

/// So many bytes are worth a write of their own.
const LARGE_BATCH: usize = 256 * 1024;

/// Slices that are handed to the stream at once, at most.
const MAX_SLICES: usize = 64;

/// What zeros are sent from.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Sends replies as they become ready.
pub(super) struct Outbox<W> {
    writer: W,
    ready: mpsc::UnboundedReceiver<Reply>,
    share: Arc<Share>,
    pace: Pace,
}

impl<W: AsyncWrite + Unpin> Outbox<W> {
    pub(super) fn new(
        writer: W,
        ready: mpsc::UnboundedReceiver<Reply>,
        share: Arc<Share>,
        stall: Duration,
    ) -> Self {
        Self { writer, ready, share, pace: Pace::new(stall) }
    }

    /// Sends until no request is left that could still be answered, then closes.
    pub(super) async fn run(mut self) -> Result<(), SessionError> {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while self.ready.recv_many(&mut batch, MAX_BATCH).await > 0 {
            // A large reply's memory is given back once it is sent, not once all are that
            // were ready together with it.
            while !batch.is_empty() {
                let count = count_for_a_write(&batch);
                self.write(batch.get(..count).unwrap_or(&batch)).await?;
                batch.drain(..count.min(batch.len()));
            }
            if self.ready.is_empty() {
                self.pace.keep(&self.share, self.writer.flush()).await?;
            }
        }
        // The client may be gone already, which is its right by now.
        self.writer.shutdown().await.unwrap_or_default();
        Ok(())
    }

    async fn write(&mut self, batch: &[Reply]) -> Result<(), SessionError> {
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(2 * batch.len());
        for frame in batch.iter().flat_map(Reply::frames) {
            slices.push(IoSlice::new(frame.head()));
            frame.segments().iter().for_each(|segment| push_slices(&mut slices, segment));
        }
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            let now = left.get(..MAX_SLICES).unwrap_or(left);
            let write = self.writer.write_vectored(now);
            let written = self.pace.keep(&self.share, write).await?;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            self.share.note_sent(written);
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }
}

/// How many of `replies` are sent together: one at least, and then as long as they are few
/// bytes.
fn count_for_a_write(replies: &[Reply]) -> usize {
    let mut bytes = 0;
    let small = replies.iter().take_while(|reply| {
        bytes += reply.len();
        bytes <= LARGE_BATCH
    });
    small.count().max(1)
}

fn push_slices<'a>(slices: &mut Vec<IoSlice<'a>>, segment: &'a Segment) {
    match segment {
        Segment::Data(bytes) if bytes.is_empty() => {}
        Segment::Data(bytes) => slices.push(IoSlice::new(bytes)),
        Segment::Zeros(length) => {
            let mut left = *length as usize;
            while left > 0 {
                let piece = ZEROS.get(..left).unwrap_or(&ZEROS);
                slices.push(IoSlice::new(piece));
                left -= piece.len();
            }
        }
    }
}

/// How fast a client has to read. It may stand still for ever while nobody is hurt by it;
/// but once its replies keep memory from others, it has to take some of them in each
/// period, and more of them the more memory that is, so that nobody holds it by reading a
/// byte now and then.
struct Pace {
    period: Duration,
    /// Since when it has been in the way, and what had been sent by then.
    in_the_way: Option<(Instant, u64)>,
}

impl Pace {
    /// Bytes that have to be read in a period at least.
    const LEAST: u64 = 1024 * 1024;
    /// In so many periods as much has to be read as is kept from others.
    const PERIODS: u64 = 8;

    fn new(period: Duration) -> Self {
        Self { period, in_the_way: None }
    }

    /// Waits for progress on the stream.
    async fn keep<T>(
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
    use tokio::io::{AsyncRead, AsyncReadExt};
    use tokio::task::JoinHandle;

    const PERIOD: Duration = Duration::from_secs(10);
    const FOR_EVER: Duration = Duration::from_secs(3600);

    /// Sends what has no end, into a pipe that holds little, while `held` bytes of the pool
    /// are kept.
    async fn sending(share: Arc<Share>, held: u32) -> (impl AsyncRead, JoinHandle<SessionError>) {
        let hold = share.take(held).await;
        let (client, server) = tokio::io::duplex(64 * 1024);
        let (_, ready) = mpsc::unbounded_channel();
        let mut outbox = Outbox::new(server, ready, share, PERIOD);
        let sender = tokio::spawn(async move {
            let _hold = hold;
            loop {
                let write = outbox.writer.write(&ZEROS);
                match outbox.pace.keep(&outbox.share, write).await {
                    Ok(written) => outbox.share.note_sent(written),
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
        let budget = Budget::new(MAX_PAYLOAD);
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
        let share = Arc::new(Share::new(Budget::new(MAX_PAYLOAD)));
        let (client, sender) = sending(share, MAX_PAYLOAD).await;
        assert!(read_slowly(client, 1, &sender).await >= FOR_EVER);
    }

    #[test]
    fn large_replies_are_sent_one_by_one() {
        let replies = |lengths: &[usize]| lengths.iter().map(|&n| Reply::of(n)).collect::<Vec<_>>();
        assert_eq!(count_for_a_write(&replies(&[100, 100, 100])), 3);
        assert_eq!(count_for_a_write(&replies(&[100, LARGE_BATCH, 100])), 1);
        assert_eq!(count_for_a_write(&replies(&[2 * LARGE_BATCH, 100])), 1);
    }
}
