//! Reads a stream block by block: at once where all blocks are in memory, otherwise concurrently.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};

use super::decoders::Client;
use super::reader::{BlockKey, BlockReader, Failure};
use crate::nbd::{COPIED, Segment, Span};
use crate::snapshot::{Block, Snapshot, StreamKind};

/// Divisor of a cached block's length: shorter parts of the block are copied, so that a reply
/// waiting for a slow client doesn't keep a whole block in memory. The shortest parts are copied
/// anyway when the reply is queued.
const COPIED_FRACTION: usize = 2;

/// Length in bytes below which a block is read together with its neighbors.
const SMALL_BLOCK: u32 = 4096;
/// Maximum number of small blocks that are read together.
const BLOCKS_IN_GROUP: usize = 256;
/// Maximum number of groups of one read that wait for the decoders at once.
const GROUPS_AT_ONCE: usize = 4;
/// Maximum number of blocks that one read may touch: a read of 32 MiB over blocks of 512 bytes.
/// Clients of archives with smaller blocks have to ask for less at a time.
const MAX_BLOCKS_IN_READ: usize = 65_536;
/// Maximum number of blocks that are looked up without yielding; a read over more takes the
/// asynchronous path.
const MAX_BLOCKS_AT_ONCE: usize = 64;

/// A run of neighboring blocks that are read together.
struct Group {
    is_zeros: bool,
    /// End of the group in the export, at most the end of the read.
    end: u64,
    /// Blocks of the group; empty if they are zeros.
    blocks: Vec<Block>,
}

/// A failure, and the offset in the export from which it affects the read.
#[derive(Debug)]
pub(super) struct Unread {
    pub(super) at: u64,
    pub(super) cause: Failure,
}

/// Estimated time to read and parse an index page, in nanoseconds.
pub(super) const PAGE_WORK: u64 = 64 * 1024;

/// The blocks of one stream, for one client.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    pub(super) stream: StreamKind,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) reader: Arc<BlockReader>,
    pub(super) client: Arc<Client>,
}

impl Blocks {
    /// Appends the segments of `span` in order, if all of them are in memory. After `None`,
    /// `segments` may hold an incomplete read.
    pub(super) fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> Option<()> {
        let mut at = span.offset;
        let mut hits = 0;
        while at < span.end() {
            let block = self.snapshot.locate_now(self.stream, at)?.ok()?;
            if segments.len() >= MAX_BLOCKS_AT_ONCE {
                return None;
            }
            let segment = zero_part(&block, span).or_else(|| {
                let key = BlockKey::of(&block, &self.snapshot, self.stream);
                let bytes = self.reader.cache.get(&key)?;
                (bytes.len() == block.decoded_length() as usize).then(|| part(&bytes, &block, span))
            })?;
            hits += u64::from(!block.is_zeros());
            segments.push(segment);
            at = block.end();
        }
        self.reader.count_hits(hits);
        Some(())
    }

    /// Returns the block that covers `at`, loading its index page if necessary.
    async fn locate(&self, at: u64) -> Result<Block, Unread> {
        let located = match self.snapshot.locate_now(self.stream, at) {
            Some(located) => located.map_err(Failure::Snapshot),
            None => {
                let (snapshot, stream) = (Arc::clone(&self.snapshot), self.stream);
                let work = move || snapshot.locate(stream, at);
                self.reader.off_the_runtime(&self.client, PAGE_WORK, work).await
            }
        };
        located.map_err(|cause| Unread { at, cause })
    }

