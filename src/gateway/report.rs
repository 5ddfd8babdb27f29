//! What a gateway is doing and has done, for whoever watches it: plain numbers and words, in
//! the form in which the monitor shows them. Times are seconds of the Unix clock, or seconds.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use rustls::pki_types::UnixTime;
use serde::Serialize;

use super::live::{One, Seen};
use super::tls::{Expiry, ServerTls, TlsVersion};
use super::{Control, Phase, Shared};
use crate::nbd::{Done, Latencies, Offer, Offered, Requests};

/// How many connections and how many exports are told of one by one. A list that is longer
/// is nothing that anybody reads, and nobody is to make it longer at will.
pub const MAX_LISTED: usize = 1000;

/// Reasons why connections are closed before a byte is sent: there is a number for each from
/// the start on. (So that whoever watches sees the first one come.)
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

/// Reasons why connections fail later.
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

/// All of it, at one moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Why nobody can be served just now; `None` if everybody can.
    #[serde(skip)]
    pub unready: Option<&'static str>,
    /// How long the threads that serve have not given a sign of life.
    #[serde(skip)]
    pub silent_for: Duration,
    /// Where clients come in.
    pub listen: Vec<String>,
    /// How they are protected; `None` is not at all.
    pub tls: Option<TlsReport>,
    /// At most [`MAX_LISTED`] of those that there are, the older ones first.
    pub connections: Vec<ConnectionReport>,
    /// All of them.
    pub connections_total: ConnectionCounts,
    /// Those that are known without opening an archive, and those that were read: at most
    /// [`MAX_LISTED`], and one of all others together.
    pub exports: Vec<ExportReport>,
    /// How often files were read anew.
    pub reloads: ReloadsReport,
    /// Of the memory that connections share, what answers on their way hold, in bytes.
    #[serde(skip)]
    pub in_flight: u64,
    /// How much of that memory there is, in bytes.
    #[serde(skip)]
    pub in_flight_limit: u64,
}

/// How connections are protected.
#[derive(Debug, Clone, Serialize)]
pub struct TlsReport {
    /// The oldest version that is spoken, if it is known.
    pub min_version: Option<&'static str>,
    /// Whether clients need one: `none`, `optional` or `required`.
    pub client_certificates: &'static str,
    /// When the server's certificate runs out.
    pub certificate_expires: Option<f64>,
    /// When the first of the CAs runs out that vouch for clients.
    pub client_ca_expires: Option<f64>,
    /// When the first of the revocation lists runs out. Then clients of its CA are refused.
    pub client_crl_expires: Option<f64>,
}

/// One connection.
#[derive(Debug, Clone, Serialize)]
pub struct ConnectionReport {
    /// Its number, as in the log.
    pub id: u64,
    /// `negotiating` or `reading`.
    pub state: &'static str,
    /// Where it comes from.
    pub peer: String,
    /// Through which load balancer.
    pub via: Option<String>,
    /// Who it is by its certificate.
    pub identity: Option<String>,
    /// What it reads.
    pub export: Option<String>,
    /// What protects it.
    pub tls: Option<&'static str>,
    /// Since when it is there.
    pub since: f64,
    /// Requests that came.
    pub requests: u64,
    /// What reads were answered with, in bytes.
    pub bytes: u64,
    /// Requests that are worked on, or not all sent.
    pub in_flight: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
}

/// How many connections there are and were.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConnectionCounts {
    /// How many are choosing an export just now.
    pub negotiating: u64,
    /// How many have chosen one.
    pub reading: u64,
    /// How many were let in by their address.
    pub accepted: u64,
    /// How many of these came to read an export.
    pub served: u64,
    /// How many were closed before a byte was sent, by reason.
    pub refused: BTreeMap<&'static str, u64>,
    /// How many were let in by their address, and failed later, by reason.
    pub failed: BTreeMap<&'static str, u64>,
    /// Why TLS handshakes failed. Each is among `failed` as well, as `tls_handshake`.
    pub handshake_failures: BTreeMap<&'static str, u64>,
}

