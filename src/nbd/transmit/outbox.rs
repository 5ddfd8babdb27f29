//! Replies on their way into the stream.

use std::future::Future;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::ticket::Reply;
use crate::nbd::budget::Share;
use crate::nbd::{Segment, SessionError};

/// Replies that are gathered for one write, at most.
const MAX_BATCH: usize = 64;

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
            self.write(&batch).await?;
            batch.clear();
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
/// but once its replies keep memory from others, it has to take [`Pace::LEAST`] bytes in
/// each period, so that nobody holds that memory by reading a byte now and then.
struct Pace {
    period: Duration,
    /// Since when it has been in the way, and what had been sent by then.
    in_the_way: Option<(Instant, u64)>,
}

impl Pace {
    /// Bytes that have to be read in a period.
    const LEAST: u64 = 1024 * 1024;

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
            Some((_, sent)) if now.1 - sent < Self::LEAST => return Err(SessionError::Stalled),
            _ => Some(now),
        };
        Ok(())
    }
}
