//! Caches decoded blocks, and schedules decoding on the decoder threads.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::spawn_blocking;

use super::decoders::{DecoderClient, Decoders, JobAbandoned};
use super::sharded_counter::ShardedCounter;
use crate::cache::ByteCache;
use hexz_reader::BackgroundExecutor;
use hexz_reader::storage::ReadCounters;
use hexz_reader::{Block, BlockHash, Error, Snapshot, StreamKind};
use nbd_telemetry::RateLimit;
use nbd_telemetry::{Counts, Tally};

/// Cache key of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlockKey {
    /// Verified hash: equal hashes mean equal bytes, in whatever archive they are.
    Content(BlockHash),
    /// Location, for a block without a verified hash; such a block only equals itself.
    Location { snapshot: u64, archive: usize, stream: StreamKind, start: u64 },
}

impl BlockKey {
    /// Returns the key under which a block is cached.
    pub(super) fn of(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        match block.hash() {
            // An unverified block must not be served for another archive's block.
            Some(hash) if snapshot.verifies_hashes() => Self::Content(hash),
            _ => Self::location(block, snapshot, stream),
        }
    }

    /// Returns the key under which a block is decoded. Until its bytes have been verified, a
    /// block only equals itself, so no client waits for another archive's block.
    fn location(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        Self::Location {
            snapshot: snapshot.id(),
            archive: block.chain_index(),
            stream,
            start: block.decoded_start(),
        }
    }
}

impl Hash for BlockKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            // Any eight bytes of a cryptographic hash are uniformly distributed.
            Self::Content(BlockHash([a, b, c, d, e, f, g, h, ..])) => {
                state.write_u64(u64::from_ne_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
            }
            Self::Location { snapshot, archive, stream, start } => {
                (snapshot, archive, stream, start).hash(state);
            }
        }
    }
}

/// The block cache and the decoder threads, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    pub(super) cache: ByteCache<BlockKey>,
    decoders: Decoders,
    hits: ShardedCounter,
    misses: ShardedCounter,
    decoded: AtomicU64,
    decoded_bytes: AtomicU64,
    /// Total decoding time, in nanoseconds.
    decode_nanos: AtomicU64,
    /// Locks of the parent hash indexes that are being built, by snapshot.
    building: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<()>>>>,
    background: Arc<BackgroundExecutor>,
    reads: Arc<ReadCounters>,
    /// Requests that failed, by reason.
    read_failures: Tally,
    open_failures: Tally,
    pub(super) failures: RateLimit,
}

