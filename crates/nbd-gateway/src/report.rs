//! Status report of a gateway, as the monitor serves it: plain numbers and strings. Times are Unix
//! timestamps in seconds; durations are in seconds. Reports can be deserialized, too: missing members
//! take their default, and unknown ones are ignored, since another version may have written them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;
use serde::{Deserialize, Serialize};

use crate::access::Timestamp;
use crate::client_expiry::ExpiryState;
use crate::control::Control;
use crate::registry::{ConnectionStatus, RegistrySnapshot};
use crate::stats::{GatewayPhase, Stats};
use crate::tls::{Expiry, ServerTls, TlsVersion};
use nbd_server::{ExportCatalog, ExportSummary, LatencyHistogram, MetricsTotals, RequestCounts};

/// Maximum number of connections, and of exports, that are listed individually. Nobody reads a
/// longer list, and clients must not be able to grow it at will.
pub const MAX_LISTED: usize = 1000;

/// Maximum number of clients listed whose certificates expire soon.
pub const MAX_EXPIRING: usize = 20;

/// Labels of the reasons for refusing a connection before a byte is sent. Each has a counter from
/// the start, so that monitoring sees its first increment.
pub const REFUSALS: [&str; 9] = [
    "address",
    "not_local",
    "connection_rate",
    "handshakes",
    "handshakes_per_address",
    "handshakes_per_network",
    "connections",
    "proxy_header",
    "proxy_address",
];

/// Labels of the reasons for which admitted connections fail.
pub const FAILURES: [&str; 11] = [
    "session",
    "tls_handshake",
    "credentials",
    "not_allowed",
    "dismissed",
    "deadline",
    "connections",
    "connections_per_address",
    "connections_per_identity",
    "tls_key_limit",
    "panicked",
];

/// Counters by label.
pub type LabelCounts = BTreeMap<Cow<'static, str>, u64>;

/// Snapshot of a gateway's status.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GatewayReport {
    /// Reason why no client can be served at the moment; `None` if the gateway is ready.
    #[serde(skip)]
    pub not_ready_reason: Option<&'static str>,
    /// Time since the last heartbeat of the serving threads.
    #[serde(skip)]
    pub since_heartbeat: Duration,
    /// Addresses that the gateway listens on.
    pub listen: Vec<String>,
    /// TLS settings; `None` if connections are in clear.
    pub tls: Option<TlsReport>,
    /// Certificates of the clients that connected within the last seven days.
    pub client_certificates: ClientCertificatesReport,
    /// Open connections, oldest first, at most [`MAX_LISTED`].
    pub connections: Vec<ConnectionReport>,
    /// Counters over all connections.
    pub connections_total: ConnectionCounts,
    /// Exports that are known without opening an archive, and those that were read: at most
    /// [`MAX_LISTED`], plus one entry that aggregates all others.
    pub exports: Vec<ExportReport>,
    /// Outcomes of configuration reloads.
    pub reloads: ReloadsReport,
    /// Bytes of the shared memory budget that are held by replies in flight.
    #[serde(skip)]
    pub in_flight: u64,
    /// Size of the shared memory budget, in bytes.
    #[serde(skip)]
    pub in_flight_limit: u64,
}

/// TLS settings of the gateway.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct TlsReport {
    /// Oldest TLS version that is accepted, if known.
    pub min_version: Option<Cow<'static, str>>,
    /// Client certificates: `none`, `optional` or `required`.
    pub client_certificates: Cow<'static, str>,
    /// Expiry of the server's certificate.
    pub certificate_expires: Option<f64>,
    /// Earliest expiry among the CAs that client certificates are verified with.
    pub client_ca_expires: Option<f64>,
    /// Earliest expiry among the revocation lists. From then on, clients of that list's CA are
    /// refused.
    pub client_crl_expires: Option<f64>,
}

/// Expiry of the certificates of clients that connected within the last seven days, at most
/// [`MAX_LISTED`]. Of each identity, the certificate presented last counts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ClientCertificatesReport {
    /// Earliest expiry.
    pub earliest_expiry: Option<f64>,
    /// Number of certificates that needn't be renewed yet.
    pub valid: u64,
    /// Number of certificates that ought to have been renewed
    /// ([`is_renewal_due`](crate::tls::is_renewal_due)).
    pub expires_soon: u64,
    /// Number of certificates that have expired since the client connected.
    pub expired: u64,
    /// Clients whose certificates expire soon or have expired, the earliest first, at most
    /// [`MAX_EXPIRING`].
    pub expiring: Vec<ExpiringClient>,
}

