//! The network front end: listens, admits and authenticates clients, hands them to the NBD engine,
//! and shuts down gracefully.
//!
//! A connection is accepted and goes to `admission.rs`. There [`access`] checks its address, which
//! [`proxy`] reports behind a load balancer, and it gets a handshake permit. In `connection.rs`,
//! TLS ([`tls`]) and the engine ([`nbd_server`]) take over, both on the threads of `porch.rs` until
//! an export is chosen. `live.rs` keeps a registry of all open connections, so that a reloaded
//! `policy.rs` can be applied to them.

pub mod access;
mod admission;
pub mod audit;
pub mod config;
mod connection;
pub mod inherited;
pub mod listen;
mod live;
mod policy;
mod porch;
pub mod proxy;
mod rates;
mod reloads;
mod report;
mod slots;
pub mod stdio;
mod story;
mod throttles;
pub mod tls;
mod unix;
pub mod vsock;
mod watched;
pub mod zone;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use rustls::pki_types::UnixTime;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use access::Timestamp;
use admission::admit;
use listen::{AcceptFault, BoundSocket, ListenAddress, Listener};
use live::Connections;
use nbd_server::budget::Budget;
use nbd_server::{ExportCatalog, TransmitLimits};
pub use nbd_telemetry::Counts;
use nbd_telemetry::RateLimit;
use nbd_telemetry::Tally;
use policy::InForce;
pub use policy::Policy;
use porch::Porch;
use rates::Rates;
use reloads::Reloads;
pub use report::{
    ConnectionCounts, ConnectionReport, DurationHistogram, ExportReport, FAILURES, GatewayReport,
    MAX_LISTED, REFUSALS, ReloadsReport, TlsReport, unix_seconds,
};
use slots::Slots;
use stdio::StdioConnection;
use throttles::Throttles;
use tls::{Expiring, ExpiryWatch};

/// A gateway whose sockets are bound.
#[derive(Debug)]
pub struct Gateway<X> {
    listeners: Vec<Listener>,
    shared: Arc<Shared<X>>,
}

/// State shared by all connections.
#[derive(Debug)]
struct Shared<X> {
    config: Config,
    exports: ArcSwap<X>,
    policy: InForce,
    connections: Connections,
    slots: Slots,
    porch: Porch,
    rates: Rates,
    transmit_limits: TransmitLimits,
    throttles: Throttles,
    next_connection: AtomicU64,
    chatter: Chatter,
    /// Connections refused before a byte was sent, by reason.
    refusals: Tally,
    /// Connections that were admitted and failed later, by reason.
    failures: Tally,
    /// Failed TLS handshakes, by cause.
    handshake_failures: Tally,
    reloads: Reloads,
    /// Listening addresses, as text.
    listen: Vec<String>,
    phase: AtomicU8,
    /// Cancelled when the shutdown timeout expires; remaining connections are then dropped.
    deadline: CancellationToken,
    pulse: Pulse,
}

/// Phase of a gateway's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Serving,
    Ending,
}

/// Heartbeat of the serving threads, for the liveness check.
#[derive(Debug)]
struct Pulse {
    started: Instant,
    /// Time of the last beat, in milliseconds since `started`.
    last: AtomicU64,
}

impl Pulse {
    fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    fn since_heartbeat(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last)
    }
}

/// Rate limits on log lines that peers can cause at will. Refused peers have their own limit, so
/// they can't suppress the lines about clients that are served.
#[derive(Debug)]
struct Chatter {
    refusals: RateLimit,
    failures: RateLimit,
    sessions: RateLimit,
    /// Requests for exports that don't exist.
    lookups: RateLimit,
}

impl Chatter {
    fn new() -> Self {
        let limit = || RateLimit::new(100, Duration::from_millis(100));
        Self { refusals: limit(), failures: limit(), sessions: limit(), lookups: limit() }
    }
}

/// Logs something unless the rate limit suppresses it. `line` gets the number of lines suppressed
/// since the last one, if any.
fn tell(limit: &RateLimit, line: impl FnOnce(Option<u64>)) {
    if let Some(held_back) = limit.allow() {
        line(held_back.field());
    }
}

/// Handle for reconfiguring and querying a running gateway.
#[derive(Debug)]
pub struct Control<X>(Arc<Shared<X>>);

