//! The front end: who comes in, by which socket, for how long, and how it all ends.
//!
//! A connection's way is accept → [`access`] → a slot → `connection.rs`, where TLS
//! ([`tls`]) and the engine ([`crate::nbd`]) take over.

pub mod access;
mod connection;
pub mod listen;
mod slots;
pub mod tls;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::config::Config;
use crate::limited::RateLimit;
use crate::nbd::budget::Budget;
use crate::nbd::{Exports, TransmitLimits};
use access::{Peer, Reason};
use listen::{AcceptFault, Incoming, ListenAddress, Listener};
use slots::{Place, Slots};

/// A gateway that listens.
#[derive(Debug)]
pub struct Gateway<X> {
    listeners: Vec<Listener>,
    shared: Arc<Shared<X>>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared<X> {
    config: Config,
    exports: X,
    tls: Option<Tls>,
    slots: Slots,
    transmit_limits: TransmitLimits,
    next_connection: AtomicU64,
    chatter: Chatter,
}

/// Log lines about connections, of which peers can cause as many as they like. Those who
/// are refused can't use up the lines of those who are served.
#[derive(Debug)]
struct Chatter {
    refusals: RateLimit,
    failures: RateLimit,
    sessions: RateLimit,
}

impl Chatter {
    fn new() -> Self {
        let limit = || RateLimit::new(100, Duration::from_millis(100));
        Self { refusals: limit(), failures: limit(), sessions: limit() }
    }
}

struct Tls(TlsAcceptor);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls(…)")
    }
}

impl<X: Exports + 'static> Gateway<X> {
    /// Binds the sockets. Clients that connect from now on wait until [`Gateway::run`].
    ///
    /// # Errors
    /// A socket can't be bound.
    pub fn bind(
        config: Config,
        tls: Option<Arc<ServerConfig>>,
        exports: X,
    ) -> Result<Self, listen::BindError> {
        let listeners = listen::bind_all(&config.listen, config.access.is_loopback_only())?;
        let shared = Shared {
            tls: tls.map(|config| Tls(TlsAcceptor::from(config))),
            slots: Slots::new(&config.limits),
            transmit_limits: TransmitLimits {
                budget: Budget::new(config.limits.in_flight),
                stall: config.timeouts.stall,
                drain: config.timeouts.stall,
            },
            next_connection: AtomicU64::new(1),
            chatter: Chatter::new(),
            exports,
            config,
        };
        Ok(Self { listeners, shared: Arc::new(shared) })
    }

    /// Where it listens, with real ports.
    ///
    /// # Errors
    /// The system can't say.
    pub fn addresses(&self) -> io::Result<Vec<ListenAddress>> {
        self.listeners.iter().map(Listener::local_address).collect()
    }

    /// Serves until `shutdown` is cancelled; then lets requests that have come in be
    /// answered, for no longer than the shutdown timeout.
    ///
    /// # Errors
    /// [`DoorClosed`] if accepting connections ended before that.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), DoorClosed> {
        let connections = TaskTracker::new();
        let mut doors = JoinSet::new();
        for listener in self.listeners {
            let shared = Arc::clone(&self.shared);
            doors.spawn(accept(listener, shared, connections.clone(), shutdown.clone()));
        }
        let mut is_sound = true;
        while doors.join_next().await.is_some() {
            // A door closes by itself only if its task has panicked. Better to end, and be
            // started again, than to be deaf.
            is_sound &= shutdown.is_cancelled();
            shutdown.cancel();
        }

        connections.close();
        let deadline = self.shared.config.timeouts.shutdown;
        if tokio::time::timeout(deadline, connections.wait()).await.is_err() {
            tracing::warn!(
                connections = connections.len(),
                "clients were still busy at the shutdown deadline and are dropped",
            );
        }
        if is_sound { Ok(()) } else { Err(DoorClosed) }
    }
}

/// Accepting connections ended though nobody had asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("accepting connections failed; this is a fault of this program")]
pub struct DoorClosed;

/// Accepts on one socket until the end.
async fn accept<X: Exports + 'static>(
    listener: Listener,
    shared: Arc<Shared<X>>,
    connections: TaskTracker,
    shutdown: CancellationToken,
) {
    /// Long enough for clients to leave, short enough for others not to notice.
    const PAUSE: Duration = Duration::from_millis(100);
    let faults = RateLimit::new(3, Duration::from_secs(10));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(incoming) => admit(incoming, &shared, &connections, &shutdown),
            Err(error) => match AcceptFault::of(&error) {
                AcceptFault::Connection => {}
                AcceptFault::Shortage | AcceptFault::Listener => {
                    if let Some(held_back) = faults.allow() {
                        tracing::error!(
                            held_back = held_back.field(),
                            "can't accept connections: {error}"
                        );
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
}

/// Lets a connection in, or closes it before a byte is sent.
fn admit<X: Exports + 'static>(
    incoming: Incoming,
    shared: &Arc<Shared<X>>,
    connections: &TaskTracker,
    shutdown: &CancellationToken,
) {
    let peer = incoming.peer();
    let (reason, slot) = match judge(peer, shared) {
        Ok(admitted) => admitted,
        Err(refusal) => {
            if let Some(held_back) = shared.chatter.refusals.allow() {
                tracing::warn!(%peer, held_back = held_back.field(), "refused: {refusal}");
            }
            return;
        }
    };
    let id = shared.next_connection.fetch_add(1, Ordering::Relaxed);
    let span = tracing::info_span!("connection", id, %peer);
    span.in_scope(|| tracing::debug!("accepted: {reason}"));

    let shared = Arc::clone(shared);
    let shutdown = shutdown.clone();
    let serve = async move {
        match incoming {
            Incoming::Tcp(stream, _) => {
                if let Err(error) = listen::tune(&stream) {
                    tracing::debug!("the connection is gone already: {error}");
                    return;
                }
                connection::serve(stream, slot, &shared, &shutdown).await;
            }
            Incoming::Unix(stream) => connection::serve(stream, slot, &shared, &shutdown).await,
        }
    };
    connections.spawn(serve.instrument(span));
}

/// Why a connection is closed at once.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Access(Reason),
    #[error("it is on another machine, and there is no TLS")]
    NotLocal,
    #[error("{0}")]
    Full(#[from] slots::Full),
}

fn judge<X>(peer: Peer, shared: &Shared<X>) -> Result<(Reason, Place), Refusal> {
    let reason = shared.config.access.judge(peer).map_err(Refusal::Access)?;
    // The settings were checked for this; a client that got here by some other way, such
    // as an address that was added to the machine later, is refused all the same.
    if shared.tls.is_none() && !shared.config.insecure_no_tls && !peer.is_local() {
        return Err(Refusal::NotLocal);
    }
    Ok((reason, shared.slots.handshake(peer)?))
}