/// A client whose certificate expires soon or has expired.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExpiringClient {
    /// Identity in the certificate.
    pub identity: String,
    /// SHA-256 of the certificate, in hexadecimal digits.
    pub sha256: String,
    /// Time at which the certificate, or an intermediate one that the client sent, expires.
    pub expires: f64,
    /// Time at which the client connected last.
    pub last_seen: f64,
}

/// Status of one connection.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectionReport {
    /// Number of the connection, as in the log.
    pub id: u64,
    /// `negotiating` or `reading`.
    pub state: Cow<'static, str>,
    /// Address of the client.
    pub peer: String,
    /// Load balancer that forwarded it, if any.
    pub via: Option<String>,
    /// Identity in the client's certificate, if it has presented one.
    pub identity: Option<String>,
    /// Export that it reads.
    pub export: Option<String>,
    /// TLS version of the connection, if it is encrypted.
    pub tls: Option<Cow<'static, str>>,
    /// Expiry of the client's certificate, if it has presented one.
    pub certificate_expires: Option<f64>,
    /// Time at which it was admitted.
    pub since: f64,
    /// Number of requests received.
    pub requests: u64,
    /// Bytes of data in replies to reads.
    pub bytes: u64,
    /// Number of requests in flight: being processed, or with a reply that isn't fully sent.
    pub in_flight: u64,
    /// Number of requests that were answered with an error.
    pub errors: u64,
}

/// Counters over all connections.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ConnectionCounts {
    /// Connections that are negotiating now.
    pub negotiating: u64,
    /// Connections that are reading an export now.
    pub reading: u64,
    /// Connections admitted by their address so far.
    pub accepted: u64,
    /// Admitted connections that went on to read an export.
    pub served: u64,
    /// Connections refused before a byte was sent, by reason.
    pub refused: LabelCounts,
    /// Connections that were admitted and failed later, by reason.
    pub failed: LabelCounts,
    /// Failed TLS handshakes, by cause. Each is counted in `failed` too, as `tls_handshake`.
    pub handshake_failures: LabelCounts,
}

/// Status of one export.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExportReport {
    /// Name of the export.
    pub name: String,
    /// Description of the export, one line.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Number of connections that read it now.
    pub readers: u64,
    /// Number of requests received, by command.
    pub requests: RequestCounts,
    /// Bytes of data in replies to reads.
    pub bytes: u64,
    /// Number of requests that were answered with an error.
    pub errors: u64,
    /// Number of error replies, by NBD error code.
    pub errors_by_code: LabelCounts,
    /// Latencies of reads ([`LatencyHistogram`]).
    pub read_seconds: DurationHistogram,
    /// Number of requests that were delayed by the rate limit.
    pub throttled: u64,
    /// Total time that these requests were delayed, in seconds.
    pub throttled_seconds: f64,
}

/// Cumulative histogram of durations, in seconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DurationHistogram {
    /// Number of observations.
    pub count: u64,
    /// Sum of all observations, in seconds.
    pub sum: f64,
    /// Upper bound of each bucket in seconds, and the number of observations up to it, those of
    /// lower buckets included.
    pub buckets: Vec<(f64, u64)>,
}

/// Activity of all connections, open ones and those that have ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ActivityTotals {
    /// Open connections.
    pub connections: u64,
    /// Number of requests received.
    pub requests: u64,
    /// Bytes of data in replies to reads.
    pub bytes: u64,
    /// Number of requests that were answered with an error.
    pub errors: u64,
}

impl ActivityTotals {
    /// Adds the activity of a connection or an export.
    pub(crate) fn add(&mut self, done: &MetricsTotals) {
        self.requests += done.requests.total();
        self.bytes += done.bytes;
        self.errors += done.errors.total();
    }
}

/// Outcomes of configuration reloads.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ReloadsReport {
    /// Number of reloads that took effect.
    pub succeeded: u64,
    /// Number of reloads that failed; the configuration stayed as it was.
    pub failed: u64,
    /// Time of the last attempt.
    pub last: Option<f64>,
    /// Error of the last attempt, if it failed.
    pub last_error: Option<String>,
}

impl<X: ExportCatalog> Control<X> {
    /// Returns the activity of all connections. It takes far less time than
    /// [`report`](Self::report).
    pub fn activity(&self) -> ActivityTotals {
        self.registry.activity()
    }

    /// Takes a snapshot of the gateway's status.
    pub fn report(&self) -> GatewayReport {
        let Self { policy, exports, registry, budget, stats, .. } = self;
        let snapshot = registry.snapshot();
        let exports = exports.load();
        let (in_flight, in_flight_limit) = budget.in_use();
        GatewayReport {
            not_ready_reason: match stats.phase() {
                GatewayPhase::Starting => Some("starting"),
                GatewayPhase::Draining => Some("shutting down"),
                GatewayPhase::Serving => exports.unready_reason(),
            },
            since_heartbeat: stats.heartbeat.elapsed(),
            listen: stats.listen.clone(),
            tls: policy.with(|it| it.policy.tls.as_ref().map(TlsReport::of)),
            client_certificates: client_certificates_report(stats, Timestamp::now()),
            connections_total: connection_counts(stats, &snapshot),
            exports: export_reports(&snapshot, exports.summaries()),
            connections: connection_reports(&snapshot),
            reloads: reloads_report(stats),
            in_flight,
            in_flight_limit,
        }
    }
}

