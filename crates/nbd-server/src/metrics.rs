//! Counters of a session's activity, readable by others while the session runs.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::wire::reply::ErrorCode;
use super::wire::request::Command;

/// Upper bounds of the latency buckets, in microseconds: from a cache hit to a read from a failing
/// disk. Each bound is inclusive. One further bucket counts all latencies above the last bound.
pub const LATENCY_BOUNDS: [u64; 18] = [
    25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000,
];

const BUCKET_COUNT: usize = LATENCY_BOUNDS.len() + 1;

/// Error codes that clients can be sent, with their labels; the last entry stands for any other.
const ERROR_LABELS: [(ErrorCode, &str); 9] = [
    (ErrorCode::IO, "io"),
    (ErrorCode::INVAL, "inval"),
    (ErrorCode::PERM, "perm"),
    (ErrorCode::OVERFLOW, "overflow"),
    (ErrorCode::NOTSUP, "notsup"),
    (ErrorCode::SHUTDOWN, "shutdown"),
    (ErrorCode::NOMEM, "nomem"),
    (ErrorCode::NOSPC, "nospc"),
    (ErrorCode::OK, "other"),
];

/// Counters of one session. The engine writes them; others may read them at any time.
///
/// Updates never wait, and the counters of two sessions share no cache line: counting must not slow
/// down a connection that answers hundreds of thousands of requests per second.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct SessionMetrics {
    requests: [AtomicU64; 4],
    in_flight: AtomicU64,
    bytes: AtomicU64,
    errors: [AtomicU64; ERROR_LABELS.len()],
    latencies: [AtomicU64; BUCKET_COUNT],
    /// Sum of all latencies, in nanoseconds.
    latency: AtomicU64,
    throttled: AtomicU64,
    /// Total time that requests were throttled, in nanoseconds.
    throttled_for: AtomicU64,
}

/// Snapshot of the counters of one session, or the sum over several sessions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetricsTotals {
    /// Number of requests received, by command.
    pub requests: RequestCounts,
    /// Bytes of data in replies to reads.
    pub bytes: u64,
    /// Number of requests that were answered with an error, by error code.
    pub errors: ErrorCounts,
    /// Latencies of reads.
    pub read_latency: LatencyHistogram,
    /// Number of requests that the client's rate limit ([`Throttle`](super::Throttle)) delayed.
    pub throttled: u64,
    /// Total time that these requests were delayed.
    pub throttled_for: Duration,
}

/// Numbers of requests, by command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default))]
pub struct RequestCounts {
    /// `NBD_CMD_READ`.
    pub read: u64,
    /// `NBD_CMD_BLOCK_STATUS`.
    pub block_status: u64,
    /// `NBD_CMD_CACHE`.
    pub cache: u64,
    /// All other commands except `NBD_CMD_DISC`.
    pub other: u64,
}

/// Numbers of error replies, by error code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ErrorCounts([u64; ERROR_LABELS.len()]);

/// Histogram of the latencies of reads that were attempted. A latency is measured from the arrival
/// of the request until the last part of its reply, or an error, was ready to be sent. Reads that
/// arrived together and were answered at once count as ready when the whole batch had been
/// processed. Time spent waiting for the client's rate limit is included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LatencyHistogram {
    buckets: [u64; BUCKET_COUNT],
    /// Sum of all latencies.
    pub sum: Duration,
}

impl SessionMetrics {
    /// Returns a snapshot of the counters.
    pub fn totals(&self) -> MetricsTotals {
        let [read, block_status, cache, other] = load(&self.requests);
        MetricsTotals {
            requests: RequestCounts { read, block_status, cache, other },
            bytes: self.bytes.load(Relaxed),
            errors: ErrorCounts(load(&self.errors)),
            read_latency: LatencyHistogram {
                buckets: load(&self.latencies),
                sum: Duration::from_nanos(self.latency.load(Relaxed)),
            },
            throttled: self.throttled.load(Relaxed),
            throttled_for: Duration::from_nanos(self.throttled_for.load(Relaxed)),
        }
    }

    /// Returns the number of requests in flight: being processed, or answered but not fully sent.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }

    /// Sets the numbers of requests. Only the connection's own task may call this: unlike the
    /// adding methods, it overwrites the counters.
    pub fn set_requests(&self, requests: RequestCounts) {
        let RequestCounts { read, block_status, cache, other } = requests;
        for (counter, count) in self.requests.iter().zip([read, block_status, cache, other]) {
            counter.store(count, Relaxed);
        }
    }

    pub(super) fn set_in_flight(&self, requests: u64) {
        self.in_flight.store(requests, Relaxed);
    }

