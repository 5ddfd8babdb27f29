//! Caches decoded blocks, and schedules decoding on the decoder threads.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::block_key::BlockKey;
use super::decoders::{DecoderClient, Decoders, JobAbandoned};
use super::hints::Hints;
use super::inline_gate::InlineGate;
use super::prefetch::{PrefetchOptions, Prefetcher};
use super::reader_stats::{ReaderCounters, ReaderStats};
use super::recording::{Recording, Recordings};
use crate::cache::ByteCache;
use hexz_reader::BackgroundExecutor;
use hexz_reader::storage::ReadCounters;
use hexz_reader::{Error, Snapshot};
use nbd_telemetry::RateLimit;

/// Maximum number of threads that wait for a store on behalf of clients.
const MAX_WAITING: usize = 32;

/// The block cache and the decoder threads, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    pub(super) cache: ByteCache<BlockKey>,
    pub(super) decoders: Decoders,
    pub(super) inline_gate: InlineGate,
    pub(super) counters: ReaderCounters,
    /// Locks of the parent hash indexes that are being built, by snapshot.
    building: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<()>>>>,
    background: Arc<BackgroundExecutor>,
    /// Permits for threads that wait for a store.
    pub(super) waiting_permits: Arc<Semaphore>,
    reads: Arc<ReadCounters>,
    pub(super) failures: RateLimit,
    pub(super) hints: Hints,
    pub(super) recordings: Arc<Recordings>,
    /// Replays the traces of remote archives, if any.
    pub(super) prefetcher: Option<Arc<Prefetcher>>,
}

impl BlockReader {
    /// Creates a reader with a cache of `cache_size` bytes.
    pub fn new(cache_size: u64) -> Arc<Self> {
        Self::with_hints(cache_size, Hints::default())
    }

    /// Creates a reader with a cache of `cache_size` bytes. Log lines about archives contain
    /// `hints`.
    pub fn with_hints(cache_size: u64, hints: Hints) -> Arc<Self> {
        Self::with_prefetch(cache_size, hints, None)
    }

    /// Creates a reader like [`with_hints`](Self::with_hints). When a remote archive is opened, it
    /// fetches what the archive's trace names.
    pub fn with_prefetch(
        cache_size: u64,
        hints: Hints,
        prefetch: Option<PrefetchOptions>,
    ) -> Arc<Self> {
        /// Average block size that packers produce, in bytes.
        const TYPICAL_BLOCK: u64 = 64 * 1024;
        Arc::new(Self {
            cache: ByteCache::new(cache_size, TYPICAL_BLOCK),
            decoders: Decoders::new(),
            inline_gate: InlineGate::default(),
            counters: ReaderCounters::default(),
            building: Mutex::default(),
            background: Arc::default(),
            waiting_permits: Arc::new(Semaphore::new(MAX_WAITING)),
            reads: Arc::default(),
            failures: RateLimit::new(20, Duration::from_secs(1)),
            hints,
            recordings: Arc::default(),
            prefetcher: prefetch.map(Prefetcher::new).map(Arc::new),
        })
    }

    /// Returns the number of blocks that were read and decoded so far.
    pub fn decoded(&self) -> u64 {
        self.counters.decoded()
    }

    /// Returns true if a decoder thread still runs jobs, by queueing an empty job ahead of the
    /// waiting ones. Doesn't return while all decoder threads hang.
    pub async fn is_alive(&self) -> bool {
        self.decoders.run(&Arc::default(), 0, || ()).await.is_ok()
    }

    /// Returns the counters of reads from archive files.
    pub fn reads(&self) -> &Arc<ReadCounters> {
        &self.reads
    }

    /// Returns the current statistics.
    pub fn stats(&self) -> ReaderStats {
        self.counters.stats(self.cache.usage(), &self.reads)
    }

    /// Starts to record what clients read of the export `name`, which need not be open. Returns
    /// `None` if four recordings are in progress.
    pub fn record(&self, name: &str) -> Option<Recording> {
        self.recordings.start(name)
    }

