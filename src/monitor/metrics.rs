//! Metrics for Prometheus, derived from [`Status`] alone. `docs/metrics.md` lists them.
//!
//! The values of labels are bounded: reasons and the like come from fixed sets, and exports are at
//! most [`MAX_LISTED`](nbd_gateway::MAX_LISTED), plus one that aggregates all others. Peers and
//! identities are never labels.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, MetricEncoder, NoLabelSet,
    prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::status::Status;
use hexz_exports::READ_FAILURE_LABELS;
use nbd_gateway::tls::HandshakeFailureCause;
use nbd_gateway::{DurationHistogram, ExportReport, FAILURES, REFUSALS};

/// Prefix of all metric names.
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
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(StatusCollector(status)));
        let mut written = String::new();
        match self {
            Self::Text => prometheus_text::encode(&mut written, &registry)?,
            Self::OpenMetrics => text::encode(&mut written, &registry)?,
        }
        Ok(written)
    }
}

#[derive(Debug)]
struct StatusCollector(Status);

impl Collector for StatusCollector {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = MetricsWriter(encoder);
        let status = &self.0;
        program(&mut out, status)?;
        connections(&mut out, status)?;
        exports(&mut out, &status.gateway.exports)?;
        reading(&mut out, status)?;
        memory(&mut out, status)?;
        reloads_and_audit(&mut out, status)
    }
}

fn program(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    out.info("build", "The program", &[("version", status.version)])?;
    let started = [(NO_LABELS, status.started)];
    out.gauge("start_time", "When the program was started, by the Unix clock", SECONDS, started)?;
    let ready = [(NO_LABELS, u64::from(status.ready))];
    out.gauge("ready", "Whether clients can be served (1) or not (0)", None, ready)
}

fn connections(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let all = &status.gateway.connections_total;
    let states = [("negotiating", all.negotiating), ("reading", all.reading)];
    out.gauge("connections", "Connections that there are", None, labelled("state", states))?;
    let help = "Connections that were let in by their address";
    out.counter("connections_accepted", help, None, [(NO_LABELS, all.accepted)])?;
    let help = "Connections that came to read an export";
    out.counter("connections_served", help, None, [(NO_LABELS, all.served)])?;
    let help = "Connections that were closed before a byte was sent";
    out.counter("connections_refused", help, None, by_reason(&all.refused, REFUSALS))?;
    let help = "Connections that were let in by their address and failed later";
    out.counter("connections_failed", help, None, by_reason(&all.failed, FAILURES))?;
    let causes = HandshakeFailureCause::ALL.map(HandshakeFailureCause::label);
    let help = "TLS handshakes that failed";
    out.counter("tls_handshake_failures", help, None, by_reason(&all.handshake_failures, causes))?;

    let tls = status.gateway.tls.as_ref();
    let ends = [
        ("certificate", tls.and_then(|tls| tls.certificate_expires)),
        ("client_ca", tls.and_then(|tls| tls.client_ca_expires)),
        ("client_crl", tls.and_then(|tls| tls.client_crl_expires)),
    ];
    let ends = ends.into_iter().filter_map(|(what, end)| Some((what, end?)));
    let help = "When this runs out, by the Unix clock; of several CAs or lists, the first";
    out.gauge("tls_expiry_timestamp", help, SECONDS, labelled("what", ends))
}

fn exports(out: &mut MetricsWriter<'_>, exports: &[ExportReport]) -> fmt::Result {
    let each = |number: fn(&ExportReport) -> u64| {
        exports.iter().map(move |export| ([("export", export.name.as_str())], number(export)))
    };
    out.gauge("export_readers", "Connections that read an export", None, each(|it| it.readers))?;
    let sizes = exports.iter().filter_map(|it| Some(([("export", it.name.as_str())], it.size?)));
    out.gauge("export_size", "How large an export is", BYTES, sizes)?;

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
    out.counter("requests", "Requests that came", None, requests)?;
    let errors = exports.iter().flat_map(|export| {
        let name = export.name.as_str();
        let by_code = export.errors_by_code.iter();
        by_code.map(move |(code, count)| ([("export", name), ("error", *code)], *count))
    });
    out.counter("request_errors", "Requests that were answered with an error", None, errors)?;
    let help = "What reads were answered with";
    out.counter("read", help, BYTES, each(|it| it.bytes))?;
    let help = "How long reads took, from when they came to when their answer was ready to be sent";
    let latencies = exports.iter().map(|it| ([("export", it.name.as_str())], &it.read_seconds));
    out.histogram("read_latency", help, SECONDS, latencies)?;
    let help = "Requests that came sooner than their client may ask, and had to wait";
    out.counter("throttled_requests", help, None, each(|it| it.throttled))?;
    let waited = exports.iter().map(|it| ([("export", it.name.as_str())], it.throttled_seconds));
    out.counter("throttled", "How long these requests waited", SECONDS, waited)
}

