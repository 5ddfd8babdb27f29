//! Queries that the index alone answers: which ranges of a stream are zeros, and which differ from
//! another archive. No block is read.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use super::index_page::{Content, IndexPage};
use super::page_cache::PageId;
use super::{Block, Error, Snapshot, StreamKind};
use crate::storage::FileId;

/// Alignment of the borders between runs, in bytes. Clients work in sectors, but blocks may have
/// any length. A border moves in the direction that keeps the answer correct.
const ALIGNMENT: u64 = 512;

/// Maximum number of the archive's index pages that one query visits. The client continues from the
/// end of the answer. A query must not occupy a decoder for more than about a millisecond.
const MAX_PAGES: usize = 16;

/// Maximum number of blocks that one query visits: some 1 GiB of a stream with usual blocks.
const MAX_BLOCKS: usize = 4 * 4096;

/// Maximum number of index pages that one query reads from files: of the archive, its ancestors and
/// the reference.
const MAX_PAGES_READ: u32 = 8;

/// Maximum number of block pairs that one query compares.
const MAX_BLOCKS_COMPARED: usize = 4096;

/// A part of a stream that has the queried property throughout, or lacks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Length in bytes; never zero.
    pub length: u64,
    /// True if the part is zeros ([`Snapshot::zero_runs`]) or has changed
    /// ([`Snapshot::changed_runs`]).
    pub has_property: bool,
}

/// An archive that streams are compared with: a member of a snapshot's chain.
#[derive(Debug, Clone)]
pub struct DiffBase {
    snapshot: Arc<Snapshot>,
    archive: usize,
}

impl Snapshot {
    /// Returns the archives that this snapshot offers for comparison: the archive itself, then its
    /// ancestors in the order of [`Snapshot::parents`].
    pub fn diff_bases(self: &Arc<Self>) -> Vec<DiffBase> {
        (0..self.chain.len())
            .map(|archive| DiffBase { snapshot: Arc::clone(self), archive })
            .collect()
    }

    /// Finds the parts of `range` of a stream that are known to be zeros. Returns at least one run
    /// and at most `max_runs`, from the start of the range. The runs may end before the range does.
    /// Zeros stored as ordinary blocks may be reported as not zeros.
    ///
    /// # Errors
    /// An index page can't be read, or no block covers a part of the range.
    pub fn zero_runs(
        &self,
        stream: StreamKind,
        range: Range<u64>,
        max_runs: usize,
    ) -> Result<Vec<Run>, Error> {
        let mut runs = RunBuilder::new(range, max_runs, SafeAnswer::No);
        let read = PagesRead::default();
        self.visit_blocks(stream, &mut runs, &read, |block, runs| {
            Ok(runs.push(block.end(), block.is_zeros()))
        })?;
        Ok(runs.finish())
    }

