//! Dispatch of requests: each is answered immediately, or in a task of its own.

use std::future::Future;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;

use super::answer::Answer;
use super::held::Held;
use super::outgoing::Outgoing;
use super::sequence::Outlook;
use super::ticket::Ticket;
use super::verdict::{BAD_STATUS_PAYLOAD, Verdict, judge, status_range};
use super::work::{Job, PIECE, StatusQuery, WRONG_PARTS, status_payload};
use super::{CloseReason, Connection};
use crate::error::Refusal;
use crate::wire::MAX_PAYLOAD;
use crate::wire::request::Request;
use crate::{Export, Segment, SessionError, Span};

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    /// Handles a request, or holds it until the rate limit admits it. Returns the reason to close
    /// if the client disconnects.
    pub(super) fn arrived(
        &mut self,
        request: Request,
    ) -> Result<Option<CloseReason>, SessionError> {
        let Some(throttle) = &self.throttle else { return self.take_in(&request) };
        let bytes = match judge(&request, self.session) {
            // Requests that end the session are not subject to the rate limit.
            Verdict::Disconnect | Verdict::TooLarge(_) => return self.take_in(&request),
            Verdict::Read { span, .. } => span.length,
            // CACHE reads data from storage, even though it is not sent. It is charged for at most
            // as much as the longest read.
            Verdict::Cache { length, .. } => {
                u32::try_from(length).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD)
            }
            _ => 0,
        };
        if throttle.pass_now(bytes) {
            return self.take_in(&request);
        }
        self.held = Some(Held::new(request, bytes, throttle, self.batch.arrived));
        Ok(None)
    }

    /// Answers a request, or starts a task that does. Returns the reason to close if the client
    /// disconnects.
    pub(super) fn take_in(
        &mut self,
        request: &Request,
    ) -> Result<Option<CloseReason>, SessionError> {
        let verdict = judge(request, self.session);
        match verdict {
            Verdict::Disconnect => return Ok(Some(CloseReason::Disconnected)),
            Verdict::TooLarge(length) => return Err(SessionError::PayloadTooLarge(length)),
            _ => self.count(request),
        }
        let answer = Answer::to(request, self.session.mode);
        match verdict {
            Verdict::Read { span, whole } => {
                self.bytes += u64::from(span.length);
                self.read(answer, span, whole);
                self.look_ahead(span);
            }
            Verdict::Cache { offset, length } => self.spawn(answer, Job::Cache { offset, length }),
            Verdict::Status { offset, length, one } => {
                let contexts = self.contexts.clone();
                self.spawn(answer, Job::Status(StatusQuery { offset, length, one, contexts }));
            }
            Verdict::StatusOf { offset, payload, one } => {
                let payload = self.inbox.payload(payload);
                let asked = payload.and_then(|payload| status_payload(&payload, &self.contexts));
                match asked {
                    None => self.refuse(answer, &BAD_STATUS_PAYLOAD),
                    Some((length, contexts)) => {
                        match status_range(offset, length, self.session.size) {
                            Err(refusal) => self.refuse(answer, &refusal),
                            Ok(()) => {
                                let query = StatusQuery { offset, length, one, contexts };
                                self.spawn(answer, Job::Status(query));
                            }
                        }
                    }
                }
            }
            Verdict::Done => self.answer(|out| answer.done(out)),
            Verdict::Refuse { refusal, payload } => {
                // The payload of a refused request, such as a WRITE, arrives nevertheless.
                self.inbox.skip(payload);
                self.refuse(answer, &refusal);
            }
            Verdict::Disconnect | Verdict::TooLarge(_) => {}
        }
        Ok(None)
    }

    fn count(&mut self, request: &Request) {
        self.requests += 1;
        self.batch.count(request);
    }

    /// Answers a read immediately if its data is cached and memory for the reply is free.
    fn read(&mut self, answer: Answer, span: Span, whole: bool) {
        let job = Job::Read { span, whole };
        if span.length == 0 {
            self.batch.answered(0);
            return self.answer(|out| answer.done(out));
        }
        if span.length > PIECE {
            return self.spawn(answer, job);
        }
        let Some(hold) = self.share.take_now(span.length) else { return self.spawn(answer, job) };
        self.segments.clear();
        if !self.export.read_now(span, &mut self.segments) {
            drop(hold);
            return self.spawn(answer, job);
        }
        if self.segments.iter().map(Segment::len).sum::<usize>() != span.length as usize {
            self.batch.answered(0);
            return self.refuse(answer, &WRONG_PARTS);
        }
        self.batch.answered(span.length);
        let queue = &mut self.outbox.queue;
        answer.data(queue, span, whole, true, &mut self.segments);
        queue.push_receipt(Some(hold), true);
    }

    /// Starts readahead for a client that reads sequentially, and cancels it when the client stops
    /// doing so.
    fn look_ahead(&mut self, span: Span) {
        match self.sequence.note(span, self.session.size) {
            Outlook::Unchanged => {}
            Outlook::Elsewhere => {
                if let Some(ahead) = self.ahead.take() {
                    ahead.abort();
                }
            }
            // At most one readahead runs at a time: a client that has overtaken it does not need
            // it.
            Outlook::Ahead(_) if self.ahead.as_ref().is_some_and(|last| !last.is_finished()) => {}
            Outlook::Ahead(span) => {
                let export = Arc::clone(&self.export);
                self.ahead = Some(self.run(async move { export.read_ahead(span).await }));
            }
        }
    }

    /// Starts a task that answers a request.
    fn spawn(&mut self, answer: Answer, job: Job) {
        let span = match job {
            Job::Read { span, .. } => Some(span),
            Job::Cache { .. } | Job::Status(_) => None,
        };
        let ticket = Ticket::new(answer, self.replies.clone(), self.batch.later(span));
        self.run(Arc::clone(&self.worker).work(ticket, job));
    }

    /// Spawns a task, after removing finished ones from the set. Some clients spawn nothing but
    /// readahead tasks for days, so no other place would remove them.
    fn run(&mut self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(work)
    }

    fn answer(&mut self, write: impl FnOnce(&mut Outgoing)) {
        write(&mut self.outbox.queue);
        self.outbox.queue.push_receipt(None, true);
    }

    fn refuse(&mut self, answer: Answer, refusal: &Refusal) {
        self.batch.metrics.add_error(refusal.code);
        self.answer(|out| answer.refuse(out, refusal));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Budget;
    use crate::{Negotiated, ReadError, ReplyMode, TransmitLimits};

    struct Zeros;

    impl Export for Zeros {
        fn name(&self) -> &'static str {
            "zeros"
        }

        fn description(&self) -> &'static str {
            ""
        }

        fn size(&self) -> u64 {
            1 << 40
        }

        fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> bool {
            segments.push(Segment::Zeros(span.length));
            true
        }

        async fn read(&self, _: Span, _: impl FnMut(u64, Segment) + Send) -> Result<(), ReadError> {
            Ok(())
        }
    }

    /// Regression test: finished readahead tasks were kept until a read had to wait, which may
    /// never happen.
    #[tokio::test]
    async fn reading_ahead_leaves_nothing_behind() {
        let (_client, server) = tokio::io::duplex(1);
        let reply_mode = ReplyMode::Structured;
        let chosen = Negotiated { export: Arc::new(Zeros), reply_mode, contexts: Vec::new() };
        let limits = TransmitLimits::new(Budget::new(0, 0));
        let mut connection = Connection::new(server, chosen, &limits);
        let mut begun = 0;
        for number in 0..10_000 {
            connection.look_ahead(Span { offset: number * 65_536, length: 65_536 });
            begun += u32::from(connection.ahead.as_ref().is_some_and(|last| !last.is_finished()));
            tokio::task::yield_now().await;
        }
        assert!(begun > 100, "{begun}");
        assert!(connection.tasks.len() <= 2, "{}", connection.tasks.len());
    }
}
