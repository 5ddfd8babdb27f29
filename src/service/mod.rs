//! The service: starts the gateway from its settings, runs it, and shuts it down.
//!
//! [`serve`] lists the steps. [`start`] acquires what takes privileges: the [`access`] policy, the
//! catalog of [`archives`], [`sockets`], the [`audit`] file, the [`monitor`]. Then the [`sandbox`]
//! is entered. While clients are served, [`reload`] replaces policy and exports, as [`control`] or a
//! signal asks for, and [`notify`] keeps the service manager informed.

pub(crate) mod access;
pub(crate) mod archives;
pub(crate) mod audit;
mod changes;
pub(crate) mod control;
#[cfg(feature = "remote")]
pub(crate) mod dialer;
pub(crate) mod hidden;
pub(crate) mod monitor;
mod notify;
pub(crate) mod password;
mod pid_file;
mod reload;
#[cfg(feature = "remote")]
pub(crate) mod remote;
pub(crate) mod runtime;
mod sandbox;
pub(crate) mod sockets;
mod start;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use hexz_exports::{BlockReader, Catalog};
use nbd_gateway::Control;
use nbd_gateway::audit::{BoundedText, Event, ServiceStarted};
use nbd_gateway::config::Config;
use nbd_gateway::listen::Listener;
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::exit_status::Failure;
use crate::monitor::RecentErrors;
use crate::settings::Settings;
use audit::AuditHandle;
use changes::ActiveSettings;
use notify::Notifier;
use reload::{ReloadInputs, Reloader, ServedExports};
use start::Prepared;

/// Interval at which the export folder is checked.
const FOLDER_CHECK_INTERVAL: Duration = Duration::from_secs(2);

