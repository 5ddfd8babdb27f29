//! The duty to answer a request that has to wait.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::answer::Answer;
use super::outgoing::Outgoing;
use crate::nbd::Activity;
use crate::nbd::budget::Hold;
use crate::nbd::error::Refusal;
use crate::nbd::wire::reply::ErrorCode;

/// The duty to answer one request from a task of its own. If it is dropped, the answer is
/// an I/O error: no client waits for ever because a task panicked.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) answer: Answer,
    replies: mpsc::UnboundedSender<Outgoing>,
    noted: Noted,
    is_open: bool,
}

/// Where the answer is noted, and what of it.
#[derive(Debug)]
pub(super) struct Noted {
    pub(super) activity: Arc<Activity>,
    pub(super) arrived: Instant,
    /// How much it reads, if it is a read.
    pub(super) bytes: Option<u64>,
}

const ABANDONED: Refusal =
    Refusal::new(ErrorCode::IO, "the server failed; its log says how, and it is its fault");

impl Ticket {
    pub(super) fn new(
        answer: Answer,
        replies: mpsc::UnboundedSender<Outgoing>,
        noted: Noted,
    ) -> Self {
        Self { answer, replies, noted, is_open: true }
    }

    /// Sends a part of the answer; more will follow. `hold` is given back when it is sent.
    pub(super) fn part(&self, hold: Option<Hold>, write: impl FnOnce(Answer, &mut Outgoing)) {
        self.send(hold, false, write);
    }

    /// Sends the answer, or the last part of it.
    pub(super) fn finish(mut self, hold: Option<Hold>, write: impl FnOnce(Answer, &mut Outgoing)) {
        self.is_open = false;
        self.noted.note(None);
        self.send(hold, true, write);
    }

    /// Answers with an error.
    pub(super) fn refuse(mut self, refusal: &Refusal) {
        self.is_open = false;
        self.noted.note(Some(refusal));
        self.send(None, true, |answer, out| answer.refuse(out, refusal));
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

impl Noted {
    fn note(&self, refusal: Option<&Refusal>) {
        if let Some(refusal) = refusal {
            self.activity.add_error(refusal.code);
        }
        if let Some(bytes) = self.bytes {
            let bytes = if refusal.is_some() { 0 } else { bytes };
            self.activity.add_reads(1, bytes, self.arrived.elapsed());
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_open {
            // Otherwise the connection has ended, and nobody is answered.
            if std::thread::panicking() {
                self.noted.note(Some(&ABANDONED));
            }
            self.send(None, true, |answer, out| answer.refuse(out, &ABANDONED));
        }
    }
}
