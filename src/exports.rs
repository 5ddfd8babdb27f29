//! Names to exports: adapts snapshots to what the engine serves.

use std::future::ready;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::cache::ByteCache;
use crate::limited::RateLimit;
use crate::nbd::{Export, Exports, ReadError, Segment, Span};
use crate::snapshot::{Block, BlockHash, Error, Snapshot, StreamKind};

/// A part of a block shorter than this fraction is copied out of it, so that a reply
/// that waits for a slow client doesn't keep a whole block in memory.
const COPIED_FRACTION: usize = 4;

/// What stands for a block's bytes in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum BlockKey {
    /// Equal hashes are equal bytes, whatever archive they are from.
    Content(BlockHash),
    /// A block without a hash is only equal to itself.
    Place { snapshot: u64, stream: StreamKind, start: u64 },
}

impl BlockKey {
    fn of(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        match block.hash() {
            Some(hash) => Self::Content(hash),
            None => Self::Place { snapshot: snapshot.id(), stream, start: block.start() },
        }
    }
}

/// Decoded blocks and the threads that decode, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    cache: ByteCache<BlockKey>,
    /// More decoders than cores would only fight for them.
    decoders: Arc<Semaphore>,
    failures: RateLimit,
}

impl BlockReader {
    /// A reader with a cache of `cache_size` bytes.
    pub fn new(cache_size: u64) -> Arc<Self> {
        /// What packers make blocks of on average, in bytes.
        const TYPICAL_BLOCK: u64 = 64 * 1024;
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Arc::new(Self {
            cache: ByteCache::new(cache_size, TYPICAL_BLOCK),
            decoders: Arc::new(Semaphore::new(cores)),
            failures: RateLimit::new(20, Duration::from_secs(1)),
        })
    }

    /// Runs what blocks on a thread where it may, no more at once than there are cores.
    async fn off_the_runtime<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Failure> {
        let decoder = Arc::clone(&self.decoders).acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _decoder = decoder;
            work()
        });
        match done.await {
            Ok(result) => result.map_err(Failure::Snapshot),
            Err(_) => Err(Failure::Panicked),
        }
    }
}

/// Why a block couldn't be had.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Snapshot(Error),
    #[error("decoding panicked; this is a fault of this program")]
    Panicked,
    #[error("the index gives one hash to blocks of {cached} and of {listed} bytes")]
    LengthDiffers { cached: usize, listed: u32 },
}

/// A failure, and the byte of the export from which on it matters.
#[derive(Debug)]
struct Unread {
    at: u64,
    cause: Failure,
}

/// One stream of a snapshot, as an export.
#[derive(Debug, Clone)]
pub struct SnapshotExport {
    name: String,
    description: String,
    stream: StreamKind,
    snapshot: Arc<Snapshot>,
    reader: Arc<BlockReader>,
}

impl SnapshotExport {
    /// Offers `stream` of `snapshot` under `name`.
    pub fn new(
        name: String,
        snapshot: Arc<Snapshot>,
        stream: StreamKind,
        reader: Arc<BlockReader>,
    ) -> Self {
        let description = describe(&snapshot, stream);
        Self { name, description, stream, snapshot, reader }
    }

    /// The block that covers `at`, loading its index page if need be.
    async fn locate(&self, at: u64) -> Result<Block, Unread> {
        let located = match self.snapshot.locate_now(self.stream, at) {
            Some(located) => located.map_err(Failure::Snapshot),
            None => {
                let (snapshot, stream) = (Arc::clone(&self.snapshot), self.stream);
                self.reader.off_the_runtime(move || snapshot.locate(stream, at)).await
            }
        };
        located.map_err(|cause| Unread { at, cause })
    }

    /// A block's bytes, from the cache or from its archive.
    async fn block(&self, block: Block) -> Result<Bytes, Failure> {
        let key = BlockKey::of(&block, &self.snapshot, self.stream);
        let snapshot = Arc::clone(&self.snapshot);
        let decode = self.reader.off_the_runtime(move || snapshot.read_block(&block));
        let make = async { decode.await.map(Bytes::from) };
        let bytes = self.reader.cache.get_or_make(&key, make).await?;
        if bytes.len() != block.length() as usize {
            let (cached, listed) = (bytes.len(), block.length());
            return Err(Failure::LengthDiffers { cached, listed });
        }
        Ok(bytes)
    }

    /// The part of `block` that `span` asks for, waiting for it.
    async fn segment(&self, block: Block, span: Span) -> Result<Segment, Unread> {
        match zeros(&block, span) {
            Some(zeros) => Ok(zeros),
            None => match self.block(block).await {
                Ok(bytes) => Ok(part(&bytes, &block, span)),
                Err(cause) => Err(Unread { at: block.start().max(span.offset), cause }),
            },
        }
    }

