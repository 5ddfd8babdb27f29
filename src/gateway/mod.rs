//! The front end: who comes in, by which socket, for how long, and how it all ends.
//!
//! A connection's way is accept → `admission.rs`, where [`access`] judges where it comes from
//! ([`proxy`] says so behind a load balancer), and which takes a slot → `connection.rs`, where
//! TLS ([`tls`]) and the engine ([`crate::nbd`]) take over, both on the threads of `porch.rs`
//! until an export is chosen. All there are stand in `live.rs`, so that another `policy.rs` can
//! judge them again.

pub mod access;
mod admission;
mod connection;
pub mod handed;
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
use crate::limited::RateLimit;
use crate::nbd::budget::Budget;
use crate::nbd::{Offer, TransmitLimits};
pub use crate::tally::Counts;
use crate::tally::Tally;
use access::Moment;
use admission::admit;
use listen::{AcceptFault, Bound, ListenAddress, Listener};
use live::Connections;
use policy::InForce;
pub use policy::Policy;
use porch::Porch;
use rates::Rates;
use reloads::Reloads;
pub use report::{
    ConnectionCounts, ConnectionReport, ExportReport, FAILURES, Histogram, MAX_LISTED, REFUSALS,
    ReloadsReport, Report, TlsReport, unix_seconds,
};
use slots::Slots;
use stdio::Stdio;
use throttles::Throttles;
use tls::{Expiring, ExpiryWatch};

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
    /// Connections that were refused at once, by reason.
    refusals: Tally,
    /// Those that failed later.
    failures: Tally,
    /// TLS handshakes that failed, by reason.
    handshake_failures: Tally,
    reloads: Reloads,
    /// Where it listens, for people.
    listen: Vec<String>,
    phase: AtomicU8,
    /// Cancelled when the shutdown timeout is over: connections that are left are dropped.
    deadline: CancellationToken,
    pulse: Pulse,
}

/// How far a gateway is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Serving,
    Ending,
}

/// When the threads that serve last gave a sign of life.
#[derive(Debug)]
struct Pulse {
    started: Instant,
    /// In milliseconds from then on.
    last: AtomicU64,
}

impl Pulse {
    fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    fn silent_for(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last)
    }
}

/// Log lines about connections, of which peers can cause as many as they like. Those who
/// are refused can't use up the lines of those who are served.
#[derive(Debug)]
struct Chatter {
    refusals: RateLimit,
    failures: RateLimit,
    sessions: RateLimit,
    /// Exports that were asked for in vain.
    lookups: RateLimit,
}

impl Chatter {
    fn new() -> Self {
        let limit = || RateLimit::new(100, Duration::from_millis(100));
        Self { refusals: limit(), failures: limit(), sessions: limit(), lookups: limit() }
    }
}

/// Says something unless too much has been said; `line` is given how much was left out.
fn tell(limit: &RateLimit, line: impl FnOnce(Option<u64>)) {
    if let Some(held_back) = limit.allow() {
        line(held_back.field());
    }
}

/// By which a gateway that runs is told of changes, and asked.
#[derive(Debug)]
pub struct Control<X>(Arc<Shared<X>>);

impl<X> Clone for Control<X> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<X: Offer> Control<X> {
    /// Puts another policy in force, at once and as a whole: for those who come from now
    /// on, and for those who are in. Who may not stay is dropped. Says how many that were.
    pub fn replace(&self, policy: Policy) -> usize {
        self.0.policy.replace(policy);
        self.0.reloads.succeeded();
        self.0.review()
    }

    /// The same with a policy that is meant for exports which [`Control::serve`] will be told
    /// of. Until then what is served is opened only by those whom the rules that it was chosen
    /// for let open it as well: a name may come to mean something else.
    pub fn replace_early(&self, policy: Policy) -> usize {
        self.0.policy.replace_early(policy);
        self.0.reloads.succeeded();
        self.0.review()
    }

    /// The number of the policy that is in force: so many were before it.
    pub fn policy(&self) -> u64 {
        self.0.policy.look(|it| it.number)
    }

    /// Notes that another policy couldn't be put in force, and why.
    pub fn note_failed_reload(&self, why: &str) {
        self.0.reloads.failed(why);
    }

    /// Lets those who choose an export from now on choose among these. Who reads one goes on.
    pub fn serve(&self, exports: Arc<X>) {
        self.0.exports.store(exports);
        self.0.policy.exports_follow();
    }

    /// What is served.
    pub fn exports(&self) -> Arc<X> {
        self.0.exports.load_full()
    }