impl<X> Clone for Control<X> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<X: ExportCatalog> Control<X> {
    /// Replaces the policy atomically, for new and existing connections. Connections that are no
    /// longer authorized are dropped; returns their number.
    pub fn replace_policy(&self, policy: Policy) -> usize {
        self.0.policy.replace(policy);
        self.0.reloads.succeeded();
        self.0.review()
    }

    /// Replaces the policy before the exports that it is meant for are passed to
    /// [`Control::replace_exports`].
    ///
    /// Until then a client must also be allowed by the previous rules to open an export, because a
    /// name may come to mean a different archive.
    pub fn replace_policy_before_exports(&self, policy: Policy) -> usize {
        self.0.policy.replace_early(policy);
        self.0.reloads.succeeded();
        self.0.review()
    }

    /// Returns the number of the active policy: the number of policies that were active before it.
    pub fn policy_number(&self) -> u64 {
        self.0.policy.look(|it| it.number)
    }

    /// Records a failed reload and the reason for it.
    pub fn record_failed_reload(&self, why: &str) {
        self.0.reloads.failed(why);
    }

    /// Replaces the exports that clients can choose from. Clients that already read an export keep
    /// it.
    pub fn replace_exports(&self, exports: Arc<X>) {
        self.0.exports.store(exports);
        self.0.policy.exports_follow();
    }

    /// Returns the current exports.
    pub fn exports(&self) -> Arc<X> {
        self.0.exports.load_full()
    }

    /// Returns the number of clients that are reading an export.
    pub fn active_sessions(&self) -> usize {
        self.0.slots.sessions()
    }

    /// Returns the number of connections that were refused or failed, by reason.
    pub fn failure_counts(&self) -> Counts {
        self.0.refusals.so_far().and(self.0.failures.so_far())
    }

    /// Returns the number of failed TLS handshakes, by cause ([`tls::HandshakeFailureCause::label`]).
    pub fn handshake_failure_counts(&self) -> Counts {
        self.0.handshake_failures.so_far()
    }
}

impl<X> Shared<X> {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Starting,
            1 => Phase::Serving,
            _ => Phase::Ending,
        }
    }

    fn begin(&self) {
        self.pulse.beat();
        self.enter(Phase::Serving);
    }

    fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Reviews all connections against the active policy at the current time.
    fn review(&self) -> usize {
        self.connections.review(&self.policy.now(), Timestamp::now())
    }

    /// Waits for open connections to drain, up to the shutdown timeout, then drops the rest.
    async fn finish(&self, connections: &TaskTracker) {
        self.enter(Phase::Ending);
        connections.close();
        /// Time for dropped connections to log their end.
        const TO_LOG: Duration = Duration::from_secs(1);
        let patience = self.config.timeouts.shutdown;
        if tokio::time::timeout(patience, connections.wait()).await.is_err() {
            // Idle clients are not counted: their requests are answered, they just don't
            // disconnect.
            let busy = self.connections.busy();
            if busy > 0 {
                tracing::warn!(
                    connections = busy,
                    "clients were still busy at the shutdown deadline and are dropped",
                );
            }
            self.deadline.cancel();
            tokio::time::timeout(TO_LOG, connections.wait()).await.unwrap_or_default();
        }
    }
}