/// One export.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ExportReport {
    /// Its name.
    pub name: String,
    /// A line for people.
    pub description: Option<String>,
    /// Its size in bytes.
    pub size: Option<u64>,
    /// How many connections read it just now.
    pub readers: u64,
    /// Requests that came.
    pub requests: Requests,
    /// What reads were answered with, in bytes.
    pub bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// The same, by the code that clients were sent.
    pub errors_by_code: BTreeMap<&'static str, u64>,
    /// How long reads took ([`Latencies`]).
    pub read_seconds: Histogram,
    /// Requests that came sooner than their clients may ask.
    pub throttled: u64,
    /// How long these waited, together.
    pub throttled_seconds: f64,
}

/// How often something took how long.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Histogram {
    /// How often.
    pub count: u64,
    /// How long all of them took together.
    pub sum: f64,
    /// How many took no longer than so many seconds, those of the buckets before included.
    pub buckets: Vec<(f64, u64)>,
}

/// How often files were read anew.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ReloadsReport {
    /// What was read is in force.
    pub succeeded: u64,
    /// Something was wrong, and everything stayed as it was.
    pub failed: u64,
    /// When it was tried the last time.
    pub last: Option<f64>,
    /// Why that failed, if it did.
    pub last_error: Option<String>,
}

impl<X: Offer> Control<X> {
    /// What the gateway is doing and has done.
    pub fn report(&self) -> Report {
        let shared = &*self.0;
        let seen = shared.connections.seen();
        let exports = shared.exports.load();
        let (in_flight, in_flight_limit) = shared.transmit_limits.budget.in_use();
        Report {
            unready: match shared.phase() {
                Phase::Starting => Some("it is starting"),
                Phase::Ending => Some("it is shutting down"),
                Phase::Serving => exports.unready(),
            },
            silent_for: shared.pulse.silent_for(),
            listen: shared.listen.clone(),
            tls: shared.policy.look(|it| it.policy.tls.as_ref().map(TlsReport::of)),
            connections_total: counts(shared, &seen),
            exports: by_export(&seen, exports.offered()),
            connections: listed(&seen),
            reloads: reloads(shared),
            in_flight,
            in_flight_limit,
        }
    }
}

impl TlsReport {
    fn of(tls: &ServerTls) -> Self {
        let Expiry { certificate, client_authority, client_list } = tls.expiry();
        let seconds = |time: Option<UnixTime>| time.map(|time| seconds(time.as_secs()));
        Self {
            min_version: tls.oldest().map(|oldest| match oldest {
                TlsVersion::V1_2 => "1.2",
                TlsVersion::V1_3 => "1.3",
            }),
            client_certificates: match (tls.asks_for_certificates(), tls.requires_certificates()) {
                (false, _) => "none",
                (true, false) => "optional",
                (true, true) => "required",
            },
            certificate_expires: seconds(certificate),
            client_ca_expires: seconds(client_authority),
            client_crl_expires: seconds(client_list),
        }
    }
}

impl From<Latencies> for Histogram {
    fn from(latencies: Latencies) -> Self {
        let mut so_far = 0;
        let buckets = latencies.buckets().map(|(bound, count)| {
            so_far += count;
            (bound.as_secs_f64(), so_far)
        });
        let buckets = buckets.collect();
        Self { count: latencies.count(), sum: latencies.sum.as_secs_f64(), buckets }
    }
}

fn counts<X>(shared: &Shared<X>, seen: &Seen) -> ConnectionCounts {
    let reading = seen.live.iter().filter(|one| one.reading.is_some()).count() as u64;
    ConnectionCounts {
        negotiating: seen.live.len() as u64 - reading,
        reading,
        accepted: seen.accepted,
        served: seen.served,
        refused: shared.refusals.so_far().0,
        failed: shared.failures.so_far().0,
        handshake_failures: shared.handshake_failures.so_far().0,
    }
}

fn reloads<X>(shared: &Shared<X>) -> ReloadsReport {
    let so_far = shared.reloads.so_far();
    ReloadsReport {
        succeeded: so_far.succeeded,
        failed: so_far.failed,
        last: so_far.last.map(unix_seconds),
        last_error: so_far.last_error,
    }
}

