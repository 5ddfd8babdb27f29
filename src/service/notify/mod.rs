//! Notifies the service manager (`sd_notify(3)`) of readiness, reloads, status and liveness.
//! Without a service manager, nothing is sent.

mod messages;

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nbd_telemetry::escape;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixDatagram;
use tokio::time::{MissedTickBehavior, interval, interval_at, timeout};

/// Timeout of one message: a manager that doesn't read must not block anything.
const PATIENCE: Duration = Duration::from_secs(1);

/// Minimum interval between status updates.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// Interval at which more time is requested while a slow startup makes progress. Managers wait 90
/// seconds by default.
const EXTEND_EVERY: Duration = Duration::from_secs(10);
/// Time from each request on.
const EXTEND_BY: Duration = Duration::from_secs(60);

/// Connection to the service manager. It is set up before the sandbox is entered, since no socket
/// can be created there.
#[derive(Debug, Default)]
pub(crate) struct Manager {
    socket: Option<std::os::unix::net::UnixDatagram>,
    /// Interval within which it expects a watchdog notification.
    watchdog: Option<Duration>,
}

impl Manager {
    /// Connects to the manager that the environment names. If that fails, only warns; the manager
    /// handles a missing notification.
    pub(crate) fn find() -> Self {
        let Some(place) = std::env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty())
        else {
            return Self::default();
        };
        let variable = |name: &str| std::env::var(name).ok();
        match connect(&place) {
            Ok(socket) => Self {
                socket: Some(socket),
                watchdog: watchdog(variable("WATCHDOG_USEC"), variable("WATCHDOG_PID")),
            },
            Err(error) => {
                tracing::warn!(
                    "can't reach the service manager at NOTIFY_SOCKET={:?}: {error}",
                    escape::name(&place)
                );
                Self::default()
            }
        }
    }
}

fn connect(place: &OsStr) -> io::Result<std::os::unix::net::UnixDatagram> {
    let address = match place.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(place)?,
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => return Err(io::Error::other("expected an absolute path, or @ and a name")),
    };
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Returns the watchdog interval, if there is one and it is for this process.
fn watchdog(time: Option<String>, process: Option<String>) -> Option<Duration> {
    let is_ours = process.is_none_or(|process| process == std::process::id().to_string());
    let micros = time?.parse().ok().filter(|micros| *micros > 0 && is_ours)?;
    Some(Duration::from_micros(micros))
}

/// The gateway as a service of its manager.
#[derive(Debug)]
pub(crate) struct Service {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    said: Mutex<Said>,
    has_stopped: AtomicBool,
}

/// Parts of the status line.
#[derive(Debug, Default)]
struct Said {
    exports: String,
    /// Description of how, and to which clients, exports are served.
    to: String,
    reload_failed: bool,
    reading: usize,
}

impl Said {
    fn line(&self) -> String {
        let Self { exports, to, reload_failed, reading } = self;
        let failed = if *reload_failed { "; not reloaded, see the log" } else { "" };
        format!("{reading} reading{failed}; serving {exports} {to}")
    }
}

impl Service {
    /// Creates the service. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't register the socket.
    pub(crate) fn new(manager: Manager) -> io::Result<Self> {
        Ok(Self {
            socket: manager.socket.map(UnixDatagram::from_std).transpose()?,
            watchdog: manager.watchdog,
            said: Mutex::default(),
            has_stopped: AtomicBool::new(false),
        })
    }

    /// Runs `work` that precedes readiness. Requests more time from the manager as long as
    /// `progress` changes, so that a startup that hangs still times out.
    pub(crate) async fn starting<T, P: PartialEq>(
        &self,
        progress: impl Fn() -> P,
        work: impl Future<Output = T>,
    ) -> T {
        let mut work = std::pin::pin!(work);
        let mut ticks = interval_at(tokio::time::Instant::now() + EXTEND_EVERY, EXTEND_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = progress();
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = ticks.tick() => {}
            }
            let now = progress();
            if now != last {
                self.tell(&messages::extend(EXTEND_BY)).await;
            }
            last = now;
        }
    }

    /// Reports readiness, with what is served and to which clients.
    pub(crate) async fn ready(&self, exports: String, to: String) {
        let line = self.change(|said| (said.exports, said.to) = (exports, to));
        self.tell(&messages::ready(&line)).await;
    }

    /// Reports that a reload begins.
    pub(crate) async fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let now = Duration::new(
            u64::try_from(now.tv_sec).unwrap_or_default(),
            u32::try_from(now.tv_nsec).unwrap_or_default(),
        );
        self.tell(&messages::reloading(now)).await;
    }

    /// Reports the end of a reload, with the clients that are now served, or `None` if it failed.
    pub(crate) async fn reloaded(&self, to: Option<String>) {
        let line = self.change(|said| {
            said.reload_failed = to.is_none();
            said.to = to.unwrap_or(std::mem::take(&mut said.to));
        });
        self.tell(&messages::ready(&line)).await;
    }

    /// Updates what is served in the status, without sending it.
    pub(crate) fn serves(&self, exports: String) {
        self.change(|said| said.exports = exports);
    }

    /// Reports that the service is stopping. Later calls do nothing.
    pub(crate) async fn stopping(&self) {
        if !self.has_stopped.swap(true, Ordering::Relaxed) {
            self.tell(&messages::stopping()).await;
        }
    }

    /// Sends the status whenever it changes, from now on; `reading` returns the number of clients
    /// that read.
    pub(crate) async fn keep_status(&self, reading: impl Fn() -> usize) {
        if self.socket.is_none() {
            return;
        }
        let mut ticks = interval(STATUS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = self.change(|_| ());
        loop {
            ticks.tick().await;
            if self.has_stopped.load(Ordering::Relaxed) {
                return;
            }
            let line = self.change(|said| said.reading = reading());
            if line != last {
                self.tell(&messages::status(&line)).await;
                last = line;
            }
        }
    }

    /// Sends watchdog notifications, at half the interval that the manager expects, as long as
    /// `probe` returns true in time.
    pub(crate) async fn keep_alive<F: Future<Output = bool>>(&self, probe: impl Fn() -> F) {
        let (Some(_), Some(time)) = (&self.socket, self.watchdog) else { return };
        let half = time / 2;
        // Leaves time to notify before the interval is over, even if the probe takes as long as
        // it may.
        let patience = half.mul_f32(0.9);
        let mut ticks = interval(half);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            match timeout(patience, probe()).await {
                Ok(true) => self.tell(&messages::alive()).await,
                Ok(false) | Err(_) => tracing::error!(
                    "this program is stuck: for {patience:?} no thread that decodes has answered, so \
                     the service manager isn't told that all is well",
                ),
            }
        }
    }

    /// Changes parts of the status, and returns the status line.
    fn change(&self, change: impl FnOnce(&mut Said)) -> String {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut said);
        said.line()
    }

    async fn tell(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        match timeout(PATIENCE, socket.send(message.as_bytes())).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::debug!("the service manager wasn't told: {error}"),
            Err(_) => tracing::debug!("the service manager doesn't listen"),
        }
    }
}

#[cfg(test)]
mod tests;
