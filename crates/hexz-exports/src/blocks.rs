//! Reads a stream block by block: at once where all blocks are in memory, otherwise concurrently.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};

use super::block_decoding::{BlockGroup, BlockRequest, BlockResult, is_full};
use super::block_key::BlockKey;
use super::decoders::DecoderClient;
use super::reader::{BlockError, BlockReader};
use hexz_reader::storage::FetchPriority;
use hexz_reader::{Block, Snapshot, StreamKind};
use nbd_server::{COPY_THRESHOLD, Segment, Span};

/// Divisor of a cached block's length: shorter parts of the block are copied, so that a reply
/// waiting for a slow client doesn't keep a whole block in memory. The shortest parts are copied
/// anyway when the reply is queued.
const COPIED_FRACTION: usize = 2;

/// Length in bytes below which a block is read together with its neighbors.
const SMALL_BLOCK_LIMIT: u32 = 4096;
/// Maximum number of small blocks in one run.
const MAX_BLOCKS_IN_RUN: usize = 256;
/// Time after which a run ends early, so that other clients get their turn.
const RUN_TIME: Duration = Duration::from_millis(2);
/// Maximum number of batches of one read that wait for the decoders at once.
const MAX_BATCHES_IN_FLIGHT: usize = 4;
/// Maximum number of blocks that one read may touch: a read of 32 MiB over blocks of 512 bytes.
/// Clients of archives with smaller blocks have to ask for less at a time.
const MAX_BLOCKS_IN_READ: usize = 65_536;
/// Maximum number of blocks that are looked up without yielding; a read over more takes the
/// asynchronous path.
const MAX_BLOCKS_AT_ONCE: usize = 64;

/// Small neighboring blocks that were read together.
struct Run {
    /// End in the export, no farther than the read.
    end: u64,
    segment: Segment,
    blocks: usize,
}

/// A failure, and the offset in the export from which it affects the read.
#[derive(Debug)]
pub(super) struct BlockReadFailure {
    pub(super) at: u64,
    pub(super) cause: BlockError,
}

/// Estimated time to read and parse an index page, in nanoseconds.
pub(super) const INDEX_PAGE_WORK: u64 = 64 * 1024;

/// The blocks of one stream, for one client.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    pub(super) stream: StreamKind,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) reader: Arc<BlockReader>,
    pub(super) client: Arc<DecoderClient>,
}

impl Blocks {
    /// Appends the segments of `span` in order, if all of them are in memory. After `None`,
    /// `segments` may hold an incomplete read.
    pub(super) fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> Option<()> {
        let mut at = span.offset;
        let mut hits = 0;
        while at < span.end() {
            let block = self.snapshot.try_locate(self.stream, at)?.ok()?;
            if segments.len() >= MAX_BLOCKS_AT_ONCE {
                return None;
            }
            let segment = zero_part(&block, span).or_else(|| {
                let key = BlockKey::of(&block, &self.snapshot, self.stream);
                let bytes = self.reader.cache.get(&key)?;
                (bytes.len() == block.decoded_length() as usize)
                    .then(|| cached_part(&bytes, &block, span))
            })?;
            hits += u64::from(!block.is_zeros());
            segments.push(segment);
            at = block.end();
        }
        self.count_hits(hits);
        Some(())
    }

    /// Returns the block that covers `at`, loading its index page if necessary.
    pub(super) async fn locate(
        &self,
        at: u64,
        priority: FetchPriority,
    ) -> Result<Block, BlockReadFailure> {
        let located = match self.snapshot.try_locate(self.stream, at) {
            Some(located) => located.map_err(BlockError::Snapshot),
            None if self.snapshot.is_remote() => self.locate_remote(at, priority).await,
            None => {
                let (snapshot, stream) = (Arc::clone(&self.snapshot), self.stream);
                let work = move || snapshot.locate(stream, at);
                self.reader.run_on_decoder(&self.client, INDEX_PAGE_WORK, work).await
            }
        };
        located.map_err(|cause| BlockReadFailure { at, cause })
    }