    async fn read_blocks(&self, span: Span) -> Result<Vec<Segment>, Unread> {
        let first = self.locate(span.offset).await?;
        if first.end() >= span.end() {
            return Ok(vec![self.segment(first, span).await?]);
        }
        // Several blocks: decoded side by side, put together in order.
        let mut tasks = JoinSet::new();
        let mut block = first;
        let mut count = 0;
        loop {
            let this = self.clone();
            tasks.spawn(async move { (count, this.segment(block, span).await) });
            count += 1;
            if block.end() >= span.end() {
                break;
            }
            block = self.locate(block.end()).await?;
        }
        let mut segments = vec![Segment::Zeros(0); count];
        while let Some(done) = tasks.join_next().await {
            let (position, segment) =
                done.map_err(|_| Unread { at: span.offset, cause: Failure::Panicked })?;
            if let Some(place) = segments.get_mut(position) {
                *place = segment?;
            }
        }
        Ok(segments)
    }

    fn report(&self, at: u64, cause: &Failure) {
        if let Some(held_back) = self.reader.failures.allow() {
            tracing::error!(
                export = %self.name,
                offset = at,
                held_back = held_back.field(),
                "a read failed, the client gets an I/O error: {cause}",
            );
        }
    }
}

impl Export for SnapshotExport {
    fn name(&self) -> &str {
        &self.name
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn size(&self) -> u64 {
        self.snapshot.size(self.stream)
    }

    fn preferred_block_size(&self) -> u32 {
        const SMALLEST: u32 = 4096;
        const LARGEST: u32 = 256 * 1024;
        self.snapshot.block_size().clamp(SMALLEST, LARGEST).next_power_of_two()
    }

    fn read_now(&self, span: Span) -> Option<Vec<Segment>> {
        let mut segments = Vec::new();
        let mut at = span.offset;
        while at < span.end() {
            let block = self.snapshot.locate_now(self.stream, at)?.ok()?;
            let segment = zeros(&block, span).or_else(|| {
                let key = BlockKey::of(&block, &self.snapshot, self.stream);
                let bytes = self.reader.cache.get(&key)?;
                (bytes.len() == block.length() as usize).then(|| part(&bytes, &block, span))
            })?;
            segments.push(segment);
            at = block.end();
        }
        Some(segments)
    }

    async fn read(&self, span: Span) -> Result<Vec<Segment>, ReadError> {
        self.read_blocks(span).await.map_err(|Unread { at, cause }| {
            self.report(at, &cause);
            ReadError::Unreadable(at)
        })
    }
}

/// Where `block` and `span` overlap, from the block's start, in bytes.
fn overlap(block: &Block, span: Span) -> (u32, u32) {
    let start = span.offset.max(block.start()) - block.start();
    let end = span.end().min(block.end()) - block.start();
    // Both lie within a block, whose length has 32 bits.
    let within = |position| u32::try_from(position).unwrap_or(u32::MAX);
    (within(start), within(end))
}

fn zeros(block: &Block, span: Span) -> Option<Segment> {
    let (start, end) = overlap(block, span);
    block.is_zeros().then(|| Segment::Zeros(end - start))
}

/// The part of a block's `bytes` that `span` asks for.
fn part(bytes: &Bytes, block: &Block, span: Span) -> Segment {
    let (start, end) = overlap(block, span);
    let range = start as usize..(end as usize).min(bytes.len());
    if range.len() < bytes.len() / COPIED_FRACTION {
        Segment::Data(Bytes::copy_from_slice(bytes.get(range).unwrap_or_default()))
    } else {
        Segment::Data(bytes.slice(range))
    }
}

fn describe(snapshot: &Snapshot, stream: StreamKind) -> String {
    let size = ByteSize::b(snapshot.size(stream)).display().iec();
    let encrypted = if snapshot.is_encrypted() { ", encrypted" } else { "" };
    let parents = match snapshot.parents().count() {
        0 => String::new(),
        1 => ", thin over 1 parent".to_owned(),
        many => format!(", thin over {many} parents"),
    };
    format!("{stream} stream, {size}, {}{encrypted}{parents}", snapshot.compression())
}

/// The exports of one snapshot: `NAME` is its main stream and the default export,
/// `NAME/aux` its auxiliary stream, if it has one.
#[derive(Debug)]
pub struct SnapshotExports {
    exports: Vec<Arc<SnapshotExport>>,
}

impl SnapshotExports {
    /// Offers the streams of `snapshot` under `name`.
    pub fn new(name: &str, snapshot: Arc<Snapshot>, reader: &Arc<BlockReader>) -> Self {
        let export = |name: String, stream| {
            Arc::new(SnapshotExport::new(name, Arc::clone(&snapshot), stream, Arc::clone(reader)))
        };
        let mut exports = vec![export(name.to_owned(), StreamKind::Main)];
        if snapshot.size(StreamKind::Auxiliary) > 0 {
            exports.push(export(format!("{name}/aux"), StreamKind::Auxiliary));
        }
        Self { exports }
    }

    /// Its exports.
    pub fn iter(&self) -> impl Iterator<Item = &SnapshotExport> {
        self.exports.iter().map(Arc::as_ref)
    }
}

impl Exports for SnapshotExports {
    type Export = SnapshotExport;

    fn find(&self, name: &[u8]) -> impl Future<Output = Option<Arc<SnapshotExport>>> + Send {
        let found = match name {
            [] => self.exports.first(),
            name => self.exports.iter().find(|export| export.name.as_bytes() == name),
        };
        ready(found.cloned())
    }

    fn list(&self) -> impl Future<Output = Vec<Arc<SnapshotExport>>> + Send {
        ready(self.exports.clone())
    }
}
