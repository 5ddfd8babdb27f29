//! Collects the status from its sources.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::recent::RecentErrors;
use super::resident::ResidentMemory;
use super::status::{CacheStatus, MemoryStatus, Status, StorageStatus};
use super::stores::StoresStatus;
use hexz_exports::{BlockReader, Recording};
use nbd_gateway::{GatewayReport, label_counts, unix_seconds};

/// Version of the format of [`Status`].
const STATUS_FORMAT: u32 = 1;

/// Time without a heartbeat after which the serving threads count as stuck. They send two per
/// second.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(15);

/// Sources of the status. They report from the start of the program on; the gateway may be added
/// later.
pub(crate) struct StatusSource {
    started: SystemTime,
    resident: ResidentMemory,
    /// Memory budget (`--cache-size`), in bytes.
    budget: u64,
    reader: Arc<BlockReader>,
    recent: RecentErrors,
    gateway: OnceLock<Box<dyn Fn() -> GatewayReport + Send + Sync>>,
    audit: OnceLock<Box<dyn Fn() -> AuditCounts + Send + Sync>>,
    stores: OnceLock<Box<dyn Fn() -> StoresStatus + Send + Sync>>,
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
    /// entered, because it opens a file in `/proc`.
    ///
    /// `budget` is the memory that decoded blocks, index pages and replies share, in bytes.
    pub(crate) fn new(budget: u64, reader: Arc<BlockReader>, recent: RecentErrors) -> Self {
        Self {
            started: SystemTime::now(),
            resident: ResidentMemory::open(),
            budget,
            reader,
            recent,
            gateway: OnceLock::new(),
            audit: OnceLock::new(),
            stores: OnceLock::new(),
        }
    }

    /// Sets the source of the gateway's report. Only the first call has an effect.
    pub(crate) fn set_gateway(&self, report: impl Fn() -> GatewayReport + Send + Sync + 'static) {
        self.gateway.get_or_init(|| Box::new(report));
    }

    /// Sets the source of the audit counts. Only the first call has an effect.
    pub(crate) fn set_audit(&self, report: impl Fn() -> AuditCounts + Send + Sync + 'static) {
        self.audit.get_or_init(|| Box::new(report));
    }

    /// Sets the source of the status of stores. Only the first call has an effect.
    #[cfg(feature = "remote")]
    pub(crate) fn set_stores(&self, report: impl Fn() -> StoresStatus + Send + Sync + 'static) {
        self.stores.get_or_init(|| Box::new(report));
    }

    /// Returns the current status.
    pub(crate) fn status(&self) -> Status {
        let gateway = self.gateway_report();
        let stats = self.reader.stats();
        let memory = MemoryStatus {
            resident: self.resident.bytes(),
            budget: self.budget,
            in_flight: gateway.in_flight,
            in_flight_limit: gateway.in_flight_limit,
        };
        Status {
            format: STATUS_FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            now: unix_seconds(SystemTime::now()),
            started: unix_seconds(self.started),
            ready: gateway.not_ready_reason.is_none(),
            unready: gateway.not_ready_reason.map(Into::into),
            gateway,
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
            audit: self.audit.get().map(|report| report()),
            recent_errors: self.recent.to_vec(),
        }
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
        let silent = self.gateway.get().is_some()
            && self.gateway_report().since_heartbeat > HEARTBEAT_TIMEOUT;
        silent.then_some("stuck: no heartbeat from the serving threads")
    }

    fn gateway_report(&self) -> GatewayReport {
        match self.gateway.get() {
            Some(report) => report(),
            None => {
                GatewayReport { not_ready_reason: Some("starting"), ..GatewayReport::default() }
            }
        }
    }
}
