//! The transmission phase ("Transmission"): many requests in flight, answered in the order in which
//! their replies become ready.
//!
//! Each connection is one task ([`connection`]). It reads requests and validates each of them into
//! an action ([`request_reader`]). Replies that need no waiting are written to a queue immediately
//! ([`reply_encoder`], [`send_queue`]). All other requests are processed in tasks of their own
//! ([`worker`], [`assembly`]), which return their replies through a channel. For clients that read
//! sequentially, data is read ahead ([`readahead`]). The queue is sent ([`reply_writer`]) when no
//! more requests have arrived or enough bytes are queued, so requests that arrived together are
//! answered together.

mod assembly;
mod connection;
mod metrics;
mod readahead;
mod reply_encoder;
mod reply_writer;
mod request_reader;
mod send_queue;
mod worker;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use super::budget::Budget;
use super::{Export, Negotiated, SessionError, SessionMetrics, Throttle};
use connection::Connection;

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

/// Serves the negotiated export until the client leaves or `shutdown` completes.
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
    negotiated: Negotiated<E>,
    limits: &TransmitLimits,
    shutdown: impl Future<Output = ()>,
) -> Result<SessionStats, SessionError>
where
    S: AsyncRead + AsyncWrite,
    E: Export,
{
    Connection::new(stream, negotiated, limits).run(limits.drain, pin!(shutdown)).await
}