/// Labels of the reasons for which a request can fail. There is a counter for each from startup.
pub const READ_FAILURE_LABELS: [&str; 15] = [
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

impl BlockReader {
    /// Creates a reader with a cache of `cache_size` bytes.
    pub fn new(cache_size: u64) -> Arc<Self> {
        /// Average block size that packers produce, in bytes.
        const TYPICAL_BLOCK: u64 = 64 * 1024;
        Arc::new(Self {
            cache: ByteCache::new(cache_size, TYPICAL_BLOCK),
            decoders: Decoders::new(),
            hits: ShardedCounter::default(),
            misses: ShardedCounter::default(),
            decoded: AtomicU64::new(0),
            decoded_bytes: AtomicU64::new(0),
            decode_nanos: AtomicU64::new(0),
            building: Mutex::default(),
            background: Arc::default(),
            reads: Arc::default(),
            read_failures: Tally::default(),
            open_failures: Tally::default(),
            failures: RateLimit::new(20, Duration::from_secs(1)),
        })
    }

    /// Returns the number of blocks that were read and decoded so far.
    pub fn decoded(&self) -> u64 {
        self.decoded.load(Ordering::Relaxed)
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
        let (cached, capacity) = self.cache.usage();
        ReaderStats {
            cached,
            capacity,
            hits: self.hits.sum(),
            misses: self.misses.sum(),
            decoded: self.decoded(),
            decoded_bytes: self.decoded_bytes.load(Ordering::Relaxed),
            decode_time: Duration::from_nanos(self.decode_nanos.load(Ordering::Relaxed)),
            read_failures: self.read_failures.so_far(),
            open_failures: self.open_failures.so_far(),
            storage_reads: self.reads.count(),
            storage_bytes: self.reads.bytes(),
        }
    }

    /// Counts requested blocks that were in the cache.
    pub(super) fn count_hits(&self, blocks: u64) {
        self.hits.add(blocks);
    }

    /// Counts a request that failed.
    pub(super) fn count_read_failure(&self, cause: &BlockError) {
        self.read_failures.count(cause.label());
    }

    /// Counts an archive that couldn't be opened.
    pub(super) fn count_open_failure(&self, cause: &Error) {
        self.open_failures.count(cause.kind.label());
    }

    /// Returns a block's bytes for a client, from the cache or decoded, and counts a hit or a
    /// miss.
    pub(super) async fn block(
        &self,
        client: &Arc<DecoderClient>,
        snapshot: &Arc<Snapshot>,
        stream: StreamKind,
        block: Block,
    ) -> Result<Bytes, BlockError> {
        let counter =
            if self.is_cached(snapshot, stream, &block) { &self.hits } else { &self.misses };
        counter.add(1);
        self.prefetch_block(client, snapshot, stream, block).await
    }

    /// Returns a block's bytes like [`block`](Self::block), but counts no hit or miss, as for a
    /// prefetch.
    pub(super) async fn prefetch_block(
        &self,
        client: &Arc<DecoderClient>,
        snapshot: &Arc<Snapshot>,
        stream: StreamKind,
        block: Block,
    ) -> Result<Bytes, BlockError> {
        let key = BlockKey::of(&block, snapshot, stream);
        let place = BlockKey::location(&block, snapshot, stream);
        let make = async {
            let bytes = match self.decode(client, snapshot, block).await? {
                Some(bytes) => bytes,
                None => {
                    self.index_parents(snapshot).await;
                    self.decode(client, snapshot, block).await?.ok_or(BlockError::Panicked)?
                }
            };
            self.count_decoded(&bytes);
            Ok(Bytes::from(bytes))
        };
        let bytes = self.cache.get_or_insert_with(&key, &place, make).await?;
        of_listed_length(bytes, &block)
    }

    /// Returns a small block's bytes on the thread of a decoder, without sharing the work with
    /// other clients that ask for it at the same time. `None` if the index of the parents'
    /// hashes is needed, and hasn't been built.
    pub(super) fn small_block(
        &self,
        snapshot: &Snapshot,
        stream: StreamKind,
        block: &Block,
    ) -> Result<Option<Bytes>, BlockError> {
        let key = BlockKey::of(block, snapshot, stream);
        let bytes = match self.cache.get(&key) {
            Some(bytes) => {
                self.hits.add(1);
                bytes
            }
            None => {
                let begun = Instant::now();
                let read = snapshot.try_read_block(block).map_err(BlockError::Snapshot)?;
                self.count_decoding(begun.elapsed());
                let Some(bytes) = read.map(Bytes::from) else { return Ok(None) };
                self.misses.add(1);
                self.count_decoded(&bytes);
                self.cache.insert(key, bytes.clone());
                bytes
            }
        };
        of_listed_length(bytes, block).map(Some)
    }

    fn count_decoding(&self, took: Duration) {
        let took = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.decode_nanos.fetch_add(took, Ordering::Relaxed);
    }

    fn count_decoded(&self, bytes: &[u8]) {
        self.decoded.fetch_add(1, Ordering::Relaxed);
        self.decoded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    /// Decodes a block on a decoder thread. Returns `None` if that needs the index of the
    /// parents' hashes, which hasn't been built.
    async fn decode(
        &self,
        client: &Arc<DecoderClient>,
        snapshot: &Arc<Snapshot>,
        block: Block,
    ) -> Result<Option<Vec<u8>>, BlockError> {
        let snapshot = Arc::clone(snapshot);
        let work = move || {
            let begun = Instant::now();
            let read = snapshot.try_read_block(&block);
            (read, begun.elapsed())
        };
        let ran = self.decoders.run(client, block.estimated_cost(), work).await;
        let (read, took) = ran.map_err(|JobAbandoned| BlockError::Panicked)?;
        self.count_decoding(took);
        read.map_err(BlockError::Snapshot)
    }

    /// Builds the index of a snapshot's parents' hashes, unless it exists. That takes as long as
    /// reading all their index pages, so it runs outside the decoder threads.
    pub(super) async fn index_parents(&self, snapshot: &Arc<Snapshot>) {
        let lock = {
            let mut building = self.building();
            Arc::clone(building.entry(snapshot.id()).or_default())
        };
        // If the waiting task is canceled, the build goes on and holds the lock until it is done.
        let lock = lock.lock_owned().await;
        let id = snapshot.id();
        let (snapshot, background) = (Arc::clone(snapshot), Arc::clone(&self.background));
        let build = spawn_blocking(move || {
            let _lock = lock;
            if snapshot.has_parent_index() {
                return Ok(());
            }
            background.run(|| snapshot.build_parent_index())
        });
        if let Err(error) = build.await.map_err(io::Error::other).flatten() {
            tracing::error!("the index of parents' blocks can't be built: {error}");
        }
        self.building().remove(&id);
    }

    fn building(&self) -> MutexGuard<'_, HashMap<u64, Arc<tokio::sync::Mutex<()>>>> {
        // Nothing panics while it is locked.
        self.building.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Returns true if a block is in the cache.
    pub(super) fn is_cached(&self, snapshot: &Snapshot, stream: StreamKind, block: &Block) -> bool {
        self.cache.contains(&BlockKey::of(block, snapshot, stream))
    }

    /// Returns true if a block would be decoded immediately, without queueing.
    pub(super) fn has_idle_decoder(&self) -> bool {
        self.decoders.has_idle_thread()
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

/// Returns `bytes` if they are as long as the index says of `block`.
fn of_listed_length(bytes: Bytes, block: &Block) -> Result<Bytes, BlockError> {
    if bytes.len() != block.decoded_length() as usize {
        let (cached, listed) = (bytes.len(), block.decoded_length());
        return Err(BlockError::LengthDiffers { cached, listed });
    }
    Ok(bytes)
}

/// Reason for which a block can't be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlockError {
    #[error(transparent)]
    Snapshot(Error),
    #[error("decoding panicked; this is a fault of this program")]
    Panicked,
    #[error("more than 65,536 blocks in one read: ask for less at a time")]
    TooManyBlocks,
    #[error("the index gives one hash to blocks of {cached} and of {listed} bytes")]
    LengthDiffers { cached: usize, listed: u32 },
}

impl BlockError {
    /// Returns the label for counters.
    fn label(&self) -> &'static str {
        match self {
            Self::Snapshot(error) => error.kind.label(),
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
                    hang.lock().unwrap().recv().unwrap();
                };
                tokio::spawn(async move { reader.decoders.run(&Arc::default(), 1, job).await })
            })
            .collect();
        for _ in 0..threads {
            begun.recv().await.unwrap();
        }
        let answered = tokio::time::timeout(Duration::from_millis(200), reader.is_alive()).await;
        assert!(answered.is_err());
        (0..threads).for_each(|_| release.send(()).unwrap());
        for job in hanging {
            job.await.unwrap().unwrap();
        }
        assert!(reader.is_alive().await);
    }
}
