//! Latency of a store's responses: when to hedge a request, and how far to read ahead.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Responses of each size class that are remembered.
const SAMPLES: usize = 128;
/// Responses without which nothing is hedged.
const MIN_SAMPLES: usize = 20;
/// Minimum time after which a request is hedged.
const MIN_DELAY: Duration = Duration::from_millis(30);
/// Ratio of an outlier to the median.
const OUTLIER: u32 = 2;
/// Requests that earn one hedge: 5 %.
const REQUESTS_PER_HEDGE: u64 = 20;

/// Recent latencies by size of the request, and the budget of hedges. Pure.
#[derive(Debug, Default)]
pub(crate) struct LatencyTracker {
    /// Latencies by size class: the logarithm of the size.
    classes: BTreeMap<u32, VecDeque<Duration>>,
    /// Slowly rising minimum.
    base: Option<Duration>,
    requests: u64,
    hedges: u64,
}

impl LatencyTracker {
    /// Counts a request that is sent, other than a hedge.
    pub(crate) fn count_request(&mut self) {
        self.requests += 1;
    }

    /// Records the time from a request of `size` bytes to the end of its response.
    pub(crate) fn record(&mut self, size: u64, latency: Duration) {
        let class = self.classes.entry(size_class(size)).or_default();
        if class.len() == SAMPLES {
            class.pop_front();
        }
        class.push_back(latency);
        self.base = Some(self.base.map_or(latency, |base| latency.min(base + base / 64)));
    }

    /// Returns the latency of a response when little is in flight, if there were any.
    pub(crate) fn base(&self) -> Option<Duration> {
        self.base
    }

    /// Returns the time after which a request of `size` bytes without a response is hedged: the
    /// 95th percentile, if it is known. It must also be an outlier: where the link is the limit, a
    /// second request would only slow down the first one.
    pub(crate) fn hedge_delay(&self, size: u64) -> Option<Duration> {
        let class = self.classes.get(&size_class(size))?;
        if class.len() < MIN_SAMPLES {
            return None;
        }
        let mut sorted: Vec<_> = class.iter().copied().collect();
        let mut percentile = |percent| {
            let place = sorted.len() * percent / 100;
            *sorted.select_nth_unstable(place).1
        };
        Some(percentile(95).max(OUTLIER * percentile(50)).max(MIN_DELAY))
    }

    /// Takes a hedge from the budget, if there is one left.
    pub(crate) fn take_hedge(&mut self) -> bool {
        let is_left = (self.hedges + 1) * REQUESTS_PER_HEDGE <= self.requests;
        self.hedges += u64::from(is_left);
        is_left
    }
}

fn size_class(size: u64) -> u32 {
    size.max(1).next_power_of_two().ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn requests_are_hedged_after_the_95th_percentile_of_their_size() {
        let mut latency = LatencyTracker::default();
        for n in 1..20 {
            latency.record(1000, n * 10 * MILLI);
        }
        assert_eq!(latency.hedge_delay(1000), None);
        latency.record(1000, 200 * MILLI);
        assert_eq!(latency.hedge_delay(1000), Some(220 * MILLI));
        assert_eq!(latency.hedge_delay(1 << 20), None);
        for n in 0..128 {
            latency.record(1000, if n % 10 == 0 { 500 * MILLI } else { MILLI });
        }
        assert_eq!(latency.hedge_delay(1000), Some(500 * MILLI));
        (0..128).for_each(|_| latency.record(1000, MILLI));
        assert_eq!(latency.hedge_delay(1000), Some(MIN_DELAY));
    }

    #[test]
    fn at_most_one_in_twenty_requests_is_hedged() {
        let mut latency = LatencyTracker::default();
        let mut hedges = 0;
        for _ in 0..100 {
            latency.count_request();
            hedges += u64::from(latency.take_hedge()) + u64::from(latency.take_hedge());
        }
        assert_eq!(hedges, 5);
    }

    #[test]
    fn the_base_follows_the_minimum() {
        let mut latency = LatencyTracker::default();
        assert_eq!(latency.base(), None);
        for latencies in [50, 20, 90] {
            latency.record(1, latencies * MILLI);
        }
        let base = latency.base().unwrap();
        assert!(base >= 20 * MILLI && base < 21 * MILLI);
        (0..200).for_each(|_| latency.record(1, 90 * MILLI));
        assert!(latency.base().unwrap() > 80 * MILLI);
    }
}