impl TlsReport {
    fn of(tls: &ServerTls) -> Self {
        let Expiry { certificate, client_ca, client_crl } = tls.expiry();
        let seconds = |time: Option<UnixTime>| time.map(|time| seconds(time.as_secs()));
        Self {
            min_version: tls.min_version().map(|oldest| match oldest {
                TlsVersion::V1_2 => "1.2".into(),
                TlsVersion::V1_3 => "1.3".into(),
            }),
            client_certificates: match (tls.requests_certificates(), tls.requires_certificates()) {
                (false, _) => "none".into(),
                (true, false) => "optional".into(),
                (true, true) => "required".into(),
            },
            certificate_expires: seconds(certificate),
            client_ca_expires: seconds(client_ca),
            client_crl_expires: seconds(client_crl),
        }
    }
}

impl From<LatencyHistogram> for DurationHistogram {
    fn from(latencies: LatencyHistogram) -> Self {
        let mut so_far = 0;
        let buckets = latencies.buckets().map(|(bound, count)| {
            so_far += count;
            (bound.as_secs_f64(), so_far)
        });
        let buckets = buckets.collect();
        Self { count: latencies.count(), sum: latencies.sum.as_secs_f64(), buckets }
    }
}

fn connection_counts(stats: &Stats, snapshot: &RegistrySnapshot) -> ConnectionCounts {
    let reading = snapshot.connections.iter().filter(|one| one.reading.is_some()).count() as u64;
    ConnectionCounts {
        negotiating: snapshot.connections.len() as u64 - reading,
        reading,
        accepted: snapshot.accepted,
        served: snapshot.served,
        refused: label_counts(stats.refusals.so_far().0),
        failed: label_counts(stats.failures.so_far().0),
        handshake_failures: label_counts(stats.handshake_failures.so_far().0),
    }
}

fn client_certificates_report(stats: &Stats, now: Timestamp) -> ClientCertificatesReport {
    let recent = stats.client_expiries.recent(now);
    let count = |wanted| recent.iter().filter(|(_, state)| *state == wanted).count() as u64;
    let expiring = recent.iter().filter(|(_, state)| *state != ExpiryState::Valid);
    ClientCertificatesReport {
        earliest_expiry: recent.first().map(|(client, _)| seconds(client.expires.0)),
        valid: count(ExpiryState::Valid),
        expires_soon: count(ExpiryState::ExpiresSoon),
        expired: count(ExpiryState::Expired),
        expiring: expiring
            .take(MAX_EXPIRING)
            .map(|(client, _)| ExpiringClient {
                identity: client.identity.clone(),
                sha256: client.sha256.clone(),
                expires: seconds(client.expires.0),
                last_seen: seconds(client.last_seen.0),
            })
            .collect(),
    }
}

fn reloads_report(stats: &Stats) -> ReloadsReport {
    let so_far = stats.reloads.snapshot();
    ReloadsReport {
        succeeded: so_far.succeeded,
        failed: so_far.failed,
        last: so_far.last.map(unix_seconds),
        last_error: so_far.last_error,
    }
}

fn connection_reports(snapshot: &RegistrySnapshot) -> Vec<ConnectionReport> {
    let one = |one: &ConnectionStatus| ConnectionReport {
        id: one.id,
        state: if one.reading.is_some() { "reading".into() } else { "negotiating".into() },
        peer: one.route.peer.to_string(),
        via: one.route.via.map(|balancer| balancer.to_string()),
        identity: one.identity.clone(),
        export: one.reading.as_ref().map(|reading| reading.export.clone()),
        tls: one.tls.map(Cow::Borrowed),
        certificate_expires: one.certificate_expires.map(|expires| seconds(expires.0)),
        since: unix_seconds(one.since),
        requests: one.done.requests.total(),
        bytes: one.done.bytes,
        in_flight: one.in_flight,
        errors: one.done.errors.total(),
    };
    snapshot.connections.iter().take(MAX_LISTED).map(one).collect()
}

