//! Rules: which requests a behavior applies to.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::log::LoggedRequest;
use crate::script::Behavior;

/// A behavior, and the requests that it applies to: all, unless it is restricted. A request has to
/// satisfy every restriction.
#[derive(Debug)]
pub struct Rule {
    pub(crate) behavior: Behavior,
    method: Option<String>,
    path: Option<String>,
    is_ranged: Option<bool>,
    overlapping: Option<Range<u64>>,
    header: Option<(String, String)>,
    skip: u64,
    times: u64,
    percent: u64,
    /// Number of requests so far that satisfied the restrictions above.
    matched: AtomicU64,
}

impl Rule {
    /// Creates a rule for all requests.
    #[must_use]
    pub fn new(behavior: Behavior) -> Self {
        Self {
            behavior,
            method: None,
            path: None,
            is_ranged: None,
            overlapping: None,
            header: None,
            skip: 0,
            times: u64::MAX,
            percent: 100,
            matched: AtomicU64::new(0),
        }
    }

    /// Restricts it to a method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Self {
        self.method = Some(method.to_owned());
        self
    }

    /// Restricts it to paths that contain `part`.
    #[must_use]
    pub fn path(mut self, part: &str) -> Self {
        self.path = Some(part.to_owned());
        self
    }

    /// Restricts it to requests with a Range header, or without one.
    #[must_use]
    pub fn ranged(mut self, is_ranged: bool) -> Self {
        self.is_ranged = Some(is_ranged);
        self
    }

    /// Restricts it to ranges of the form `bytes=a-b` and `bytes=a-` that overlap this one.
    #[must_use]
    pub fn overlapping(mut self, range: Range<u64>) -> Self {
        self.overlapping = Some(range);
        self
    }

    /// Restricts it to requests in which this header contains `part`.
    #[must_use]
    pub fn header(mut self, name: &str, part: &str) -> Self {
        self.header = Some((name.to_owned(), part.to_owned()));
        self
    }

    /// Leaves out the first `count` requests.
    #[must_use]
    pub fn skip(mut self, count: u64) -> Self {
        self.skip = count;
        self
    }

    /// Ends it after `count` requests.
    #[must_use]
    pub fn times(mut self, count: u64) -> Self {
        self.times = count;
        self
    }

    /// Applies it to this share of the requests, spread evenly: with 30, to the 4th, 7th and 10th
    /// of every ten.
    #[must_use]
    pub fn percent(mut self, percent: u8) -> Self {
        self.percent = u64::from(percent.min(100));
        self
    }

    /// Returns true if the rule applies. Each call counts as a request.
    pub(crate) fn applies_to(&self, request: &LoggedRequest) -> bool {
        let range = request.requested_range();
        let satisfied = self.method.as_ref().is_none_or(|method| *method == request.method)
            && self.path.as_ref().is_none_or(|path| request.path.contains(path))
            && self.is_ranged.is_none_or(|ranged| ranged == request.range.is_some())
            && self.overlapping.as_ref().is_none_or(|wanted| {
                range.is_some_and(|range| range.start < wanted.end && wanted.start < range.end)
            })
            && self.header.as_ref().is_none_or(|(name, part)| {
                request.header(name).is_some_and(|value| value.contains(part))
            });
        if !satisfied {
            return false;
        }
        let Some(number) = self.matched.fetch_add(1, Ordering::Relaxed).checked_sub(self.skip)
        else {
            return false;
        };
        number < self.times && (number + 1) * self.percent / 100 > number * self.percent / 100
    }
}
