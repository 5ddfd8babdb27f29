//! The task of one connection: it reads requests, answers them or starts tasks that do, and sends
//! the replies, until the session ends.
//!
//! [`Connection::serve`] is the main loop. [`Connection::accept_request`] dispatches each request;
//! tasks return their replies to the loop through a channel. [`Connection::run`] also drains and
//! closes the connection at the end.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::metrics::ConnectionMetrics;
use super::readahead::{Readahead, ReadaheadHint};
use super::reply_encoder::ReplyEncoder;
use super::reply_writer::ReplyWriter;
use super::request_reader::{
    Action, BAD_STATUS_PAYLOAD, NegotiatedParams, RequestReader, validate, validate_status_range,
};
use super::send_queue::SendQueue;
use super::worker::{
    DATA_MISMATCH, Job, MAX_PIECE, ReplyGuard, StatusQuery, Worker, decode_status_payload,
};
use super::{CloseReason, SessionStats, TransmitLimits};
use crate::budget::ConnectionBudget;
use crate::error::Refusal;
use crate::wire::MAX_PAYLOAD;
use crate::wire::request::Request;
use crate::{Export, Negotiated, Segment, SelectedContext, SessionError, Span, Throttle};

/// Maximum number of requests in flight on one connection: being processed, or answered but not
/// fully sent. The Linux client keeps 128 in flight, others fewer.
const MAX_REQUESTS_IN_FLIGHT: u64 = 256;

/// Time that a client has to close the connection after the server decided to end the session.
const LINGER: Duration = Duration::from_secs(1);

