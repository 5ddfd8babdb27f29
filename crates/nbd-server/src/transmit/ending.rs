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
    /// A request held by the rate limit, and all requests after it, are not accepted: waiting for
    /// the limit would delay the client and the restart.
    pub(super) async fn serve_accepted(
        &mut self,
        patience: Duration,
    ) -> Result<CloseReason, SessionError> {
        self.batch.arrived = Instant::now();
        while self.held.is_none() {
            if !self.may_ask() {
                self.progress(patience).await?;
                continue;
            }
            let Some(request) = self.inbox.request_here()? else { break };
            if let Some(close_reason) = self.arrived(request)? {
                return Ok(close_reason);
            }
        }
        self.held = None;
        Ok(CloseReason::ShutDown)
    }

    /// Sends all outstanding replies, as long as the client keeps reading them, then shuts down the
    /// write side of the stream.
    pub(super) async fn drain(&mut self, patience: Duration) -> Result<(), SessionError> {
        while self.in_flight() > 0 || !self.outbox.is_empty() {
            self.progress(patience).await?;
        }
        tokio::time::timeout(patience, self.outbox.close()).await.unwrap_or_default();
        Ok(())
    }

    /// Waits for a reply to become ready, or sends those that are queued. The client must read some
    /// of what is sent within `patience`; the processing of requests is not limited in time.
    async fn progress(&mut self, patience: Duration) -> Result<(), SessionError> {
        let before = self.share.sent();
        let is_waiting_for_work = self.outbox.is_empty();
        let step = async {
            tokio::select! {
                Some(reply) = self.ready.recv() => self.outbox.queue.append(reply),
                sent = self.outbox.send(), if !self.outbox.is_empty() => sent?,
            }
            Ok(())
        };
        let ended = tokio::time::timeout(patience, step).await;
        self.batch.metrics.set_in_flight(self.in_flight());
        match ended {
            Ok(done) => done,
            Err(_) if is_waiting_for_work || self.share.sent() > before => Ok(()),
            Err(_) => Err(SessionError::DrainTimeout),
        }
    }
}
