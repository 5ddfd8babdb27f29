//! The whole session of one client in a single call.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use super::budget::Budget;
use super::{
    Exports, NegotiationLimits, Security, SessionError, SessionStats, Throttle, TransmitLimits,
    greet, negotiate, transmit,
};

/// Limits and deadlines of [`handle_client_with`].
///
/// All clients of a server should be served with the same value, or with clones of it, so that they
/// share the memory budget.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Memory budget for replies. Clones share it.
    pub budget: Arc<Budget>,
    /// Limits on the options that a client may send.
    pub negotiation: NegotiationLimits,
    /// Time that a client has to choose an export, from the greeting on.
    pub negotiation_timeout: Duration,
    /// Rate limit. Clones share it.
    pub throttle: Option<Arc<Throttle>>,
    /// Time that a client may send no requests while none are in flight; `None` means unlimited.
    pub idle_timeout: Option<Duration>,
    /// Time for which a client that holds memory others are waiting for may stop reading.
    pub stall_timeout: Duration,
    /// Time that a client has to make progress in reading its last replies.
    pub drain_timeout: Duration,
}

impl SessionOptions {
    /// Creates options with the given budget, 30 seconds for negotiation, stall and drain timeouts
    /// of 10 seconds, the default [`NegotiationLimits`], no rate limit and no idle timeout.
    pub fn new(budget: Arc<Budget>) -> Self {
        let TransmitLimits { budget, throttle, idle, stall, drain, metrics: _ } =
            TransmitLimits::new(budget);
        Self {
            budget,
            negotiation: NegotiationLimits::default(),
            negotiation_timeout: Duration::from_secs(30),
            throttle,
            idle_timeout: idle,
            stall_timeout: stall,
            drain_timeout: drain,
        }
    }

    /// Returns the limits of one client's transmission phase, with counters of its own.
    fn transmit_limits(&self) -> TransmitLimits {
        TransmitLimits {
            budget: Arc::clone(&self.budget),
            throttle: self.throttle.clone(),
            idle: self.idle_timeout,
            stall: self.stall_timeout,
            drain: self.drain_timeout,
            metrics: Arc::default(),
        }
    }
}

impl Default for SessionOptions {
    /// Returns the options described at [`SessionOptions::new`] with a budget of 64 MiB, of which
    /// one client may hold 16 MiB.
    fn default() -> Self {
        const MIB: u32 = 1024 * 1024;
        Self::new(Budget::new(64 * MIB, 16 * MIB))
    }
}

/// Serves one client from the greeting until it leaves, without TLS and with the default
/// [`SessionOptions`].
///
/// Returns the statistics of the session, or `None` if the client left without choosing an export,
/// as one that only lists them does.
///
/// Each call has a memory budget of its own. A server whose clients are to share one, or that has
/// to be shut down gracefully, uses [`handle_client_with`]. TCP streams should have Nagle's
/// algorithm disabled (`TCP_NODELAY`).
///
/// ```no_run
/// # async fn example() -> std::io::Result<()> {
/// use nbd_server::{BytesExport, ExportSet, handle_client};
///
/// let exports = ExportSet::single(BytesExport::new("disk", vec![0; 1024 * 1024]));
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:10809").await?;
/// loop {
///     let (stream, _) = listener.accept().await?;
///     stream.set_nodelay(true)?;
///     let exports = exports.clone();
///     tokio::spawn(async move { handle_client(stream, &exports).await });
/// }
/// # }
/// ```
///
/// # Errors
/// The stream failed, the client broke the protocol, or it exceeded a limit or deadline.
pub async fn handle_client<S, X>(
    stream: S,
    exports: &X,
) -> Result<Option<SessionStats>, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    X: Exports,
{
    handle_client_with(stream, exports, &SessionOptions::default(), std::future::pending()).await
}

/// Serves one client like [`handle_client`], with explicit `options`, until it leaves or `shutdown`
/// completes.
///
/// At shutdown, a client in the transmission phase receives the replies to all requests in flight
/// (see [`transmit()`]). One that is still negotiating is disconnected, and `None` is returned.
///
/// Dropping the future closes the stream without draining replies in flight. It leaves no tasks
/// behind.
///
/// # Errors
/// The stream failed, the client broke the protocol, or it exceeded a limit or deadline.
pub async fn handle_client_with<S, X>(
    mut stream: S,
    exports: &X,
    options: &SessionOptions,
    shutdown: impl Future<Output = ()>,
) -> Result<Option<SessionStats>, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    X: Exports,
{
    let mut shutdown = pin!(shutdown);
    let negotiation = async {
        let flags = greet(&mut stream).await?;
        let mut quota = options.negotiation.quota();
        negotiate(&mut stream, flags, Security::Plain, exports, &mut quota).await
    };
    let negotiated = tokio::select! {
        biased;
        () = &mut shutdown => return Ok(None),
        negotiated = tokio::time::timeout(options.negotiation_timeout, negotiation) => {
            negotiated.map_err(|_| SessionError::NegotiationTimeout)??
        }
    };
    let Some(negotiated) = negotiated else { return Ok(None) };
    transmit(stream, negotiated, &options.transmit_limits(), shutdown).await.map(Some)
}