impl<X: ExportCatalog> Gateway<X> {
    /// Creates a gateway from sockets bound by [`listen::bind_all`]. Clients wait until
    /// [`Gateway::run`]. Call it within a tokio runtime.
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
        let shared = Shared {
            policy: InForce::new(policy),
            connections: Connections::default(),
            slots: Slots::new(&config.limits),
            porch: Porch::new()?,
            rates: Rates::new(config.limits.connection_rate),
            transmit_limits: TransmitLimits {
                budget: Budget::new(
                    config.limits.in_flight,
                    config.limits.in_flight_per_connection,
                ),
                throttle: None,
                idle: config.timeouts.idle,
                stall: config.timeouts.stall,
                drain: config.timeouts.stall,
                // Replaced for each connection.
                metrics: Arc::default(),
            },
            throttles: Throttles::new(config.limits.rate),
            next_connection: AtomicU64::new(1),
            chatter: Chatter::new(),
            refusals: Tally::default(),
            failures: Tally::default(),
            handshake_failures: Tally::default(),
            reloads: Reloads::default(),
            listen,
            phase: AtomicU8::new(Phase::Starting as u8),
            deadline: CancellationToken::new(),
            pulse: Pulse { started: Instant::now(), last: AtomicU64::new(0) },
            exports: ArcSwap::from_pointee(exports),
            config,
        };
        Ok(Self { listeners, shared: Arc::new(shared) })
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
        Control(Arc::clone(&self.shared))
    }

    /// Serves until `shutdown` is cancelled, then drains each connection: accepted requests are
    /// answered ([`transmit`](nbd_server::transmit)) and the connection is closed, both within the
    /// shutdown timeout.
    ///
    /// # Errors
    /// [`AcceptLoopFailed`] if accepting connections ended before `shutdown` was cancelled.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AcceptLoopFailed> {
        self.shared.begin();
        let connections = TaskTracker::new();
        let mut doors = JoinSet::new();
        for listener in self.listeners {
            let shared = Arc::clone(&self.shared);
            doors.spawn(accept(listener, shared, connections.clone(), shutdown.clone()));
        }
        // Certificates expire, and rules may be limited to certain hours.
        let mut watch = JoinSet::new();
        watch.spawn(review_now_and_then(Arc::clone(&self.shared)));
        let mut is_sound = true;
        loop {
            tokio::select! {
                closed = doors.join_next() => if closed.is_none() { break },
                Some(_) = watch.join_next() => {}
            }
            // Before a shutdown these tasks end only if they panic. Exiting, to be restarted, is
            // better than accepting no connections, or letting clients stay that are no longer
            // authorized.
            is_sound &= shutdown.is_cancelled();
            shutdown.cancel();
        }
        self.shared.finish(&connections).await;
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
        self.shared.begin();
        let connections = TaskTracker::new();
        admit(connection.incoming()?, &self.shared, &connections, &shutdown);
        connections.close();
        let mut watch = JoinSet::new();
        watch.spawn(review_now_and_then(Arc::clone(&self.shared)));
        tokio::select! {
            () = connections.wait() => return Ok(()),
            () = shutdown.cancelled() => {}
            // The review task panicked, and clients that are no longer authorized must not stay.
            Some(_) = watch.join_next() => shutdown.cancel(),
        }
        self.shared.finish(&connections).await;
        Ok(())
    }
}

/// Reviews all connections every 500 ms, since authorization may depend on the time. Also updates
/// the heartbeat, and warns when the server's certificate expires.
async fn review_now_and_then<X: ExportCatalog>(shared: Arc<Shared<X>>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(500));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut certificate = ExpiryWatch::default();
    loop {
        ticks.tick().await;
        shared.pulse.beat();
        let in_force = shared.policy.now();
        let expires = in_force.policy.tls.as_ref().and_then(|tls| tls.expiry().certificate);
        warn_of_expiry(certificate.look(expires, UnixTime::now()));
        let has_certificates =
            in_force.policy.tls.as_ref().is_some_and(tls::ServerTls::requests_certificates);
        if has_certificates || in_force.policy.rules.depend_on_time() {
            shared.connections.review(&in_force, Timestamp::now());
        }
    }
}

/// Logs the expiry of the server's certificate.
fn warn_of_expiry(expiring: Option<Expiring>) {
    let Some(expiring) = expiring else { return };
    let reason = expiring.reason();
    match expiring {
        Expiring::Soon(seconds) => {
            let left = humantime::format_duration(Duration::from_secs(seconds / 60 * 60));
            tracing::warn!(
                reason,
                "the server's certificate expires in {left}: put a new one in its place and send a \
                 SIGHUP",
            );
        }
        Expiring::Expired => tracing::error!(
            reason,
            "the server's certificate has expired, so that clients refuse it: put a new one in its \
             place and send a SIGHUP",
        ),
    }
}

/// Accepting connections ended although no shutdown was requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("accepting connections failed; this is a fault of this program")]
pub struct AcceptLoopFailed;

/// Accepts connections on one socket until shutdown.
async fn accept<X: ExportCatalog>(
    listener: Listener,
    shared: Arc<Shared<X>>,
    connections: TaskTracker,
    shutdown: CancellationToken,
) {
    /// Pause after a failed `accept`: long enough for clients to leave, short enough not to be
    /// noticed.
    const PAUSE: Duration = Duration::from_millis(100);
    let faults = RateLimit::new(3, Duration::from_secs(10));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(incoming) => admit(incoming, &shared, &connections, &shutdown),
            Err(error) => match AcceptFault::classify(&error) {
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
