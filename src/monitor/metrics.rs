//! Metrics for Prometheus, derived from [`Status`] alone. `docs/metrics.md` lists them.
//!
//! The values of labels are bounded: reasons and the like come from fixed sets, and exports are at
//! most [`MAX_LISTED`](nbd_gateway::MAX_LISTED), plus one that aggregates all others. Peers and
//! identities are never labels.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet,
    prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::status::Status;
use super::stores::{StoreStatus, StoresStatus};
use hexz_exports::READ_FAILURE_LABELS;
use nbd_gateway::tls::HandshakeFailureCause;
use nbd_gateway::{DurationHistogram, ExportReport, FAILURES, LabelCounts, REFUSALS};

/// Prefix of all metric names but those of the process.
const PREFIX: &str = "hexz_nbd";

/// Exposition format of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Prometheus' text format, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.0.
    OpenMetrics,
}

impl Format {
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Text => prometheus_text::CONTENT_TYPE,
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Encodes the metrics of a status.
    pub(super) fn encode(self, status: Status) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        let status = Arc::new(status);
        registry.register_collector(Box::new(ProcessCollector(Arc::clone(&status))));
        let program = registry.sub_registry_with_prefix(PREFIX);
        program.register_collector(Box::new(StatusCollector(status)));
        let mut written = String::new();
        match self {
            Self::Text => prometheus_text::encode(&mut written, &registry)?,
            Self::OpenMetrics => text::encode(&mut written, &registry)?,
        }
        Ok(written)
    }
}

/// Metrics of the process. All Prometheus clients give them the same names.
#[derive(Debug)]
struct ProcessCollector(Arc<Status>);

impl Collector for ProcessCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = MetricsWriter(encoder);
        let Status { process, memory, started, .. } = &*self.0;
        let one = |value: Option<u64>| value.map(|value| (NO_LABELS, value));
        let help = "Unix time at which the program started";
        out.gauge("process_start_time", help, SECONDS, [(NO_LABELS, *started)])?;
        let help = "CPU time of all threads, in user and system mode";
        out.counter("process_cpu", help, SECONDS, [(NO_LABELS, process.cpu_seconds)])?;
        let help = "Resident memory of the process";
        out.gauge("process_resident_memory", help, BYTES, one(memory.resident))?;
        let help = "Size of the address space of the process";
        out.gauge("process_virtual_memory", help, BYTES, one(process.virtual_memory))?;
        out.gauge("process_open_fds", "Open file descriptors", None, one(process.open_fds))?;
        let help = "Maximum number of open file descriptors";
        out.gauge("process_max_fds", help, None, one(process.max_fds))
    }
}

#[derive(Debug)]
struct StatusCollector(Arc<Status>);

impl Collector for StatusCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = MetricsWriter(encoder);
        let status = &self.0;
        program(&mut out, status)?;
        connections(&mut out, status)?;
        exports(&mut out, &status.gateway.exports)?;
        reading(&mut out, status)?;
        stores(&mut out, &status.remote)?;
        fetched(&mut out, &status.remote)?;
        memory(&mut out, status)?;
        reloads_and_audit(&mut out, status)
    }
}

fn program(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    out.info("build", "Version of the program", &[("version", &status.version)])?;
    let ready = [(NO_LABELS, u64::from(status.ready))];
    out.gauge("ready", "1 if clients can be served, else 0", None, ready)
}