/// Aggregates activity by export: exports that are offered, in their order, then others that were
/// read. Exports that were read are always listed, since their number is bounded.
fn export_reports(snapshot: &RegistrySnapshot, offered: Vec<ExportSummary>) -> Vec<ExportReport> {
    let mut read: BTreeMap<&str, (&ExportSummary, u64, MetricsTotals)> = snapshot
        .exports
        .iter()
        .map(|(name, it)| (name.as_str(), (&it.export, 0, it.done)))
        .collect();
    for one in &snapshot.connections {
        if let Some(reading) = &one.reading
            && let Some((_, readers, done)) = read.get_mut(reading.label.as_str())
        {
            *readers += 1;
            *done += one.done;
        }
    }
    let room = MAX_LISTED.saturating_sub(read.len());
    let mut unread = 0;
    let mut all = Vec::with_capacity(read.len());
    for export in offered {
        match read.remove(export.name.as_str()) {
            Some((_, readers, done)) => all.push(export_report(export, readers, &done)),
            None if unread < room => {
                unread += 1;
                all.push(export_report(export, 0, &MetricsTotals::default()));
            }
            None => {}
        }
    }
    all.extend(
        read.into_values()
            .map(|(export, readers, done)| export_report(export.clone(), readers, &done)),
    );
    all
}

fn export_report(export: ExportSummary, readers: u64, done: &MetricsTotals) -> ExportReport {
    ExportReport {
        name: export.name,
        description: export.description,
        size: export.size,
        readers,
        requests: done.requests,
        bytes: done.bytes,
        errors: done.errors.total(),
        errors_by_code: label_counts(done.errors.by_code().filter(|(_, count)| *count > 0)),
        read_seconds: done.read_latency.into(),
        throttled: done.throttled,
        throttled_seconds: done.throttled_for.as_secs_f64(),
    }
}

/// Collects counters whose labels are constants.
pub fn label_counts(counts: impl IntoIterator<Item = (&'static str, u64)>) -> LabelCounts {
    counts.into_iter().map(|(label, count)| (label.into(), count)).collect()
}

/// Converts a time to seconds since the Unix epoch.
pub fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn seconds(whole: u64) -> f64 {
    Duration::from_secs(whole).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Peer;
    use crate::registry::ConnectionRegistry;
    use crate::route::Route;
    use nbd_server::{Export, ReadError, Segment, Span};

    struct Named(String);

    impl Export for Named {
        fn name(&self) -> &str {
            &self.0
        }

        fn description(&self) -> &'static str {
            "nothing"
        }

        fn size(&self) -> u64 {
            0
        }

        async fn read(&self, _: Span, _: impl FnMut(u64, Segment) + Send) -> Result<(), ReadError> {
            Ok(())
        }
    }

    fn named(name: &str) -> Named {
        Named(name.to_owned())
    }

    #[test]
    fn exports_beyond_the_cap_are_aggregated() {
        let registry = ConnectionRegistry::default();
        let route = Route::direct(Peer::Unix);
        let mut staying = Vec::new();
        for number in 0..2 * MAX_LISTED as u64 {
            let registration = registry.register(number, route);
            registry.start_reading(&registration.entry, &named(&format!("{number}.hxz")));
            if number % 2 == 0 {
                staying.push(registration);
            }
        }
        let snapshot = registry.snapshot();
        assert_eq!((snapshot.accepted, snapshot.served), (2000, 2000));
        assert_eq!(connection_reports(&snapshot).len(), MAX_LISTED);
        let offered =
            (0..5000).map(|number| ExportSummary::name_only(&format!("offered-{number}")));
        let exports = export_reports(&snapshot, offered.collect());
        assert_eq!(exports.len(), MAX_LISTED + 1);
        let others = exports.iter().find(|export| export.name == "other").unwrap();
        assert_eq!((others.readers, others.size), (500, None));
        assert_eq!(exports.iter().map(|export| export.readers).sum::<u64>(), 1000);
    }

    /// Activity is counted once, whether the connection is still open or not.
    #[test]
    fn activity_remains_after_the_connection_ends() {
        let registry = ConnectionRegistry::default();
        let reads = || {
            let export =
                export_reports(&registry.snapshot(), vec![ExportSummary::name_only("x")]).remove(0);
            (export.requests.read, export.readers)
        };
        assert_eq!(reads(), (0, 0));
        for number in 1..=3 {
            let registration = registry.register(number, Route::direct(Peer::Unix));
            registry.start_reading(&registration.entry, &named("x"));
            registration
                .entry
                .activity
                .set_requests(RequestCounts { read: 10, ..RequestCounts::default() });
            assert_eq!(reads(), (10 * number, 1));
            let activity = |connections| ActivityTotals {
                connections,
                requests: 10 * number,
                ..ActivityTotals::default()
            };
            assert_eq!(registry.activity(), activity(1));
            drop(registration);
            assert_eq!(reads(), (10 * number, 0));
            assert_eq!(registry.activity(), activity(0));
        }
    }
}