    /// Reads `span`, and passes each segment to `part` as soon as it is ready.
    pub(super) async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), BlockReadFailure> {
        let (mut group, mut waiting) = (BlockGroup::default(), FuturesUnordered::new());
        let mut at = span.offset;
        let mut blocks = 0;
        while at < span.end() {
            if blocks >= MAX_BLOCKS_IN_READ {
                return Err(BlockReadFailure { at, cause: BlockError::TooManyBlocks });
            }
            tokio::task::consume_budget().await;
            let block = self.locate(at, FetchPriority::Demand).await?;
            let start = at;
            if block.length() < SMALL_BLOCK_LIMIT && block.end() < span.end() {
                let run = self.run_of_blocks(block, span).await?;
                (at, blocks) = (run.end, blocks + run.blocks);
                part(start, run.segment);
                continue;
            }
            (at, blocks) = (block.end(), blocks + 1);
            if let Some(zeros) = zero_part(&block, span) {
                part(start, zeros);
                continue;
            }
            match self.request(&block) {
                BlockRequest::Ready(bytes) => part(start, segment(bytes, &block, span)?),
                BlockRequest::Decoded(bytes) => {
                    part(start, segment(bytes, &block, span)?);
                    if at < span.end() {
                        // Other tasks have waited for it, such as the one that sends the part.
                        tokio::task::yield_now().await;
                    }
                }
                BlockRequest::Pending(pending) => group.push(block, pending),
            }
            if group.is_full() {
                self.decode_group(std::mem::take(&mut group), &waiting);
                // Polls once, which queues the jobs.
                let mut next = waiting.next().now_or_never().flatten();
                // No more than keep the decoders busy: a part that waits for others takes memory.
                while next.is_some() || waiting.len() >= MAX_BATCHES_IN_FLIGHT {
                    let decoded = match next.take() {
                        Some(decoded) => decoded,
                        None => waiting.next().await.unwrap_or_default(),
                    };
                    deliver(decoded, span, &mut part)?;
                }
            }
        }
        self.decode_group(group, &waiting);
        while let Some(decoded) = waiting.next().await {
            deliver(decoded, span, &mut part)?;
        }
        Ok(())
    }

    /// Prefetches the blocks of `span` into the cache, but only while the decoders are idle, so
    /// that requested blocks don't wait for it. Blocks of remote archives have to be in memory: what
    /// to fetch ahead is decided where it is known which reads had to wait for the store.
    pub(super) async fn read_ahead(&self, span: Span) {
        let mut waiting = FuturesUnordered::new();
        let (mut group, mut at) = (Vec::new(), span.offset);
        while at < span.end() {
            tokio::task::consume_budget().await;
            // Errors are ignored: a client that requests the block gets them.
            let block = match self.snapshot.is_remote() {
                true => self.snapshot.try_locate(self.stream, at).and_then(Result::ok),
                false => self.locate(at, FetchPriority::Ahead).await.ok(),
            };
            let Some(block) = block else { break };
            at = block.end();
            if !block.is_zeros() && !self.is_cached(&block) {
                if self.snapshot.is_remote() && !self.snapshot.is_at_hand(&block) {
                    break;
                }
                group.push(block);
            }
            if at < span.end() && !is_full(&group) {
                continue;
            }
            while !self.reader.has_idle_decoder() {
                if waiting.next().await.is_none() {
                    return;
                }
            }
            // Not earlier: a client that requests one of the blocks would wait until its job is
            // queued.
            let batch = group.drain(..).filter_map(|block| self.lead(block)).collect();
            waiting.push(self.decode_batch(batch, FetchPriority::Ahead));
            // Polls once, which queues the job.
            waiting.next().now_or_never();
        }
        while waiting.next().await.is_some() {}
    }

    /// Reads small blocks from `first` on, all of them zeros or none, in one job of the decoders.
    ///
    /// An archive may have millions of blocks of a few bytes. Walking over them takes long
    /// compared with what it yields, so it is done where work is charged to the client, and
    /// not on the threads that serve everybody.
    async fn run_of_blocks(&self, first: Block, span: Span) -> Result<Run, BlockReadFailure> {
        let failure = |cause| BlockReadFailure { at: first.start().max(span.offset), cause };
        let read = async || {
            let blocks = self.clone();
            let work = move || Ok(blocks.read_run(first, span));
            if self.snapshot.is_remote() {
                return self.reader.run_waiting(work).await.map_err(failure)?;
            }
            let cost = first.estimated_cost();
            self.reader.run_on_decoder(&self.client, cost, work).await.map_err(failure)?
        };
        if let Some(run) = read().await? {
            return Ok(run);
        }
        self.reader.index_parents(&self.snapshot).await.map_err(failure)?;
        read().await?.ok_or(failure(BlockError::Panicked))
    }

    /// Reads a run on the calling thread. Returns `None` if the index of the parents' hashes is
    /// needed, and hasn't been built.
    fn read_run(&self, first: Block, span: Span) -> Result<Option<Run>, BlockReadFailure> {
        let begun = Instant::now();
        let is_zeros = first.is_zeros();
        let (mut block, mut blocks, mut bytes) = (first, 0, BytesMut::new());
        loop {
            blocks += 1;
            let end = block.end().min(span.end());
            if !is_zeros {
                let read = self.small_block(&block);
                let at = block.start().max(span.offset);
                let Some(decoded) = read.map_err(|cause| BlockReadFailure { at, cause })? else {
                    return Ok(None);
                };
                let (start, end) = overlap(&block, span);
                let range = start as usize..end as usize;
                bytes.extend_from_slice(decoded.get(range).unwrap_or_default());
            }
            let is_over =
                end == span.end() || blocks == MAX_BLOCKS_IN_RUN || begun.elapsed() > RUN_TIME;
            // An error in the next block is for the run that begins there.
            let next = if is_over { None } else { self.snapshot.locate(self.stream, end).ok() };
            match next {
                Some(next) if next.is_zeros() == is_zeros && next.length() < SMALL_BLOCK_LIMIT => {
                    block = next;
                }
                _ => {
                    let start = first.start().max(span.offset);
                    let segment =
                        if is_zeros { zeros(end - start) } else { Segment::Data(bytes.freeze()) };
                    return Ok(Some(Run { end, segment, blocks }));
                }
            }
        }
    }
}

