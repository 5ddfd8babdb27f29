//! Reading of blocks from remote archives: their bytes are fetched asynchronously, so a decoder
//! thread never waits for a store.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::task::spawn_blocking;

use super::block_decoding::{BlockInFlight, BlockResult};
use super::blocks::{Blocks, INDEX_PAGE_WORK};
use super::reader::{BlockError, BlockReader};
use hexz_reader::storage::FetchPriority;
use hexz_reader::{Block, Error, Lookup, Missing, StoredBlock};

/// Maximum number of lookups for one block: for a page of each archive of a long chain, and for
/// pages that are evicted before they are used.
const MAX_LOOKUPS: usize = 64;

/// The bytes from which a block is decoded.
enum BlockSource {
    /// Bytes that were fetched from a remote archive.
    Fetched(StoredBlock, Bytes),
    /// The block is in a file, or is zeros.
    Local(StoredBlock),
    /// The block has been read already.
    Read(Vec<u8>),
}

impl BlockReader {
    /// Runs `work` that may wait for a store, on a thread for blocking work.
    pub(super) async fn run_waiting<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, BlockError> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.waiting_permits).acquire_owned().await.ok();
        let result = spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        result
            .await
            .map_or(Err(BlockError::Panicked), |result| result.map_err(BlockError::Snapshot))
    }
}

impl Blocks {
    /// Returns the block that covers `at`, after fetching the index pages that are needed.
    pub(super) async fn locate_remote(
        &self,
        at: u64,
        priority: FetchPriority,
    ) -> Result<Block, BlockError> {
        for _ in 0..MAX_LOOKUPS {
            match self.snapshot.lookup(self.stream, at).map_err(BlockError::Snapshot)? {
                Lookup::Found(block) => return Ok(block),
                Lookup::NotInMemory(missing) => self.load(missing, priority).await?,
            }
        }
        let (snapshot, stream) = (Arc::clone(&self.snapshot), self.stream);
        self.reader.run_waiting(move || snapshot.locate(stream, at)).await
    }

    /// Brings into memory what a lookup needs.
    async fn load(&self, missing: Missing, priority: FetchPriority) -> Result<(), BlockError> {
        let snapshot = Arc::clone(&self.snapshot);
        match missing {
            Missing::Page(id) => match snapshot.fetch_page(id, priority) {
                Some(fetch) => {
                    let bytes = fetch.await.map_err(BlockError::Snapshot)?;
                    let insert = move || snapshot.insert_page(id, &bytes);
                    self.reader.run_on_decoder(&self.client, INDEX_PAGE_WORK, insert).await
                }
                None => {
                    let load = move || snapshot.load_page(id);
                    self.reader.run_on_decoder(&self.client, INDEX_PAGE_WORK, load).await
                }
            },
            Missing::ParentIndex => self.reader.index_parents(&self.snapshot).await,
            // Reading the block reads them.
            Missing::ParentBytes => Ok(()),
        }
    }

    /// Returns the stored bytes that a block is decoded from, after fetching the index pages that
    /// are needed. `None` if only reading the block tells which they are.
    pub(super) async fn stored(
        &self,
        block: &Block,
        priority: FetchPriority,
    ) -> Result<Option<StoredBlock>, BlockError> {
        for _ in 0..MAX_LOOKUPS {
            match self.snapshot.stored_block(block).map_err(BlockError::Snapshot)? {
                Lookup::Found(stored) => return Ok(Some(stored)),
                Lookup::NotInMemory(Missing::ParentBytes) => break,
                Lookup::NotInMemory(missing) => self.load(missing, priority).await?,
            }
        }
        Ok(None)
    }

    /// Fetches the bytes of a block.
    async fn fetch(
        &self,
        block: &Block,
        priority: FetchPriority,
    ) -> Result<BlockSource, BlockError> {
        if let Some(stored) = self.stored(block, priority).await? {
            return match self.snapshot.fetch_block(&stored, priority) {
                Some(fetch) => {
                    let bytes = fetch.await.map_err(BlockError::Snapshot)?;
                    Ok(BlockSource::Fetched(stored, bytes))
                }
                None => Ok(BlockSource::Local(stored)),
            };
        }
        let (snapshot, block) = (Arc::clone(&self.snapshot), *block);
        self.reader.run_waiting(move || snapshot.read_block(&block)).await.map(BlockSource::Read)
    }

    /// Fetches the bytes of all blocks, then decodes them in one job of a decoder thread.
    pub(super) async fn decode_remote_batch(
        &self,
        batch: Vec<BlockInFlight>,
        priority: FetchPriority,
    ) -> Vec<BlockResult> {
        let fetches = batch.into_iter().map(async |(block, flight)| {
            let source = self.fetch(&block, priority).await;
            (block, flight, source)
        });
        let fetched = join_all(fetches).await;
        let (mut results, mut ready) = (Vec::with_capacity(fetched.len()), Vec::new());
        for (block, flight, source) in fetched {
            match source {
                Ok(source) => ready.push((block, flight, source)),
                Err(error) => results.push((block, Err(error))),
            }
        }
        let cost = ready.iter().map(|(block, ..)| block.estimated_cost()).sum();
        let blocks = self.clone();
        let work = move || {
            let decode = |(block, flight, source)| {
                let decoded = blocks.timed_decode(|snapshot| match source {
                    BlockSource::Fetched(stored, bytes) => snapshot.decode_copy(&stored, &bytes),
                    BlockSource::Local(stored) => snapshot.read_stored(&stored),
                    BlockSource::Read(bytes) => Ok(bytes),
                });
                let decoded = decoded.map_err(BlockError::Snapshot);
                (block, decoded.map(|bytes| blocks.finish(&block, flight, bytes)))
            };
            ready.into_iter().map(decode).collect::<Vec<BlockResult>>()
        };
        results
            .extend(self.reader.decoders.run(&self.client, cost, work).await.unwrap_or_default());
        results
    }
}
