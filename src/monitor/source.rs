//! Collects the status from its sources.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::history::{FailureCounts, History, HistoryReport, LastFailures, Sample};
use super::problems;
use super::process::ProcessFiles;
use super::recent::RecentErrors;
use super::status::{CacheStatus, MemoryStatus, Status, StorageStatus};
use super::stores::StoresStatus;
use hexz_exports::{BlockReader, CatalogStatus, Recording};
use nbd_gateway::{ActivityTotals, GatewayReport, label_counts, unix_seconds};

/// Version of the format of [`Status`].
const STATUS_FORMAT: u32 = 1;

/// Time without a heartbeat after which the serving threads count as stuck. They send two per
/// second.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(15);

/// Sources of the status. They report from the start of the program on; the gateway may be added
/// later.
pub(crate) struct StatusSource {
    started: SystemTime,
    /// Host name of this machine, if known.
    host: Option<String>,
    process: ProcessFiles,
    history: History,
    /// Memory budget (`--cache-size`), in bytes.
    budget: u64,
    reader: Arc<BlockReader>,
    recent: RecentErrors,
    gateway: OnceLock<GatewaySource>,
    audit: OnceLock<Box<dyn Fn() -> AuditCounts + Send + Sync>>,
    stores: OnceLock<Box<dyn Fn() -> StoresStatus + Send + Sync>>,
    /// Returns what prevents connections to stores until a restart.
    stores_fault: OnceLock<Box<dyn Fn() -> Option<&'static str> + Send + Sync>>,
}

/// What a gateway reports.
struct GatewaySource {
    report: Box<dyn Fn() -> GatewayReport + Send + Sync>,
    activity: Box<dyn Fn() -> ActivityTotals + Send + Sync>,
    archives: Box<dyn Fn() -> CatalogStatus + Send + Sync>,
}

impl fmt::Debug for StatusSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StatusSource").finish_non_exhaustive()
    }
}

/// Counts of audit events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct AuditCounts {
    /// Number of events that were written.
    pub(crate) written: u64,
    /// Number of events that couldn't be written.
    pub(crate) lost: u64,
}

impl StatusSource {
    /// Creates the sources for a program that is starting. This has to happen before the sandbox is
    /// entered, because it opens files in `/proc`.
    ///
    /// `budget` is the memory that decoded blocks, index pages and replies share, in bytes.
    pub(crate) fn new(budget: u64, reader: Arc<BlockReader>, recent: RecentErrors) -> Self {
        Self {
            started: SystemTime::now(),
            host: host_name(),
            process: ProcessFiles::open(),
            history: History::default(),
            budget,
            reader,
            recent,
            gateway: OnceLock::new(),
            audit: OnceLock::new(),
            stores: OnceLock::new(),
            stores_fault: OnceLock::new(),
        }
    }

    /// Sets the sources of the gateway's report, its activity, and the status of its archives.
    /// Only the first call has an effect.
    pub(crate) fn set_gateway(
        &self,
        report: impl Fn() -> GatewayReport + Send + Sync + 'static,
        activity: impl Fn() -> ActivityTotals + Send + Sync + 'static,
        archives: impl Fn() -> CatalogStatus + Send + Sync + 'static,
    ) {
        self.gateway.get_or_init(|| GatewaySource {
            report: Box::new(report),
            activity: Box::new(activity),
            archives: Box::new(archives),
        });
    }

    /// Sets the source of the audit counts. Only the first call has an effect.
    pub(crate) fn set_audit(&self, report: impl Fn() -> AuditCounts + Send + Sync + 'static) {
        self.audit.get_or_init(|| Box::new(report));
    }

    /// Sets the source of the status of stores, and of what prevents connections to them until a
    /// restart. Only the first call has an effect.
    #[cfg(feature = "remote")]
    pub(crate) fn set_stores(
        &self,
        report: impl Fn() -> StoresStatus + Send + Sync + 'static,
        fault: impl Fn() -> Option<&'static str> + Send + Sync + 'static,
    ) {
        self.stores.get_or_init(|| Box::new(report));
        self.stores_fault.get_or_init(|| Box::new(fault));
    }

