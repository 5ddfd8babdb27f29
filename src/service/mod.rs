//! What the service manager is told (`sd_notify(3)`): when clients are served, what they are
//! served, and that all is well. Where there is no manager, nobody is told.

mod messages;

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hexz_nbd::escape;
use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixDatagram;
use tokio::time::{MissedTickBehavior, interval, interval_at, timeout};

/// How long one message may take: a manager that doesn't read must not hold up anything.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often the status may change.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// While the start takes long and gets on: how often it is asked for more time, and for how
/// much from then on. Managers wait 90 seconds if they aren't asked.
const EXTEND_EVERY: Duration = Duration::from_secs(10);
const EXTEND_BY: Duration = Duration::from_secs(60);

/// The way to the manager. It is found before the sandbox is entered, where no socket can be
/// made any more.
#[derive(Debug, Default)]
pub(crate) struct Manager {
    socket: Option<std::os::unix::net::UnixDatagram>,
    /// Within which time it wants to hear again and again that all is well.
    watchdog: Option<Duration>,
}

impl Manager {
    /// As the environment names it. One that can't be reached is a warning: whoever started
    /// this program will see to it.
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

/// The watchdog's time, if there is one and it is for this process.
fn watchdog(time: Option<String>, process: Option<String>) -> Option<Duration> {
    let is_ours = process.is_none_or(|process| process == std::process::id().to_string());
    let micros = time?.parse().ok().filter(|micros| *micros > 0 && is_ours)?;
    Some(Duration::from_micros(micros))
}

/// This program as its manager sees it.
#[derive(Debug)]
pub(crate) struct Service {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
    said: Mutex<Said>,
    has_stopped: AtomicBool,
}

/// What the status line is made of.
#[derive(Debug, Default)]
struct Said {
    exports: String,
    /// How, and to whom.
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
    /// Call it within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't watch the socket.
    pub(crate) fn new(manager: Manager) -> io::Result<Self> {
        Ok(Self {
            socket: manager.socket.map(UnixDatagram::from_std).transpose()?,
            watchdog: manager.watchdog,
            said: Mutex::default(),
            has_stopped: AtomicBool::new(false),
        })
    }

    /// Does `work` that has to be done before clients are served. It may take as long as it
    /// gets on, of which `progress` is a sign: a start that hangs is to fail in time.
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

    /// Clients are served: what, and to whom.
    pub(crate) async fn ready(&self, exports: String, to: String) {
        let line = self.change(|said| (said.exports, said.to) = (exports, to));
        self.tell(&messages::ready(&line)).await;
    }

    /// Files are about to be read anew.
    pub(crate) async fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        let now = Duration::new(
            u64::try_from(now.tv_sec).unwrap_or_default(),
            u32::try_from(now.tv_nsec).unwrap_or_default(),
        );
        self.tell(&messages::reloading(now)).await;
    }

    /// Files have been read anew, and to whom is served now; or everything stays as it was.
    pub(crate) async fn reloaded(&self, to: Option<String>) {
        let line = self.change(|said| {
            said.reload_failed = to.is_none();
            said.to = to.unwrap_or(std::mem::take(&mut said.to));
        });
        self.tell(&messages::ready(&line)).await;
    }

    /// What is served now.
    pub(crate) fn serves(&self, exports: String) {
        self.change(|said| said.exports = exports);
    }

    /// No more clients are served. Only the first time counts.
    pub(crate) async fn stopping(&self) {
        if !self.has_stopped.swap(true, Ordering::Relaxed) {
            self.tell(&messages::stopping()).await;
        }
    }

    /// Keeps the status as it should be, from now on; `reading` says how many clients read.
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

    /// Says that all is well, twice within the time in which the manager wants to hear it, for
    /// as long as `probe` comes to a good end in time.
    pub(crate) async fn keep_alive<F: Future<Output = bool>>(&self, probe: impl Fn() -> F) {
        let (Some(_), Some(time)) = (&self.socket, self.watchdog) else { return };
        let half = time / 2;
        // It hears of it before its time is over, even if the probe takes as long as it may.
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

    /// Changes what the status says, and says it.
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
