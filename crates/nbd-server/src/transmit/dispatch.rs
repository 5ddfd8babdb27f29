//! Dispatch of requests: each is answered immediately, or in a task of its own.

use std::future::Future;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::AbortHandle;

use super::action::{Action, BAD_STATUS_PAYLOAD, validate, validate_status_range};
use super::readahead::ReadaheadHint;
use super::reply_encoder::ReplyEncoder;
use super::reply_guard::ReplyGuard;
use super::send_queue::SendQueue;
use super::throttled::ThrottledRequest;
use super::worker::{DATA_MISMATCH, Job, MAX_PIECE, StatusQuery, decode_status_payload};
use super::{CloseReason, Connection};
use crate::error::Refusal;
use crate::wire::MAX_PAYLOAD;
use crate::wire::request::Request;
use crate::{Export, Segment, SessionError, Span};

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    /// Handles a request, or holds it until the rate limit admits it. Returns the reason to close
    /// if the client disconnects.
    pub(super) fn handle_request(
        &mut self,
        request: Request,
    ) -> Result<Option<CloseReason>, SessionError> {
        let Some(throttle) = &self.throttle else { return self.accept_request(&request) };
        let bytes = match validate(&request, self.params) {
            // Requests that end the session are not subject to the rate limit.
            Action::Disconnect | Action::PayloadTooLarge(_) => {
                return self.accept_request(&request);
            }
            Action::Read { span, .. } => span.length,
            // CACHE reads data from storage, even though it is not sent. It is charged for at most
            // as much as the longest read.
            Action::Cache { length, .. } => {
                u32::try_from(length).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD)
            }
            _ => 0,
        };
        if throttle.try_acquire(bytes) {
            return self.accept_request(&request);
        }
        self.throttled = Some(ThrottledRequest::new(request, bytes, throttle, self.batch.arrived));
        Ok(None)
    }

    /// Answers a request, or starts a task that does. Returns the reason to close if the client
    /// disconnects.
    pub(super) fn accept_request(
        &mut self,
        request: &Request,
    ) -> Result<Option<CloseReason>, SessionError> {
        let action = validate(request, self.params);
        match action {
            Action::Disconnect => return Ok(Some(CloseReason::Disconnected)),
            Action::PayloadTooLarge(length) => return Err(SessionError::PayloadTooLarge(length)),
            _ => self.count(request),
        }
        let encoder = ReplyEncoder::new(request, self.params.mode);
        match action {
            Action::Read { span, whole } => {
                self.bytes += u64::from(span.length);
                self.read(encoder, span, whole);
                self.update_readahead(span);
            }
            Action::Cache { offset, length } => {
                self.spawn_job(encoder, Job::Cache { offset, length });
            }
            Action::Status { offset, length, single_extent } => {
                let contexts = self.contexts.clone();
                self.spawn_job(
                    encoder,
                    Job::Status(StatusQuery { offset, length, single_extent, contexts }),
                );
            }
            Action::StatusWithPayload { offset, payload, single_extent } => {
                let payload = self.reader.take_payload(payload);
                let decoded =
                    payload.and_then(|payload| decode_status_payload(&payload, &self.contexts));
                match decoded {
                    None => self.refuse(encoder, &BAD_STATUS_PAYLOAD),
                    Some((length, contexts)) => {
                        match validate_status_range(offset, length, self.params.size) {
                            Err(refusal) => self.refuse(encoder, &refusal),
                            Ok(()) => {
                                let query = StatusQuery { offset, length, single_extent, contexts };
                                self.spawn_job(encoder, Job::Status(query));
                            }
                        }
                    }
                }
            }
            Action::Succeed => self.reply(|out| encoder.done(out)),
            Action::Refuse { refusal, payload } => {
                // The payload of a refused request, such as a WRITE, arrives nevertheless.
                self.reader.skip_payload(payload);
                self.refuse(encoder, &refusal);
            }
            Action::Disconnect | Action::PayloadTooLarge(_) => {}
        }
        Ok(None)
    }

    fn count(&mut self, request: &Request) {
        self.requests += 1;
        self.batch.count(request);
    }

    /// Answers a read immediately if its data is cached and memory for the reply is free.
    fn read(&mut self, encoder: ReplyEncoder, span: Span, whole: bool) {
        let job = Job::Read { span, whole };
        if span.length == 0 {
            self.batch.count_answered_read(0);
            return self.reply(|out| encoder.done(out));
        }
        if span.length > MAX_PIECE {
            return self.spawn_job(encoder, job);
        }
        let Some(permit) = self.budget.try_acquire(span.length) else {
            return self.spawn_job(encoder, job);
        };
        self.segments.clear();
        if !self.export.read_now(span, &mut self.segments) {
            drop(permit);
            return self.spawn_job(encoder, job);
        }
        if self.segments.iter().map(Segment::len).sum::<usize>() != span.length as usize {
            self.batch.count_answered_read(0);
            return self.refuse(encoder, &DATA_MISMATCH);
        }
        self.batch.count_answered_read(span.length);
        let queue = &mut self.writer.queue;
        encoder.data(queue, span, whole, true, &mut self.segments);
        queue.push_marker(Some(permit), true);
    }

    /// Starts readahead for a client that reads sequentially, and cancels it when the client stops
    /// doing so.
    fn update_readahead(&mut self, span: Span) {
        match self.readahead.record(span, self.params.size) {
            ReadaheadHint::Unchanged => {}
            ReadaheadHint::Cancel => {
                if let Some(ahead) = self.readahead_task.take() {
                    ahead.abort();
                }
            }
            // At most one readahead runs at a time: a client that has overtaken it does not need
            // it.
            ReadaheadHint::Prefetch(_)
                if self.readahead_task.as_ref().is_some_and(|task| !task.is_finished()) => {}
            ReadaheadHint::Prefetch(span) => {
                let export = Arc::clone(&self.export);
                self.readahead_task =
                    Some(self.spawn_task(async move { export.read_ahead(span).await }));
            }
        }
    }

    /// Starts a task that answers a request.
    fn spawn_job(&mut self, encoder: ReplyEncoder, job: Job) {
        let span = match job {
            Job::Read { span, .. } => Some(span),
            Job::Cache { .. } | Job::Status(_) => None,
        };
        let guard =
            ReplyGuard::new(encoder, self.reply_sender.clone(), self.batch.request_metrics(span));
        self.spawn_task(Arc::clone(&self.worker).process(guard, job));
    }

    /// Spawns a task, after removing finished ones from the set. Some clients spawn nothing but
    /// readahead tasks for days, so no other place would remove them.
    fn spawn_task(&mut self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        while self.tasks.try_join_next().is_some() {}
        self.tasks.spawn(work)
    }

    fn reply(&mut self, write: impl FnOnce(&mut SendQueue)) {
        write(&mut self.writer.queue);
        self.writer.queue.push_marker(None, true);
    }

    fn refuse(&mut self, encoder: ReplyEncoder, refusal: &Refusal) {
        self.batch.metrics.add_error(refusal.code);
        self.reply(|out| encoder.refuse(out, refusal));
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
    async fn finished_readahead_tasks_are_removed() {
        let (_client, server) = tokio::io::duplex(1);
        let reply_mode = ReplyMode::Structured;
        let chosen = Negotiated { export: Arc::new(Zeros), reply_mode, contexts: Vec::new() };
        let limits = TransmitLimits::new(Budget::new(0, 0));
        let mut connection = Connection::new(server, chosen, &limits);
        let mut begun = 0;
        for number in 0..10_000 {
            connection.update_readahead(Span { offset: number * 65_536, length: 65_536 });
            begun += u32::from(
                connection.readahead_task.as_ref().is_some_and(|task| !task.is_finished()),
            );
            tokio::task::yield_now().await;
        }
        assert!(begun > 100, "{begun}");
        assert!(connection.tasks.len() <= 2, "{}", connection.tasks.len());
    }
}