/// Returns the overlap of `block` and `span`: its start and end relative to the start of the
/// whole block, in bytes.
fn overlap(block: &Block, span: Span) -> (u32, u32) {
    let start = span.offset.max(block.start()) - block.decoded_start();
    let end = span.end().min(block.end()) - block.decoded_start();
    // Both lie within a block, whose length fits 32 bits.
    let within = |position| u32::try_from(position).unwrap_or(u32::MAX);
    (within(start), within(end))
}

fn zero_part(block: &Block, span: Span) -> Option<Segment> {
    let (start, end) = overlap(block, span);
    block.is_zeros().then(|| Segment::Zeros(end - start))
}

/// Returns a segment of zeros within a read, whose length fits 32 bits.
fn zeros(length: u64) -> Segment {
    Segment::Zeros(u32::try_from(length).unwrap_or(u32::MAX))
}

/// Passes the segments of blocks to `part`.
fn deliver(
    decoded: Vec<BlockResult>,
    span: Span,
    part: &mut impl FnMut(u64, Segment),
) -> Result<(), BlockReadFailure> {
    decoded.into_iter().try_for_each(|(block, bytes)| {
        part(block.start().max(span.offset), segment(bytes, &block, span)?);
        Ok(())
    })
}

/// Returns the part of a `block` that `span` requests, or the reason why it can't be read.
fn segment(
    bytes: Result<Bytes, BlockError>,
    block: &Block,
    span: Span,
) -> Result<Segment, BlockReadFailure> {
    match bytes {
        Ok(bytes) => Ok(unpinned_part(&bytes, block, span)),
        Err(cause) => Err(BlockReadFailure { at: block.start().max(span.offset), cause }),
    }
}

/// Returns the part of a block's `bytes` that `span` requests, for a reply that may wait for
/// other blocks to be decoded. It keeps no more memory alive than its length, since a reply's
/// memory is accounted for by its length.
fn unpinned_part(bytes: &Bytes, block: &Block, span: Span) -> Segment {
    let (start, end) = overlap(block, span);
    let range = start as usize..(end as usize).min(bytes.len());
    if range.len() == bytes.len() {
        return Segment::Data(bytes.clone());
    }
    Segment::Data(Bytes::copy_from_slice(bytes.get(range).unwrap_or_default()))
}

/// Returns the part of a cached block's `bytes` that `span` requests, for a reply that is ready.
fn cached_part(bytes: &Bytes, block: &Block, span: Span) -> Segment {
    let (start, end) = overlap(block, span);
    let range = start as usize..(end as usize).min(bytes.len());
    if range.len() >= COPY_THRESHOLD && range.len() < bytes.len() / COPIED_FRACTION {
        Segment::Data(Bytes::copy_from_slice(bytes.get(range).unwrap_or_default()))
    } else {
        Segment::Data(bytes.slice(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hexz_reader::{OpenOptions, Snapshot};

    /// A waiting reply doesn't keep a whole block in memory if it sends only a part of it.
    #[test]
    fn a_waiting_part_does_not_pin_its_block() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/archives/fixed-64k-zstd.hxz");
        let snapshot = Snapshot::open(path.as_ref(), &OpenOptions::default()).unwrap();
        let block = snapshot.locate(StreamKind::Main, 0).unwrap();
        let bytes = Bytes::from(snapshot.read_block(&block).unwrap());
        for range in [0..1, 1..16, 100..20_100, 1..65_536, 0..65_535] {
            let span =
                Span { offset: range.start as u64, length: u32::try_from(range.len()).unwrap() };
            let Segment::Data(part) = unpinned_part(&bytes, &block, span) else {
                panic!("it is data")
            };
            assert_eq!(part, bytes.slice(range.clone()));
            assert!(!bytes.as_ptr_range().contains(&part.as_ptr()), "{range:?}");
        }
        let Segment::Data(whole) =
            unpinned_part(&bytes, &block, Span { offset: 0, length: 65_536 })
        else {
            panic!("it is data")
        };
        assert_eq!(whole.as_ptr(), bytes.as_ptr());
    }
}
