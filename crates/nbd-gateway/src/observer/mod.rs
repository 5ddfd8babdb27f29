//! The observer of connections: it is notified of each event once, updates the counters, emits the
//! audit event, and writes the log line.

mod events;

use std::sync::Arc;
use std::time::Duration;

use nbd_server::wire::Printable;
use nbd_server::{CloseReason, SessionError, SessionStats};
use nbd_telemetry::{RateLimit, escape};
use tokio::time::Instant;

use crate::access::Reason;
use crate::audit::{Audit, rounded_seconds};
use crate::outcome::{ConnectionFailure, ConnectionOutcome, LEFT_EARLY, Refusal, close_label};
use crate::proxy::ReadHeaderError;
use crate::registry::RegistryEntry;
use crate::route::Route;
use crate::stats::Stats;

/// Maximum number of audit events per connection about denied exports, and as many about missing
/// ones. Further requests are only counted: sending one costs the client less than the audit would
/// have to write.
const MAX_LOOKUP_EVENTS: u64 = 16;

/// Feeds log, counters and audit with the events of all connections.
#[derive(Debug)]
pub(crate) struct Observer {
    audit: Audit,
    stats: Arc<Stats>,
    log_limits: LogLimits,
}

/// Rate limits on log lines that peers can cause at will. Refused peers have their own limit, so
/// they can't suppress the lines about clients that are served.
#[derive(Debug)]
struct LogLimits {
    refusals: RateLimit,
    failures: RateLimit,
    sessions: RateLimit,
    /// Requests for exports that don't exist.
    lookups: RateLimit,
}

/// Encryption of a client's stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamEncryption {
    /// TLS version as text, `none` in clear.
    pub(crate) version: &'static str,
    /// IANA name of the cipher suite, if the stream is encrypted.
    pub(crate) cipher: Option<&'static str>,
}

impl StreamEncryption {
    /// Returns the TLS version, if the stream is encrypted.
    pub(crate) fn tls(self) -> Option<&'static str> {
        self.cipher.map(|_| self.version)
    }
}

impl Observer {
    pub(crate) fn new(audit: Audit, stats: Arc<Stats>) -> Self {
        Self { audit, stats, log_limits: LogLimits::new() }
    }

    /// A connection was refused. `next_id` is called to number it, unless it is a load balancer's
    /// own.
    pub(crate) fn refused(&self, route: Route, refusal: &Refusal, next_id: impl FnOnce() -> u64) {
        let Route { peer, via, is_health_check } = route;
        let via = via.map(tracing::field::display);
        let (reason, cause) = (refusal.label(), refusal.cause());
        // Health checks arrive every other second, and most of them only connect.
        let only_connected = matches!(refusal, Refusal::ProxyHeader(ReadHeaderError::ClosedAtOnce));
        if is_health_check || only_connected {
            tracing::debug!(%peer, via, reason, cause, health_check = true, "health check: {refusal}");
            return;
        }
        self.stats.refusals.count(reason);
        let id = next_id();
        self.audit.emit(|| events::refused(id, route, refusal));
        log_limited(&self.log_limits.refusals, |held_back| {
            tracing::warn!(id, %peer, via, reason, cause, held_back, "connection refused: {refusal}");
        });
    }

    /// A client starts reading `export`. `decision` returns the rule that allows it and the number
    /// of its policy.
    pub(crate) fn reading(
        &self,
        entry: &RegistryEntry,
        encryption: StreamEncryption,
        export: &str,
        decision: impl FnOnce() -> (Reason, u64),
    ) {
        log_limited(&self.log_limits.sessions, |held_back| {
            tracing::info!(tls = encryption.version, held_back, "reading");
        });
        self.audit.emit(|| events::reading(entry, encryption, export, decision()));
    }

    /// Returns true if [`export_denied`](Self::export_denied) has an effect beyond counting.
    pub(crate) fn wants_denials(&self) -> bool {
        self.audit.is_enabled()
    }

    /// A client asked for an export that it may not open.
    pub(crate) fn export_denied(&self, entry: &RegistryEntry, export: &str, why: &Reason) {
        if entry.count_denied() <= MAX_LOOKUP_EVENTS {
            self.audit.emit(|| events::export_denied(entry, export, why));
        }
    }

    /// A client asked for an export that doesn't exist; `reason` is the label of why.
    pub(crate) fn export_missing(&self, entry: &RegistryEntry, name: &[u8], reason: &'static str) {
        if entry.count_missing() > MAX_LOOKUP_EVENTS {
            return;
        }
        self.audit.emit(|| events::export_missing(entry, name, reason));
        log_limited(&self.log_limits.lookups, |held_back| {
            let name = Printable(name).to_string();
            let name = escape::text(&name);
            tracing::info!(reason, held_back, "export not found: {name}");
        });
    }