fn connections(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let all = &status.gateway.connections_total;
    let states = [("negotiating", all.negotiating), ("reading", all.reading)];
    out.gauge("connections", "Open connections", None, labelled("state", states))?;
    let help = "Connections admitted by their address";
    out.counter("connections_accepted", help, None, [(NO_LABELS, all.accepted)])?;
    let help = "Connections whose clients selected an export";
    out.counter("connections_served", help, None, [(NO_LABELS, all.served)])?;
    let help = "Connections closed before anything was sent";
    out.counter("connections_refused", help, None, by_reason(&all.refused, REFUSALS))?;
    let help = "Connections admitted by their address that failed or were dropped later";
    out.counter("connections_failed", help, None, by_reason(&all.failed, FAILURES))?;
    let causes = HandshakeFailureCause::ALL.map(HandshakeFailureCause::label);
    let help = "Failed TLS handshakes";
    out.counter("tls_handshake_failures", help, None, by_reason(&all.handshake_failures, causes))?;

    let tls = status.gateway.tls.as_ref();
    let ends = [
        ("certificate", tls.and_then(|tls| tls.certificate_expires)),
        ("client_ca", tls.and_then(|tls| tls.client_ca_expires)),
        ("client_crl", tls.and_then(|tls| tls.client_crl_expires)),
        ("client_certificate", status.gateway.client_certificates.earliest_expiry),
    ];
    let ends = ends.into_iter().filter_map(|(what, end)| Some((what, end?)));
    let help = "Unix time at which this expires; of several, the earliest";
    out.gauge("tls_expiry_timestamp", help, SECONDS, labelled("what", ends))?;
    let clients = &status.gateway.client_certificates;
    let states = [
        ("valid", clients.valid),
        ("expires_soon", clients.expires_soon),
        ("expired", clients.expired),
    ];
    let help = "Certificates of the clients that connected within the last seven days";
    out.gauge("client_certificates", help, None, labelled("state", states))
}

fn exports(out: &mut MetricsWriter<'_>, exports: &[ExportReport]) -> fmt::Result {
    let each = |number: fn(&ExportReport) -> u64| {
        exports.iter().map(move |export| ([("export", export.name.as_str())], number(export)))
    };
    out.gauge("export_readers", "Connections reading the export", None, each(|it| it.readers))?;
    let sizes = exports.iter().filter_map(|it| Some(([("export", it.name.as_str())], it.size?)));
    out.gauge("export_size", "Size of the export", BYTES, sizes)?;

    let commands = |export: &ExportReport| {
        let all = &export.requests;
        [
            ("read", all.read),
            ("block_status", all.block_status),
            ("cache", all.cache),
            ("other", all.other),
        ]
    };
    let requests = exports.iter().flat_map(|export| {
        let name = export.name.as_str();
        commands(export).map(|(command, count)| ([("export", name), ("command", command)], count))
    });
    out.counter("requests", "Requests received", None, requests)?;
    let errors = exports.iter().flat_map(|export| {
        let name = export.name.as_str();
        let by_code = export.errors_by_code.iter();
        by_code.map(move |(code, count)| ([("export", name), ("error", &**code)], *count))
    });
    out.counter("request_errors", "Requests answered with an NBD error", None, errors)?;
    let help = "Bytes sent in reply to reads";
    out.counter("read", help, BYTES, each(|it| it.bytes))?;
    let help = "Time from when a read was received until its reply was ready to be sent";
    let latencies = exports.iter().map(|it| ([("export", it.name.as_str())], &it.read_seconds));
    out.histogram("read_latency", help, SECONDS, latencies)?;
    let help = "Requests delayed by the limits on requests and bandwidth per client";
    out.counter("throttled_requests", help, None, each(|it| it.throttled))?;
    let waited = exports.iter().map(|it| ([("export", it.name.as_str())], it.throttled_seconds));
    out.counter("throttled", "Total delay of throttled requests", SECONDS, waited)
}

fn reading(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let cache = &status.cache;
    out.gauge(
        "cache",
        "Size of the decoded blocks in the cache",
        BYTES,
        [(NO_LABELS, cache.bytes)],
    )?;
    let help = "Capacity of the cache";
    out.gauge("cache_capacity", help, BYTES, [(NO_LABELS, cache.capacity)])?;
    let help = "Requested blocks that were in the cache";
    out.counter("cache_hits", help, None, [(NO_LABELS, cache.hits)])?;
    let help = "Requested blocks that clients had to wait for";
    out.counter("cache_misses", help, None, [(NO_LABELS, cache.misses)])?;
    let help = "Decoded blocks, including readahead";
    out.counter("decoded_blocks", help, None, [(NO_LABELS, cache.decoded_blocks)])?;
    out.counter(
        "decoded",
        "Size of the decoded blocks",
        BYTES,
        [(NO_LABELS, cache.decoded_bytes)],
    )?;
    let help = "Time spent reading, verifying and decoding blocks, over all threads";
    out.counter("decode", help, SECONDS, [(NO_LABELS, cache.decode_seconds)])?;

    let storage = &status.storage;
    out.counter("storage_reads", "Reads from archives", None, [(NO_LABELS, storage.reads)])?;
    out.counter("storage_read", "Bytes read from archives", BYTES, [(NO_LABELS, storage.bytes)])?;

    let help = "Requests that failed because a block couldn't be read or verified";
    let failures = by_reason(&status.verification_failures, READ_FAILURE_LABELS);
    out.counter("verification_failures", help, None, failures)?;
    let help = "Archives that couldn't be opened; repeated failures count once";
    out.counter("open_failures", help, None, by_reason(&status.open_failures, []))
}

