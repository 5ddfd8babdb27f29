//! Decoding of blocks that aren't cached: a small one on the task that requests it, if nobody else
//! has to wait for that, and others in groups on the decoder threads.

use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::oneshot;

use super::block_key::BlockKey;
use super::blocks::Blocks;
use super::decoders::JobAbandoned;
use super::inline_gate::MAX_INLINE_WORK;
use super::reader::BlockError;
use crate::cache::{Flight, Role};
use hexz_reader::storage::FetchPriority;
use hexz_reader::{Block, Snapshot};

/// Maximum number of blocks in a group.
const MAX_BLOCKS_IN_GROUP: usize = 16;
/// Decoded length of a group in bytes from which on it is full.
const GROUP_LENGTH: u64 = 256 * 1024;

/// A block and its bytes.
pub(super) type BlockResult = (Block, Result<Bytes, BlockError>);

/// A block and the right to decode it.
pub(super) type BlockInFlight = (Block, Flight<BlockKey>);

/// State of a block that has been requested.
pub(super) enum BlockRequest {
    /// The block was cached.
    Ready(Result<Bytes, BlockError>),
    /// The block has been decoded on the calling task.
    Decoded(Result<Bytes, BlockError>),
    Pending(PendingBlock),
}

/// A block that has to be decoded.
pub(super) enum PendingBlock {
    /// The caller decodes it.
    Leader(Flight<BlockKey>),
    /// Another caller decodes it.
    Follower(oneshot::Receiver<Bytes>),
}

/// Requested blocks of one stream that have to be decoded.
#[derive(Default)]
pub(super) struct BlockGroup {
    blocks: Vec<Block>,
    pending: Vec<PendingBlock>,
}

impl BlockGroup {
    pub(super) fn push(&mut self, block: Block, pending: PendingBlock) {
        self.blocks.push(block);
        self.pending.push(pending);
    }

    pub(super) fn is_full(&self) -> bool {
        is_full(&self.blocks)
    }
}

/// Returns true if there are enough blocks for one job of a decoder.
pub(super) fn is_full(blocks: &[Block]) -> bool {
    let length: u64 = blocks.iter().map(|block| u64::from(block.decoded_length())).sum();
    blocks.len() >= MAX_BLOCKS_IN_GROUP || length >= GROUP_LENGTH
}

impl Blocks {
    pub(super) fn count_hits(&self, blocks: u64) {
        self.reader.counters.hits.add(blocks);
        self.client.count_requested(blocks);
    }

    fn count_miss(&self) {
        self.reader.counters.misses.add(1);
        self.client.count_requested(1);
    }

    fn key(&self, block: &Block) -> BlockKey {
        BlockKey::of(block, &self.snapshot, self.stream)
    }

    fn place(&self, block: &Block) -> BlockKey {
        BlockKey::location(block, &self.snapshot, self.stream)
    }

    fn join_flight(&self, block: &Block) -> Role<BlockKey> {
        self.reader.cache.get_or_join(&self.key(block), &self.place(block))
    }

    /// Requests a block for the client, and counts a hit or a miss.
    pub(super) fn request(&self, block: &Block) -> BlockRequest {
        match self.join_flight(block) {
            Role::Cached(bytes) => {
                self.count_hits(1);
                BlockRequest::Ready(of_listed_length(bytes, block))
            }
            Role::Leader(flight) => {
                self.count_miss();
                match self.decode_inline(block, flight) {
                    Ok(bytes) => BlockRequest::Decoded(bytes),
                    Err(flight) => BlockRequest::Pending(PendingBlock::Leader(flight)),
                }
            }
            Role::Follower(bytes) => {
                self.count_miss();
                BlockRequest::Pending(PendingBlock::Follower(bytes))
            }
        }
    }

    /// Returns true if a block is cached. Doesn't count as a use of it.
    pub(super) fn is_cached(&self, block: &Block) -> bool {
        self.reader.cache.contains(&self.key(block))
    }

