//! Caches decoded blocks, and schedules decoding on the decoder threads.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;

use super::block_key::BlockKey;
use super::decoders::{DecoderClient, Decoders, JobAbandoned};
use super::hints::Hints;
use super::reader_stats::{ReaderCounters, ReaderStats};
use crate::cache::ByteCache;
use hexz_reader::BackgroundExecutor;
use hexz_reader::storage::ReadCounters;
use hexz_reader::{Block, Error, Snapshot, StreamKind};
use nbd_telemetry::RateLimit;

/// The block cache and the decoder threads, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    pub(super) cache: ByteCache<BlockKey>,
    decoders: Decoders,
    pub(super) counters: ReaderCounters,
    /// Locks of the parent hash indexes that are being built, by snapshot.
    building: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<()>>>>,
    background: Arc<BackgroundExecutor>,
    reads: Arc<ReadCounters>,
    pub(super) failures: RateLimit,
    pub(super) hints: Hints,
}

impl BlockReader {
    /// Creates a reader with a cache of `cache_size` bytes.
    pub fn new(cache_size: u64) -> Arc<Self> {
        Self::with_hints(cache_size, Hints::default())
    }

    /// Creates a reader with a cache of `cache_size` bytes. Log lines about archives contain
    /// `hints`.
    pub fn with_hints(cache_size: u64, hints: Hints) -> Arc<Self> {
        /// Average block size that packers produce, in bytes.
        const TYPICAL_BLOCK: u64 = 64 * 1024;
        Arc::new(Self {
            cache: ByteCache::new(cache_size, TYPICAL_BLOCK),
            decoders: Decoders::new(),
            counters: ReaderCounters::default(),
            building: Mutex::default(),
            background: Arc::default(),
            reads: Arc::default(),
            failures: RateLimit::new(20, Duration::from_secs(1)),
            hints,
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

    /// Returns the advice for a failed read, for the log.
    pub(super) fn hint(&self, cause: &BlockError) -> Option<&'static str> {
        match cause {
            BlockError::Snapshot(error) => (self.hints.for_error)(&error.kind),
            _ => None,
        }
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
        let is_cached = self.is_cached(snapshot, stream, &block);
        let ReaderCounters { hits, misses, .. } = &self.counters;
        (if is_cached { hits } else { misses }).add(1);
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
            self.counters.count_decoded(&bytes);
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
                self.counters.hits.add(1);
                bytes
            }
            None => {
                let begun = Instant::now();
                let read = snapshot.try_read_block(block).map_err(BlockError::Snapshot)?;
                self.counters.count_decoding(begun.elapsed());
                let Some(bytes) = read.map(Bytes::from) else { return Ok(None) };
                self.counters.misses.add(1);
                self.counters.count_decoded(&bytes);
                self.cache.insert(key, bytes.clone());
                bytes
            }
        };
        of_listed_length(bytes, block).map(Some)
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
        self.counters.count_decoding(took);
        read.map_err(BlockError::Snapshot)
    }

    /// Builds the index of a snapshot's parents' hashes, unless it exists. That takes as long as
    /// reading all their index pages, so it runs outside the decoder threads.
    pub(super) async fn index_parents(&self, snapshot: &Arc<Snapshot>) {
        let lock = Arc::clone(self.building.lock().entry(snapshot.id()).or_default());
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
            tracing::error!(reason = "parent_index", "can't index the parents' blocks: {error}");
        }
        self.building.lock().remove(&id);
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
