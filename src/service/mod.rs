//! The service: starts the gateway from its settings, runs it, and shuts it down.
//!
//! [`serve`] is the story. [`start`] acquires what takes privileges: the [`access`] policy, the
//! catalog of [`archives`], [`sockets`], the [`audit`] file, the [`monitor`]. Then the [`sandbox`]
//! is entered. While clients are served, [`reload`] replaces policy and exports, and [`notify`]
//! keeps the service manager informed.

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
mod start;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hexz_exports::{BlockReader, Catalog};
use nbd_gateway::Control;
use nbd_gateway::audit::{BoundedText, Event, ServiceStarted};
use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::exit_status::Failure;
use crate::monitor::RecentErrors;
use crate::settings::{OptionSource, Settings};
use audit::AuditHandle;
use notify::Notifier;
use reload::{ActiveState, Reloader, ServedExports};
use start::Prepared;

/// Interval at which the export folder is checked.
const FOLDER_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Opens everything, then serves until a signal, or, with `--stdio`, until its client
/// disconnects.
pub(crate) fn serve(
    source: OptionSource,
    settings: Settings,
    recent: RecentErrors,
) -> Result<(), Failure> {
    reload::block_sighup()?;
    let plan = sandbox::plan(&settings);
    let Prepared {
        file,
        fixed,
        options,
        watch,
        stamps,
        mut config,
        policy,
        catalog,
        listen,
        services,
    } = Prepared::new(settings, recent)?;
    let runtime = runtime::prepare();
    let readable = sandbox::enter_sandbox(&plan)?;
    let record = AuditHandle::start(services.audit)?;
    config.audit = record.audit();
    let monitor = services.monitor.start(record.counts())?;

    let mut shutdown_at = None;
    let patience = config.timeouts.shutdown;
    let ended = runtime::run_until_signal(runtime, async |shutdown| {
        let sighup = reload::unblock_sighup()?;
        let service = Arc::new(Notifier::new(services.manager)?);
        // Verifying an archive's digest can take long; a signal must be able to interrupt it.
        let opening = archives::open(&catalog, &options.snapshots);
        let opening = shutdown.run_until_cancelled(opening);
        let opened = service.run_startup(|| progress(catalog.reader()), opening).await;
        let Some(exports) = opened.transpose()? else { return Ok(()) };

        let (access, open_to) = (access::describe_access(&policy), policy.rules.to_string());
        let (tls, reader) = (policy.tls.clone(), Arc::clone(catalog.reader()));
        let (has_tls, audit) = (tls.is_some(), config.audit.clone());
        let open = listen.sockets.into_gateway(config.clone(), policy, catalog)?;
        let (control, addresses) = (open.gateway.control(), open.listen.clone());
        monitor.attach(control.clone());

        let reloader = Reloader {
            source,
            file,
            fixed_options: fixed,
            config,
            readable,
            control: control.clone(),
            service: Arc::clone(&service),
            stamps,
            is_loopback_only: listen.is_loopback_only,
            active: ActiveState { tls, served: ServedExports::new(options.snapshots.clone()) },
            record: record.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(reloader.run(sighup, watch));
        tracing::info!(listen = %addresses.join(", "), "ready: serving {exports} {access}");
        service.ready(exports, access).await;
        audit.emit(|| start_event(&addresses, has_tls, open_to));
        let (notifier, stop) = (Arc::clone(&service), shutdown.clone());
        tasks.spawn(notify_manager(notifier, control.clone(), Arc::clone(&reader), stop));
        tasks.spawn(poll_folder(control.clone()));

        let ended = tokio::select! {
            // Otherwise the gateway may end before the time of the signal has been recorded.
            biased;
            never = record_time(&shutdown, &mut shutdown_at) => match never {},
            ended = open.run(shutdown.clone()) => ended,
        };
        drop(tasks);
        service.stopping().await;
        log_totals(&control, &reader);
        ended
    });
    // All connections have ended by now and reported their events.
    let until = shutdown_at.map_or_else(Instant::now, |at| at + patience);
    record.finish(ended.as_ref().err().map(BoundedText::from_display), until);
    ended
}

/// Records the time at which shutdown was requested. Never returns.
async fn record_time(shutdown: &CancellationToken, at: &mut Option<Instant>) -> Infallible {
    shutdown.cancelled().await;
    *at = Some(Instant::now());
    std::future::pending().await
}

/// Builds the audit event of a completed startup.
fn start_event(listen: &[String], tls: bool, open_to: String) -> Event {
    Event::Start(ServiceStarted {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        listen: listen.iter().map(BoundedText::from_display).collect(),
        tls,
        policy: 0,
        open_to: open_to.into(),
    })
}

/// Keeps the service manager informed while clients are served.
async fn notify_manager(
    service: Arc<Notifier>,
    control: Control<Catalog>,
    reader: Arc<BlockReader>,
    shutdown: CancellationToken,
) {
    // Tests both a runtime worker and a decoder thread.
    let works = || {
        let reader = Arc::clone(&reader);
        async move { tokio::spawn(async move { reader.is_alive().await }).await.unwrap_or(false) }
    };
    let stopping = async {
        shutdown.cancelled().await;
        service.stopping().await;
    };
    tokio::join!(
        service.run_status(|| control.active_sessions()),
        service.run_watchdog(works),
        stopping
    );
}

/// Checks the export folder periodically: for readiness, and so that problems are logged before a
/// client asks.
async fn poll_folder(control: Control<Catalog>) {
    let mut ticks = tokio::time::interval(FOLDER_CHECK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        control.exports().check_folder().await;
    }
}

/// Returns a measure that grows while archives are opened: bytes read from them, as for a digest,
/// and CPU time in tenths of a second, as spent on deriving a key from a password.
fn progress(reader: &BlockReader) -> (u64, i64) {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    (reader.reads().bytes(), time.tv_sec * 10 + time.tv_nsec / 100_000_000)
}

/// Logs the totals of all connections.
fn log_totals(control: &Control<Catalog>, reader: &BlockReader) {
    for (what, counts) in [
        ("connections were refused or failed", control.failure_counts()),
        ("TLS handshakes failed", control.handshake_failure_counts()),
    ] {
        if !counts.0.is_empty() {
            tracing::info!("{what}: {counts}");
        }
    }
    tracing::info!(decoded = reader.decoded(), "ended");
}
