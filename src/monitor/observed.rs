//! Where the numbers come from.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::recent::RecentErrors;
use super::resident::Resident;
use super::status::{Cache, Memory, Status, Storage};
use crate::exports::{BlockReader, Figures};
use crate::gateway::{Report, unix_seconds};

/// The form of [`Status`].
const FORMAT: u32 = 1;

/// Threads that serve show that they live twice a second. When they haven't for so long, they
/// won't any more.
const SILENCE: Duration = Duration::from_secs(15);

/// All that is looked at. There is something to see from the start on: a gateway may come
/// later.
pub struct Observed {
    started: SystemTime,
    resident: Resident,
    /// `--cache-size`, in bytes.
    budget: u64,
    reader: Arc<BlockReader>,
    recent: RecentErrors,
    gateway: OnceLock<Box<dyn Fn() -> Report + Send + Sync>>,
    audit: OnceLock<Box<dyn Fn() -> AuditReport + Send + Sync>>,
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observed").finish_non_exhaustive()
    }
}

/// How many audit events there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct AuditReport {
    /// Those that were written.
    pub written: u64,
    /// Those that couldn't be.
    pub lost: u64,
}

impl Observed {
    /// A program that is starting. Make it before the sandbox is entered.
    ///
    /// `budget` is what decoded blocks, index pages and answers may take together, in bytes.
    pub fn new(budget: u64, reader: Arc<BlockReader>, recent: RecentErrors) -> Self {
        Self {
            started: SystemTime::now(),
            resident: Resident::open(),
            budget,
            reader,
            recent,
            gateway: OnceLock::new(),
            audit: OnceLock::new(),
        }
    }

    /// There is a gateway now, which says this of itself. Only the first one counts.
    pub fn gateway(&self, report: impl Fn() -> Report + Send + Sync + 'static) {
        self.gateway.get_or_init(|| Box::new(report));
    }

    /// There are audit events, so many. Only the first to say so counts.
    pub fn audit(&self, report: impl Fn() -> AuditReport + Send + Sync + 'static) {
        self.audit.get_or_init(|| Box::new(report));
    }

    /// All of it, as it is now.
    pub fn status(&self) -> Status {
        let gateway = self.report();
        let figures = self.reader.figures();
        let memory = Memory {
            resident: self.resident.bytes(),
            budget: self.budget,
            in_flight: gateway.in_flight,
            in_flight_limit: gateway.in_flight_limit,
        };
        Status {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            now: unix_seconds(SystemTime::now()),
            started: unix_seconds(self.started),
            ready: gateway.unready.is_none(),
            unready: gateway.unready,
            gateway,
            cache: Cache {
                bytes: figures.cached,
                capacity: figures.capacity,
                hits: figures.hits,
                misses: figures.misses,
                decoded_blocks: figures.decoded,
                decoded_bytes: figures.decoded_bytes,
                decode_seconds: figures.decoding.as_secs_f64(),
            },
            storage: storage(&figures),
            verification_failures: figures.unread.0,
            open_failures: figures.unopened.0,
            memory,
            audit: self.audit.get().map(|report| report()),
            recent_errors: self.recent.all(),
        }
    }

    /// Why clients can't be served just now, if they can't.
    pub(super) fn unready(&self) -> Option<&'static str> {
        self.report().unready
    }

    /// Why the program had better be started anew, if it had.
    pub(super) fn sick(&self) -> Option<&'static str> {
        let silent = self.gateway.get().is_some() && self.report().silent_for > SILENCE;
        silent.then_some("the threads that serve clients are stuck")
    }

    fn report(&self) -> Report {
        match self.gateway.get() {
            Some(report) => report(),
            None => Report { unready: Some("it is starting"), ..Report::default() },
        }
    }
}

fn storage(figures: &Figures) -> Storage {
    Storage { reads: figures.storage_reads, bytes: figures.storage_bytes }
}