    /// Counts `reads` reads that returned `bytes` bytes in total, each with latency `after`.
    pub(super) fn add_reads(&self, reads: u64, bytes: u64, after: Duration) {
        let nanoseconds = nanoseconds(after);
        let bucket = LATENCY_BOUNDS.partition_point(|bound| bound * 1000 < nanoseconds);
        if let Some(counter) = self.latencies.get(bucket) {
            counter.fetch_add(reads, Relaxed);
        }
        self.latency.fetch_add(nanoseconds.saturating_mul(reads), Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_error(&self, code: ErrorCode) {
        let known = ERROR_LABELS.iter().position(|(known, _)| *known == code);
        if let Some(counter) = self.errors.get(known.unwrap_or(ERROR_LABELS.len() - 1)) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn add_throttled(&self, waited: Duration) {
        self.throttled.fetch_add(1, Relaxed);
        self.throttled_for.fetch_add(nanoseconds(waited), Relaxed);
    }
}

impl RequestCounts {
    pub(super) fn count(&mut self, command: Command) {
        match command {
            Command::READ => self.read += 1,
            Command::BLOCK_STATUS => self.block_status += 1,
            Command::CACHE => self.cache += 1,
            _ => self.other += 1,
        }
    }

    /// Returns the number of requests of all kinds.
    pub fn total(&self) -> u64 {
        self.read + self.block_status + self.cache + self.other
    }
}

impl ErrorCounts {
    /// Returns the number of errors of all kinds.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Returns the count for each error label: the name of the code in lower case without `NBD_E`,
    /// or "other". Codes with a count of zero are included.
    pub fn by_code(&self) -> impl Iterator<Item = (&'static str, u64)> {
        ERROR_LABELS.iter().map(|(_, label)| *label).zip(self.0)
    }
}

impl LatencyHistogram {
    /// Returns the number of reads counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Returns the upper bound and the count of each bucket in [`LATENCY_BOUNDS`]. Buckets are not
    /// cumulative. Reads slower than the last bound appear only in [`count`](Self::count).
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> {
        LATENCY_BOUNDS.iter().map(|bound| Duration::from_micros(*bound)).zip(self.buckets)
    }
}

impl AddAssign for MetricsTotals {
    fn add_assign(&mut self, other: Self) {
        self.requests.read += other.requests.read;
        self.requests.block_status += other.requests.block_status;
        self.requests.cache += other.requests.cache;
        self.requests.other += other.requests.other;
        self.bytes += other.bytes;
        add(&mut self.errors.0, other.errors.0);
        add(&mut self.read_latency.buckets, other.read_latency.buckets);
        self.read_latency.sum += other.read_latency.sum;
        self.throttled += other.throttled;
        self.throttled_for += other.throttled_for;
    }
}

fn add<const N: usize>(counts: &mut [u64; N], more: [u64; N]) {
    counts.iter_mut().zip(more).for_each(|(count, more)| *count += more);
}

fn load<const N: usize>(counters: &[AtomicU64; N]) -> [u64; N] {
    counters.each_ref().map(|counter| counter.load(Relaxed))
}

/// Converts to nanoseconds; 64 bits suffice for centuries.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_is_counted_in_the_first_matching_bucket() {
        let metrics = SessionMetrics::default();
        let of = |nanoseconds| {
            let before = metrics.totals().read_latency.buckets;
            metrics.add_reads(1, 0, Duration::from_nanos(nanoseconds));
            let after = metrics.totals().read_latency.buckets;
            (0..BUCKET_COUNT).find(|&at| after[at] != before[at])
        };
        assert_eq!([of(0), of(25_000), of(25_001)], [Some(0), Some(0), Some(1)]);
        assert_eq!([of(10_000_000_000), of(10_000_000_001)], [Some(17), Some(18)]);
        let latencies = metrics.totals().read_latency;
        assert_eq!(latencies.count(), 5);
        assert_eq!(latencies.buckets().map(|(_, count)| count).sum::<u64>(), 4);
        assert!(LATENCY_BOUNDS.is_sorted());
    }

    #[test]
    fn totals_of_several_sessions_are_added() {
        let metrics = SessionMetrics::default();
        metrics.set_requests(RequestCounts { read: 3, block_status: 1, cache: 1, other: 1 });
        metrics.add_reads(2, 1024, Duration::from_millis(3));
        metrics.add_error(ErrorCode::IO);
        metrics.add_error(ErrorCode(77));
        metrics.add_throttled(Duration::from_secs(1));
        let mut all = metrics.totals();
        all += metrics.totals();
        assert_eq!((all.requests.total(), all.bytes, all.throttled), (12, 2048, 2));
        assert_eq!(all.read_latency.sum, Duration::from_millis(12));
        let errors: Vec<_> = all.errors.by_code().filter(|(_, count)| *count > 0).collect();
        assert_eq!(errors, [("io", 2), ("other", 2)]);
        assert_eq!(size_of::<SessionMetrics>() % 128, 0);
    }
}
