//! Reading a stream block by block: what is in memory at once, and the rest side by side.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;

use super::reader::{BlockKey, BlockReader, Failure};
use crate::nbd::{Segment, Span};
use crate::snapshot::{Block, Snapshot, StreamKind};

/// A part of a block shorter than this fraction is copied out of it, so that a reply
/// that waits for a slow client doesn't keep a whole block in memory.
const COPIED_FRACTION: usize = 2;

/// A block shorter than this is read together with its neighbours, in bytes.
const SMALL_BLOCK: u32 = 4096;
/// How many small blocks are read together, at most.
const BLOCKS_IN_GROUP: usize = 256;
/// How many groups of one read wait for the decoders at once.
const GROUPS_AT_ONCE: usize = 4;
/// How many blocks one read may touch: a read of 32 MiB over blocks of 512 bytes. Who has
/// smaller ones has to read less at a time.
const MAX_BLOCKS_IN_READ: usize = 65_536;
/// How many blocks are looked up without a pause; a read over more isn't answered at once.
const MAX_BLOCKS_AT_ONCE: usize = 64;

/// Neighbouring blocks that are read together.
struct Group {
    is_zeros: bool,
    /// Where it ends in the export, no farther than the read.
    end: u64,
    /// Its blocks, unless they are zeros.
    blocks: Vec<Block>,
}

/// A failure, and the byte of the export from which on it matters.
#[derive(Debug)]
pub(super) struct Unread {
    pub(super) at: u64,
    pub(super) cause: Failure,
}

/// The blocks of one stream. A copy costs two counts, so each task may have one.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    pub(super) stream: StreamKind,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) reader: Arc<BlockReader>,
}

impl Blocks {
    /// Adds the parts of `span` in order, if all of them are in memory.
    pub(super) fn read_now(&self, span: Span, segments: &mut Vec<Segment>) -> Option<()> {
        let mut at = span.offset;
        while at < span.end() {
            let block = self.snapshot.locate_now(self.stream, at)?.ok()?;
            if segments.len() >= MAX_BLOCKS_AT_ONCE {
                return None;
            }
            let segment = zero_part(&block, span).or_else(|| {
                let key = BlockKey::of(&block, &self.snapshot, self.stream);
                let bytes = self.reader.cache.get(&key)?;
                (bytes.len() == block.length() as usize).then(|| part(&bytes, &block, span))
            })?;
            segments.push(segment);
            at = block.end();
        }
        Some(())
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

    /// Hands over the parts of `span` as they become ready.
    pub(super) async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), Unread> {
        let panicked = |_| Unread { at: span.offset, cause: Failure::Panicked };
        let mut tasks = JoinSet::new();
        let mut at = span.offset;
        let mut blocks = 0;
        while at < span.end() {
            let group = self.group(span, at, &mut blocks).await?;
            let start = at;
            at = group.end;
            if group.is_zeros {
                part(start, zeros(at - start));
            } else if start == span.offset && at == span.end() {
                part(start, self.segment(group, span).await?);
            } else {
                // No more side by side than keep the decoders busy: other clients' blocks
                // come between them.
                while tasks.len() >= GROUPS_AT_ONCE {
                    if let Some(done) = tasks.join_next().await {
                        let (offset, segment) = done.map_err(panicked)?;
                        part(offset, segment?);
                    }
                }
                let this = self.clone();
                tasks.spawn(async move { (start, this.segment(group, span).await) });
            }
        }
        while let Some(done) = tasks.join_next().await {
            let (offset, segment) = done.map_err(panicked)?;
            part(offset, segment?);
        }
        Ok(())
    }

    /// What is read together from `at` on: a run of zeros, a block, or some small blocks.
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
            // An archive may have millions of tiny blocks; others want to run, too.
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

    /// What `span` asks for of a group's blocks, waiting for them.
    async fn segment(&self, group: Group, span: Span) -> Result<Segment, Unread> {
        let read = async |block: Block| {
            let bytes = self.block(block).await;
            bytes.map_err(|cause| Unread { at: block.start().max(span.offset), cause })
        };
        if let [block] = group.blocks.as_slice() {
            return Ok(part(&read(*block).await?, block, span));
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

/// Where `block` and `span` overlap, from the block's start, in bytes.
fn overlap(block: &Block, span: Span) -> (u32, u32) {
    let start = span.offset.max(block.start()) - block.start();
    let end = span.end().min(block.end()) - block.start();
    // Both lie within a block, whose length has 32 bits.
    let within = |position| u32::try_from(position).unwrap_or(u32::MAX);
    (within(start), within(end))
}

fn zero_part(block: &Block, span: Span) -> Option<Segment> {
    let (start, end) = overlap(block, span);
    block.is_zeros().then(|| Segment::Zeros(end - start))
}

/// Zeros within a read, whose length has 32 bits.
fn zeros(length: u64) -> Segment {
    Segment::Zeros(u32::try_from(length).unwrap_or(u32::MAX))
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