    /// Returns a block with the right to decode it, unless it is cached or in flight already.
    pub(super) fn lead(&self, block: Block) -> Option<BlockInFlight> {
        match self.join_flight(&block) {
            Role::Leader(flight) => Some((block, flight)),
            Role::Cached(_) | Role::Follower(_) => None,
        }
    }

    /// Decodes a block on the calling task, if it is small, its stored bytes are in memory, and no
    /// other client has to wait for it. Otherwise returns its flight.
    fn decode_inline(
        &self,
        block: &Block,
        flight: Flight<BlockKey>,
    ) -> Result<Result<Bytes, BlockError>, Flight<BlockKey>> {
        let reader = &self.reader;
        let (estimate, begun) = (block.estimated_cost(), Instant::now());
        if estimate > MAX_INLINE_WORK
            || !reader.inline_gate.admits(&self.client, || reader.requested(), begun)
            || reader.decoders.has_others_waiting(&self.client)
        {
            return Err(flight);
        }
        let read = self.snapshot.read_block_in_memory(block);
        let ended = Instant::now();
        let took = ended - begun;
        reader.decoders.charge(&self.client, took);
        reader.inline_gate.record(took, estimate, ended);
        let Some(read) = read.transpose() else { return Err(flight) };
        reader.counters.count_decoding(took);
        Ok(read.map_err(BlockError::Snapshot).map(|bytes| self.finish(block, flight, bytes)))
    }

    /// Decodes a block by `decode`, and counts the time.
    pub(super) fn timed_decode(
        &self,
        decode: impl FnOnce(&Snapshot) -> Result<Vec<u8>, hexz_reader::Error>,
    ) -> Result<Vec<u8>, hexz_reader::Error> {
        let begun = Instant::now();
        let decoded = decode(&self.snapshot);
        self.reader.counters.count_decoding(begun.elapsed());
        decoded
    }

    /// Caches a decoded block, and passes it to those who wait for it.
    pub(super) fn finish(&self, block: &Block, flight: Flight<BlockKey>, bytes: Vec<u8>) -> Bytes {
        self.reader.counters.count_decoded(&bytes);
        let bytes = Bytes::from(bytes);
        flight.finish(&self.reader.cache, self.key(block), &bytes);
        bytes
    }