    /// Returns the fault of the program that only a restart cures, if there is one, other than
    /// threads that are stuck.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        self.stores_fault.get().and_then(|fault| fault())
    }

    /// Returns the current status.
    pub(crate) fn status(&self) -> Status {
        let gateway = self.gateway_report();
        let stuck = stuck_reason(&gateway);
        let stats = self.reader.stats();
        let memory = MemoryStatus {
            resident: self.process.resident(),
            budget: self.budget,
            in_flight: gateway.in_flight,
            in_flight_limit: gateway.in_flight_limit,
        };
        let archives = self.gateway.get().map(|gateway| (gateway.archives)());
        let mut status = Status {
            format: STATUS_FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            host: self.host.clone(),
            pid: std::process::id(),
            now: unix_seconds(SystemTime::now()),
            started: unix_seconds(self.started),
            ready: gateway.not_ready_reason.is_none(),
            unready: gateway.not_ready_reason.map(Into::into),
            problems: Vec::new(),
            gateway,
            archives: archives.map(Into::into).unwrap_or_default(),
            cache: CacheStatus {
                bytes: stats.cached,
                capacity: stats.capacity,
                hits: stats.hits,
                misses: stats.misses,
                decoded_blocks: stats.decoded,
                decoded_bytes: stats.decoded_bytes,
                decode_seconds: stats.decode_time.as_secs_f64(),
            },
            storage: StorageStatus { reads: stats.storage_reads, bytes: stats.storage_bytes },
            remote: self.stores.get().map(|report| report()).unwrap_or_default(),
            verification_failures: label_counts(stats.read_failures.0),
            open_failures: label_counts(stats.open_failures.0),
            memory,
            process: self.process.read(),
            audit: self.audit.get().map(|report| report()),
            recent_errors: self.recent.to_vec(),
        };
        let failures = self.last_failures(status.now);
        status.problems = problems::find(&status, failures, stuck, self.fault());
        status
    }

    /// Adds the current counters to the history.
    pub(super) fn record_sample(&self) {
        let now = unix_seconds(SystemTime::now());
        self.last_failures(now);
        let activity = self.gateway.get().map(|gateway| (gateway.activity)()).unwrap_or_default();
        let stats = self.reader.stats();
        self.history.record(Sample {
            at: now,
            connections: activity.connections,
            requests: activity.requests,
            bytes: activity.bytes,
            cache_hits: stats.hits,
            cache_misses: stats.misses,
        });
    }

    /// Returns when failures were last seen until the Unix time `now`.
    fn last_failures(&self, now: f64) -> LastFailures {
        let counts = FailureCounts {
            reads: self.reader.stats().read_failures.0.values().sum(),
            audit: self.audit.get().map_or(0, |report| report().lost),
        };
        self.history.last_failures(now, counts)
    }

    /// Returns the activity of the last minutes.
    pub(super) fn history(&self) -> HistoryReport {
        self.history.report()
    }

    /// Starts to record what clients read of an export. `None` if too many recordings are in
    /// progress.
    pub(super) fn record(&self, export: &str) -> Option<Recording> {
        self.reader.record(export)
    }

    /// Returns the reason why clients can't be served at the moment, if they can't.
    pub(super) fn unready_reason(&self) -> Option<&'static str> {
        self.gateway_report().not_ready_reason
    }

    /// Returns the reason why the program should be restarted, if it should.
    pub(super) fn unhealthy_reason(&self) -> Option<&'static str> {
        stuck_reason(&self.gateway_report()).or_else(|| self.fault())
    }

    fn gateway_report(&self) -> GatewayReport {
        match self.gateway.get() {
            Some(gateway) => (gateway.report)(),
            None => {
                GatewayReport { not_ready_reason: Some("starting"), ..GatewayReport::default() }
            }
        }
    }
}

/// Returns the reason why the program should be restarted, if its serving threads are stuck.
fn stuck_reason(report: &GatewayReport) -> Option<&'static str> {
    (report.since_heartbeat > HEARTBEAT_TIMEOUT)
        .then_some("stuck: no heartbeat from the serving threads")
}

/// Returns the host name of this machine.
fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    let name = name.trim_end();
    (!name.is_empty()).then(|| name.to_owned())
}