    /// Returns the advice for a failed read, for the log.
    pub(super) fn hint(&self, cause: &BlockError) -> Option<&'static str> {
        match cause {
            BlockError::Snapshot(error) => (self.hints.for_error)(&error.kind),
            _ => None,
        }
    }

    /// Returns the number of blocks that all clients have requested.
    pub(super) fn requested(&self) -> u64 {
        self.counters.hits.sum() + self.counters.misses.sum()
    }

    /// Builds the index of a snapshot's parents' hashes, unless it exists. That takes as long as
    /// reading all their index pages, so it runs outside the decoder threads.
    ///
    /// # Errors
    /// A store failed, or building it panicked.
    pub(super) async fn index_parents(&self, snapshot: &Arc<Snapshot>) -> Result<(), BlockError> {
        let lock = Arc::clone(self.building.lock().entry(snapshot.id()).or_default());
        // If the waiting task is canceled, the build goes on and holds the lock until it is done.
        let lock = lock.lock_owned().await;
        let id = snapshot.id();
        let (snapshot, background) = (Arc::clone(snapshot), Arc::clone(&self.background));
        let build = spawn_blocking(move || {
            let _lock = lock;
            if snapshot.has_parent_index() {
                return Ok(Ok(()));
            }
            // A remote parent takes waiting rather than work.
            match snapshot.is_remote() {
                true => Ok(snapshot.build_parent_index()),
                false => background.run(|| snapshot.build_parent_index()),
            }
        });
        let built = build.await.map_err(io::Error::other).flatten();
        self.building.lock().remove(&id);
        match built {
            Ok(built) => built.map_err(BlockError::Snapshot),
            Err(error) => {
                tracing::error!(
                    reason = "parent_index",
                    "can't index the parents' blocks: {error}"
                );
                Err(BlockError::Panicked)
            }
        }
    }

    /// Returns true if a block would be decoded immediately, without queueing.
    pub(super) fn has_idle_decoder(&self) -> bool {
        self.decoders.idle_threads() > 0
    }

    /// Runs blocking `work`, which takes about `estimate` nanoseconds, on a decoder thread.
    pub(super) async fn run_on_decoder<T: Send + 'static>(
        &self,
        client: &Arc<DecoderClient>,
        estimate: u64,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, BlockError> {
        match self.decoders.run(client, estimate, work).await {
            Ok(result) => result.map_err(BlockError::Snapshot),
            Err(JobAbandoned) => Err(BlockError::Panicked),
        }
    }
}

/// Reason for which a block can't be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlockError {
    #[error(transparent)]
    Snapshot(Error),
    #[error("decoding panicked, which is a bug")]
    Panicked,
    #[error("the read covers more than 65,536 blocks")]
    TooManyBlocks,
    #[error("the index has one hash for blocks of {cached} and of {listed} bytes")]
    LengthDiffers { cached: usize, listed: u32 },
}

impl BlockError {
    /// Returns the label for counters and the log.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Snapshot(error) => error.label(),
            Self::Panicked => "panicked",
            Self::TooManyBlocks => "too_many_blocks",
            Self::LengthDiffers { .. } => "length",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Simulates decoders that all read from a dead disk.
    #[tokio::test]
    async fn liveness_check_blocks_while_all_decoders_hang() {
        let reader = BlockReader::new(0);
        assert!(reader.is_alive().await);
        let (release, hang) = mpsc::channel::<()>();
        let (begin, mut begun) = tokio::sync::mpsc::unbounded_channel();
        let hang = Arc::new(Mutex::new(hang));
        let threads = std::thread::available_parallelism().unwrap().get();
        let hanging: Vec<_> = (0..threads)
            .map(|_| {
                let (reader, hang) = (Arc::clone(&reader), Arc::clone(&hang));
                let begin = begin.clone();
                let job = move || {
                    begin.send(()).unwrap();
                    hang.lock().recv().unwrap();
                };
                tokio::spawn(async move { reader.decoders.run(&Arc::default(), 1, job).await })
            })
            .collect();
        for _ in 0..threads {
            begun.recv().await.unwrap();
        }
        let answered = tokio::time::timeout(Duration::from_millis(200), reader.is_alive()).await;
        assert!(answered.is_err());
        assert!(!reader.has_idle_decoder());
        (0..threads).for_each(|_| release.send(()).unwrap());
        for job in hanging {
            job.await.unwrap().unwrap();
        }
        assert!(reader.is_alive().await);
    }
}
