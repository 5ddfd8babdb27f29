//! Number of sequential readers, who share the memory for readahead.

use parking_lot::Mutex;
use tokio::time::Instant;

/// Counts the sequential streams of all objects that were read recently.
#[derive(Debug)]
pub(crate) struct ActiveStreams {
    counts: Mutex<PeriodCounts>,
    start: Instant,
}

#[derive(Debug, Default)]
struct PeriodCounts {
    period: u64,
    current: u64,
    previous: u64,
}

impl ActiveStreams {
    /// Length of a period, in milliseconds. A stream counts in its period and in the next one. It is
    /// short, since a client that copies an image in parts starts several streams a second.
    const PERIOD: u128 = 250;

    /// Starts without streams.
    pub(crate) fn new() -> Self {
        Self { counts: Mutex::default(), start: Instant::now() }
    }

    /// Counts a stream that is read, unless it was counted in this period, and returns the number
    /// of active ones: at least 1.
    pub(crate) fn count(&self, counted: &mut Option<u64>, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.start).as_millis();
        let period = u64::try_from(elapsed / Self::PERIOD).unwrap_or(u64::MAX);
        let mut counts = self.counts.lock();
        if period > counts.period {
            let is_next = period == counts.period + 1;
            let previous = if is_next { counts.current } else { 0 };
            *counts = PeriodCounts { period, current: 0, previous };
        }
        if *counted != Some(period) {
            *counted = Some(period);
            counts.current += 1;
        }
        counts.current.max(counts.previous).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn streams_are_active_for_two_periods() {
        let (active, now) = (ActiveStreams::new(), Instant::now());
        let period = Duration::from_millis(250);
        let mut streams = [None; 3];
        let counts = streams.each_mut().map(|stream| active.count(stream, now));
        assert_eq!(counts, [1, 2, 3]);
        assert_eq!(active.count(&mut streams[0], now + period), 3);
        assert_eq!(active.count(&mut streams[0], now + 2 * period), 1);
        assert_eq!(active.count(&mut streams[0], now + 60 * period), 1);
    }
}
