//! Resolution of references to parents: finds the bytes of blocks that an archive doesn't store
//! itself.
//!
//! Hexz writes two kinds of references. A reference *by hash* means the block with that BLAKE3
//! hash, in whichever ancestor stores it. A reference *by offset* means the parent's bytes at the
//! same offset of the same stream, regardless of the parent's block boundaries.
//!
//! - Layout D has references by hash only, layout A (without hashes) by offset only.
//! - Layouts B and C have both, and the entry doesn't say which kind it is. `Writer(parent=…)`
//!   writes references by hash. `commit --thin` and `merge_overlay(thin=True)` write references by
//!   offset; the hash is that of the base's block that *covers* the start, or is missing if that
//!   block is zeros.
//!
//! So a reference may be by offset if its hash is that of a covering block, and is by hash
//! otherwise. If both are possible, both usually mean the same bytes. If they don't, and the
//! operator hasn't decided, reading the block is an error.
//!
//! This module translates a block that is referenced by offset into the ancestors' blocks that
//! cover its range, each with its own hash. Other modules never see references by offset.

use std::collections::VecDeque;
use std::sync::Arc;

use super::archive::Archive;
use super::block_read::{Missing, ReadContext};
use super::error::{Ambiguity, Error, ErrorKind};
use super::index_page::{Content, IndexEntry, IndexPage, LocatedBlock};
use super::page_cache::PageId;
use super::parent_index::ParentBlock;
use super::reference_choice::ReferenceMode;
use super::{Block, BlockHash, Snapshot, StreamKind};

/// Maximum number of ambiguous references that are followed one after another to read one block.
/// Each needs memory for a block and a hash of it.
const MAX_AMBIGUOUS_DEPTH: u32 = 8;
/// Maximum length of a block of zeros that replaces a range that no block covers, in bytes.
const MAX_UNCOVERED_BLOCK: u32 = 1 << 20;

/// Reason why a block couldn't be located.
#[derive(Debug)]
pub(super) enum LocateError {
    /// Something isn't in memory, and loading it isn't allowed.
    NotInMemory(Missing),
    /// A page can't be read or is damaged, or no block covers the requested byte.
    Failed {
        error: Error,
        /// End offset of the affected range of the stream, in bytes. Bytes behind it may be
        /// readable.
        end: u64,
    },
}

impl LocateError {
    /// Limits the affected range of a failure to `end`.
    fn limit_to(self, end: u64) -> Self {
        match self {
            Self::Failed { error, end: known } => Self::Failed { error, end: known.min(end) },
            Self::NotInMemory(missing) => Self::NotInMemory(missing),
        }
    }
}

impl From<Missing> for LocateError {
    fn from(missing: Missing) -> Self {
        Self::NotInMemory(missing)
    }
}

impl From<Error> for LocateError {
    fn from(error: Error) -> Self {
        Self::Failed { error, end: u64::MAX }
    }
}

/// Meaning of a reference to a parent.
#[derive(Clone, Copy)]
enum ReferenceTarget {
    /// The block with that hash, which has yet to be looked up.
    Hash,
    /// The bytes at the same offset of this archive of the chain.
    Offset(usize),
    /// This block of an ancestor, which has the same range and hash.
    Block(usize, LocatedBlock),
    /// By offset or by hash; only reading the bytes can tell.
    Ambiguous,
}

impl Snapshot {
    /// Finds the block that covers byte `at` of a stream of an archive of the chain. Follows
    /// references by offset.
    pub(super) fn resolve(
        &self,
        archive: usize,
        stream: StreamKind,
        at: u64,
        page: impl Fn(PageId) -> Result<Arc<IndexPage>, LocateError>,
    ) -> Result<Block, LocateError> {
        let (page_id, own) = match self.page_covering(archive, stream, at) {
            Some(id) => (id, page(id)?),
            None => return Ok(self.uncovered_block(archive, stream, at)?),
        };
        match own.block_at(at) {
            Some(located) => self.follow(page_id, located, at, page),
            None => Ok(self.uncovered_block(archive, stream, at)?),
        }
    }

