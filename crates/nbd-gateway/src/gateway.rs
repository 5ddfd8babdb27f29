//! The gateway: its parts, and its life from bound sockets to graceful shutdown.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use nbd_server::ExportCatalog;
use nbd_server::budget::Budget;
use rustls::pki_types::UnixTime;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accept::Acceptor;
use crate::access::Timestamp;
use crate::admission::AdmissionControl;
use crate::admission::slots::Slots;
use crate::config::Config;
use crate::control::Control;
use crate::listen::{BoundSocket, ListenAddress, Listener, StdioConnection};
use crate::observer::Observer;
use crate::policy::{ActivePolicy, Policy};
use crate::registry::ConnectionRegistry;
use crate::session::Sessions;
use crate::stats::{GatewayPhase, Stats};
use crate::tls::{ExpiryWarning, ExpiryWatch, ServerTls};

/// A gateway whose sockets are bound.
#[derive(Debug)]
pub struct Gateway<X> {
    listeners: Vec<Listener>,
    admission: Arc<AdmissionControl>,
    sessions: Arc<Sessions<X>>,
    control: Control<X>,
    shutdown_timeout: Duration,
}

/// Accepting connections ended although no shutdown was requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("internal error: a task that accepts or reviews connections ended unexpectedly")]
pub struct AcceptLoopFailed;

impl<X: ExportCatalog> Gateway<X> {
    /// Creates a gateway from sockets bound by [`listen::bind_all`](crate::listen::bind_all).
    /// Clients wait until [`Gateway::run`]. Call it within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't watch a socket, or no thread can be created.
    pub fn new(
        sockets: Vec<BoundSocket>,
        config: Config,
        policy: Policy,
        exports: X,
    ) -> io::Result<Self> {
        let listeners = sockets.into_iter().map(Listener::new).collect::<io::Result<Vec<_>>>()?;
        let addresses = listeners.iter().map(Listener::local_address);
        let listen = addresses.map(|at| Ok(at?.to_string())).collect::<io::Result<_>>()?;

        let limits = &config.limits;
        let policy = Arc::new(ActivePolicy::new(policy));
        let exports = Arc::new(ArcSwap::from_pointee(exports));
        let registry = Arc::new(ConnectionRegistry::default());
        let slots = Arc::new(Slots::new(limits));
        let budget = Budget::new(limits.in_flight, limits.in_flight_per_connection);
        let stats = Arc::new(Stats::new(listen));
        let observer = Arc::new(Observer::new(config.audit.clone(), Arc::clone(&stats)));
        let admission = AdmissionControl::new(
            &config,
            Arc::clone(&policy),
            Arc::clone(&slots),
            Arc::clone(&observer),
        );
        let sessions = Sessions::new(
            &config,
            Arc::clone(&policy),
            Arc::clone(&exports),
            Arc::clone(&registry),
            Arc::clone(&slots),
            Arc::clone(&budget),
            observer,
        )?;
        Ok(Self {
            listeners,
            admission: Arc::new(admission),
            sessions: Arc::new(sessions),
            control: Control { policy, exports, registry, slots, budget, stats },
            shutdown_timeout: config.timeouts.shutdown,
        })
    }

    /// Returns the listening addresses, with actual ports.
    ///
    /// # Errors
    /// An address can't be queried.
    pub fn addresses(&self) -> io::Result<Vec<ListenAddress>> {
        self.listeners.iter().map(Listener::local_address).collect()
    }

    /// Returns a handle for reconfiguring and querying the gateway while it runs.
    pub fn control(&self) -> Control<X> {
        self.control.clone()
    }

