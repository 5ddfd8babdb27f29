//! Counters of the fetcher, for metrics.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

use crate::object::Priority;
use crate::store::{StoreError, StoreErrorKind};

/// Upper bounds of the buckets of [`LatencyHistogram`], in seconds. A last bucket has no bound.
pub const LATENCY_BUCKETS: [f64; 12] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Counters of a fetcher since its start, and its present state.
#[derive(Debug, Clone, Default)]
pub struct FetcherStats {
    /// One entry for each store, by label.
    pub stores: Vec<StoreStats>,
    /// Chunks in memory.
    pub cache: CacheStats,
    /// Chunks on disk, if there is a disk cache.
    pub disk_cache: Option<DiskCacheStats>,
    /// Time that reads have waited, summed over all of them.
    pub waits: WaitStats,
}

/// Counters of one store, and its present state.
#[derive(Debug, Clone)]
pub struct StoreStats {
    /// Label of the store.
    pub store: String,
    /// Requests sent, by priority and result: `ok`, `canceled`, or the label of an error.
    pub requests: BTreeMap<(Priority, &'static str), u64>,
    /// Bytes received, by priority.
    pub bytes: BTreeMap<Priority, u64>,
    /// Time from the request to the end of the response, of successful requests.
    pub latency: LatencyHistogram,
    /// Requests in flight.
    pub in_flight: usize,
    /// Requests that wait to be sent.
    pub queued: usize,
    /// Present limit of requests in flight.
    pub limit: usize,
    /// Responses that asked for fewer requests.
    pub throttled: u64,
    /// Requests repeated after a failure.
    pub retries: u64,
    /// Requests repeated because the first one took long.
    pub hedges_sent: u64,
    /// Hedged requests that were answered first.
    pub hedges_won: u64,
    /// State of the circuit breaker.
    pub breaker: BreakerState,
    /// Label of the reason for which the store rejects requests for objects that it has had:
    /// `denied`, `credentials_expired` or `clock_skew`.
    pub rejection: Option<&'static str>,
    /// Requests that found another version of the object.
    pub changed: u64,
    /// Time at which the credentials expire.
    pub credentials_expiry: Option<SystemTime>,
}

/// Distribution of latencies.
#[derive(Debug, Clone, Copy, Default)]
pub struct LatencyHistogram {
    /// Number of latencies in each bucket, which isn't part of the next one.
    pub counts: [u64; LATENCY_BUCKETS.len() + 1],
    /// Sum of all latencies.
    pub sum: Duration,
}

/// State of the chunk cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct CacheStats {
    /// Bytes in use, with overhead.
    pub bytes: u64,
    /// Limit of the bytes in use.
    pub capacity: u64,
    /// Chunks that were in memory when a read needed them.
    pub hits: u64,
    /// Chunks that weren't.
    pub misses: u64,
}

/// Counters of a disk cache since its start, and its present state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCacheStats {
    /// Bytes of the chunks on disk.
    pub bytes: u64,
    /// Slots with a chunk.
    pub slots_used: u64,
    /// Slots of 256 KiB.
    pub slots: u64,
    /// Chunks that were read from disk.
    pub hits: u64,
    /// Chunks that were needed and weren't on disk, or were bad.
    pub misses: u64,
    /// Chunks that weren't what had been written, or were rejected by their verifier.
    pub bad: u64,
    /// Chunks that made room for others.
    pub evicted: u64,
    /// Chunks that weren't written because too many were queued.
    pub writes_dropped: u64,
    /// True if the disk has failed, or the cache is closed.
    pub is_off: bool,
}

/// Time waited, by cause.
#[derive(Debug, Clone, Copy, Default)]
pub struct WaitStats {
    /// For a free slot or the response.
    pub fetch: Duration,
    /// For the next attempt after a failure.
    pub retry: Duration,
    /// For the end of a pause that the store asked for.
    pub throttled: Duration,
    /// For a store that is down.
    pub breaker: Duration,
}

/// State of a circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BreakerState {
    /// The store works.
    Closed,
    /// The store is down; one request a second probes it.
    Open,
}

impl BreakerState {
    /// Returns the stable label for logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
        }
    }
}

impl LatencyHistogram {
    fn record(&mut self, latency: Duration) {
        let seconds = latency.as_secs_f64();
        let bucket = LATENCY_BUCKETS.iter().take_while(|bound| seconds > **bound).count();
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += latency;
    }
}

impl WaitStats {
    /// Returns the time waited since `earlier`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            fetch: self.fetch.saturating_sub(earlier.fetch),
            retry: self.retry.saturating_sub(earlier.retry),
            throttled: self.throttled.saturating_sub(earlier.throttled),
            breaker: self.breaker.saturating_sub(earlier.breaker),
        }
    }

    /// Adds another time.
    pub(crate) fn add(&mut self, other: &Self) {
        self.fetch += other.fetch;
        self.retry += other.retry;
        self.throttled += other.throttled;
        self.breaker += other.breaker;
    }
}

/// Counters of one store.
#[derive(Debug, Default)]
pub(crate) struct StoreMetrics {
    counters: Mutex<Counters>,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct Counters {
    pub(crate) requests: BTreeMap<(Priority, &'static str), u64>,
    pub(crate) bytes: BTreeMap<Priority, u64>,
    pub(crate) latency: LatencyHistogram,
    pub(crate) throttled: u64,
    pub(crate) retries: u64,
    pub(crate) hedges_sent: u64,
    pub(crate) hedges_won: u64,
    pub(crate) changed: u64,
}

impl StoreMetrics {
    /// Counts a request with `bytes` in its response.
    pub(crate) fn count_response(&self, priority: Priority, bytes: u64, latency: Duration) {
        let mut counters = self.counters.lock();
        *counters.requests.entry((priority, "ok")).or_default() += 1;
        *counters.bytes.entry(priority).or_default() += bytes;
        counters.latency.record(latency);
    }

    /// Counts a request that failed.
    pub(crate) fn count_error(&self, priority: Priority, error: &StoreError) {
        let mut counters = self.counters.lock();
        *counters.requests.entry((priority, error.kind.label())).or_default() += 1;
        match error.kind {
            StoreErrorKind::Throttled => counters.throttled += 1,
            StoreErrorKind::Changed => counters.changed += 1,
            _ => {}
        }
    }

    /// Counts a request whose response wasn't waited for.
    pub(crate) fn count_canceled(&self, priority: Priority) {
        *self.counters.lock().requests.entry((priority, "canceled")).or_default() += 1;
    }

    /// Counts a retry.
    pub(crate) fn count_retry(&self) {
        self.counters.lock().retries += 1;
    }

    /// Counts a hedged request that is sent.
    pub(crate) fn count_hedge(&self) {
        self.counters.lock().hedges_sent += 1;
    }

    /// Counts a hedged request that was answered first.
    pub(crate) fn count_hedge_won(&self) {
        self.counters.lock().hedges_won += 1;
    }

    /// Returns a copy of all counters.
    pub(crate) fn snapshot(&self) -> Counters {
        self.counters.lock().clone()
    }
}