fn stores(out: &mut MetricsWriter<'_>, status: &StoresStatus) -> fmt::Result {
    let all = &status.stores;
    let each = |number: fn(&StoreStatus) -> u64| {
        all.iter().map(move |store| ([("store", store.name.as_str())], number(store)))
    };
    let requests = all.iter().flat_map(|store| {
        store.requests.iter().flat_map(|(priority, results)| {
            results.iter().map(|(result, count)| {
                let labels = [("store", &*store.name), ("priority", priority), ("result", result)];
                (labels, *count)
            })
        })
    });
    out.counter("store_requests", "Requests sent to stores", None, requests)?;
    let received = all.iter().flat_map(|store| {
        let by_priority = store.bytes.iter();
        by_priority
            .map(|(priority, bytes)| ([("store", &*store.name), ("priority", priority)], *bytes))
    });
    out.counter("store_received", "Bytes of objects received from stores", BYTES, received)?;
    let help = "Time from a request to the end of its response, of successful requests";
    let seconds = all.iter().map(|store| ([("store", &*store.name)], &store.request_seconds));
    out.histogram("store_request", help, SECONDS, seconds)?;
    out.gauge("store_in_flight", "Requests in flight", None, each(|it| it.in_flight))?;
    out.gauge("store_queued", "Requests that wait to be sent", None, each(|it| it.queued))?;
    out.gauge("store_limit", "Present limit of requests in flight", None, each(|it| it.limit))?;
    let help = "Responses that asked for fewer requests";
    out.counter("store_throttled", help, None, each(|it| it.throttled))?;
    let help = "Requests repeated after a failure";
    out.counter("store_retries", help, None, each(|it| it.retries))?;
    let hedges = all.iter().flat_map(|store| {
        let results = [("sent", store.hedges_sent), ("won", store.hedges_won)];
        results.map(|(result, count)| ([("store", &*store.name), ("result", result)], count))
    });
    let help = "Requests repeated because the first one took long";
    out.counter("store_hedges", help, None, hedges)?;
    let help = "1 if the store is down, else 0";
    out.gauge("store_breaker", help, None, each(|it| u64::from(it.is_down())))?;
    let help = "Requests that found another version of the object";
    out.counter("store_changed", help, None, each(|it| it.changed))?;
    let expiry = all.iter().filter_map(|it| Some(([("store", &*it.name)], it.credentials_expire?)));
    let help = "Unix time at which the credentials expire";
    out.gauge("store_credentials_expiry_timestamp", help, SECONDS, expiry)
}

fn fetched(out: &mut MetricsWriter<'_>, status: &StoresStatus) -> fmt::Result {
    let cache = status.fetched.as_ref();
    let one = |number: Option<u64>| number.map(|number| (NO_LABELS, number));
    let help = "Size of the fetched chunks in memory";
    out.gauge("store_cache", help, BYTES, one(cache.map(|it| it.bytes)))?;
    let help = "Capacity for fetched chunks";
    out.gauge("store_cache_capacity", help, BYTES, one(cache.map(|it| it.capacity)))?;
    let help = "Chunks that were in memory when a read needed them";
    out.counter("store_cache_hits", help, None, one(cache.map(|it| it.hits)))?;
    let help = "Chunks that weren't in memory when a read needed them";
    out.counter("store_cache_misses", help, None, one(cache.map(|it| it.misses)))?;
    let disk = status.disk_cache.as_ref();
    let help = "Size of the chunks on disk";
    out.gauge("disk_cache", help, BYTES, one(disk.map(|it| it.bytes)))?;
    let help = "Capacity for chunks on disk";
    out.gauge("disk_cache_capacity", help, BYTES, one(disk.map(|it| it.capacity)))?;
    let help = "Chunks that were read from disk";
    out.counter("disk_cache_hits", help, None, one(disk.map(|it| it.hits)))?;
    let help = "Chunks that were neither in memory nor on disk";
    out.counter("disk_cache_misses", help, None, one(disk.map(|it| it.misses)))?;
    let help = "Chunks on disk that weren't what had been written";
    out.counter("disk_cache_bad", help, None, one(disk.map(|it| it.bad)))?;
    let help = "Chunks on disk that made room for others";
    out.counter("disk_cache_evicted", help, None, one(disk.map(|it| it.evicted)))?;
    let help = "Chunks that weren't written to disk because too many were queued";
    out.counter("disk_cache_writes_dropped", help, None, one(disk.map(|it| it.writes_dropped)))?;
    let help = "1 if the disk has failed, so that the disk cache isn't used, else 0";
    out.gauge("disk_cache_off", help, None, one(disk.map(|it| u64::from(it.is_off))))?;
    let waits = status.read_wait_seconds.iter().map(|(cause, seconds)| (&**cause, *seconds));
    let help = "Time that reads have waited for stores, summed over all reads";
    out.counter("store_read_wait", help, SECONDS, labelled("cause", waits))
}