    /// Serves until `shutdown` is cancelled, then drains each connection: accepted requests are
    /// answered ([`transmit`](nbd_server::transmit)) and the connection is closed, both within the
    /// shutdown timeout.
    ///
    /// # Errors
    /// [`AcceptLoopFailed`] if accepting connections ended before `shutdown` was cancelled.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), AcceptLoopFailed> {
        let listeners = std::mem::take(&mut self.listeners);
        let acceptor = self.start(&shutdown);
        let mut accept_loops = JoinSet::new();
        for listener in listeners {
            accept_loops.spawn(acceptor.clone().accept_all(listener));
        }
        let mut review = self.spawn_review();
        let mut is_sound = true;
        loop {
            tokio::select! {
                ended = accept_loops.join_next() => if ended.is_none() { break },
                Some(_) = review.join_next() => {}
            }
            // Before a shutdown these tasks end only if they panic. Exiting, to be restarted, is
            // better than accepting no connections, or letting clients stay that are no longer
            // authorized.
            is_sound &= shutdown.is_cancelled();
            shutdown.cancel();
        }
        self.drain(&acceptor.connections).await;
        if is_sound { Ok(()) } else { Err(AcceptLoopFailed) }
    }

    /// Serves a single connection until it ends. It passes the same admission as any other, and its
    /// outcome is logged. `shutdown` works as for [`Gateway::run`]; no other connection is
    /// accepted.
    ///
    /// # Errors
    /// The runtime can't watch the connection.
    pub async fn run_one(
        self,
        connection: StdioConnection,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let acceptor = self.start(&shutdown);
        let connections = &acceptor.connections;
        acceptor.admit(connection.incoming()?);
        connections.close();
        let mut review = self.spawn_review();
        tokio::select! {
            () = connections.wait() => return Ok(()),
            () = shutdown.cancelled() => {}
            // The review task panicked, and clients that are no longer authorized must not stay.
            Some(_) = review.join_next() => shutdown.cancel(),
        }
        self.drain(connections).await;
        Ok(())
    }

    fn start(&self, shutdown: &CancellationToken) -> Acceptor<X> {
        self.control.stats.heartbeat.beat();
        self.control.stats.set_phase(GatewayPhase::Serving);
        Acceptor {
            admission: Arc::clone(&self.admission),
            sessions: Arc::clone(&self.sessions),
            connections: TaskTracker::new(),
            shutdown: shutdown.clone(),
        }
    }

    /// Spawns the task that reviews connections: certificates expire, and rules may be limited to
    /// certain hours. Dropping the set aborts it.
    fn spawn_review(&self) -> JoinSet<()> {
        let Control { policy, registry, stats, .. } = self.control.clone();
        let mut review = JoinSet::new();
        review.spawn(review_periodically(policy, registry, stats));
        review
    }

    /// Waits for open connections to drain, up to the shutdown timeout, then drops the rest.
    async fn drain(&self, connections: &TaskTracker) {
        /// Time for dropped connections to log their end.
        const TO_LOG: Duration = Duration::from_secs(1);
        self.control.stats.set_phase(GatewayPhase::Draining);
        connections.close();
        if tokio::time::timeout(self.shutdown_timeout, connections.wait()).await.is_err() {
            // Idle clients are not counted: their requests are answered, they just don't
            // disconnect.
            let busy = self.control.registry.busy_count();
            if busy > 0 {
                tracing::warn!(
                    reason = "shutdown_deadline",
                    connections = busy,
                    "shutdown deadline reached: dropping connections with requests in flight",
                );
            }
            self.sessions.shutdown_deadline.cancel();
            tokio::time::timeout(TO_LOG, connections.wait()).await.unwrap_or_default();
        }
    }
}

/// Reviews all connections every 500 ms, since authorization may depend on the time. Also updates
/// the heartbeat, and warns when the server's certificate expires.
async fn review_periodically(
    policy: Arc<ActivePolicy>,
    registry: Arc<ConnectionRegistry>,
    stats: Arc<Stats>,
) {
    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut certificate = ExpiryWatch::default();
    loop {
        ticks.tick().await;
        stats.heartbeat.beat();
        let active = policy.load();
        let expires = active.policy.tls.as_ref().and_then(|tls| tls.expiry().certificate);
        log_certificate_expiry(certificate.check(expires, UnixTime::now()));
        let has_certificates =
            active.policy.tls.as_ref().is_some_and(ServerTls::requests_certificates);
        if has_certificates || active.policy.rules.depend_on_time() {
            registry.review(&active, Timestamp::now());
        }
    }
}

/// Logs the expiry of the server's certificate.
fn log_certificate_expiry(warning: Option<ExpiryWarning>) {
    let Some(warning) = warning else { return };
    let reason = warning.reason();
    match warning {
        ExpiryWarning::Soon(seconds) => {
            let left = humantime::format_duration(Duration::from_secs(seconds / 60 * 60));
            tracing::warn!(
                reason,
                "the server's certificate expires in {left}: replace it and reload",
            );
        }
        ExpiryWarning::Expired => tracing::error!(
            reason,
            "the server's certificate has expired and clients reject it: replace it and reload",
        ),
    }
}
