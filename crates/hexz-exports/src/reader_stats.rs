//! Counters of the block reader.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hexz_reader::storage::ReadCounters;
use nbd_telemetry::{Counts, Tally};

use super::sharded_counter::ShardedCounter;

/// Labels of the reasons for which a request can fail. There is a counter for each from startup.
pub const READ_FAILURE_LABELS: [&str; 25] = [
    "crc",
    "tag",
    "decompress",
    "length",
    "hash",
    "unresolvable",
    "uncovered",
    "ambiguous",
    "io",
    "truncated",
    "changed",
    "invalid",
    "too_large",
    "too_many_blocks",
    "panicked",
    "store_not_found",
    "store_denied",
    "store_timed_out",
    "store_down",
    "store_throttled",
    "store_changed",
    "store_credentials",
    "store_clock_skew",
    "store_unsupported",
    "shutting_down",
];

/// Statistics of reads so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReaderStats {
    /// Current size of the cache, in bytes.
    pub cached: u64,
    /// Maximum size of the cache, in bytes.
    pub capacity: u64,
    /// Number of requested blocks that were in the cache.
    pub hits: u64,
    /// Number of requested blocks that weren't. Blocks of zeros count as neither.
    pub misses: u64,
    /// Number of decoded blocks, including prefetched ones.
    pub decoded: u64,
    /// Total size of the decoded blocks, in bytes.
    pub decoded_bytes: u64,
    /// Total time to read, verify and decode blocks, over all threads.
    pub decode_time: Duration,
    /// Number of failed requests, by reason.
    pub read_failures: Counts,
    /// Number of failures to open an archive, by reason; repeated failures for the same reason
    /// count once.
    pub open_failures: Counts,
    /// Number of reads from archive files.
    pub storage_reads: u64,
    /// Total size of these reads, in bytes.
    pub storage_bytes: u64,
}

/// Counters behind [`ReaderStats`].
#[derive(Debug, Default)]
pub(super) struct ReaderCounters {
    pub(super) hits: ShardedCounter,
    pub(super) misses: ShardedCounter,
    decoded: AtomicU64,
    decoded_bytes: AtomicU64,
    /// Total decoding time, in nanoseconds.
    decode_nanos: AtomicU64,
    /// Requests that failed, by reason.
    pub(super) read_failures: Tally,
    /// Archives that couldn't be opened, by reason.
    pub(super) open_failures: Tally,
}

impl ReaderCounters {
    /// Returns the number of decoded blocks.
    pub(super) fn decoded(&self) -> u64 {
        self.decoded.load(Relaxed)
    }

    /// Counts a decoded block.
    pub(super) fn count_decoded(&self, bytes: &[u8]) {
        self.decoded.fetch_add(1, Relaxed);
        self.decoded_bytes.fetch_add(bytes.len() as u64, Relaxed);
    }

    /// Adds the time that decoding a block took, whether or not it succeeded.
    pub(super) fn count_decoding(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.decode_nanos.fetch_add(took, Relaxed);
    }

    /// Returns the statistics, with the current and maximum size of the cache in bytes, and the
    /// reads from archive files.
    pub(super) fn stats(
        &self,
        (cached, capacity): (u64, u64),
        reads: &ReadCounters,
    ) -> ReaderStats {
        ReaderStats {
            cached,
            capacity,
            hits: self.hits.sum(),
            misses: self.misses.sum(),
            decoded: self.decoded(),
            decoded_bytes: self.decoded_bytes.load(Relaxed),
            decode_time: Duration::from_nanos(self.decode_nanos.load(Relaxed)),
            read_failures: self.read_failures.so_far(),
            open_failures: self.open_failures.so_far(),
            storage_reads: reads.count(),
            storage_bytes: reads.bytes(),
        }
    }
}
