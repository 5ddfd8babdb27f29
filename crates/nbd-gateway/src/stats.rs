//! Counters and state of a gateway that its report shows.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nbd_telemetry::Tally;

use crate::client_expiry::ClientExpiries;
use crate::reloads::ReloadCounters;

/// Counters of a gateway, its phase and its heartbeat.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    /// Connections refused before a byte was sent, by reason.
    pub(crate) refusals: Tally,
    /// Connections that were admitted and failed later, by reason.
    pub(crate) failures: Tally,
    /// Failed TLS handshakes, by cause.
    pub(crate) handshake_failures: Tally,
    pub(crate) reloads: ReloadCounters,
    pub(crate) client_expiries: ClientExpiries,
    pub(crate) heartbeat: Heartbeat,
    /// Listening addresses, as text.
    pub(crate) listen: Vec<String>,
    phase: AtomicU8,
}

/// Phase of a gateway's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GatewayPhase {
    Starting,
    Serving,
    Draining,
}

impl Stats {
    pub(crate) fn new(listen: Vec<String>) -> Self {
        Self { listen, ..Self::default() }
    }

    pub(crate) fn phase(&self) -> GatewayPhase {
        match self.phase.load(Ordering::Relaxed) {
            0 => GatewayPhase::Starting,
            1 => GatewayPhase::Serving,
            _ => GatewayPhase::Draining,
        }
    }

    pub(crate) fn set_phase(&self, phase: GatewayPhase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }
}

/// Heartbeat of the serving threads, for the liveness check.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    started: Instant,
    /// Time of the last beat, in milliseconds since `started`.
    last: AtomicU64,
}

impl Heartbeat {
    pub(crate) fn beat(&self) {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
    }

    /// Returns the time since the last beat.
    pub(crate) fn elapsed(&self) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last)
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self { started: Instant::now(), last: AtomicU64::new(0) }
    }
}
