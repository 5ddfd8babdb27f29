//! The transmission phase ("Transmission"): many requests in flight, answered in the order in which
//! their replies become ready.
//!
//! Each connection is one task. It reads requests ([`request_reader`]) and validates each of them
//! ([`action`]). Replies that need no waiting are written to a queue immediately ([`dispatch`],
//! [`reply_encoder`], [`send_queue`]). All other requests are processed in tasks of their own
//! ([`worker`]), which return their replies through a channel. For clients that read sequentially,
//! data is read ahead ([`readahead`]). The queue is sent ([`reply_writer`]) when no more requests
//! have arrived or enough bytes are queued, so requests that arrived together are answered
//! together.

mod action;
mod assembly;
mod batch;
mod chunks;
mod dispatch;
mod drain;
mod readahead;
mod reply_encoder;
mod reply_guard;
mod reply_writer;
mod request_reader;
mod send_queue;
mod stall;
mod throttled;
mod worker;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::budget::{Budget, ConnectionBudget};
use super::{Export, Negotiated, Segment, SelectedContext, SessionError, SessionMetrics, Throttle};
use action::NegotiatedParams;
use batch::RequestBatch;
use readahead::Readahead;
use reply_writer::ReplyWriter;
use request_reader::RequestReader;
use send_queue::SendQueue;
use throttled::ThrottledRequest;
use worker::{StatusQuery, Worker};

/// Maximum number of requests in flight on one connection: being processed, or answered but not
/// fully sent. The Linux client keeps 128 in flight, others fewer.
const MAX_REQUESTS_IN_FLIGHT: u64 = 256;

/// Time that a client has to close the connection after the server decided to end the session.
const LINGER: Duration = Duration::from_secs(1);

/// Resource limits of one connection.
#[derive(Debug, Clone)]
pub struct TransmitLimits {
    /// Memory budget for replies, shared with all other connections.
    pub budget: Arc<Budget>,
    /// Rate limit of the client, shared with its other connections. While a request waits for it,
    /// nothing more is read from the stream.
    pub throttle: Option<Arc<Throttle>>,
    /// Idle timeout: time that a client may send no requests while none are in flight.
    pub idle: Option<Duration>,
    /// Stall timeout: time for which a client that holds memory others are waiting for may stop
    /// reading.
    pub stall: Duration,
    /// Drain timeout: time that a client has to make progress in reading its last replies.
    pub drain: Duration,
    /// Counters to which the session reports. They should not be shared with other connections.
    pub metrics: Arc<SessionMetrics>,
}

impl TransmitLimits {
    /// Creates limits with a share of `budget` and stall and drain timeouts of ten seconds;
    /// nothing else is limited.
    pub fn new(budget: Arc<Budget>) -> Self {
        const PATIENCE: Duration = Duration::from_secs(10);
        let metrics = Arc::default();
        Self { budget, throttle: None, idle: None, stall: PATIENCE, drain: PATIENCE, metrics }
    }
}

/// Reason why transmission ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// The client sent `NBD_CMD_DISC`.
    Disconnected,
    /// The client closed the stream between two requests.
    StreamClosed,
    /// The client sent no requests for longer than the idle timeout.
    IdleTimeout,
    /// The server is shutting down.
    ShutDown,
}

/// Statistics of a finished transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionStats {
    /// Reason why it ended.
    pub close_reason: CloseReason,
    /// Number of requests received.
    pub requests: u64,
    /// Total length of the valid reads among them, in bytes.
    pub bytes: u64,
    /// Number of requests whose replies could not be sent completely, because the stream failed or
    /// the client stopped reading while the server was shutting down.
    pub unanswered: u64,
}

