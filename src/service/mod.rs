//! Starts the gateway from its settings, runs it, and shuts it down.

pub(crate) mod access;
pub(crate) mod archives;
pub(crate) mod audit;
mod monitor;
mod notify;
pub(crate) mod password;
mod pid_file;
mod reload;
pub(crate) mod runtime;
mod sandbox;
pub(crate) mod sockets;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::monitor::RecentErrors;
use hexz_exports::{BlockReader, Catalog};
use hexz_reader::storage;
use nbd_gateway::audit::{Event, Start, Text};
use nbd_gateway::config::Config;
use nbd_gateway::{Control, Policy};

use crate::cli::Changeable;
use crate::failure::Failure;
use crate::settings::{Fixed, Settings, Source};
use audit::{Record, Target};
use monitor::Show;
use notify::{Manager, Service};
use reload::{InForce, Reloading, Served, Stamps};
use sandbox::confine;
use sockets::{Door, Entrance};

/// Interval at which the export folder is checked.
const LOOK_AT_FOLDER_EVERY: Duration = Duration::from_secs(2);

/// Opens everything, then serves until a signal, or, with `--stdio`, until its client
/// disconnects.
pub(crate) fn serve(
    source: Source,
    settings: Settings,
    recent: RecentErrors,
) -> Result<(), Failure> {
    reload::hold_hangups()?;
    let plan = settings.plan();
    let Prepared { file, fixed, options, watch, seen, mut config, policy, catalog, at, had } =
        Prepared::of(settings, recent)?;
    let runtime = runtime::prepare();
    let confines = confine(&plan)?;
    let record = Record::start(had.audit)?;
    config.audit = record.audit();
    let shown = had.show.start(record.counts())?;

    let mut told_at = None;
    let patience = config.timeouts.shutdown;
    let ended = runtime::until_signal(runtime, async |shutdown| {
        let hangup = reload::hangup()?;
        let service = Arc::new(Service::new(had.manager)?);
        // Verifying an archive's digest can take long; a signal must be able to interrupt it.
        let opening = archives::open(&catalog, &options.snapshots);
        let opening = shutdown.run_until_cancelled(opening);
        let opened = service.starting(progress, opening).await;
        let Some(what) = opened.transpose()? else { return Ok(()) };

        let (to, open_to) = (access::to_whom(&policy), policy.rules.to_string());
        let (tls, reader) = (policy.tls.clone(), Arc::clone(catalog.reader()));
        let (has_tls, audit) = (tls.is_some(), config.audit.clone());
        let open = at.entrance.open(config.clone(), policy, catalog)?;
        let (control, listen) = (open.gateway.control(), open.listen.clone());
        shown.watch(control.clone());
        let served = Served::new(options.snapshots.clone());
        let reloading = Reloading {
            source,
            file,
            fixed,
            config,
            confines,
            control: control.clone(),
            service: Arc::clone(&service),
            seen,
            on_loopback: at.loopback_alone,
            in_force: InForce { tls, served },
            record: record.clone(),
        };
        let mut beside = JoinSet::new();
        beside.spawn(reloading.on_signal(hangup, watch));
        tracing::info!(listen = %listen.join(", "), "ready: serving {what} {to}");
        service.ready(what, to).await;
        audit.tell(|| start(&listen, has_tls, open_to));
        let informed =
            attend(Arc::clone(&service), control.clone(), Arc::clone(&reader), shutdown.clone());
        beside.spawn(informed);
        beside.spawn(keep_looking_at_folder(control.clone()));

        let ended = tokio::select! {
            // Otherwise the gateway may end before the time of the signal has been recorded.
            biased;
            never = note_when(&shutdown, &mut told_at) => match never {},
            ended = open.run(shutdown.clone()) => ended,
        };
        drop(beside);
        service.stopping().await;
        say_what_happened(&control, &reader);
        ended
    });
    // All connections have ended by now and reported their events.
    let until = told_at.map_or_else(Instant::now, |at| at + patience);
    record.finish(ended.as_ref().err().map(Text::of), until);
    ended
}

/// Resources that are acquired before privileges are dropped.
struct Prepared {
    /// Path of the configuration file.
    file: Option<PathBuf>,
    fixed: Fixed,
    /// Options that a reload can change.
    options: Changeable,
    watch: bool,
    /// Stamps of the files from before they were read.
    seen: Stamps,
    config: Config,
    policy: Policy,
    catalog: Catalog,
    at: Place,
    had: Beside,
}

/// Sockets on which clients connect.
struct Place {
    entrance: Entrance,
    /// True if the gateway listens on loopback only, since the rules admit no other clients.
    loopback_alone: bool,
}

/// Services besides the gateway: service manager, audit and monitoring.
struct Beside {
    manager: Manager,
    audit: Option<Target>,
    show: Show,
}