    /// How many clients read an export just now.
    pub fn reading(&self) -> usize {
        self.0.slots.sessions()
    }

    /// Connections that were refused or failed, by reason.
    pub fn failures(&self) -> Counts {
        self.0.refusals.so_far().and(self.0.failures.so_far())
    }

    /// TLS handshakes that failed, by reason ([`tls::Cause::label`]).
    pub fn handshake_failures(&self) -> Counts {
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

    /// Judges all connections by what holds now.
    fn review(&self) -> usize {
        self.connections.review(&self.policy.now(), Moment::now())
    }

    /// Waits for those who are in, for no longer than the shutdown timeout.
    async fn finish(&self, connections: &TaskTracker) {
        self.enter(Phase::Ending);
        connections.close();
        /// Enough for those that are dropped to say so.
        const TO_LOG: Duration = Duration::from_secs(1);
        let patience = self.config.timeouts.shutdown;
        if tokio::time::timeout(patience, connections.wait()).await.is_err() {
            // The others have been answered, and merely don't close.
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

impl<X: Offer> Gateway<X> {
    /// Takes over sockets from [`listen::bind_all`]. Clients wait until [`Gateway::run`].
    /// Call it within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't watch a socket, or the system has no threads left.
    pub fn new(
        sockets: Vec<Bound>,
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
                // Each connection gets its own.
                activity: Arc::default(),
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

    /// Where it listens, with real ports.
    ///
    /// # Errors
    /// The system can't say.
    pub fn addresses(&self) -> io::Result<Vec<ListenAddress>> {
        self.listeners.iter().map(Listener::local_address).collect()
    }

    /// By which it is told of changes while it runs.
    pub fn control(&self) -> Control<X> {
        Control(Arc::clone(&self.shared))
    }

    /// Serves until `shutdown` is cancelled; then drains each connection: requests that have
    /// been accepted are answered ([`transmit`](crate::nbd::transmit)), and it is closed, both
    /// within the shutdown timeout.
    ///
    /// # Errors
    /// [`DoorClosed`] if accepting connections ended before that.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), DoorClosed> {
        self.shared.begin();
        let connections = TaskTracker::new();
        let mut doors = JoinSet::new();
        for listener in self.listeners {
            let shared = Arc::clone(&self.shared);
            doors.spawn(accept(listener, shared, connections.clone(), shutdown.clone()));
        }
        // Certificates run out, and rules have their hours.
        let mut watch = JoinSet::new();
        watch.spawn(review_now_and_then(Arc::clone(&self.shared)));
        let mut is_sound = true;
        loop {
            tokio::select! {
                closed = doors.join_next() => if closed.is_none() { break },
                Some(_) = watch.join_next() => {}
            }
            // They end by themselves only if they have panicked. Better to end, and be started
            // again, than to be deaf, or to let stay who may not.
            is_sound &= shutdown.is_cancelled();
            shutdown.cancel();
        }
        self.shared.finish(&connections).await;
        if is_sound { Ok(()) } else { Err(DoorClosed) }
    }

    /// Serves that one connection, which is judged like any other, until it ends. What it
    /// comes to is in the log. `shutdown` is as for [`Gateway::run`]; nobody else is served.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub async fn run_one(self, connection: Stdio, shutdown: CancellationToken) -> io::Result<()> {
        self.shared.begin();
        let connections = TaskTracker::new();
        admit(connection.incoming()?, &self.shared, &connections, &shutdown);
        connections.close();
        let mut watch = JoinSet::new();
        watch.spawn(review_now_and_then(Arc::clone(&self.shared)));
        tokio::select! {
            () = connections.wait() => return Ok(()),
            () = shutdown.cancelled() => {}
            // It has panicked, and who may not stay must not.
            Some(_) = watch.join_next() => shutdown.cancel(),
        }
        self.shared.finish(&connections).await;
        Ok(())
    }
}

/// Judges all connections again and again, by the time.
async fn review_now_and_then<X: Offer>(shared: Arc<Shared<X>>) {
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
            in_force.policy.tls.as_ref().is_some_and(tls::ServerTls::asks_for_certificates);
        if has_certificates || in_force.policy.rules.depend_on_time() {
            shared.connections.review(&in_force, Moment::now());
        }
    }
}

/// Says that the server's own certificate expires, at most once for each stage.
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

/// Accepting connections ended though nobody had asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("accepting connections failed; this is a fault of this program")]
pub struct DoorClosed;

/// Accepts on one socket until the end.
async fn accept<X: Offer>(
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
