//! Decoded blocks, and the threads that decode them.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::spawn_blocking;

use super::decoders::{Abandoned, Client, Decoders};
use super::striped::Striped;
use crate::background::Background;
use crate::cache::ByteCache;
use crate::limited::RateLimit;
use crate::snapshot::{Block, BlockHash, Error, Snapshot, StreamKind};
use crate::storage::Reads;
use crate::tally::{Counts, Tally};

/// What stands for a block's bytes in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlockKey {
    /// Equal hashes are equal bytes, whatever archive they are from.
    Content(BlockHash),
    /// A block without a verified hash is only equal to itself.
    Place { snapshot: u64, archive: usize, stream: StreamKind, start: u64 },
}

impl BlockKey {
    /// Key under which a block is cached.
    pub(super) fn of(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        match block.hash() {
            // What wasn't verified must not be served for another archive's block.
            Some(hash) if snapshot.verifies_hashes() => Self::Content(hash),
            _ => Self::place(block, snapshot, stream),
        }
    }

    /// Key under which a block is decoded: until its bytes have been compared with its hash,
    /// it is only equal to itself, and nobody waits for another archive's block.
    fn place(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        Self::Place {
            snapshot: snapshot.id(),
            archive: block.archive(),
            stream,
            start: block.decoded_start(),
        }
    }
}

impl Hash for BlockKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self {
            // A part of a hash is as good a hash as any.
            Self::Content(BlockHash([a, b, c, d, e, f, g, h, ..])) => {
                state.write_u64(u64::from_ne_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
            }
            Self::Place { snapshot, archive, stream, start } => {
                (snapshot, archive, stream, start).hash(state);
            }
        }
    }
}

/// Decoded blocks and the threads that decode, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    pub(super) cache: ByteCache<BlockKey>,
    decoders: Decoders,
    hits: Striped,
    misses: Striped,
    decoded: AtomicU64,
    decoded_bytes: AtomicU64,
    /// How long decoding took, in nanoseconds.
    decoding: AtomicU64,
    /// Indexes of parents' hashes that are being built, by snapshot.
    building: Mutex<HashMap<u64, Arc<tokio::sync::Mutex<()>>>>,
    background: Arc<Background>,
    reads: Arc<Reads>,
    /// Requests that couldn't be answered, and archives that couldn't be opened, by reason.
    unread: Tally,
    unopened: Tally,
    pub(super) failures: RateLimit,
}

/// Reasons why a request can't be answered, as they are counted: there is a number for each
/// from the start on.
pub const UNREADABLE: [&str; 15] = [
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

/// What reading has come to so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// What the cache holds, in bytes, and how much it may.
    pub cached: u64,
    /// How much the cache may hold, in bytes.
    pub capacity: u64,
    /// Blocks that clients asked for and that were in the cache.
    pub hits: u64,
    /// Those that weren't. Blocks of zeros are neither.
    pub misses: u64,
    /// Blocks that were decoded, also those that were read ahead.
    pub decoded: u64,
    /// How long these are, in bytes.
    pub decoded_bytes: u64,
    /// How long it took to read, check and decode blocks, over all threads.
    pub decoding: Duration,
    /// Requests that couldn't be answered, by what was wrong.
    pub unread: Counts,
    /// How often an archive couldn't be opened for a reason that was new, by what was wrong.
    pub unopened: Counts,
    /// Reads from archives' files.
    pub storage_reads: u64,
    /// What these came to, in bytes.
    pub storage_bytes: u64,
}