impl Prepared {
    /// Reads the files, and binds the sockets.
    fn of(settings: Settings, recent: RecentErrors) -> Result<Self, Failure> {
        let Settings { cli, stamp, fixed, .. } = settings;
        let (file, serve) = (cli.file.config, cli.serve);
        let mut config = serve.config();
        let mut door = Door::find(&serve, &mut config)?;
        let monitor = door.monitor();
        let manager = Manager::find();
        let seen = Stamps::of(stamp, &serve.changeable);
        let policy = access::read(&serve.changeable, &config, None)?;
        let catalog = serve.catalog(archives::options(&serve.changeable.snapshots.opening)?)?;
        tracing::debug!("limits: {}; {}", config.limits, config.timeouts);
        tracing::debug!("memory: {}", serve.memory());
        access::warn_of_surprises(&config, &policy);
        let open = catalog.descriptors();
        raise_descriptor_limit(&config, open);
        let local_only = policy.rules.is_local_only();
        let loopback_alone = config.listen.is_empty() && local_only && !serve.stdio();
        let entrance = door.open(&config, local_only, &serve.socket_rights())?;
        let audit = audit::open(&serve.audit, serve.stdio())?;
        let show = Show::prepare(&serve, monitor, catalog.reader(), recent)?;
        if let Some(path) = serve.pid_file() {
            pid_file::write(path)?;
        }
        let watch = serve.watch();
        let at = Place { entrance, loopback_alone };
        let had = Beside { manager, audit, show };
        let options = serve.changeable;
        Ok(Self { file, fixed, options, watch, seen, config, policy, catalog, at, had })
    }
}

/// Records the time at which shutdown was requested. Never returns.
async fn note_when(told: &CancellationToken, at: &mut Option<Instant>) -> Infallible {
    told.cancelled().await;
    *at = Some(Instant::now());
    std::future::pending().await
}

/// Builds the audit event of a completed startup.
fn start(listen: &[String], tls: bool, open_to: String) -> Event {
    Event::Start(Start {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        listen: listen.iter().map(Text::of).collect(),
        tls,
        policy: 0,
        open_to: open_to.into(),
    })
}

/// Keeps the service manager informed while clients are served.
async fn attend(
    service: Arc<Service>,
    control: Control<Catalog>,
    reader: Arc<BlockReader>,
    shutdown: CancellationToken,
) {
    // Tests both a runtime worker and a decoder thread.
    let works = || {
        let reader = Arc::clone(&reader);
        async move { tokio::spawn(async move { reader.works().await }).await.unwrap_or(false) }
    };
    let stopping = async {
        shutdown.cancelled().await;
        service.stopping().await;
    };
    tokio::join!(service.keep_status(|| control.reading()), service.keep_alive(works), stopping);
}

/// Checks the export folder periodically: for readiness, and so that problems are logged before a
/// client asks.
async fn keep_looking_at_folder(control: Control<Catalog>) {
    let mut ticks = tokio::time::interval(LOOK_AT_FOLDER_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        control.exports().check_folder().await;
    }
}

/// Returns a measure that grows while archives are opened: bytes hashed, and CPU time in tenths
/// of a second, as spent on deriving a key from a password.
fn progress() -> (u64, i64) {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    (storage::hashed(), time.tv_sec * 10 + time.tv_nsec / 100_000_000)
}

/// Logs the totals of all connections.
fn say_what_happened(control: &Control<Catalog>, reader: &BlockReader) {
    for (what, counts) in [
        ("connections were refused or failed", control.failures()),
        ("TLS handshakes failed", control.handshake_failures()),
    ] {
        if !counts.0.is_empty() {
            tracing::info!("{what}: {counts}");
        }
    }
    tracing::info!(decoded = reader.decoded(), "ended");
}

/// Raises the soft limit of file descriptors to the hard limit: each connection needs a
/// descriptor, and the usual 1024 is a compatibility limit for programs that use `select`.
///
/// Warns if that is fewer than clients and `archives` open archives may need.
fn raise_descriptor_limit(config: &Config, archives: usize) {
    /// Descriptors for listeners, the log, the audit and the runtime.
    const OWN: usize = 32;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!("the limit of open files stays as it is: {error}");
    }
    let (clients, handshakes) = (config.limits.connections, config.limits.handshakes);
    let needed = [clients, handshakes, archives, OWN].into_iter().fold(0, usize::saturating_add);
    // `None` means unlimited.
    let Some(granted) = getrlimit(Resource::Nofile).current else { return };
    if usize::try_from(granted).is_ok_and(|granted| granted < needed) {
        tracing::warn!(
            needed,
            granted,
            "too few file descriptors: {clients} clients (--max-connections), {handshakes} that \
             negotiate (--max-handshakes), archives and sockets may need {needed}, and the system \
             grants {granted}, so some clients will wait: raise its limit (LimitNOFILE=, ulimit \
             -Hn), or lower these",
        );
    }
}
