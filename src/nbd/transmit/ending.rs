//! What is still to be done for a client when no further request of it is taken in.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use super::answer::Answer;
use super::verdict::{Verdict, judge};
use super::{Connection, MAX_REQUESTS_IN_FLIGHT};
use crate::nbd::error::Refusal;
use crate::nbd::wire::reply::ErrorCode;
use crate::nbd::{Export, SessionError};

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    /// Answers requests that have arrived and won't be worked on: "The error value issued
    /// in respect of these requests … SHOULD be NBD_ESHUTDOWN."
    pub(super) async fn refuse_the_rest(&mut self) -> Result<(), SessionError> {
        const SHUTTING_DOWN: Refusal =
            Refusal::new(ErrorCode::SHUTDOWN, "the server is shutting down");
        // More than clients have under way; one that goes on asking must not go on for ever.
        const MOST: u64 = 4 * MAX_REQUESTS_IN_FLIGHT;
        for _ in 0..MOST {
            let request = match self.held.take() {
                Some(held) => held.into_request(),
                None => match self.inbox.request_now().await? {
                    Some(request) => request,
                    None => break,
                },
            };
            match judge(&request, self.session) {
                Verdict::Disconnect | Verdict::TooLarge(_) => break,
                Verdict::StatusOf { payload, .. } | Verdict::Refuse { payload, .. } => {
                    self.inbox.skip(payload);
                }
                _ => {}
            }
            self.count(&request);
            self.refuse(Answer::to(&request, self.session.mode), &SHUTTING_DOWN);
        }
        Ok(())
    }

    /// Waits until everything is answered and sent, as long as the client takes it; then
    /// closes the way out.
    pub(super) async fn drain(&mut self, patience: Duration) -> Result<(), SessionError> {
        while self.in_flight() > 0 || !self.outbox.is_empty() {
            let before = self.share.sent();
            let is_waiting_for_work = self.outbox.is_empty();
            let step = async {
                tokio::select! {
                    Some(reply) = self.ready.recv() => self.outbox.queue.append(reply),
                    sent = self.outbox.send(), if !self.outbox.is_empty() => sent?,
                }
                Ok::<(), SessionError>(())
            };
            match tokio::time::timeout(patience, step).await {
                Ok(done) => done?,
                Err(_) if is_waiting_for_work || self.share.sent() > before => {}
                Err(_) => return Err(SessionError::DrainTimeout),
            }
        }
        tokio::time::timeout(patience, self.outbox.close()).await.unwrap_or_default();
        Ok(())
    }
}
