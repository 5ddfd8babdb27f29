//! Sending of queued replies to the stream.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::send_queue::SendQueue;
use super::stall::StallDetector;
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
