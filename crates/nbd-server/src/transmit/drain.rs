//! Graceful end of a connection from which no more requests are read.

use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{CloseReason, Connection};
use crate::{Export, SessionError};

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    /// Handles the requests that had been read from the stream when the shutdown began: "On a
    /// server shutdown, the server SHOULD wait for inflight requests to be serviced prior to
    /// initiating a hard disconnect." The rest of that section ("MAY speed this process up by
    /// issuing error replies", `NBD_ESHUTDOWN`) is deliberately not used: clients that would
    /// reconnect report such an error to their users instead.
    ///
    /// A request delayed by the rate limit, and all requests after it, are not accepted: waiting
    /// for the limit would delay the client and the restart.
    pub(super) async fn handle_buffered_requests(
        &mut self,
        timeout: Duration,
    ) -> Result<CloseReason, SessionError> {
        self.batch.arrived = Instant::now();
        while self.throttled.is_none() {
            if !self.can_accept_request() {
                self.drain_step(timeout).await?;
                continue;
            }
            let Some(request) = self.reader.buffered_request()? else { break };
            if let Some(close_reason) = self.handle_request(request)? {
                return Ok(close_reason);
            }
        }
        self.throttled = None;
        Ok(CloseReason::ShutDown)
    }

    /// Sends all outstanding replies, as long as the client keeps reading them, then shuts down the
    /// write side of the stream.
    pub(super) async fn drain(&mut self, timeout: Duration) -> Result<(), SessionError> {
        while self.in_flight() > 0 || !self.writer.is_empty() {
            self.drain_step(timeout).await?;
        }
        tokio::time::timeout(timeout, self.writer.close()).await.unwrap_or_default();
        Ok(())
    }

    /// Waits for a reply to become ready, or sends those that are queued. The client must read some
    /// of what is sent within `timeout`; the processing of requests is not limited in time.
    async fn drain_step(&mut self, timeout: Duration) -> Result<(), SessionError> {
        let before = self.budget.sent();
        let is_waiting_for_work = self.writer.is_empty();
        let step = async {
            tokio::select! {
                Some(reply) = self.reply_receiver.recv() => self.writer.queue.append(reply),
                sent = self.writer.send(), if !self.writer.is_empty() => sent?,
            }
            Ok(())
        };
        let ended = tokio::time::timeout(timeout, step).await;
        self.batch.metrics.set_in_flight(self.in_flight());
        match ended {
            Ok(done) => done,
            Err(_) if is_waiting_for_work || self.budget.sent() > before => Ok(()),
            Err(_) => Err(SessionError::DrainTimeout),
        }
    }
}
