//! Adapts a stream of a snapshot to what the engine serves.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use bytesize::ByteSize;
use tokio::task::JoinSet;

use super::file_name;
use super::reader::{BlockKey, BlockReader, Failure};
use crate::nbd::wire::MAX_PAYLOAD;
use crate::nbd::wire::reply::{STATE_HOLE, STATE_ZERO};
use crate::nbd::{Export, Extent, Listing, ReadError, Segment, Span};
use crate::snapshot::{Block, Reference, Run, Snapshot, StreamKind};

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
struct Unread {
    at: u64,
    cause: Failure,
}

/// What a metadata context says of an export.
#[derive(Debug, Clone)]
enum Meaning {
    /// Where it is zeros.
    Allocation,
    /// Where it differs from another archive.
    Changed(Reference),
}

/// Set where `hexz:changed:NAME` and `qemu:dirty-bitmap:NAME` can't say that the bytes are
/// the same as those of NAME.
pub const STATE_CHANGED: u32 = 1;

/// One stream of a snapshot, as an export.
#[derive(Debug, Clone)]
pub struct SnapshotExport {
    name: String,
    description: String,
    stream: StreamKind,
    snapshot: Arc<Snapshot>,
    reader: Arc<BlockReader>,
    contexts: Vec<(String, Meaning)>,
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
        let contexts = vec![("base:allocation".to_owned(), Meaning::Allocation)];
        Self { name, description, stream, snapshot, reader, contexts }
    }

    pub(super) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// What LIST says of it.
    pub(super) fn listing(&self) -> Listing {
        Listing { name: self.name.clone(), description: self.description.clone() }
    }

    /// Lets clients ask what differs from `reference`, which they know as `name`. Of two
    /// references of one name the first is kept.
    #[must_use]
    pub fn comparable_with(mut self, name: &str, reference: &Reference) -> Self {
        for namespace in ["hexz:changed", "qemu:dirty-bitmap"] {
            let context = format!("{namespace}:{name}");
            if !self.contexts.iter().any(|(known, _)| *known == context) {
                self.contexts.push((context, Meaning::Changed(reference.clone())));
            }
        }
        self
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
    async fn read_blocks(
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

    /// Runs of the context at `position`, off the runtime's threads: index pages may have
    /// to be read.
    async fn runs(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<(u32, Vec<Run>), Failure> {
        let Some((_, meaning)) = self.contexts.get(position).cloned() else {
            return Ok((0, Vec::new()));
        };
        let (snapshot, stream) = (Arc::clone(&self.snapshot), self.stream);
        let range = offset..offset.saturating_add(length);
        self.reader
            .off_the_runtime(move || match meaning {
                Meaning::Allocation => {
                    snapshot.zeros(stream, range, most).map(|runs| (STATE_HOLE | STATE_ZERO, runs))
                }
                Meaning::Changed(reference) => snapshot
                    .changed(stream, range, most, &reference)
                    .map(|runs| (STATE_CHANGED, runs)),
            })
            .await
    }

    fn unreadable(&self, at: u64, cause: &Failure) -> ReadError {
        self.report(at, cause);
        ReadError::Unreadable(at)
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
        Some(segments)
    }

    async fn read(
        &self,
        span: Span,
        part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        let read = self.read_blocks(span, part).await;
        read.map_err(|Unread { at, cause }| self.unreadable(at, &cause))
    }

    async fn cache(&self, offset: u64, length: u64) -> Result<(), ReadError> {
        // As much as one read may ask for: nobody's request may push out all that others
        // have in the cache.
        let length = u32::try_from(length).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD);
        self.read(Span { offset, length }, |_, _| ()).await
    }

    fn contexts(&self) -> Vec<&str> {
        self.contexts.iter().map(|(name, _)| name.as_str()).collect()
    }

    async fn extents(
        &self,
        position: usize,
        offset: u64,
        length: u64,
        most: usize,
    ) -> Result<Vec<Extent>, ReadError> {
        match self.runs(position, offset, length, most).await {
            Ok((flags, runs)) => Ok(runs
                .into_iter()
                .map(|run| Extent { length: run.length, flags: if run.is_so { flags } else { 0 } })
                .collect()),
            Err(cause) => Err(self.unreadable(offset, &cause)),
        }
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

fn describe(snapshot: &Snapshot, stream: StreamKind) -> String {
    let size = ByteSize::b(snapshot.size(stream)).display().iec();
    let encrypted = if snapshot.is_encrypted() { ", encrypted" } else { "" };
    let mut parents = snapshot.parents().map(file_name);
    let thin = match (parents.next(), parents.count()) {
        (None, _) => String::new(),
        (Some(parent), 0) => format!(", thin over {parent}"),
        (Some(parent), more) => format!(", thin over {parent} and {more} more"),
    };
    format!("{stream} stream, {size}, {}{encrypted}{thin}", snapshot.compression())
}
