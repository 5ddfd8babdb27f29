//! Counts events by label, such as the reason for a failure.

use std::collections::BTreeMap;
use std::fmt;

use parking_lot::Mutex;

/// Counters by label.
#[derive(Debug, Default)]
pub struct Tally(Mutex<BTreeMap<&'static str, u64>>);

/// Counts at one point in time, by label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts(pub BTreeMap<&'static str, u64>);

impl Tally {
    /// Adds one to the counter of `label`.
    pub fn count(&self, label: &'static str) {
        *self.0.lock().entry(label).or_default() += 1;
    }

    /// Returns the counts so far.
    pub fn so_far(&self) -> Counts {
        Counts(self.0.lock().clone())
    }
}

impl Counts {
    /// Returns the sum of both, label by label.
    pub fn and(mut self, others: Self) -> Self {
        for (label, count) in others.0 {
            *self.0.entry(label).or_default() += count;
        }
        self
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, (label, count)) in self.0.iter().enumerate() {
            let comma = if position == 0 { "" } else { ", " };
            write!(f, "{comma}{label} {count}")?;
        }
        Ok(())
    }
}