fn memory(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let memory = &status.memory;
    let help = "Budget for decoded blocks, index pages and replies in flight";
    out.gauge("memory_budget", help, BYTES, [(NO_LABELS, memory.budget)])?;
    let help = "Part of the shared memory for replies that is in use";
    out.gauge("in_flight", help, BYTES, [(NO_LABELS, memory.in_flight)])?;
    let help = "Size of the shared memory for replies";
    out.gauge("in_flight_limit", help, BYTES, [(NO_LABELS, memory.in_flight_limit)])
}

fn reloads_and_audit(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let reloads = &status.gateway.reloads;
    let results = [("succeeded", reloads.succeeded), ("failed", reloads.failed)];
    let help = "Reloads of certificates, rules and the like";
    out.counter("reloads", help, None, labelled("result", results))?;
    let last = reloads.last.map(|last| (NO_LABELS, last));
    let help = "Unix time of the last reload";
    out.gauge("last_reload_timestamp", help, SECONDS, last)?;
    let succeeded = [(NO_LABELS, u64::from(reloads.last_error.is_none()))];
    let help = "1 if the last reload succeeded, else 0";
    out.gauge("last_reload_successful", help, None, succeeded)?;

    let events = status.audit.map(|audit| [("written", audit.written), ("lost", audit.lost)]);
    let events = events.into_iter().flatten();
    out.counter("audit_events", "Audit events", None, labelled("result", events))
}

type Label<'a> = (&'a str, &'a str);

const NO_LABELS: [Label<'static>; 0] = [];

static UNIT_SECONDS: Unit = Unit::Seconds;
static UNIT_BYTES: Unit = Unit::Bytes;
const SECONDS: Option<&Unit> = Some(&UNIT_SECONDS);
const BYTES: Option<&Unit> = Some(&UNIT_BYTES);

fn labelled<'a, V>(
    name: &'a str,
    values: impl IntoIterator<Item = (&'a str, V)>,
) -> impl Iterator<Item = ([Label<'a>; 1], V)> {
    values.into_iter().map(move |(label, value)| ([(name, label)], value))
}

/// Returns counts by reason, with zeros for reasons in `all_reasons` that haven't occurred.
fn by_reason<'a>(
    counts: &'a LabelCounts,
    all_reasons: impl IntoIterator<Item = &'static str>,
) -> impl Iterator<Item = ([Label<'a>; 1], u64)> {
    let mut all: BTreeMap<&str, u64> = all_reasons.into_iter().map(|reason| (reason, 0)).collect();
    all.extend(counts.iter().map(|(reason, count)| (&**reason, *count)));
    labelled("reason", all)
}

/// Encoder of metric families.
struct MetricsWriter<'a>(DescriptorEncoder<'a>);

impl MetricsWriter<'_> {
    fn info(&mut self, name: &str, help: &str, labels: &[Label<'_>]) -> fmt::Result {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(&labels)
    }

    fn gauge<'l, const N: usize, V: EncodeGaugeValue>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: impl IntoIterator<Item = ([Label<'l>; N], V)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for (labels, value) in values {
            encode_labelled(&mut family, &labels, |metric| metric.encode_gauge(&value))?;
        }
        Ok(())
    }

    fn counter<'l, const N: usize, V: EncodeCounterValue>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: impl IntoIterator<Item = ([Label<'l>; N], V)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        let none: Option<&Exemplar<NoLabelSet, u64>> = None;
        for (labels, value) in values {
            encode_labelled(&mut family, &labels, |metric| metric.encode_counter(&value, none))?;
        }
        Ok(())
    }

    fn histogram<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        values: impl IntoIterator<Item = ([Label<'l>; N], &'l DurationHistogram)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for (labels, DurationHistogram { count, sum, buckets }) in values {
            // The encoder takes counts that aren't cumulative, and an explicit last bucket, which
            // OpenMetrics would lack otherwise.
            let mut before = 0;
            let alone = |(bound, so_far): &(f64, u64)| {
                (*bound, so_far - std::mem::replace(&mut before, *so_far))
            };
            let last = (f64::INFINITY, *count);
            let buckets: Vec<_> = buckets.iter().chain([&last]).map(alone).collect();
            encode_labelled(&mut family, &labels, |metric| {
                metric.encode_histogram::<NoLabelSet>(*sum, *count, &buckets, None)
            })?;
        }
        Ok(())
    }
}