    /// Reads `span`, and passes each segment to `part` as soon as it is ready.
    pub(super) async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), Unread> {
        let mut under_way = FuturesUnordered::new();
        let mut at = span.offset;
        let mut blocks = 0;
        while at < span.end() {
            let group = self.group(span, at, &mut blocks).await?;
            let start = at;
            at = group.end;
            if group.is_zeros {
                part(start, zeros(at - start));
                continue;
            }
            // More groups in flight would only take memory while they wait for their neighbors.
            while under_way.len() >= GROUPS_AT_ONCE {
                if let Some((offset, segment)) = under_way.next().await {
                    part(offset, segment?);
                }
            }
            under_way.push(async move { (start, self.segment(group, span).await) });
        }
        while let Some((offset, segment)) = under_way.next().await {
            part(offset, segment?);
        }
        Ok(())
    }

    /// Prefetches the blocks of `span` into the cache, but only while the decoders are idle, so
    /// that requested blocks don't wait for it.
    pub(super) async fn read_ahead(&self, span: Span) {
        let mut under_way = FuturesUnordered::new();
        let mut at = span.offset;
        while at < span.end() {
            if !self.reader.is_idle() {
                // Errors are ignored: a client that requests the block gets them.
                match under_way.next().await {
                    Some(_) => continue,
                    None => return,
                }
            }
            let Ok(block) = self.locate(at).await else { return };
            at = block.end();
            if block.is_zeros() || self.reader.has(&self.snapshot, self.stream, &block) {
                continue;
            }
            under_way.push(self.reader.block_ahead(
                &self.client,
                &self.snapshot,
                self.stream,
                block,
            ));
            // Polls once, which queues the job.
            under_way.next().now_or_never();
        }
        while under_way.next().await.is_some() {}
    }

    /// Returns the group that starts at `at`: a run of zeros, one block, or several small blocks.
    async fn group(&self, span: Span, at: u64, blocks: &mut usize) -> Result<Group, Unread> {
        let first = self.locate(at).await?;
        let is_zeros = first.is_zeros();
        let mut group = Group { is_zeros, end: first.end().min(span.end()), blocks: Vec::new() };
        let mut block = first;
        loop {
            *blocks += 1;
            if *blocks > MAX_BLOCKS_IN_READ {
                return Err(Unread { at, cause: Failure::TooManyBlocks });
            }
            // An archive may have millions of tiny blocks; yield to other tasks.
            tokio::task::consume_budget().await;
            group.end = block.end().min(span.end());
            if !is_zeros {
                group.blocks.push(block);
            }
            let is_full = !is_zeros
                && (block.length() >= SMALL_BLOCK || group.blocks.len() >= BLOCKS_IN_GROUP);
            if is_full || group.end == span.end() {
                return Ok(group);
            }
            let next = self.locate(group.end).await?;
            let fits = next.is_zeros() == is_zeros && (is_zeros || next.length() < SMALL_BLOCK);
            if !fits {
                return Ok(group);
            }
            block = next;
        }
    }

    /// Waits for a group's blocks, and returns the part that `span` requests.
    async fn segment(&self, group: Group, span: Span) -> Result<Segment, Unread> {
        let read = async |block: Block| {
            let bytes = self.reader.block(&self.client, &self.snapshot, self.stream, block);
            bytes.await.map_err(|cause| Unread { at: block.start().max(span.offset), cause })
        };
        if let [block] = group.blocks.as_slice() {
            return Ok(waiting_part(&read(*block).await?, block, span));
        }
        let mut together = BytesMut::new();
        for block in group.blocks {
            let bytes = read(block).await?;
            let (start, end) = overlap(&block, span);
            together.extend_from_slice(bytes.get(start as usize..end as usize).unwrap_or_default());
        }
        Ok(Segment::Data(together.freeze()))
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

/// Returns the part of a block's `bytes` that `span` requests, for a reply that may wait for
/// other blocks to be decoded. It keeps no more memory alive than its length, since a reply's
/// memory is accounted for by its length.
fn waiting_part(bytes: &Bytes, block: &Block, span: Span) -> Segment {
    let (start, end) = overlap(block, span);
    let range = start as usize..(end as usize).min(bytes.len());
    if range.len() == bytes.len() {
        return Segment::Data(bytes.clone());
    }
    Segment::Data(Bytes::copy_from_slice(bytes.get(range).unwrap_or_default()))
}

/// Returns the part of a cached block's `bytes` that `span` requests, for a reply that is ready.
fn part(bytes: &Bytes, block: &Block, span: Span) -> Segment {
    let (start, end) = overlap(block, span);
    let range = start as usize..(end as usize).min(bytes.len());
    if range.len() >= COPIED && range.len() < bytes.len() / COPIED_FRACTION {
        Segment::Data(Bytes::copy_from_slice(bytes.get(range).unwrap_or_default()))
    } else {
        Segment::Data(bytes.slice(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{OpenOptions, Snapshot};

    /// A waiting reply doesn't keep a whole block in memory if it sends only a part of it.
    #[test]
    fn a_waiting_part_does_not_pin_its_block() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/archives/fixed-64k-zstd.hxz");
        let snapshot = Snapshot::open(path.as_ref(), &OpenOptions::default()).unwrap();
        let block = snapshot.locate(StreamKind::Main, 0).unwrap();
        let bytes = Bytes::from(snapshot.read_block(&block).unwrap());
        for range in [0..1, 1..16, 100..20_100, 1..65_536, 0..65_535] {
            let span =
                Span { offset: range.start as u64, length: u32::try_from(range.len()).unwrap() };
            let Segment::Data(part) = waiting_part(&bytes, &block, span) else {
                panic!("it is data")
            };
            assert_eq!(part, bytes.slice(range.clone()));
            assert!(!bytes.as_ptr_range().contains(&part.as_ptr()), "{range:?}");
        }
        let Segment::Data(whole) = waiting_part(&bytes, &block, Span { offset: 0, length: 65_536 })
        else {
            panic!("it is data")
        };
        assert_eq!(whole.as_ptr(), bytes.as_ptr());
    }
}