fn reading(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let cache = &status.cache;
    out.gauge("cache", "Decoded blocks that are kept", BYTES, [(NO_LABELS, cache.bytes)])?;
    let help = "How much may be kept";
    out.gauge("cache_capacity", help, BYTES, [(NO_LABELS, cache.capacity)])?;
    let help = "Blocks that clients asked for and that were kept";
    out.counter("cache_hits", help, None, [(NO_LABELS, cache.hits)])?;
    let help = "Blocks that clients asked for and had to wait for";
    out.counter("cache_misses", help, None, [(NO_LABELS, cache.misses)])?;
    let help = "Blocks that were decoded, those that were read ahead included";
    out.counter("decoded_blocks", help, None, [(NO_LABELS, cache.decoded_blocks)])?;
    out.counter("decoded", "What these blocks came to", BYTES, [(NO_LABELS, cache.decoded_bytes)])?;
    let help = "How long it took to read, check and decode blocks, over all threads";
    out.counter("decode", help, SECONDS, [(NO_LABELS, cache.decode_seconds)])?;

    let storage = &status.storage;
    out.counter("storage_reads", "Reads from archives", None, [(NO_LABELS, storage.reads)])?;
    out.counter("storage_read", "What these came to", BYTES, [(NO_LABELS, storage.bytes)])?;

    let help = "Requests that couldn't be answered since a block can't be read or trusted";
    let failures = by_reason(&status.verification_failures, READ_FAILURE_LABELS);
    out.counter("verification_failures", help, None, failures)?;
    let help = "Archives that couldn't be opened, each for a reason that was new";
    out.counter("open_failures", help, None, by_reason(&status.open_failures, []))
}

fn memory(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let memory = &status.memory;
    let resident = memory.resident.map(|bytes| (NO_LABELS, bytes));
    out.gauge("resident_memory", "What the process has", BYTES, resident)?;
    let help = "What decoded blocks, index pages and answers may take together";
    out.gauge("memory_budget", help, BYTES, [(NO_LABELS, memory.budget)])?;
    let help = "What answers on their way take of what connections share";
    out.gauge("in_flight", help, BYTES, [(NO_LABELS, memory.in_flight)])?;
    let help = "How much of that there is";
    out.gauge("in_flight_limit", help, BYTES, [(NO_LABELS, memory.in_flight_limit)])
}

fn reloads_and_audit(out: &mut MetricsWriter<'_>, status: &Status) -> fmt::Result {
    let reloads = &status.gateway.reloads;
    let results = [("succeeded", reloads.succeeded), ("failed", reloads.failed)];
    let help = "How often certificates, rules and the like were read anew";
    out.counter("reloads", help, None, labelled("result", results))?;
    let last = reloads.last.map(|last| (NO_LABELS, last));
    let help = "When that was tried the last time, by the Unix clock";
    out.gauge("last_reload_timestamp", help, SECONDS, last)?;
    let succeeded = [(NO_LABELS, u64::from(reloads.last_error.is_none()))];
    let help = "Whether what was read the last time is in force (1) or something was wrong (0)";
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

/// Returns counts by reason, with zeros for reasons in `known` that haven't occurred.
fn by_reason(
    counts: &BTreeMap<&'static str, u64>,
    known: impl IntoIterator<Item = &'static str>,
) -> impl Iterator<Item = ([Label<'static>; 1], u64)> {
    let mut all: BTreeMap<_, _> = known.into_iter().map(|reason| (reason, 0)).collect();
    all.extend(counts);
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