impl BlockReader {
    /// A reader with a cache of `cache_size` bytes.
    pub fn new(cache_size: u64) -> Arc<Self> {
        /// What packers make blocks of on average, in bytes.
        const TYPICAL_BLOCK: u64 = 64 * 1024;
        Arc::new(Self {
            cache: ByteCache::new(cache_size, TYPICAL_BLOCK),
            decoders: Decoders::new(),
            hits: Striped::default(),
            misses: Striped::default(),
            decoded: AtomicU64::new(0),
            decoded_bytes: AtomicU64::new(0),
            decoding: AtomicU64::new(0),
            building: Mutex::default(),
            background: Arc::default(),
            reads: Arc::default(),
            unread: Tally::default(),
            unopened: Tally::default(),
            failures: RateLimit::new(20, Duration::from_secs(1)),
        })
    }

    /// How many blocks were read and decoded so far.
    pub fn decoded(&self) -> u64 {
        self.decoded.load(Ordering::Relaxed)
    }

    /// Whether there still is a thread that decodes: it is given nothing to do, before all that
    /// waits. If all of them hang, so does this.
    pub async fn works(&self) -> bool {
        self.decoders.run(&Arc::default(), 0, || ()).await.is_ok()
    }

    /// Where it is counted what is read from archives.
    pub fn reads(&self) -> &Arc<Reads> {
        &self.reads
    }

    /// What has come of all that until now.
    pub fn figures(&self) -> Figures {
        let (cached, capacity) = self.cache.fill();
        Figures {
            cached,
            capacity,
            hits: self.hits.sum(),
            misses: self.misses.sum(),
            decoded: self.decoded(),
            decoded_bytes: self.decoded_bytes.load(Ordering::Relaxed),
            decoding: Duration::from_nanos(self.decoding.load(Ordering::Relaxed)),
            unread: self.unread.so_far(),
            unopened: self.unopened.so_far(),
            storage_reads: self.reads.count(),
            storage_bytes: self.reads.bytes(),
        }
    }

    /// Counts blocks that a client asked for and that were in the cache.
    pub(super) fn count_hits(&self, blocks: u64) {
        self.hits.add(blocks);
    }

    /// Counts a request that couldn't be answered.
    pub(super) fn count_unread(&self, cause: &Failure) {
        self.unread.count(cause.label());
    }

    /// Counts an archive that couldn't be opened.
    pub(super) fn count_unopened(&self, cause: &Error) {
        self.unopened.count(cause.problem.label());
    }

    /// A block's bytes for a client, from the cache or from its archive.
    pub(super) async fn block(
        &self,
        client: &Arc<Client>,
        snapshot: &Arc<Snapshot>,
        stream: StreamKind,
        block: Block,
    ) -> Result<Bytes, Failure> {
        let counter = if self.has(snapshot, stream, &block) { &self.hits } else { &self.misses };
        counter.add(1);
        self.block_ahead(client, snapshot, stream, block).await
    }