fn listed(seen: &Seen) -> Vec<ConnectionReport> {
    let one = |one: &One| ConnectionReport {
        id: one.id,
        state: if one.reading.is_some() { "reading" } else { "negotiating" },
        peer: one.route.peer.to_string(),
        via: one.route.via.map(|balancer| balancer.to_string()),
        identity: one.identity.clone(),
        export: one.reading.as_ref().map(|reading| reading.export.clone()),
        tls: one.tls,
        since: unix_seconds(one.since),
        requests: one.done.requests.all(),
        bytes: one.done.bytes,
        in_flight: one.in_flight,
        errors: one.done.errors.all(),
    };
    seen.live.iter().take(MAX_LISTED).map(one).collect()
}

/// What was done for each export: those that are offered, in their order, then others that
/// were read. Those that were read are told apart in any case; their number is bounded.
fn by_export(seen: &Seen, offered: Vec<Offered>) -> Vec<ExportReport> {
    let mut read: BTreeMap<&str, (&Offered, u64, Done)> =
        seen.read.iter().map(|(name, it)| (name.as_str(), (&it.export, 0, it.done))).collect();
    for one in &seen.live {
        if let Some(reading) = &one.reading
            && let Some((_, readers, done)) = read.get_mut(reading.counted_as.as_str())
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
            Some((_, readers, done)) => all.push(report_of(export, readers, &done)),
            None if unread < room => {
                unread += 1;
                all.push(report_of(export, 0, &Done::default()));
            }
            None => {}
        }
    }
    all.extend(
        read.into_values().map(|(export, readers, done)| report_of(export.clone(), readers, &done)),
    );
    all
}

fn report_of(export: Offered, readers: u64, done: &Done) -> ExportReport {
    ExportReport {
        name: export.name,
        description: export.description,
        size: export.size,
        readers,
        requests: done.requests,
        bytes: done.bytes,
        errors: done.errors.all(),
        errors_by_code: done.errors.by_code().filter(|(_, count)| *count > 0).collect(),
        read_seconds: done.read_latency.into(),
        throttled: done.held,
        throttled_seconds: done.held_for.as_secs_f64(),
    }
}

/// Seconds of the Unix clock.
pub fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn seconds(whole: u64) -> f64 {
    Duration::from_secs(whole).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::access::Peer;
    use crate::gateway::admission::Route;
    use crate::gateway::live::Connections;
    use crate::nbd::{Export, ReadError, Segment, Span};

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
    fn exports_beyond_the_cap_are_counted_together() {
        let connections = Connections::default();
        let route = Route::direct(Peer::Unix);
        let mut staying = Vec::new();
        for number in 0..2 * MAX_LISTED as u64 {
            let entry = connections.enter(number, route);
            connections.begin(&entry.live, &named(&format!("{number}.hxz")));
            if number % 2 == 0 {
                staying.push(entry);
            }
        }
        let seen = connections.seen();
        assert_eq!((seen.accepted, seen.served), (2000, 2000));
        assert_eq!(listed(&seen).len(), MAX_LISTED);
        let offered = (0..5000).map(|number| Offered::named(&format!("offered-{number}")));
        let exports = by_export(&seen, offered.collect());
        assert_eq!(exports.len(), MAX_LISTED + 1);
        let others = exports.iter().find(|export| export.name == "other").unwrap();
        assert_eq!((others.readers, others.size), (500, None));
        assert_eq!(exports.iter().map(|export| export.readers).sum::<u64>(), 1000);
    }

    /// What somebody did is there once, whether it has left or not.
    #[test]
    fn what_was_done_stays_when_who_did_it_leaves() {
        let connections = Connections::default();
        let reads = || {
            let export = by_export(&connections.seen(), vec![Offered::named("x")]).remove(0);
            (export.requests.read, export.readers)
        };
        assert_eq!(reads(), (0, 0));
        for number in 1..=3 {
            let entry = connections.enter(number, Route::direct(Peer::Unix));
            connections.begin(&entry.live, &named("x"));
            entry.live.activity.set_requests(Requests { read: 10, ..Requests::default() });
            assert_eq!(reads(), (10 * number, 1));
            drop(entry);
            assert_eq!(reads(), (10 * number, 0));
        }
    }
}