/// State of one client's connection in the transmission phase.
pub(super) struct Connection<S, E> {
    export: Arc<E>,
    params: NegotiatedParams,
    contexts: Vec<SelectedContext>,
    reader: RequestReader<ReadHalf<S>>,
    writer: ReplyWriter<WriteHalf<S>>,
    budget: Arc<ConnectionBudget>,
    worker: Arc<Worker<E>>,
    /// Tasks of requests that have to wait, and of readahead. They are canceled when the
    /// connection is dropped.
    tasks: JoinSet<()>,
    readahead: Readahead,
    /// The running readahead task, if any.
    readahead_task: Option<AbortHandle>,
    /// Channel through which `tasks` return replies.
    reply_sender: mpsc::UnboundedSender<SendQueue>,
    reply_receiver: mpsc::UnboundedReceiver<SendQueue>,
    /// Buffer for the segments of an immediate read; reused to avoid an allocation for each read.
    segments: Vec<Segment>,
    throttle: Option<Arc<Throttle>>,
    /// Request that is waiting for the rate limit.
    throttled: Option<ThrottledRequest>,
    idle: Option<Duration>,
    metrics: ConnectionMetrics,
}

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    pub(super) fn new(stream: S, negotiated: Negotiated<E>, limits: &TransmitLimits) -> Self {
        let Negotiated { export, reply_mode: mode, contexts } = negotiated;
        let (reader, writer) = tokio::io::split(stream);
        let budget = Arc::new(ConnectionBudget::new(Arc::clone(&limits.budget)));
        let (reply_sender, reply_receiver) = mpsc::unbounded_channel();
        let params =
            NegotiatedParams { size: export.size(), mode, has_contexts: !contexts.is_empty() };
        Self {
            reader: RequestReader::new(reader, mode, StatusQuery::max_payload(&contexts)),
            writer: ReplyWriter::new(writer, Arc::clone(&budget), limits.stall),
            worker: Arc::new(Worker::new(Arc::clone(&export), Arc::clone(&budget))),
            tasks: JoinSet::new(),
            readahead: Readahead::default(),
            readahead_task: None,
            export,
            params,
            contexts,
            budget,
            reply_sender,
            reply_receiver,
            segments: Vec::new(),
            throttle: limits.throttle.clone(),
            throttled: None,
            idle: limits.idle,
            metrics: ConnectionMetrics::new(Arc::clone(&limits.metrics)),
        }
    }

    /// Serves the client until it leaves or `shutdown` completes, then drains and closes the
    /// stream. The client must make progress in reading its last replies within `drain_timeout`.
    pub(super) async fn run(
        mut self,
        drain_timeout: Duration,
        shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<SessionStats, SessionError> {
        let mut served = self.serve(shutdown).await;
        let is_shutdown = matches!(served, Ok(CloseReason::ShutDown));
        if is_shutdown {
            served = self.handle_buffered_requests(drain_timeout).await;
        }
        self.publish_metrics();
        // Requests that preceded a protocol violation or the end of the stream are still answered.
        // If the stream has failed, this ends immediately.
        let drained = match served {
            Err(SessionError::Stalled) => Ok(()),
            _ => self.drain(drain_timeout).await,
        };
        self.publish_metrics();
        let ended = served.and_then(|close_reason| drained.map(|()| close_reason));
        let close_reason = match ended {
            // The server initiated the end, so it is no failure that the client left or stopped
            // reading in the meantime.
            Err(SessionError::Io(_) | SessionError::Stalled | SessionError::DrainTimeout)
                if is_shutdown =>
            {
                return Ok(self.stats(CloseReason::ShutDown));
            }
            ended => ended?,
        };
        let linger = match close_reason {
            CloseReason::StreamClosed => Duration::ZERO,
            CloseReason::Disconnected => drain_timeout,
            CloseReason::IdleTimeout | CloseReason::ShutDown => LINGER.min(drain_timeout),
        };
        // If the client does not close in time, the server does; that is not an error.
        tokio::time::timeout(linger, self.reader.discard()).await.unwrap_or_default();
        Ok(self.stats(close_reason))
    }

    fn stats(&self, close_reason: CloseReason) -> SessionStats {
        let unanswered = self.in_flight();
        SessionStats {
            close_reason,
            requests: self.metrics.requests(),
            bytes: self.metrics.requested_bytes(),
            unanswered,
        }
    }

    /// Reads and handles requests until the session ends.
    async fn serve(
        &mut self,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<CloseReason, SessionError> {
        loop {
            self.metrics.publish_in_flight(self.in_flight());
            let can_accept_request = self.can_accept_request();
            let is_idle = self.is_idle();
            tokio::select! {
                biased;
                () = &mut shutdown => return Ok(CloseReason::ShutDown),
                request = self.reader.next_request(), if can_accept_request => {
                    let Some(request) = request? else { return Ok(CloseReason::StreamClosed) };
                    self.metrics.arrived = Instant::now();
                    if let Some(close_reason) = self.handle_request(request)? {
                        return Ok(close_reason);
                    }
                    // Handles the rest of the batch from the buffer, without another system call.
                    while self.can_accept_request()
                        && let Some(request) = self.reader.buffered_request()?
                    {
                        if let Some(close_reason) = self.handle_request(request)? {
                            return Ok(close_reason);
                        }
                    }
                    self.publish_metrics();
                }
                admitted = admitted(&mut self.throttled), if self.throttled.is_some() => {
                    let AdmittedRequest { request, action, arrived } = admitted;
                    self.metrics.arrived = arrived;
                    self.metrics.count_throttled(arrived.elapsed());
                    if let Some(close_reason) = self.accept_request(&request, action)? {
                        return Ok(close_reason);
                    }
                    self.publish_metrics();
                }
                Some(reply) = self.reply_receiver.recv() => self.writer.queue.append(reply),
                sent = self.writer.send(), if !self.writer.is_empty() => sent?,
                () = sleep_or_pend(self.idle), if is_idle => return Ok(CloseReason::IdleTimeout),
            }
        }
    }

    /// Returns true if another request may be accepted.
    fn can_accept_request(&self) -> bool {
        self.in_flight() < MAX_REQUESTS_IN_FLIGHT
            && self.writer.has_room()
            && self.throttled.is_none()
    }

    /// Returns true if the idle timeout applies: nothing is in flight, so only a request from the
    /// client can cause progress. The timeout restarts whenever this becomes true; receiving a part
    /// of a request does not restart it.
    fn is_idle(&self) -> bool {
        self.idle.is_some()
            && self.in_flight() == 0
            && self.writer.is_empty()
            && self.throttled.is_none()
    }

    /// Publishes the metrics collected since the last call.
    fn publish_metrics(&mut self) {
        self.metrics.publish();
        self.metrics.publish_in_flight(self.in_flight());
    }

    /// Returns the number of requests that have not been answered completely.
    fn in_flight(&self) -> u64 {
        self.metrics.requests() - self.writer.answered()
    }
}

/// Dispatch of requests: each is answered immediately, or in a task of its own.
impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    /// Handles a request, or holds it until the rate limit admits it. Returns the reason to close
    /// if the client disconnects.
    fn handle_request(&mut self, request: Request) -> Result<Option<CloseReason>, SessionError> {
        let action = validate(&request, self.params);
        let Some(throttle) = &self.throttle else { return self.accept_request(&request, action) };
        let bytes = match action {
            // Requests that end the session are not subject to the rate limit.
            Action::Disconnect | Action::PayloadTooLarge(_) => {
                return self.accept_request(&request, action);
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
            return self.accept_request(&request, action);
        }
        let request = AdmittedRequest { request, action, arrived: self.metrics.arrived };
        self.throttled = Some(ThrottledRequest::new(request, bytes, throttle));
        Ok(None)
    }

    /// Answers a request, or starts a task that does. Returns the reason to close if the client
    /// disconnects.
    fn accept_request(
        &mut self,
        request: &Request,
        action: Action,
    ) -> Result<Option<CloseReason>, SessionError> {
        match action {
            Action::Disconnect => return Ok(Some(CloseReason::Disconnected)),
            Action::PayloadTooLarge(length) => return Err(SessionError::PayloadTooLarge(length)),
            _ => self.metrics.count_request(request),
        }
        let encoder = ReplyEncoder::new(request, self.params.mode);
        match action {
            Action::Read { span, whole } => {
                self.metrics.count_read(span.length);
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
                match self.status_query(offset, payload, single_extent) {
                    Ok(query) => self.spawn_job(encoder, Job::Status(query)),
                    Err(refusal) => self.refuse(encoder, &refusal),
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

    /// Takes the payload of a block status request, and validates it and the range.
    fn status_query(
        &mut self,
        offset: u64,
        payload: u32,
        single_extent: bool,
    ) -> Result<StatusQuery, Refusal> {
        let payload = self.reader.take_payload(payload).ok_or(BAD_STATUS_PAYLOAD)?;
        let (length, contexts) =
            decode_status_payload(&payload, &self.contexts).ok_or(BAD_STATUS_PAYLOAD)?;
        validate_status_range(offset, length, self.params.size)?;
        Ok(StatusQuery { offset, length, single_extent, contexts })
    }

    /// Answers a read immediately if its data is cached and memory for the reply is free.
    fn read(&mut self, encoder: ReplyEncoder, span: Span, whole: bool) {
        let job = Job::Read { span, whole };
        if span.length == 0 {
            self.metrics.count_answered_read(0);
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
            self.metrics.count_answered_read(0);
            return self.refuse(encoder, &DATA_MISMATCH);
        }
        self.metrics.count_answered_read(span.length);
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
            ReplyGuard::new(encoder, self.reply_sender.clone(), self.metrics.request_metrics(span));
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
        self.metrics.count_refusal(refusal);
        self.reply(|out| encoder.refuse(out, refusal));
    }
}

/// Graceful end of a connection from which no more requests are read.
impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    /// Handles the requests that had been read from the stream when the shutdown began: "On a
    /// server shutdown, the server SHOULD wait for inflight requests to be serviced prior to
    /// initiating a hard disconnect." The rest of that section ("MAY speed this process up by
    /// issuing error replies", `NBD_ESHUTDOWN`) is deliberately not used: clients that would
    /// reconnect report such an error to their users instead.
    ///
    /// A request delayed by the rate limit, and all requests after it, are not accepted: waiting
    /// for the limit would delay the client and the restart.
    async fn handle_buffered_requests(
        &mut self,
        timeout: Duration,
    ) -> Result<CloseReason, SessionError> {
        self.metrics.arrived = Instant::now();
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
    async fn drain(&mut self, timeout: Duration) -> Result<(), SessionError> {
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
        self.metrics.publish_in_flight(self.in_flight());
        match ended {
            Ok(done) => done,
            Err(_) if is_waiting_for_work || self.budget.sent() > before => Ok(()),
            Err(_) => Err(SessionError::DrainTimeout),
        }
    }
}

/// A request that the rate limit admits.
#[derive(Clone, Copy)]
struct AdmittedRequest {
    request: Request,
    action: Action,
    arrived: Instant,
}

/// A request that waits in the throttle's queue.
struct ThrottledRequest {
    request: AdmittedRequest,
    admission: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl ThrottledRequest {
    /// Enqueues a request that asks for `bytes` bytes.
    fn new(request: AdmittedRequest, bytes: u32, throttle: &Arc<Throttle>) -> Self {
        let throttle = Arc::clone(throttle);
        Self { request, admission: Box::pin(async move { throttle.acquire(bytes).await }) }
    }
}

/// Waits until the throttled request is admitted, and takes it. Never completes if no request is
/// throttled.
///
/// Cancel safe: the request keeps its position in the queue.
async fn admitted(throttled: &mut Option<ThrottledRequest>) -> AdmittedRequest {
    match throttled {
        Some(ThrottledRequest { admission, request }) => {
            admission.await;
            let admitted = *request;
            *throttled = None;
            admitted
        }
        None => pending().await,
    }
}

/// Sleeps for `time`; never completes if there is none.
async fn sleep_or_pend(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => pending().await,
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