    /// The same for somebody who will perhaps ask for it.
    pub(super) async fn block_ahead(
        &self,
        client: &Arc<Client>,
        snapshot: &Arc<Snapshot>,
        stream: StreamKind,
        block: Block,
    ) -> Result<Bytes, Failure> {
        let key = BlockKey::of(&block, snapshot, stream);
        let place = BlockKey::place(&block, snapshot, stream);
        let make = async {
            let bytes = match self.decode(client, snapshot, block).await? {
                Some(bytes) => bytes,
                None => {
                    self.index_parents(snapshot).await;
                    self.decode(client, snapshot, block).await?.ok_or(Failure::Panicked)?
                }
            };
            self.count_decoded(&bytes);
            Ok(Bytes::from(bytes))
        };
        let bytes = self.cache.get_or_make(&key, &place, make).await?;
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
    ) -> Result<Option<Bytes>, Failure> {
        let key = BlockKey::of(block, snapshot, stream);
        let bytes = match self.cache.get(&key) {
            Some(bytes) => {
                self.hits.add(1);
                bytes
            }
            None => {
                let begun = Instant::now();
                let read = snapshot.read_indexed_block(block).map_err(Failure::Snapshot)?;
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
        self.decoding.fetch_add(took, Ordering::Relaxed);
    }

    fn count_decoded(&self, bytes: &[u8]) {
        self.decoded.fetch_add(1, Ordering::Relaxed);
        self.decoded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    /// Has a decoder read a block. `None` if the index of the parents' hashes is needed, and
    /// hasn't been built.
    async fn decode(
        &self,
        client: &Arc<Client>,
        snapshot: &Arc<Snapshot>,
        block: Block,
    ) -> Result<Option<Vec<u8>>, Failure> {
        let snapshot = Arc::clone(snapshot);
        let work = move || {
            let begun = Instant::now();
            let read = snapshot.read_indexed_block(&block);
            (read, begun.elapsed())
        };
        let ran = self.decoders.run(client, block.work(), work).await;
        let (read, took) = ran.map_err(|Abandoned| Failure::Panicked)?;
        self.count_decoding(took);
        read.map_err(Failure::Snapshot)
    }

    /// Builds the index of the hashes of a snapshot's parents, unless it is there. That takes
    /// as long as reading all their index pages, so it is nothing for the decoders.
    pub(super) async fn index_parents(&self, snapshot: &Arc<Snapshot>) {
        let lock = {
            let mut building = self.building();
            Arc::clone(building.entry(snapshot.id()).or_default())
        };
        // Whoever waits for it may leave: the build goes on, and holds the lock until it is done.
        let lock = lock.lock_owned().await;
        let id = snapshot.id();
        let (snapshot, background) = (Arc::clone(snapshot), Arc::clone(&self.background));
        let build = spawn_blocking(move || {
            let _lock = lock;
            if snapshot.has_parent_index() {
                return Ok(());
            }
            background.run(|| snapshot.index_parents())
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

    /// Whether a block is in the cache.
    pub(super) fn has(&self, snapshot: &Snapshot, stream: StreamKind, block: &Block) -> bool {
        self.cache.contains(&BlockKey::of(block, snapshot, stream))
    }

    /// Whether a block would be decoded at once, before anybody else's.
    pub(super) fn is_idle(&self) -> bool {
        self.decoders.are_idle()
    }

    /// Does `work` that blocks, for about `estimate` nanoseconds, on a decoder.
    pub(super) async fn off_the_runtime<T: Send + 'static>(
        &self,
        client: &Arc<Client>,
        estimate: u64,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Failure> {
        match self.decoders.run(client, estimate, work).await {
            Ok(result) => result.map_err(Failure::Snapshot),
            Err(Abandoned) => Err(Failure::Panicked),
        }
    }
}

/// Returns `bytes` if they are as long as the index says of `block`.
fn of_listed_length(bytes: Bytes, block: &Block) -> Result<Bytes, Failure> {
    if bytes.len() != block.decoded_length() as usize {
        let (cached, listed) = (bytes.len(), block.decoded_length());
        return Err(Failure::LengthDiffers { cached, listed });
    }
    Ok(bytes)
}

/// Why a block couldn't be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Snapshot(Error),
    #[error("decoding panicked; this is a fault of this program")]
    Panicked,
    #[error("more than 65,536 blocks in one read: ask for less at a time")]
    TooManyBlocks,
    #[error("the index gives one hash to blocks of {cached} and of {listed} bytes")]
    LengthDiffers { cached: usize, listed: u32 },
}

impl Failure {
    /// A label for counters.
    fn label(&self) -> &'static str {
        match self {
            Self::Snapshot(error) => error.problem.label(),
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

    /// As when they all read from a disk that is dead.
    #[tokio::test]
    async fn decoders_that_all_hang_do_not_work() {
        let reader = BlockReader::new(0);
        assert!(reader.works().await);
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
        let answered = tokio::time::timeout(Duration::from_millis(200), reader.works()).await;
        assert!(answered.is_err());
        (0..threads).for_each(|_| release.send(()).unwrap());
        for job in hanging {
            job.await.unwrap().unwrap();
        }
        assert!(reader.works().await);
    }
}