    /// Adds the work of a group to `waiting`: its blocks are decoded in as many batches as decoders
    /// are idle, and those that others decode are waited for.
    pub(super) fn decode_group<'a>(
        &'a self,
        group: BlockGroup,
        waiting: &FuturesUnordered<BoxFuture<'a, Vec<BlockResult>>>,
    ) {
        let (mut leaders, mut followers) = (Vec::new(), Vec::new());
        for (block, pending) in group.blocks.into_iter().zip(group.pending) {
            match pending {
                PendingBlock::Leader(flight) => leaders.push((block, flight)),
                PendingBlock::Follower(bytes) => followers.push((block, bytes)),
            }
        }
        let batches = self.reader.decoders.idle_threads().max(1);
        let length = leaders.len().div_ceil(batches).max(1);
        while !leaders.is_empty() {
            let rest = leaders.split_off(length.min(leaders.len()));
            let batch = std::mem::replace(&mut leaders, rest);
            waiting.push(self.decode_batch(batch, FetchPriority::Demand).boxed());
        }
        for (block, bytes) in followers {
            waiting.push(async move { vec![(block, self.follow(&block, bytes).await)] }.boxed());
        }
    }

    /// Waits for a block that another caller decodes.
    async fn follow(
        &self,
        block: &Block,
        bytes: oneshot::Receiver<Bytes>,
    ) -> Result<Bytes, BlockError> {
        let (key, place) = (self.key(block), self.place(block));
        match self.reader.cache.wait_or_lead(&key, &place, Role::Follower(bytes)).await {
            Ok(bytes) => of_listed_length(bytes, block),
            Err(flight) => {
                let batch = vec![(*block, flight)];
                let decoded = self.decode_batch(batch, FetchPriority::Demand).await;
                decoded.into_iter().next().map_or(Err(BlockError::Panicked), |it| it.1)
            }
        }
    }

    /// Decodes blocks in one job of a decoder thread. The bytes of a remote archive are fetched
    /// with this priority before.
    pub(super) async fn decode_batch(
        &self,
        batch: Vec<BlockInFlight>,
        priority: FetchPriority,
    ) -> Vec<BlockResult> {
        if batch.is_empty() {
            return Vec::new();
        }
        let blocks: Vec<Block> = batch.iter().map(|(block, _)| *block).collect();
        let mut results = if self.snapshot.is_remote() {
            self.decode_remote_batch(batch, priority).await
        } else {
            self.decode_local_batch(batch).await
        };
        if results.len() < blocks.len() {
            let is_missing = |block: &Block| !results.iter().any(|(known, _)| known == block);
            let missing: Vec<Block> = blocks.into_iter().filter(is_missing).collect();
            results.extend(missing.into_iter().map(|block| (block, Err(BlockError::Panicked))));
        }
        results
    }

    async fn decode_local_batch(&self, batch: Vec<BlockInFlight>) -> Vec<BlockResult> {
        let (mut results, unresolved) = self.run_batch(batch).await.unwrap_or_default();
        // Its error was logged, and its blocks are missing in the results.
        if !unresolved.is_empty() && self.reader.index_parents(&self.snapshot).await.is_ok() {
            let (more, _) = self.run_batch(unresolved).await.unwrap_or_default();
            results.extend(more);
        }
        results
    }

    /// Decodes blocks in one job of a decoder thread. Returns those separately that need the index
    /// of the parents' hashes, which hasn't been built.
    async fn run_batch(
        &self,
        batch: Vec<BlockInFlight>,
    ) -> Result<(Vec<BlockResult>, Vec<BlockInFlight>), JobAbandoned> {
        let cost = batch.iter().map(|(block, _)| block.estimated_cost()).sum();
        let blocks = self.clone();
        let work = move || {
            let (mut results, mut unresolved) = (Vec::with_capacity(batch.len()), Vec::new());
            for (block, flight) in batch {
                // Another block with the same bytes may have been decoded since the job was queued.
                if let Some(bytes) = blocks.reader.cache.peek(&blocks.key(&block)) {
                    flight.finish(&blocks.reader.cache, blocks.key(&block), &bytes);
                    results.push((block, of_listed_length(bytes, &block)));
                    continue;
                }
                // Lets the threads that send replies run, as after a job.
                if !results.is_empty() {
                    std::thread::yield_now();
                }
                let begun = Instant::now();
                let read = blocks.snapshot.try_read_block(&block);
                blocks.reader.counters.count_decoding(begun.elapsed());
                match read {
                    Ok(Some(bytes)) => {
                        results.push((block, Ok(blocks.finish(&block, flight, bytes))));
                    }
                    Ok(None) => unresolved.push((block, flight)),
                    Err(error) => results.push((block, Err(BlockError::Snapshot(error)))),
                }
            }
            (results, unresolved)
        };
        self.reader.decoders.run(&self.client, cost, work).await
    }

    /// Returns a small block's bytes on the thread of a decoder, without sharing the work with
    /// other clients that ask for it at the same time. `None` if the index of the parents'
    /// hashes is needed, and hasn't been built.
    pub(super) fn small_block(&self, block: &Block) -> Result<Option<Bytes>, BlockError> {
        let (key, counters) = (self.key(block), &self.reader.counters);
        let bytes = match self.reader.cache.get(&key) {
            Some(bytes) => {
                self.count_hits(1);
                bytes
            }
            None => {
                let begun = Instant::now();
                let read = self.snapshot.try_read_block(block).map_err(BlockError::Snapshot)?;
                counters.count_decoding(begun.elapsed());
                let Some(bytes) = read.map(Bytes::from) else { return Ok(None) };
                self.count_miss();
                counters.count_decoded(&bytes);
                self.reader.cache.insert(key, bytes.clone());
                bytes
            }
        };
        of_listed_length(bytes, block).map(Some)
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