    /// Resolves the part around byte `at` of a block on the page `id`. Follows references by
    /// offset.
    pub(super) fn follow(
        &self,
        id: PageId,
        located: LocatedBlock,
        at: u64,
        page: impl Fn(PageId) -> Result<Arc<IndexPage>, LocateError>,
    ) -> Result<Block, LocateError> {
        let mut block = Block::whole(id.archive, id.stream, located);
        // The chain has no cycles, so this loop ends.
        while block.located.entry.content == Content::InParent {
            // Bytes behind the reference that is followed may be elsewhere.
            let limit = block.end();
            let parent = match self.target(&block, &page).map_err(|error| error.limit_to(limit))? {
                ReferenceTarget::Hash => break,
                ReferenceTarget::Ambiguous => {
                    block.is_ambiguous = true;
                    break;
                }
                ReferenceTarget::Block(archive, located) => {
                    block = block.intersect(archive, located);
                    break;
                }
                ReferenceTarget::Offset(parent) => parent,
            };
            let located = match self.page_covering(parent, id.stream, at) {
                Some(id) => {
                    let end = self.page_end(id).min(limit);
                    page(id).map_err(|error| error.limit_to(end))?.block_at(at)
                }
                None => None,
            };
            block = match located {
                Some(located) => block.intersect(parent, located),
                None => {
                    let end = self.next_page_start(parent, id.stream, at).min(limit);
                    let zeros = self.uncovered_block(parent, id.stream, at);
                    let zeros = zeros.map_err(|error| LocateError::Failed { error, end })?;
                    block.intersect(parent, zeros.located)
                }
            };
        }
        Ok(block)
    }

    /// Returns the end offset of the page `id` in its stream, in bytes.
    fn page_end(&self, id: PageId) -> u64 {
        self.chain
            .get(id.archive)
            .map_or(u64::MAX, |archive| archive.stream(id.stream).page_end(id.page))
    }

    /// Returns the start offset of the first page behind `at` in an archive's stream, or `u64::MAX`
    /// if there is none.
    fn next_page_start(&self, archive: usize, stream: StreamKind, at: u64) -> u64 {
        let pages = self.chain.get(archive).map_or(&[][..], |it| &it.stream(stream).pages);
        let next = pages.partition_point(|page| page.start_logical <= at);
        pages.get(next).map_or(u64::MAX, |page| page.start_logical)
    }

    /// Determines the meaning of a reference to a parent, from the archives or by the operator's
    /// decision.
    fn target(
        &self,
        block: &Block,
        page: &impl Fn(PageId) -> Result<Arc<IndexPage>, LocateError>,
    ) -> Result<ReferenceTarget, LocateError> {
        let target = self.unambiguous_target(block, page)?;
        let ReferenceTarget::Ambiguous = target else { return Ok(target) };
        match self.archive(block.archive)?.reference_mode {
            Some(ReferenceMode::Offset) => Ok(ReferenceTarget::Offset(self.single_parent(block)?)),
            Some(ReferenceMode::Hash) => Ok(ReferenceTarget::Hash),
            None => Ok(ReferenceTarget::Ambiguous),
        }
    }

    /// Determines the meaning of a reference to a parent as far as the archives reveal it.
    fn unambiguous_target(
        &self,
        block: &Block,
        page: &impl Fn(PageId) -> Result<Arc<IndexPage>, LocateError>,
    ) -> Result<ReferenceTarget, LocateError> {
        let child = self.archive(block.archive)?;
        if child.layout.references_by_hash() {
            return Ok(ReferenceTarget::Hash);
        }
        let LocatedBlock { start, length, entry: IndexEntry { hash, .. }, .. } = block.located;
        if !hash.is_present() {
            return Ok(ReferenceTarget::Offset(self.single_parent(block)?));
        }
        // No version writes references by offset into an archive with several parents.
        if child.header.parent_paths.len() != 1 {
            return Ok(ReferenceTarget::Hash);
        }
        let mut is_covered = false;
        for ancestor in self.ancestors(block.archive) {
            let covering = match self.page_covering(ancestor, block.stream, start) {
                Some(id) => page(id)?.block_at(start),
                None => None,
            };
            let Some(covering) = covering.filter(|covering| covering.entry.hash == hash) else {
                continue;
            };
            let is_same_range = (covering.start, covering.length) == (start, length);
            if covering.entry.content == Content::InParent {
                if is_same_range && Some(&Some(ancestor)) == child.parents.first() {
                    // By offset, this reference means whatever the parent's reference means. If the
                    // parent's reference can't be by hash, this one can't either.
                    let parents = Block::whole(ancestor, block.stream, covering);
                    return Ok(match self.unambiguous_target(&parents, page)? {
                        ReferenceTarget::Offset(_) => ReferenceTarget::Offset(ancestor),
                        target => target,
                    });
                }
                is_covered = true;
            } else if is_same_range && !is_covered {
                return Ok(ReferenceTarget::Block(ancestor, covering));
            } else if covering.length != length {
                // The block with that hash has another length, so the reference isn't by hash.
                return Ok(ReferenceTarget::Offset(self.single_parent(block)?));
            } else {
                is_covered = true;
            }
        }
        Ok(if is_covered { ReferenceTarget::Ambiguous } else { ReferenceTarget::Hash })
    }

