//! Counters and last outcome of configuration reloads.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// Maximum length of the error text that is kept, in bytes.
const LONGEST: usize = 1000;

/// Counters of reloads, shared between threads.
#[derive(Debug, Default)]
pub(super) struct Reloads(Mutex<SoFar>);

/// Number of reloads, and the outcome of the last one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SoFar {
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    pub(super) last: Option<SystemTime>,
    /// Error of the last reload, if it failed.
    pub(super) last_error: Option<String>,
}

impl Reloads {
    pub(super) fn succeeded(&self) {
        self.note(|it| {
            it.succeeded += 1;
            it.last_error = None;
        });
    }

    pub(super) fn failed(&self, why: &str) {
        let why = why.get(..why.floor_char_boundary(LONGEST)).unwrap_or_default().to_owned();
        self.note(|it| {
            it.failed += 1;
            it.last_error = Some(why);
        });
    }

    fn note(&self, change: impl FnOnce(&mut SoFar)) {
        let mut so_far = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        so_far.last = Some(SystemTime::now());
        change(&mut so_far);
    }

    pub(super) fn so_far(&self) -> SoFar {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