/// Serves the chosen export until the client leaves or `shutdown` completes.
///
/// Every accepted request is answered, and the replies are sent, before the stream is shut down
/// (TLS with it) and this returns. A request is accepted once it has been read from the stream,
/// payload included, and the rate limit has admitted it.
///
/// When `shutdown` completes, nothing more is read from the stream, which then ends between two
/// replies. Requests that were not accepted get no reply, not even `NBD_ESHUTDOWN`: a client that
/// reconnects repeats them, whereas an error would be reported to the user of the disk.
///
/// # Errors
/// The stream failed, or the client broke the protocol or exceeded its limits.
pub async fn transmit<S, E>(
    stream: S,
    chosen: Negotiated<E>,
    limits: &TransmitLimits,
    shutdown: impl Future<Output = ()>,
) -> Result<SessionStats, SessionError>
where
    S: AsyncRead + AsyncWrite,
    E: Export,
{
    let mut connection = Connection::new(stream, chosen, limits);
    let mut served = connection.serve(pin!(shutdown)).await;
    let is_shutdown = matches!(served, Ok(CloseReason::ShutDown));
    if is_shutdown {
        served = connection.handle_buffered_requests(limits.drain).await;
    }
    connection.publish_metrics();
    // Requests that preceded a protocol violation or the end of the stream are still answered. If
    // the stream has failed, this ends immediately.
    let drained = match served {
        Err(SessionError::Stalled) => Ok(()),
        _ => connection.drain(limits.drain).await,
    };
    connection.publish_metrics();
    let ended = served.and_then(|close_reason| drained.map(|()| close_reason));
    let close_reason = match ended {
        // The server initiated the end, so it is no failure that the client left or stopped reading
        // in the meantime.
        Err(SessionError::Io(_) | SessionError::Stalled | SessionError::DrainTimeout)
            if is_shutdown =>
        {
            return Ok(connection.stats(CloseReason::ShutDown));
        }
        ended => ended?,
    };
    let linger = match close_reason {
        CloseReason::StreamClosed => Duration::ZERO,
        CloseReason::Disconnected => limits.drain,
        CloseReason::IdleTimeout | CloseReason::ShutDown => LINGER.min(limits.drain),
    };
    // If the client does not close in time, the server does; that is not an error.
    tokio::time::timeout(linger, connection.reader.discard()).await.unwrap_or_default();
    Ok(connection.stats(close_reason))
}

/// State of one client's connection in the transmission phase.
struct Connection<S, E> {
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
    /// Number of requests received, and total length of the valid reads among them, in bytes.
    requests: u64,
    bytes: u64,
    /// Buffer for the segments of an immediate read; reused to avoid an allocation for each read.
    segments: Vec<Segment>,
    throttle: Option<Arc<Throttle>>,
    /// Request that is waiting for the rate limit.
    throttled: Option<ThrottledRequest>,
    idle: Option<Duration>,
    batch: RequestBatch,
}

impl<S: AsyncRead + AsyncWrite, E: Export> Connection<S, E> {
    fn new(stream: S, chosen: Negotiated<E>, limits: &TransmitLimits) -> Self {
        let Negotiated { export, reply_mode: mode, contexts } = chosen;
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
            requests: 0,
            bytes: 0,
            segments: Vec::new(),
            throttle: limits.throttle.clone(),
            throttled: None,
            idle: limits.idle,
            batch: RequestBatch::new(Arc::clone(&limits.metrics)),
        }
    }

    fn stats(&self, close_reason: CloseReason) -> SessionStats {
        let unanswered = self.in_flight();
        SessionStats { close_reason, requests: self.requests, bytes: self.bytes, unanswered }
    }

    /// Reads and handles requests until the session ends.
    async fn serve(
        &mut self,
        mut shutdown: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<CloseReason, SessionError> {
        loop {
            self.batch.metrics.set_in_flight(self.in_flight());
            let can_accept_request = self.can_accept_request();
            let is_idle = self.is_idle();
            tokio::select! {
                biased;
                () = &mut shutdown => return Ok(CloseReason::ShutDown),
                request = self.reader.next_request(), if can_accept_request => {
                    let Some(request) = request? else { return Ok(CloseReason::StreamClosed) };
                    self.batch.arrived = Instant::now();
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
                (request, arrived) = throttled::admitted(&mut self.throttled),
                    if self.throttled.is_some() =>
                {
                    self.batch.arrived = arrived;
                    self.batch.metrics.add_throttled(arrived.elapsed());
                    if let Some(close_reason) = self.accept_request(&request)? {
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
        self.batch.publish();
        self.batch.metrics.set_in_flight(self.in_flight());
    }

    /// Returns the number of requests that have not been answered completely.
    fn in_flight(&self) -> u64 {
        self.requests - self.writer.answered()
    }
}

/// Sleeps for `time`; never completes if there is none.
async fn sleep_or_pend(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}
