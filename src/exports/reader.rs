//! Decoded blocks, and the threads that decode them.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::decoders::{Abandoned, Client, Decoders};
use crate::cache::ByteCache;
use crate::limited::RateLimit;
use crate::snapshot::{Block, BlockHash, Error, Snapshot, StreamKind};

/// What stands for a block's bytes in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlockKey {
    /// Equal hashes are equal bytes, whatever archive they are from.
    Content(BlockHash),
    /// A block without a verified hash is only equal to itself.
    Place { snapshot: u64, stream: StreamKind, start: u64 },
}

impl BlockKey {
    pub(super) fn of(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        match block.hash() {
            // What wasn't verified must not be served for another archive's block.
            Some(hash) if snapshot.verifies_hashes() => Self::Content(hash),
            _ => Self::Place { snapshot: snapshot.id(), stream, start: block.start() },
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
            Self::Place { snapshot, stream, start } => (snapshot, stream, start).hash(state),
        }
    }
}

/// Decoded blocks and the threads that decode, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    pub(super) cache: ByteCache<BlockKey>,
    decoders: Decoders,
    decoded: AtomicU64,
    pub(super) failures: RateLimit,
}

impl BlockReader {
    /// A reader with a cache of `cache_size` bytes.
    pub fn new(cache_size: u64) -> Arc<Self> {
        /// What packers make blocks of on average, in bytes.
        const TYPICAL_BLOCK: u64 = 64 * 1024;
        Arc::new(Self {
            cache: ByteCache::new(cache_size, TYPICAL_BLOCK),
            decoders: Decoders::new(),
            decoded: AtomicU64::new(0),
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
        self.decoders.run(&Client::default(), 0, || ()).await.is_ok()
    }

    /// A block's bytes, from the cache or from its archive.
    pub(super) async fn block(
        &self,
        client: &Client,
        snapshot: &Arc<Snapshot>,
        stream: StreamKind,
        block: Block,
    ) -> Result<Bytes, Failure> {
        let key = BlockKey::of(&block, snapshot, stream);
        let make = async {
            let snapshot = Arc::clone(snapshot);
            let work = move || snapshot.read_block(&block);
            let bytes = self.off_the_runtime(client, block.length().into(), work).await?;
            self.decoded.fetch_add(1, Ordering::Relaxed);
            Ok(Bytes::from(bytes))
        };
        let bytes = self.cache.get_or_make(&key, make).await?;
        if bytes.len() != block.length() as usize {
            let (cached, listed) = (bytes.len(), block.length());
            return Err(Failure::LengthDiffers { cached, listed });
        }
        Ok(bytes)
    }

    /// Whether a block is in the cache.
    pub(super) fn has(&self, snapshot: &Snapshot, stream: StreamKind, block: &Block) -> bool {
        self.cache.contains(&BlockKey::of(block, snapshot, stream))
    }

    /// Whether a block would be decoded at once, before anybody else's.
    pub(super) fn is_idle(&self) -> bool {
        self.decoders.are_idle()
    }

    /// Does `work` that blocks, worth so many bytes, on a thread where it may.
    pub(super) async fn off_the_runtime<T: Send + 'static>(
        &self,
        client: &Client,
        bytes: u64,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Failure> {
        match self.decoders.run(client, bytes, work).await {
            Ok(result) => result.map_err(Failure::Snapshot),
            Err(Abandoned) => Err(Failure::Panicked),
        }
    }
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
