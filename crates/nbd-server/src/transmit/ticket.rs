//! Guard that ensures a reply to a request processed in a task of its own.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::answer::Answer;
use super::outgoing::Outgoing;
use crate::SessionMetrics;
use crate::budget::Hold;
use crate::error::Refusal;
use crate::wire::reply::ErrorCode;

/// Guard for the reply to one request that is processed in a task of its own. If the task panics,
/// the guard replies with an I/O error, so that no client waits forever. If the task is canceled,
/// there is no reply: the connection is ending, and the client would treat an error reply as a
/// failure of the disk.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) answer: Answer,
    replies: mpsc::UnboundedSender<Outgoing>,
    noted: Noted,
    is_open: bool,
}

/// Metrics record of one request, written when its reply is complete.
#[derive(Debug)]
pub(super) struct Noted {
    pub(super) metrics: Arc<SessionMetrics>,
    pub(super) arrived: Instant,
    /// Length of the read in bytes; `None` for other requests.
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

    /// Sends a part of the reply that is not the last one. `hold` is released once it has been
    /// sent.
    pub(super) fn part(&self, hold: Option<Hold>, write: impl FnOnce(Answer, &mut Outgoing)) {
        self.send(hold, false, write);
    }

    /// Sends the whole reply, or its last part.
    pub(super) fn finish(mut self, hold: Option<Hold>, write: impl FnOnce(Answer, &mut Outgoing)) {
        self.is_open = false;
        self.noted.note(None);
        self.send(hold, true, write);
    }

    /// Replies with an error.
    pub(super) fn refuse(mut self, refusal: &Refusal) {
        self.is_open = false;
        self.noted.note(Some(refusal));
        self.send(None, true, |answer, out| answer.refuse(out, refusal));
    }

    fn send(&self, hold: Option<Hold>, last: bool, write: impl FnOnce(Answer, &mut Outgoing)) {
        let mut reply = Outgoing::default();
        write(self.answer, &mut reply);
        reply.push_receipt(hold, last);
        // The receiver is gone if the connection has failed; the reply is then not needed.
        self.replies.send(reply).unwrap_or_default();
    }
}

impl Noted {
    fn note(&self, refusal: Option<&Refusal>) {
        if let Some(refusal) = refusal {
            self.metrics.add_error(refusal.code);
        }
        if let Some(bytes) = self.bytes {
            let bytes = if refusal.is_some() { 0 } else { bytes };
            self.metrics.add_reads(1, bytes, self.arrived.elapsed());
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.is_open && std::thread::panicking() {
            self.noted.note(Some(&ABANDONED));
            self.send(None, true, |answer, out| answer.refuse(out, &ABANDONED));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplyMode;
    use crate::wire::request::{Command, CommandFlags, Cookie, Request};

    fn ticket(metrics: &Arc<SessionMetrics>) -> Ticket {
        ticket_to(metrics, mpsc::unbounded_channel().0)
    }

    fn ticket_to(
        metrics: &Arc<SessionMetrics>,
        replies: mpsc::UnboundedSender<Outgoing>,
    ) -> Ticket {
        let request = Request {
            flags: CommandFlags::default(),
            command: Command::READ,
            cookie: Cookie(1),
            offset: 0,
            length: 512,
        };
        let metrics = Arc::clone(metrics);
        let noted = Noted { metrics, arrived: Instant::now(), bytes: Some(512) };
        Ticket::new(Answer::to(&request, ReplyMode::Simple), replies, noted)
    }

    #[tokio::test]
    async fn each_answer_is_noted_once() {
        let metrics = Arc::new(SessionMetrics::default());
        let noted = || {
            let done = metrics.totals();
            (done.errors.total(), done.read_latency.count(), done.bytes)
        };
        ticket(&metrics).finish(None, |answer, out| answer.done(out));
        assert_eq!(noted(), (0, 1, 512));
        ticket(&metrics).refuse(&ABANDONED);
        assert_eq!(noted(), (1, 2, 512));
        // The connection has ended, which is not counted as an error.
        drop(ticket(&metrics));
        assert_eq!(noted(), (1, 2, 512));
        let panics = ticket(&metrics);
        let task = async move {
            let _ticket = panics;
            panic!("as an export may");
        };
        assert!(tokio::spawn(task).await.is_err());
        assert_eq!(noted(), (2, 3, 512));
    }

    /// Regression test: the client was sent an error if the runtime shut down before its connection
    /// ended.
    #[tokio::test]
    async fn a_cancelled_task_answers_nothing() {
        let metrics = Arc::new(SessionMetrics::default());
        let (replies, mut answers) = mpsc::unbounded_channel();
        let (cancelled, panics) =
            (ticket_to(&metrics, replies.clone()), ticket_to(&metrics, replies));
        let waits = tokio::spawn(async move {
            let _ticket = cancelled;
            std::future::pending::<()>().await;
        });
        tokio::task::yield_now().await;
        waits.abort();
        assert!(waits.await.unwrap_err().is_cancelled());
        assert!(answers.try_recv().is_err());
        let task = async move {
            let _ticket = panics;
            panic!("as an export may");
        };
        assert!(tokio::spawn(task).await.is_err());
        assert!(answers.try_recv().is_ok());
    }
}
