//! Counters and last outcome of configuration reloads.

use std::time::SystemTime;

use parking_lot::Mutex;

/// Maximum length of the error text that is kept, in bytes.
const MAX_ERROR_LENGTH: usize = 1000;

/// Counters of reloads, shared between threads.
#[derive(Debug, Default)]
pub(crate) struct ReloadCounters(Mutex<ReloadStats>);

/// Number of reloads, and the outcome of the last one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ReloadStats {
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) last: Option<SystemTime>,
    /// Error of the last reload, if it failed.
    pub(crate) last_error: Option<String>,
}

impl ReloadCounters {
    pub(crate) fn record_success(&self) {
        self.record(|it| {
            it.succeeded += 1;
            it.last_error = None;
        });
    }

    pub(crate) fn record_failure(&self, why: &str) {
        let why =
            why.get(..why.floor_char_boundary(MAX_ERROR_LENGTH)).unwrap_or_default().to_owned();
        self.record(|it| {
            it.failed += 1;
            it.last_error = Some(why);
        });
    }

    fn record(&self, change: impl FnOnce(&mut ReloadStats)) {
        let mut so_far = self.0.lock();
        so_far.last = Some(SystemTime::now());
        change(&mut so_far);
    }

    pub(crate) fn snapshot(&self) -> ReloadStats {
        self.0.lock().clone()
    }
}