fn encode_labelled<const N: usize>(
    family: &mut MetricEncoder<'_>,
    labels: &[Label<'_>; N],
    write: impl FnOnce(&mut MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    match N {
        0 => write(family),
        _ => write(&mut family.encode_family(labels)?),
    }
}

/// Returns the labels that docs/metrics.md lists in the row that begins with `of`.
#[cfg(test)]
pub(super) fn documented_reasons(of: &str) -> std::collections::BTreeSet<&'static str> {
    let page = include_str!("../../docs/metrics.md");
    let is_label = |text: &&str| text.bytes().all(|it| it.is_ascii_lowercase() || it == b'_');
    let mut rows = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_prefix(of));
    rows.next().unwrap().split('`').skip(1).step_by(2).filter(is_label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_documented() {
        let documented = documented_reasons;
        let causes = HandshakeFailureCause::ALL.map(HandshakeFailureCause::label);
        assert_eq!(documented("refused connections"), REFUSALS.into());
        assert_eq!(documented("failed connections"), FAILURES.into());
        assert_eq!(documented("TLS handshakes"), causes.into());
        assert_eq!(documented("failed requests"), READ_FAILURE_LABELS.into());
    }

    #[test]
    fn stores_are_encoded_in_both_formats() {
        let status =
            br#"{ "format": 1, "stores": [{ "name": "s3://a\"b", "limit": 16, "breaker": "open",
            "requests": { "demand": { "ok": 7 } }, "bytes": { "demand": 9 }, "hedges_sent": 2,
            "hedges_won": 1, "credentials_expire": 1795600000.5,
            "request_seconds": { "count": 7, "sum": 1.5, "buckets": [[0.01, 4], [30, 6]] } }],
            "fetched": { "capacity": 100 }, "read_wait_seconds": { "breaker": 2.5 } }"#;
        let status = Status::parse(status).unwrap();
        let (text, open_metrics) = (
            Format::Text.encode(status.clone()).unwrap(),
            Format::OpenMetrics.encode(status).unwrap(),
        );
        for line in [
            r#"requests_total{store="s3://a\"b",priority="demand",result="ok"} 7"#,
            r#"received_bytes_total{store="s3://a\"b",priority="demand"} 9"#,
            r#"request_seconds_count{store="s3://a\"b"} 7"#,
            r#"limit{store="s3://a\"b"} 16"#,
            r#"breaker{store="s3://a\"b"} 1"#,
            r#"hedges_total{store="s3://a\"b",result="won"} 1"#,
            r#"credentials_expiry_timestamp_seconds{store="s3://a\"b"} 1795600000.5"#,
            "cache_capacity_bytes 100",
            r#"read_wait_seconds_total{cause="breaker"} 2.5"#,
        ] {
            for encoded in [&text, &open_metrics] {
                assert!(
                    encoded.contains(&format!("\nhexz_nbd_store_{line}\n")),
                    "{line}: {encoded}"
                );
            }
        }
        // Without stores, there are names, but no values.
        let empty = Format::Text.encode(Status::default()).unwrap();
        assert!(empty.contains("# TYPE hexz_nbd_store_breaker gauge\n"), "{empty}");
        assert!(!empty.contains("\nhexz_nbd_store_"), "{empty}");
    }
}