/// Opens everything, then serves until a signal, or, with `--stdio`, until its client
/// disconnects.
pub(crate) fn serve(settings: Settings, recent: RecentErrors) -> Result<(), Failure> {
    reload::block_sighup()?;
    let source = settings.source.clone();
    let plan = sandbox::plan(&settings);
    let is_started_by_client = settings.is_started_by_client();
    let prepared = Prepared::new(settings, recent)?;
    #[cfg(feature = "remote")]
    let plan = match &prepared.stores {
        Some(stores) => stores.permit(plan),
        None => plan,
    };
    #[cfg(feature = "remote")]
    let disk_cache = prepared.stores.as_ref().and_then(remote::ConnectedStores::disk_cache);
    let runtime = runtime::prepare();
    let readable = sandbox::enter_sandbox(&plan, is_started_by_client)?;
    let audit = AuditHandle::start(prepared.audit)?;
    let monitor = prepared.monitor.start(audit.counts())?;
    let config = Config { audit: audit.audit(), ..prepared.config };

    let mut shutdown_at = None;
    let (drain_delay, shutdown_timeout) = (prepared.drain_delay, config.timeouts.shutdown);
    let ended = runtime::run_until_signal(runtime, &mut shutdown_at, async |shutdown| {
        #[cfg(feature = "remote")]
        let _shut_down = prepared.stores.as_ref().map(remote::ConnectedStores::shut_down_on_drop);
        let sighup = reload::unblock_sighup()?;
        let notifier = Arc::new(Notifier::new(prepared.manager)?);
        let (catalog, policy, snapshots) =
            (prepared.catalog, prepared.policy, prepared.options.snapshots.clone());
        let reader = Arc::clone(catalog.reader());
        // Verifying an archive's digest can take long; a signal must be able to interrupt it.
        let opening = archives::open(&catalog, &snapshots);
        let opening = shutdown.run_until_cancelled(opening);
        let opened = notifier.run_startup(|| progress(&reader), opening).await;
        let Some(exports) = opened.transpose()? else { return Ok(()) };

        let (access, open_to) = (access::describe_access(&policy), policy.rules.to_string());
        let active = ActiveSettings::new(prepared.options, &policy, prepared.files.clone());
        let gateway = prepared.sockets.into_gateway(config.clone(), policy, catalog)?;
        let control = gateway.control();
        monitor.attach(control.clone());

        let started = ServiceStarted {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            listen: gateway.listen().iter().map(BoundedText::from_display).collect(),
            tls: active.tls.is_some(),
            policy: 0,
            open_to: open_to.into(),
        };
        let record = config.audit.clone();
        let (reloads, requests) = mpsc::channel(control::MAX_REQUESTS);
        let reloader = Reloader {
            inputs: Arc::new(ReloadInputs {
                source,
                file: prepared.file,
                fixed: prepared.fixed,
                config,
                readable,
                #[cfg(feature = "remote")]
                stores: prepared.stores.as_ref().map(remote::ConnectedStores::archives),
            }),
            files: prepared.files,
            active,
            requests,
            served: ServedExports::new(control.clone(), snapshots),
            is_loopback_only: prepared.is_loopback_only,
            notifier: Arc::clone(&notifier),
            audit: audit.clone(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(reloader.run(sighup, prepared.watch));
        if let Some(socket) = prepared.control {
            tasks.spawn(control::serve(Listener::new(socket)?, reloads));
        }
        let listen = gateway.listen().join(", ");
        tracing::info!(%listen, monitor = monitor.address(), "ready: serving {exports} {access}");
        notifier.ready(exports, access).await;
        record.emit(|| Event::Start(started));
        let notifying = (Arc::clone(&notifier), control.clone(), Arc::clone(&reader));
        tasks.spawn(notify_manager(notifying, monitor.fault(), shutdown.clone()));
        tasks.spawn(poll_folder(control.clone()));
        tasks.spawn(monitor.reload_auth());

        let stop = if drain_delay.is_zero() {
            shutdown
        } else {
            let stop = CancellationToken::new();
            tasks.spawn(delay_draining(drain_delay, control.clone(), shutdown, stop.clone()));
            stop
        };
        let ended = gateway.run(stop).await;
        drop(tasks);
        notifier.stopping().await;
        log_totals(&control, &reader);
        ended
    });
    // Chunks that were fetched shortly before are on disk after this.
    #[cfg(feature = "remote")]
    if let Some(cache) = disk_cache {
        remote::close_disk_cache(cache);
    }
    // All connections have ended by now and reported their events.
    let until = shutdown_at.map_or_else(Instant::now, |at| at + drain_delay + shutdown_timeout);
    audit.finish(ended.as_ref().err().map(BoundedText::from_display), until);
    ended
}

/// Keeps the service manager informed while clients are served.
async fn notify_manager(
    (notifier, control, reader): (Arc<Notifier>, Control<Catalog>, Arc<BlockReader>),
    fault: impl Fn() -> Option<&'static str>,
    shutdown: CancellationToken,
) {
    // Tests both a runtime worker and a decoder thread.
    let works = || {
        let (reader, fault) = (Arc::clone(&reader), fault());
        async move {
            if let Some(fault) = fault {
                return Err(fault);
            }
            let is_alive = tokio::spawn(async move { reader.is_alive().await }).await;
            is_alive.unwrap_or(false).then_some(()).ok_or("no decoder thread responded")
        }
    };
    let stopping = async {
        shutdown.cancelled().await;
        notifier.stopping().await;
    };
    tokio::join!(
        notifier.run_status(|| control.active_sessions()),
        notifier.run_watchdog(works),
        stopping
    );
}

/// Cancels `stop` some time after `shutdown`. In between, the gateway isn't ready, but accepts
/// connections.
async fn delay_draining(
    delay: Duration,
    control: Control<Catalog>,
    shutdown: CancellationToken,
    stop: CancellationToken,
) {
    shutdown.cancelled().await;
    control.announce_shutdown();
    tokio::time::sleep(delay).await;
    stop.cancel();
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
        ("refused and failed connections", control.failure_counts()),
        ("failed TLS handshakes", control.handshake_failure_counts()),
    ] {
        if !counts.0.is_empty() {
            tracing::info!("{what}: {counts}");
        }
    }
    tracing::info!(decoded = reader.decoded(), "stopped");
}
