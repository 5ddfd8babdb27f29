//! The duty to answer a request that has to wait.

use tokio::sync::mpsc;

use super::answer::Answer;
use super::outgoing::Outgoing;
use crate::nbd::budget::Hold;
use crate::nbd::error::Refusal;
use crate::nbd::wire::reply::ErrorCode;

/// The duty to answer one request from a task of its own. If it is dropped, the answer is
/// an I/O error: no client waits for ever because a task panicked.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) answer: Answer,
    replies: mpsc::UnboundedSender<Outgoing>,
    is_open: bool,
}

const ABANDONED: Refusal =
    Refusal::new(ErrorCode::IO, "the server failed; its log says how, and it is its fault");

impl Ticket {
    pub(super) fn new(answer: Answer, replies: mpsc::UnboundedSender<Outgoing>) -> Self {
        Self { answer, replies, is_open: true }
    }

    /// Sends a part of the answer; more will follow. `hold` is given back when it is sent.
    pub(super) fn part(&self, hold: Option<Hold>, write: impl FnOnce(Answer, &mut Outgoing)) {
        self.send(hold, false, write);
    }

    /// Sends the answer, or the last part of it.
    pub(super) fn finish(mut self, hold: Option<Hold>, write: impl FnOnce(Answer, &mut Outgoing)) {
        self.is_open = false;
        self.send(hold, true, write);
    }

    /// Answers with an error.
    pub(super) fn refuse(self, refusal: &Refusal) {
        self.finish(None, |answer, out| answer.refuse(out, refusal));
    }

    fn send(&self, hold: Option<Hold>, last: bool, write: impl FnOnce(Answer, &mut Outgoing)) {
        let mut reply = Outgoing::default();
        write(self.answer, &mut reply);
        reply.push_receipt(hold, last);
        // Nobody listens any more when the connection has failed; then nobody needs the
        // answer either.
        self.replies.send(reply).unwrap_or_default();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_open {
            self.send(None, true, |answer, out| answer.refuse(out, &ABANDONED));
        }
    }
}