    /// Reads a block that may be referenced by offset or by hash. Returns the bytes if both
    /// interpretations agree, or if only one of them is possible.
    ///
    /// # Errors
    /// The two interpretations mean different bytes, or the parent can't be read.
    pub(super) fn read_ambiguous(
        &self,
        block: &Block,
        reading: ReadContext,
    ) -> Result<Vec<u8>, Error> {
        let LocatedBlock { start, length, entry: IndexEntry { hash, .. }, .. } = block.located;
        let file = &self.archive(block.archive)?.file;
        let parent = self.single_parent(block)?;
        let depth = reading.depth + 1;
        if depth > MAX_AMBIGUOUS_DEPTH {
            return Err(file.error(ErrorKind::TooLarge {
                what: "the number of nested ambiguous references",
                got: depth.into(),
                limit: MAX_AMBIGUOUS_DEPTH.into(),
            }));
        }
        let mut bytes = vec![0; length as usize];
        match self.read_from(
            parent,
            block.stream,
            &mut bytes,
            start,
            ReadContext { depth, ..reading },
        ) {
            Ok(()) => {}
            // No block covers that offset of the parent, so the reference must be by hash.
            Err(error) if error.is_uncovered() => {
                let ParentBlock { archive, block } = self.load_from_parents(block, reading)?;
                return self.archive(archive)?.read_block(&block);
            }
            Err(error) => return Err(error),
        }
        let by_offset = BlockHash(*blake3::hash(&bytes).as_bytes());
        if by_offset == hash {
            return Ok(bytes);
        }
        match self.load_from_parents(block, reading) {
            Ok(by_hash) => Err(file.error(ErrorKind::Ambiguous(Box::new(Ambiguity {
                stream: block.stream,
                at: start,
                length,
                hash,
                parent: self.archive(parent)?.file.path.to_path_buf(),
                by_offset,
                holder: self.archive(by_hash.archive)?.file.path.to_path_buf(),
                holder_at: by_hash.block.start,
            })))),
            // No archive has a block with that hash, so the reference must be by offset.
            Err(Error { kind: ErrorKind::Unresolvable { .. }, .. }) => Ok(bytes),
            Err(error) => Err(error),
        }
    }

    /// Returns the parent that a reference by offset reads from.
    fn single_parent(&self, block: &Block) -> Result<usize, Error> {
        let child = self.archive(block.archive)?;
        if let [Some(parent)] = child.parents.as_slice() {
            return Ok(*parent);
        }
        let (stream, at) = (block.stream, block.located.start);
        let parents = child.header.parent_paths.len();
        Err(child.file.error(ErrorKind::NoParentToRead { stream, at, parents }))
    }

    /// Iterates over all ancestors of an archive of the chain, nearest first.
    fn ancestors(&self, archive: usize) -> impl Iterator<Item = usize> {
        let parents_of = |archive: usize| {
            let parents = self.chain.get(archive).map(|archive| archive.parents.as_slice());
            parents.unwrap_or_default().iter().copied().flatten()
        };
        let mut queue: VecDeque<usize> = parents_of(archive).collect();
        let mut met = vec![false; self.chain.len()];
        std::iter::from_fn(move || {
            loop {
                let next = queue.pop_front()?;
                if let Some(met @ false) = met.get_mut(next) {
                    *met = true;
                    queue.extend(parents_of(next));
                    return Some(next);
                }
            }
        })
    }

    /// Returns a block of zeros that replaces a range that no block covers, if the operator allows
    /// that.
    ///
    /// # Errors
    /// The operator doesn't allow it, or `at` is beyond the end of the stream.
    pub(super) fn uncovered_block(
        &self,
        archive: usize,
        stream: StreamKind,
        at: u64,
    ) -> Result<Block, Error> {
        let file: &Archive = self.archive(archive)?;
        let index = file.stream(stream);
        let next = index.pages.partition_point(|page| page.start_logical <= at);
        let end = index.pages.get(next).map_or(index.size, |page| page.start_logical);
        if !file.zero_uncovered || at >= end {
            return Err(file.uncovered_error(stream, at));
        }
        let length =
            u32::try_from(end - at).unwrap_or(MAX_UNCOVERED_BLOCK).min(MAX_UNCOVERED_BLOCK);
        let entry = IndexEntry { content: Content::Zeros, hash: BlockHash::NONE };
        Ok(Block::whole(archive, stream, LocatedBlock { entry, number: 0, start: at, length }))
    }
}
