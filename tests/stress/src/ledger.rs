//! What was done and seen, and what should not have been.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::panic::Location;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Violations of one kind that are told one by one; of one fault there are often very many.
const TOLD: usize = 5;

#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    rows: BTreeMap<&'static str, Row>,
    /// By where in this program they are found.
    violations: BTreeMap<Place, Vec<String>>,
    /// All of them.
    violated: u64,
}

/// A file and a line.
type Place = (&'static str, u32);

#[derive(Debug)]
enum Row {
    Count(u64),
    /// The longest, and of how many.
    Longest(Duration, u64),
    Text(String),
}

impl Ledger {
    pub(crate) fn count(&self, what: &'static str) {
        self.add(what, 1);
    }

    pub(crate) fn add(&self, what: &'static str, more: u64) {
        if let Row::Count(count) = self.entries().rows.entry(what).or_insert(Row::Count(0)) {
            *count += more;
        }
    }

    /// Notes how long something took; the longest is shown.
    pub(crate) fn took(&self, what: &'static str, time: Duration) {
        let mut entries = self.entries();
        let row = entries.rows.entry(what).or_insert(Row::Longest(Duration::ZERO, 0));
        if let Row::Longest(longest, count) = row {
            *longest = time.max(*longest);
            *count += 1;
        }
    }

    pub(crate) fn note(&self, what: &'static str, text: impl Display) {
        self.entries().rows.insert(what, Row::Text(text.to_string()));
    }

    /// Something that must not be. It is said at once, and again at the end.
    #[track_caller]
    pub(crate) fn violation(&self, text: impl Display) {
        let place = Location::caller();
        let mut entries = self.entries();
        entries.violated += 1;
        let told = entries.violations.entry((place.file(), place.line())).or_default();
        if told.len() < TOLD {
            eprintln!("VIOLATION: {text}");
            told.push(text.to_string());
        }
    }

    /// Unless it is so, that is a violation.
    #[track_caller]
    pub(crate) fn require(&self, is_so: bool, otherwise: impl Display) {
        if !is_so {
            self.violation(otherwise);
        }
    }

    /// Something that a run that proves anything has to have seen.
    #[track_caller]
    pub(crate) fn require_some(&self, what: &'static str) {
        let seen = match self.entries().rows.get(what) {
            Some(Row::Count(count) | Row::Longest(_, count)) => *count > 0,
            Some(Row::Text(_)) => true,
            None => false,
        };
        self.require(seen, format_args!("this run proves little: nothing of \"{what}\""));
    }

    /// Prints all of it; whether there was no violation.
    pub(crate) fn print(&self) -> bool {
        let entries = self.entries();
        println!();
        for (what, row) in &entries.rows {
            let value = match row {
                Row::Count(count) => count.to_string(),
                Row::Longest(longest, count) => format!("{longest:.3?} (of {count})"),
                Row::Text(text) => text.clone(),
            };
            println!("{what:<58} {value}");
        }
        println!();
        for violation in entries.violations.values().flatten() {
            println!("VIOLATION: {violation}");
        }
        println!("{} violations, at most {TOLD} of a kind shown", entries.violated);
        entries.violated == 0
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
