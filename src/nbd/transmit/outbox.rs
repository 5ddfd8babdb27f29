//! The way out: replies that wait, and the stream that takes them.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::outgoing::Outgoing;
use super::pace::Pace;
use crate::nbd::SessionError;
use crate::nbd::budget::Share;

/// As long as so many bytes wait, no further request is taken in: more at once wouldn't be
/// faster, and a client that doesn't read has to stop asking some time.
const ROOM: usize = 256 * 1024;

/// So many bytes are sent without a pause, then other threads and the other connections of
/// this one have their turn.
const WITHOUT_A_PAUSE: usize = 256 * 1024;

/// Slices that are handed to the stream at once, at most.
const MAX_SLICES: usize = 64;

/// Sends replies, and says which requests are answered with that.
#[derive(Debug)]
pub(super) struct Outbox<W> {
    writer: W,
    /// Answers are added here.
    pub(super) queue: Outgoing,
    is_flushed: bool,
    since_pause: usize,
    answered: u64,
    share: Arc<Share>,
    pace: Pace,
}

impl<W: AsyncWrite + Unpin> Outbox<W> {
    pub(super) fn new(writer: W, share: Arc<Share>, stall: Duration) -> Self {
        Self {
            writer,
            queue: Outgoing::default(),
            is_flushed: true,
            since_pause: 0,
            answered: 0,
            share,
            pace: Pace::new(stall),
        }
    }

    /// Whether a further request may be taken in.
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < ROOM
    }

    /// Whether everything has left this program.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.is_flushed
    }

    /// How many requests have been answered so far, to the last byte.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    /// Sends all that waits, then flushes.
    ///
    /// Cancel safe: what was not sent waits on.
    pub(super) async fn send(&mut self) -> Result<(), SessionError> {
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let count = self.queue.slices(&mut slices);
            let now = slices.get(..count).unwrap_or(&slices);
            self.is_flushed = false;
            let write = self.writer.write_vectored(now);
            let written = self.pace.keep(&self.share, write).await?;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            self.share.note_sent(written);
            self.answered += self.queue.advance(written) as u64;
            self.since_pause += written;
            if self.since_pause >= WITHOUT_A_PAUSE {
                self.since_pause = 0;
                // Other threads first: with more of them than cores, one that only has a small
                // answer to send would wait until this one's time is up.
                std::thread::yield_now();
                tokio::task::yield_now().await;
            }
        }
        if !self.is_flushed {
            self.pace.keep(&self.share, self.writer.flush()).await?;
            self.is_flushed = true;
        }
        Ok(())
    }

    /// Closes the stream, TLS with it. The client may be gone already, which is its right.
    pub(super) async fn close(&mut self) {
        self.writer.shutdown().await.unwrap_or_default();
    }
}