    /// A connection was admitted and accepted at the time `started`. Call
    /// [`ConnectionAudit::ended`] on the returned value; dropping it records that the connection
    /// was dropped.
    pub(crate) fn admitted<'a>(
        &'a self,
        entry: &'a RegistryEntry,
        started: Instant,
    ) -> ConnectionAudit<'a> {
        ConnectionAudit { observer: self, entry, started, has_ended: false }
    }
}

/// Observation of an admitted connection, whose end is recorded in any case.
pub(crate) struct ConnectionAudit<'a> {
    observer: &'a Observer,
    entry: &'a RegistryEntry,
    started: Instant,
    has_ended: bool,
}

impl ConnectionAudit<'_> {
    /// Records how the connection ended.
    pub(crate) fn ended(mut self, outcome: &Result<ConnectionOutcome, ConnectionFailure>) {
        self.has_ended = true;
        let duration = self.started.elapsed();
        self.observer.audit.emit(|| events::ended(self.entry, duration, outcome));
        // One unit, so that programs can compare the values of a log.
        let seconds = rounded_seconds(duration);
        match outcome {
            Ok(ConnectionOutcome::LeftEarly) => {
                let how = LEFT_EARLY;
                tracing::debug!(how, duration = seconds, "disconnected without choosing an export");
            }
            Ok(ConnectionOutcome::Served(stats)) => self.log_served(stats, seconds),
            // The client hadn't chosen an export, so the shutdown interrupted nothing.
            Err(ConnectionFailure::ShuttingDown) if self.entry.export().is_none() => {
                let how = ConnectionFailure::ShuttingDown.label();
                tracing::debug!(how, duration = seconds, "connection closed: server shutdown");
            }
            Err(
                failure @ (ConnectionFailure::ShuttingDown | ConnectionFailure::ShutdownDeadline),
            ) => self.log_shutdown(failure, seconds),
            // A health check often closes the connection as soon as it is established.
            Err(ConnectionFailure::Session(SessionError::Io(failure)))
                if self.entry.route.is_health_check =>
            {
                tracing::debug!(health_check = true, "health check: {failure}");
            }
            Err(failure) => self.count_and_log(failure, seconds),
        }
    }

    fn log_served(&self, stats: &SessionStats, duration: f64) {
        let SessionStats { close_reason, requests, bytes, unanswered } = *stats;
        log_limited(&self.observer.log_limits.sessions, |held_back| {
            let how = close_label(close_reason);
            let sentence = match close_reason {
                CloseReason::ShutDown => "connection closed: server shutdown",
                CloseReason::IdleTimeout => "connection closed: idle timeout",
                CloseReason::Disconnected | CloseReason::StreamClosed => "disconnected",
            };
            let unanswered = Some(unanswered).filter(|count| *count > 0);
            tracing::info!(how, requests, bytes, unanswered, duration, held_back, "{sentence}");
        });
    }

    fn log_shutdown(&self, failure: &ConnectionFailure, duration: f64) {
        log_limited(&self.observer.log_limits.sessions, |held_back| {
            let how = failure.label();
            let sentence = match failure {
                ConnectionFailure::ShutdownDeadline => {
                    "connection dropped: requests were in flight at the shutdown deadline"
                }
                _ => "connection closed: server shutdown",
            };
            let totals = self.entry.activity.totals();
            let (requests, bytes) = (totals.requests.total(), totals.bytes);
            let unanswered = Some(self.entry.activity.in_flight()).filter(|count| *count > 0);
            tracing::info!(how, requests, bytes, unanswered, duration, held_back, "{sentence}");
        });
    }

    fn count_and_log(&self, failure: &ConnectionFailure, duration: f64) {
        let stats = &self.observer.stats;
        let (reason, cause) = (failure.label(), failure.cause());
        stats.failures.count(reason);
        if let ConnectionFailure::TlsHandshake(failure) = failure {
            stats.handshake_failures.count(failure.cause.label());
        }
        log_limited(&self.observer.log_limits.failures, |held_back| {
            let failure = failure.to_string();
            let failure = escape::text(&failure);
            tracing::warn!(reason, cause, duration, held_back, "connection closed: {failure}");
        });
    }
}

impl Drop for ConnectionAudit<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            self.observer.audit.emit(|| events::dropped(self.entry, self.started.elapsed()));
        }
    }
}

impl LogLimits {
    fn new() -> Self {
        let limit = || RateLimit::new(100, Duration::from_millis(100));
        Self { refusals: limit(), failures: limit(), sessions: limit(), lookups: limit() }
    }
}

/// Logs something unless the rate limit suppresses it. `line` gets the number of lines suppressed
/// since the last one, if any.
fn log_limited(limit: &RateLimit, line: impl FnOnce(Option<u64>)) {
    if let Some(suppressed) = limit.allow() {
        line(suppressed.field());
    }
}
