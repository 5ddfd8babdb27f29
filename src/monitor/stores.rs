//! Status of the stores from which remote archives are fetched.

use std::borrow::Cow;
use std::collections::BTreeMap;

use nbd_gateway::{DurationHistogram, LabelCounts};
use serde::{Deserialize, Serialize};

/// Status of all stores, and of what is fetched from them. Empty without remote archives.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StoresStatus {
    /// Stores in the order of their names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) stores: Vec<StoreStatus>,
    /// Chunks of archives in memory; `None` without remote archives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fetched: Option<FetchedStatus>,
    /// Chunks of archives on disk; `None` without a disk cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) disk_cache: Option<DiskCacheStatus>,
    /// Seconds that reads have waited, summed over all of them, by cause: `fetch` (for a free slot
    /// or the response), `retry`, `throttled`, `breaker` (for a store that is down).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) read_wait_seconds: BTreeMap<Cow<'static, str>, f64>,
}

/// Status of one store.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StoreStatus {
    /// Label of the store, such as `s3://golden`.
    pub(crate) name: String,
    /// Number of requests sent, by priority and result.
    pub(crate) requests: BTreeMap<Cow<'static, str>, LabelCounts>,
    /// Bytes received, by priority.
    pub(crate) bytes: LabelCounts,
    /// Time from a request to the end of its response, of successful requests.
    pub(crate) request_seconds: DurationHistogram,
    /// Number of requests in flight.
    pub(crate) in_flight: u64,
    /// Number of requests that wait to be sent.
    pub(crate) queued: u64,
    /// Present limit of requests in flight.
    pub(crate) limit: u64,
    /// Number of responses that asked for fewer requests.
    pub(crate) throttled: u64,
    /// Number of requests repeated after a failure.
    pub(crate) retries: u64,
    /// Number of requests repeated because the first one took long.
    pub(crate) hedges_sent: u64,
    /// Number of these that were answered first.
    pub(crate) hedges_won: u64,
    /// State of the circuit breaker: `closed`, or `open` if the store is down.
    pub(crate) breaker: Cow<'static, str>,
    /// Reason for which the store rejects requests for objects that it has had: `denied`,
    /// `credentials_expired` or `clock_skew`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rejection: Option<Cow<'static, str>>,
    /// Number of requests that found another version of the object.
    pub(crate) changed: u64,
    /// Time at which the credentials expire, if they do and it is known.
    pub(crate) credentials_expire: Option<f64>,
}

/// Chunks of archives in memory.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct FetchedStatus {
    /// Bytes in use.
    pub(crate) bytes: u64,
    /// Limit of the bytes in use.
    pub(crate) capacity: u64,
    /// Number of chunks that were in memory when a read needed them.
    pub(crate) hits: u64,
    /// Number of chunks that weren't.
    pub(crate) misses: u64,
}

/// Chunks of archives on disk.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DiskCacheStatus {
    /// Bytes in use.
    pub(crate) bytes: u64,
    /// Limit of the bytes in use.
    pub(crate) capacity: u64,
    /// Number of chunks that were read from disk.
    pub(crate) hits: u64,
    /// Number of chunks that weren't there, or were bad.
    pub(crate) misses: u64,
    /// Number of chunks that weren't what had been written.
    pub(crate) bad: u64,
    /// Number of chunks that made room for others.
    pub(crate) evicted: u64,
    /// Number of chunks that weren't written because too many were queued.
    pub(crate) writes_dropped: u64,
    /// True if the disk has failed, so that the cache isn't used any more.
    pub(crate) is_off: bool,
}

impl StoreStatus {
    /// Returns true if the store is down.
    pub(crate) fn is_down(&self) -> bool {
        self.breaker == "open"
    }

    /// Returns the number of requests. It may have any value, so the sum must not overflow.
    pub(crate) fn total_requests(&self) -> u64 {
        self.requests
            .values()
            .flat_map(LabelCounts::values)
            .fold(0, |sum, it| sum.saturating_add(*it))
    }

    /// Returns the number of bytes received.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.bytes.values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

#[cfg(feature = "remote")]
mod conversion {
    use nbd_gateway::unix_seconds;
    use object_reader::{
        CHUNK_SIZE, CacheStats, DiskCacheStats, FetcherStats, LATENCY_BUCKETS, LatencyHistogram,
        StoreStats, WaitStats,
    };

    use super::*;

