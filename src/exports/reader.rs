//! Decoded blocks, and the threads that decode them.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::cache::ByteCache;
use crate::limited::RateLimit;
use crate::snapshot::{Block, BlockHash, Error, Snapshot, StreamKind};

/// What stands for a block's bytes in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum BlockKey {
    /// Equal hashes are equal bytes, whatever archive they are from.
    Content(BlockHash),
    /// A block without a hash is only equal to itself.
    Place { snapshot: u64, stream: StreamKind, start: u64 },
}

impl BlockKey {
    pub(super) fn of(block: &Block, snapshot: &Snapshot, stream: StreamKind) -> Self {
        match block.hash() {
            Some(hash) => Self::Content(hash),
            None => Self::Place { snapshot: snapshot.id(), stream, start: block.start() },
        }
    }
}

/// Decoded blocks and the threads that decode, shared by all exports.
#[derive(Debug)]
pub struct BlockReader {
    pub(super) cache: ByteCache<BlockKey>,
    /// More decoders than cores would only fight for them.
    decoders: Arc<Semaphore>,
    pub(super) failures: RateLimit,
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
    pub(super) async fn off_the_runtime<T: Send + 'static>(
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