    /// Finds the parts of `range` of a stream that differ from the same range of the same stream of
    /// `reference`. Returns runs as [`Snapshot::zero_runs`] does. Parts that can't be proven equal,
    /// such as blocks with different boundaries or without a hash, are reported as changed.
    ///
    /// # Errors
    /// As for [`Snapshot::zero_runs`], in either archive.
    pub fn changed_runs(
        &self,
        stream: StreamKind,
        range: Range<u64>,
        max_runs: usize,
        reference: &DiffBase,
    ) -> Result<Vec<Run>, Error> {
        let mut runs = RunBuilder::new(range, max_runs, SafeAnswer::Yes);
        let mut compared = 0;
        let read = PagesRead::default();
        self.visit_blocks(stream, &mut runs, &read, |block, runs| {
            let mut at = runs.at;
            while at < block.end().min(runs.range.end) {
                let (end, changed) = match reference.block_at(stream, at, &read)? {
                    Some(other) => {
                        (other.end().min(block.end()), !self.is_same(block, reference, &other))
                    }
                    None => (block.end(), true),
                };
                at = end;
                compared += 1;
                let is_enough = compared >= MAX_BLOCKS_COMPARED || read.is_exhausted();
                if !runs.push(at, changed) || is_enough {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(runs.finish())
    }

    /// Calls `visit` for the blocks from the start of `runs` on, until it returns false or a limit
    /// is reached.
    fn visit_blocks(
        &self,
        stream: StreamKind,
        runs: &mut RunBuilder,
        read: &PagesRead,
        mut visit: impl FnMut(&Block, &mut RunBuilder) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let mut blocks = 0;
        for _ in 0..MAX_PAGES {
            let start = runs.at;
            if let Some(id) = self.page_covering(0, stream, start) {
                let page = read.page(self, id)?;
                while runs.at < runs.range.end
                    && let Some(located) = page.block_at(runs.at)
                {
                    let page = |id| Ok(read.page(self, id)?);
                    let block = self.or_read_error(self.follow(id, located, runs.at, page))?;
                    blocks += 1;
                    if !visit(&block, runs)? || read.is_exhausted() || blocks >= MAX_BLOCKS {
                        return Ok(());
                    }
                }
            }
            if runs.at >= runs.range.end {
                return Ok(());
            }
            // The page doesn't cover the byte at which it should continue.
            if runs.at == start {
                let zeros = self.uncovered_block(0, stream, start)?;
                if !visit(&zeros, runs)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Returns true if two blocks are known to have the same bytes where they overlap.
    fn is_same(&self, block: &Block, reference: &DiffBase, other: &Block) -> bool {
        let theirs = &reference.snapshot;
        match (block.is_zeros(), other.is_zeros()) {
            (true, true) => return true,
            // If one block is zeros, it is worth hashing zeros to see if the other one is, too.
            (true, false) => return theirs.is_zero_reference(other),
            (false, true) => return self.is_zero_reference(block),
            (false, false) => {}
        }
        let range = |block: &Block| (block.decoded_start(), block.decoded_length());
        if range(block) != range(other) {
            return false;
        }
        if block.hash().is_some() && block.hash() == other.hash() {
            return true;
        }
        // The same stored block of the same file, for example if both archives are thin over it.
        let is_stored = matches!(block.located.entry.content, Content::Stored { .. });
        is_stored && block.located == other.located && {
            let is_same_archive =
                std::ptr::eq(self, Arc::as_ptr(theirs)) && block.archive == other.archive;
            let files = self.chain.get(block.archive).zip(theirs.chain.get(other.archive));
            is_same_archive || files.is_some_and(|(ours, theirs)| ours.has_bytes_of(theirs))
        }
    }

    /// Returns true if a block is a reference by hash, and the hash is that of zeros.
    fn is_zero_reference(&self, block: &Block) -> bool {
        !block.is_ambiguous
            && self.zeros.is_zeros_in_parent(&block.located.entry, block.decoded_length())
    }
}

impl DiffBase {
    /// Returns the identity of the archive's file; `None` if it isn't a file.
    pub fn file_id(&self) -> Option<FileId> {
        self.snapshot.chain.get(self.archive)?.file.storage.file_id()
    }

    /// Returns true if an archive of its chain is remote, so that queries may wait for a network.
    pub fn is_remote(&self) -> bool {
        self.snapshot.is_remote()
    }

    /// Returns the block of the reference that covers byte `at`; `None` if none does.
    fn block_at(
        &self,
        stream: StreamKind,
        at: u64,
        read: &PagesRead,
    ) -> Result<Option<Block>, Error> {
        let snapshot = &self.snapshot;
        let page = |id| Ok(read.page(snapshot, id)?);
        match snapshot.or_read_error(snapshot.resolve(self.archive, stream, at, page)) {
            Ok(block) => Ok(Some(block)),
            Err(error) if error.is_uncovered() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Number of index pages that a query has read from files.
#[derive(Debug, Default)]
struct PagesRead(Cell<u32>);

impl PagesRead {
    fn page(&self, snapshot: &Snapshot, id: PageId) -> Result<Arc<IndexPage>, Error> {
        if let Some(page) = snapshot.pages.get(snapshot.id, id) {
            return Ok(page);
        }
        self.0.set(self.0.get() + 1);
        snapshot.page(id)
    }

    fn is_exhausted(&self) -> bool {
        self.0.get() >= MAX_PAGES_READ
    }
}

/// The answer that is always correct, and may therefore extend to aligned borders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SafeAnswer {
    Yes,
    No,
}

/// Builder of the runs of an answer.
#[derive(Debug)]
struct RunBuilder {
    range: Range<u64>,
    max_runs: usize,
    safe_answer: bool,
    /// End offset of the blocks that have been visited.
    at: u64,
    /// Start offset and answer of the last blocks with the same answer, which end at `at`.
    pending: Option<(u64, bool)>,
    /// End offset of the runs that have been built.
    built_end: u64,
    runs: Vec<Run>,
}

impl RunBuilder {
    fn new(range: Range<u64>, max_runs: usize, safe_answer: SafeAnswer) -> Self {
        let safe_answer = safe_answer == SafeAnswer::Yes;
        let (at, built_end) = (range.start, range.start);
        Self {
            range,
            max_runs: max_runs.max(1),
            safe_answer,
            at,
            pending: None,
            built_end,
            runs: Vec::new(),
        }
    }

    /// Adds the answer for the bytes up to `end`. Returns false if there is no room for more runs.
    fn push(&mut self, end: u64, is_so: bool) -> bool {
        let has_room = match self.pending {
            Some((_, pending)) if pending == is_so => true,
            Some((start, pending)) => {
                let has_room = self.append_aligned(start, self.at, pending);
                // If runs were left out, later ones can't be appended.
                self.pending = has_room.then_some((self.at, is_so));
                has_room
            }
            None => {
                self.pending = Some((self.at, is_so));
                true
            }
        };
        self.at = end.min(self.range.end);
        has_room
    }

    fn finish(mut self) -> Vec<Run> {
        if let Some((start, is_so)) = self.pending {
            self.append_aligned(start, self.at, is_so);
        }
        self.runs
    }

    /// Appends runs for the answer from `start` to `end`. Returns false if there is no room for
    /// more runs.
    fn append_aligned(&mut self, start: u64, end: u64, is_so: bool) -> bool {
        if is_so == self.safe_answer {
            return self.extend(end, is_so);
        }
        // The answer that isn't always correct shrinks to aligned borders, or to those of the
        // query.
        let bold_start =
            if start == self.range.start { start } else { start.next_multiple_of(ALIGNMENT) };
        let bold_end = if end == self.range.end { end } else { end - end % ALIGNMENT };
        if bold_start >= bold_end {
            return self.extend(end, self.safe_answer);
        }
        self.extend(bold_start, self.safe_answer)
            && self.extend(bold_end, is_so)
            && self.extend(end, self.safe_answer)
    }

    fn extend(&mut self, end: u64, is_so: bool) -> bool {
        let Some(length) = end.checked_sub(self.built_end).filter(|&length| length > 0) else {
            return true;
        };
        let is_full = self.runs.len() == self.max_runs;
        match self.runs.last_mut() {
            Some(last) if last.has_property == is_so => last.length += length,
            _ if is_full => return false,
            _ => self.runs.push(Run { length, has_property: is_so }),
        }
        self.built_end = end;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(safe_answer: SafeAnswer, max_runs: usize, blocks: &[(u64, bool)]) -> Vec<(u64, bool)> {
        let mut runs = RunBuilder::new(100..10_000, max_runs, safe_answer);
        for (end, is_so) in blocks {
            if !runs.push(*end, *is_so) {
                break;
            }
        }
        runs.finish().iter().map(|run| (run.length, run.has_property)).collect()
    }

    #[test]
    fn adjacent_equal_blocks_are_merged() {
        let blocks = [(612, true), (1124, true), (2148, false), (20_000, false)];
        // From 100 to 1124: the start of the query needn't be aligned, but 1124 becomes 1024.
        assert_eq!(runs(SafeAnswer::No, 9, &blocks), [(924, true), (8976, false)]);
    }

    #[test]
    fn borders_are_aligned_without_false_answers() {
        let blocks = [(1000, false), (3000, true), (20_000, false)];
        assert_eq!(runs(SafeAnswer::No, 9, &blocks), [(924, false), (1536, true), (7440, false)]);
        assert_eq!(runs(SafeAnswer::Yes, 9, &blocks), [(412, false), (2560, true), (6928, false)]);
        // A run without an aligned part disappears if it must shrink, and remains if it may grow.
        let small = [(1000, false), (1010, true), (20_000, false)];
        assert_eq!(runs(SafeAnswer::No, 9, &small), [(9900, false)]);
        assert_eq!(runs(SafeAnswer::Yes, 9, &small), [(412, false), (512, true), (8976, false)]);
    }

    #[test]
    fn number_of_runs_is_limited() {
        let blocks = [(1024, false), (2048, true), (4096, false), (20_000, true)];
        assert_eq!(runs(SafeAnswer::No, 1, &blocks), [(924, false)]);
        assert_eq!(runs(SafeAnswer::No, 2, &blocks), [(924, false), (1024, true)]);
        assert_eq!(runs(SafeAnswer::No, 4, &blocks).len(), 4);
    }
}