    impl From<FetcherStats> for StoresStatus {
        fn from(stats: FetcherStats) -> Self {
            let CacheStats { bytes, capacity, hits, misses } = stats.cache;
            let WaitStats { fetch, retry, throttled, breaker } = stats.waits;
            let waits = [
                ("fetch", fetch),
                ("retry", retry),
                ("throttled", throttled),
                ("breaker", breaker),
            ];
            let seconds = waits.map(|(cause, time)| (cause.into(), time.as_secs_f64()));
            Self {
                stores: stats.stores.into_iter().map(Into::into).collect(),
                fetched: Some(FetchedStatus { bytes, capacity, hits, misses }),
                disk_cache: stats.disk_cache.map(Into::into),
                read_wait_seconds: seconds.into(),
            }
        }
    }

    impl From<DiskCacheStats> for DiskCacheStatus {
        fn from(stats: DiskCacheStats) -> Self {
            Self {
                bytes: stats.bytes,
                capacity: stats.slots.saturating_mul(CHUNK_SIZE),
                hits: stats.hits,
                misses: stats.misses,
                bad: stats.bad,
                evicted: stats.evicted,
                writes_dropped: stats.writes_dropped,
                is_off: stats.is_off,
            }
        }
    }

    impl From<StoreStats> for StoreStatus {
        fn from(stats: StoreStats) -> Self {
            let mut requests = BTreeMap::<_, LabelCounts>::new();
            for ((priority, result), count) in stats.requests {
                requests.entry(priority.label().into()).or_default().insert(result.into(), count);
            }
            let bytes = stats.bytes.into_iter();
            Self {
                name: stats.store,
                requests,
                bytes: bytes.map(|(priority, bytes)| (priority.label().into(), bytes)).collect(),
                request_seconds: histogram(&stats.latency),
                in_flight: count(stats.in_flight),
                queued: count(stats.queued),
                limit: count(stats.limit),
                throttled: stats.throttled,
                retries: stats.retries,
                hedges_sent: stats.hedges_sent,
                hedges_won: stats.hedges_won,
                breaker: stats.breaker.label().into(),
                rejection: stats.rejection.map(Into::into),
                changed: stats.changed,
                credentials_expire: stats.credentials_expiry.map(unix_seconds),
            }
        }
    }

    fn histogram(latency: &LatencyHistogram) -> DurationHistogram {
        let mut so_far = 0;
        let buckets = LATENCY_BUCKETS.iter().zip(latency.counts).map(|(bound, count)| {
            so_far += count;
            (*bound, so_far)
        });
        let buckets = buckets.collect();
        let count = latency.counts.iter().sum();
        DurationHistogram { count, sum: latency.sum.as_secs_f64(), buckets }
    }

    fn count(length: usize) -> u64 {
        u64::try_from(length).unwrap_or(u64::MAX)
    }
}

#[cfg(all(test, feature = "remote"))]
mod tests {
    use super::*;
    use object_reader::{
        BreakerState, FetcherStats, LATENCY_BUCKETS, LatencyHistogram, Priority, StoreStats,
    };
    use std::time::{Duration, SystemTime};

    #[test]
    fn figures_of_the_fetcher_become_a_status() {
        let mut latency = LatencyHistogram { sum: Duration::from_secs(50), ..Default::default() };
        latency.counts[0] = 3;
        latency.counts[2] = 1;
        latency.counts[LATENCY_BUCKETS.len()] = 1;
        let store = StoreStats {
            store: "s3://golden".to_owned(),
            requests: [
                ((Priority::Demand, "ok"), 4),
                ((Priority::Demand, "throttled"), 2),
                ((Priority::Ahead, "ok"), 1),
            ]
            .into(),
            bytes: [(Priority::Demand, 400), (Priority::Ahead, 100)].into(),
            latency,
            in_flight: 1,
            queued: 2,
            limit: 16,
            throttled: 2,
            retries: 3,
            hedges_sent: 1,
            hedges_won: 0,
            breaker: BreakerState::Open,
            rejection: Some("denied"),
            changed: 0,
            credentials_expiry: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(7)),
        };
        let stats = FetcherStats { stores: vec![store], ..FetcherStats::default() };
        let status = StoresStatus::from(stats);
        let store = &status.stores[0];
        assert_eq!(store.requests["demand"]["throttled"], 2);
        assert_eq!((store.total_requests(), store.total_bytes()), (7, 500));
        assert!(store.is_down());
        assert_eq!(store.rejection.as_deref(), Some("denied"));
        assert_eq!(store.credentials_expire, Some(7.0));
        let seconds = &store.request_seconds;
        assert_eq!((seconds.count, seconds.sum), (5, 50.0));
        // Cumulative, without the last bucket, which has no bound.
        assert_eq!(seconds.buckets[..3], [(0.005, 3), (0.01, 3), (0.025, 4)]);
        assert_eq!(seconds.buckets.last(), Some(&(30.0, 4)));
        let causes: Vec<_> = status.read_wait_seconds.keys().map(|cause| &**cause).collect();
        assert_eq!(causes, ["breaker", "fetch", "retry", "throttled"]);
    }
}
