//! Notifies the service manager (`sd_notify(3)`) of readiness, reloads, status and liveness.
//! Without a service manager, nothing is sent.
//!
//! The crate `sd-notify` creates a socket for each message, which the sandbox forbids, and blocks
//! while the manager doesn't read. Here, one socket is connected before the sandbox is entered.

mod messages;

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nbd_telemetry::escape;
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixDatagram;
use tokio::time::{MissedTickBehavior, interval, interval_at, timeout};

/// Timeout of one message: a manager that doesn't read must not block anything.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Minimum interval between status updates.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Interval at which more time is requested while a slow startup makes progress. Managers wait 90
/// seconds by default.
const EXTEND_INTERVAL: Duration = Duration::from_secs(10);
/// Time from each request on.
const EXTEND_BY: Duration = Duration::from_secs(60);

/// Connection to the service manager. It is set up before the sandbox is entered, since no socket
/// can be created there.
#[derive(Debug, Default)]
pub(crate) struct ManagerSocket {
    socket: Option<std::os::unix::net::UnixDatagram>,
    /// Interval within which it expects a watchdog notification.
    watchdog: Option<Duration>,
}

impl ManagerSocket {
    /// Connects to the manager that the environment names. If that fails, only warns; the manager
    /// handles a missing notification.
    pub(crate) fn from_environment() -> Self {
        let Some(address) = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())
        else {
            return Self::default();
        };
        let variable = |name: &str| std::env::var(name).ok();
        match connect(&address) {
            Ok(socket) => Self {
                socket: Some(socket),
                watchdog: watchdog_interval(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID")),
            },
            Err(error) => {
                tracing::warn!(
                    reason = "service_manager_unreachable",
                    "can't reach the service manager at NOTIFY_SOCKET={:?}: {error}",
                    escape::name(&address)
                );
                Self::default()
            }
        }
    }
}

fn connect(address: &OsStr) -> io::Result<std::os::unix::net::UnixDatagram> {
    let address = match address.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(address)?,
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => return Err(io::Error::other("expected an absolute path, or @ and a name")),
    };
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Returns the watchdog interval, if there is one and it is for this process.
fn watchdog_interval(time: Option<String>, process: Option<String>) -> Option<Duration> {
    let is_ours = process.is_none_or(|process| process == std::process::id().to_string());
    let micros = time?.parse().ok().filter(|micros| *micros > 0 && is_ours)?;
    Some(Duration::from_micros(micros))
}

/// The gateway as a service of its manager.
#[derive(Debug)]
pub(crate) struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    status: Mutex<StatusParts>,
    has_stopped: AtomicBool,
}

/// Parts of the status line.
#[derive(Debug, Default)]
struct StatusParts {
    exports: String,
    /// Description of how, and to which clients, exports are served.
    access: String,
    reload_failed: bool,
    active_clients: usize,
}

impl StatusParts {
    fn line(&self) -> String {
        let Self { exports, access, reload_failed, active_clients } = self;
        let failed = if *reload_failed { "; reload failed, see the log" } else { "" };
        format!("{active_clients} reading{failed}; serving {exports} {access}")
    }
}

impl Notifier {
    /// Creates the service. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't register the socket.
    pub(crate) fn new(manager: ManagerSocket) -> io::Result<Self> {
        Ok(Self {
            socket: manager.socket.map(UnixDatagram::from_std).transpose()?,
            watchdog: manager.watchdog,
            status: Mutex::default(),
            has_stopped: AtomicBool::new(false),
        })
    }

    /// Runs `work` that precedes readiness. Requests more time from the manager as long as
    /// `progress` changes, so that a startup that hangs still times out.
    pub(crate) async fn run_startup<T, P: PartialEq>(
        &self,
        progress: impl Fn() -> P,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = std::pin::pin!(work);
        let mut ticks = interval_at(tokio::time::Instant::now() + EXTEND_INTERVAL, EXTEND_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = progress();
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = ticks.tick() => {}
            }
            let now = progress();
            if now != last {
                self.send(&messages::extend(EXTEND_BY)).await;
            }
            last = now;
        }
    }

    /// Reports readiness, with what is served and to which clients.
    pub(crate) async fn ready(&self, exports: String, to: String) {
        let line = self.update_status(|status| (status.exports, status.access) = (exports, to));
        self.send(&messages::ready(&line)).await;
    }

    /// Reports that a reload begins.
    pub(crate) async fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let now = Duration::new(
            u64::try_from(now.tv_sec).unwrap_or_default(),
            u32::try_from(now.tv_nsec).unwrap_or_default(),
        );
        self.send(&messages::reloading(now)).await;
    }

    /// Reports the end of a reload, with the clients that are now served, or `None` if it failed.
    pub(crate) async fn reloaded(&self, to: Option<String>) {
        let line = self.update_status(|status| {
            status.reload_failed = to.is_none();
            status.access = to.unwrap_or(std::mem::take(&mut status.access));
        });
        self.send(&messages::ready(&line)).await;
    }

    /// Updates what is served in the status, without sending it.
    pub(crate) fn set_exports(&self, exports: String) {
        self.update_status(|status| status.exports = exports);
    }

    /// Reports that the service is stopping. Later calls do nothing.
    pub(crate) async fn stopping(&self) {
        if !self.has_stopped.swap(true, Ordering::Relaxed) {
            self.send(&messages::stopping()).await;
        }
    }

    /// Sends the status whenever it changes, from now on; `reading` returns the number of clients
    /// that read.
    pub(crate) async fn run_status(&self, reading: impl Fn() -> usize) {
        if self.socket.is_none() {
            return;
        }
        let mut ticks = interval(STATUS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = self.update_status(|_| ());
        loop {
            ticks.tick().await;
            if self.has_stopped.load(Ordering::Relaxed) {
                return;
            }
            let line = self.update_status(|status| status.active_clients = reading());
            if line != last {
                self.send(&messages::status(&line)).await;
                last = line;
            }
        }
    }

    /// Sends watchdog notifications, at half the interval that the manager expects, as long as
    /// `probe` finds nothing that a restart would cure, in time.
    pub(crate) async fn run_watchdog<F>(&self, probe: impl Fn() -> F)
    where
        F: Future<Output = Result<(), &'static str>>,
    {
        let (Some(_), Some(time)) = (&self.socket, self.watchdog) else { return };
        let half = time / 2;
        // Leaves time to notify before the interval is over, even if the probe takes as long as
        // it may.
        let patience = half.mul_f32(0.9);
        let mut ticks = interval(half);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let fault = match timeout(patience, probe()).await {
                Ok(Ok(())) => {
                    self.send(&messages::alive()).await;
                    continue;
                }
                Ok(Err(fault)) => fault.to_owned(),
                Err(_) => format!("no decoder thread responded within {patience:?}"),
            };
            tracing::error!(reason = "watchdog", "no watchdog notification: {fault}");
        }
    }

    /// Changes parts of the status, and returns the status line.
    fn update_status(&self, change: impl FnOnce(&mut StatusParts)) -> String {
        let mut status = self.status.lock();
        change(&mut status);
        status.line()
    }

    async fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        match timeout(SEND_TIMEOUT, socket.send(message.as_bytes())).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!("can't notify the service manager: {error}"),
            Err(_) => tracing::debug!("the service manager doesn't read notifications"),
        }
    }
}

#[cfg(test)]
mod tests;
