//! Remembers the activity of the last minutes, so that a status page that has just been opened
//! shows them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::MissedTickBehavior;

use super::source::StatusSource;

/// Interval between two samples.
const INTERVAL: Duration = Duration::from_secs(5);

/// Maximum number of samples: those of 15 minutes. They take 10 KiB.
const MAX_SAMPLES: usize = 180;

/// Counters at one moment. They count from the start of the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Sample {
    /// Unix time in seconds.
    pub(super) at: f64,
    /// Open connections.
    pub(super) connections: u64,
    /// Number of requests received.
    pub(super) requests: u64,
    /// Bytes of data in replies to reads.
    pub(super) bytes: u64,
    /// Number of blocks that clients asked for and that were in the cache.
    pub(super) cache_hits: u64,
    /// Number of blocks that clients asked for and had to wait for.
    pub(super) cache_misses: u64,
}

/// Samples of the last minutes, in the format of `/history.json`.
#[derive(Debug, Default, Serialize)]
pub(super) struct HistoryReport {
    /// Version of this format: 1.
    format: u32,
    /// Seconds between two samples.
    interval: u64,
    /// Samples, oldest first.
    samples: Vec<Sample>,
}

/// Counters of failures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct FailureCounts {
    /// Number of requests that failed because a block couldn't be read or verified.
    pub(super) reads: u64,
    /// Number of audit events that couldn't be written.
    pub(super) audit: u64,
}

/// Times at which these counters were last seen to grow; `None` if they are zero.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct LastFailures {
    /// Time of the last failed read.
    pub(super) reads: Option<f64>,
    /// Time of the last lost audit event.
    pub(super) audit: Option<f64>,
}

/// The activity of the last minutes.
#[derive(Debug, Default)]
pub(super) struct History(Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    samples: VecDeque<Sample>,
    counts: FailureCounts,
    failures: LastFailures,
}

impl History {
    /// Adds a sample.
    pub(super) fn record(&self, sample: Sample) {
        let mut recorded = self.0.lock();
        if recorded.samples.len() == MAX_SAMPLES {
            recorded.samples.pop_front();
        }
        recorded.samples.push_back(sample);
    }

    /// Returns when failures were last seen, after the counters have reached `counts` at the Unix
    /// time `at`.
    pub(super) fn last_failures(&self, at: f64, counts: FailureCounts) -> LastFailures {
        let mut recorded = self.0.lock();
        let before = std::mem::replace(&mut recorded.counts, counts);
        if counts.reads > before.reads {
            recorded.failures.reads = Some(at);
        }
        if counts.audit > before.audit {
            recorded.failures.audit = Some(at);
        }
        recorded.failures
    }

    /// Returns all samples.
    pub(super) fn report(&self) -> HistoryReport {
        let samples = self.0.lock().samples.iter().copied().collect();
        HistoryReport { format: 1, interval: INTERVAL.as_secs(), samples }
    }
}

/// Takes samples until this is dropped.
pub(super) async fn sample(observed: Arc<StatusSource>) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        observed.record_sample();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(number: u32) -> Sample {
        Sample { at: f64::from(number), requests: u64::from(number), ..Sample::default() }
    }

    #[test]
    fn the_latest_samples_are_kept() {
        let history = History::default();
        (0..1000).for_each(|number| history.record(sample(number)));
        let samples = history.report().samples;
        assert_eq!(samples.len(), MAX_SAMPLES);
        assert_eq!((samples[0].requests, samples[MAX_SAMPLES - 1].requests), (820, 999));
        let json = serde_json::to_value(history.report()).unwrap();
        assert_eq!((&json["format"], &json["samples"][0]["at"]), (&1.into(), &820.0.into()));
    }

    #[test]
    fn the_last_failure_is_remembered() {
        let history = History::default();
        let after = |at, reads, audit| history.last_failures(at, FailureCounts { reads, audit });
        assert_eq!(after(1.0, 0, 0), LastFailures::default());
        assert_eq!(after(2.0, 3, 0), LastFailures { reads: Some(2.0), audit: None });
        assert_eq!(after(3.0, 3, 1), LastFailures { reads: Some(2.0), audit: Some(3.0) });
        assert_eq!(after(4.0, 4, 1), LastFailures { reads: Some(4.0), audit: Some(3.0) });
    }
}
