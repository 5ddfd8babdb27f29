//! What the index alone tells of a stream: where it is zeros, and where it differs from
//! another archive's. No block is read for it.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use super::index::{Content, Page};
use super::pages::PageId;
use super::{Block, Error, Snapshot, StreamKind};
use crate::storage::FileId;

/// Borders between runs are moved to multiples of this, in bytes, in the direction in
/// which nothing becomes untrue. Clients think in sectors, blocks don't.
const ALIGNMENT: u64 = 512;

/// Index pages of the archive that one question may visit: some 2 GiB of a stream of usual
/// blocks. Whoever wants more asks again from where the answer ended: no question may keep a
/// decoder from others for more than a few milliseconds.
const MAX_PAGES: usize = 8;

/// Index pages that one question may read from files, of the archive, its ancestors and what
/// it is compared with.
const MAX_PAGES_READ: u32 = 8;

/// Pairs of blocks that one question may compare.
const MAX_BLOCKS_COMPARED: usize = 2 * 4096;

/// A part of a stream of which something is so, or isn't.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its length in bytes; never zero.
    pub length: u64,
    /// Whether it is so.
    pub is_so: bool,
}

/// An archive that streams are compared with: one of a snapshot's own, by its place in
/// the chain.
#[derive(Debug, Clone)]
pub struct Reference {
    snapshot: Arc<Snapshot>,
    archive: usize,
}

impl Snapshot {
    /// What streams can be compared with by way of this snapshot: the archive itself
    /// first, then its ancestors in the order of [`Snapshot::parents`].
    pub fn references(self: &Arc<Self>) -> Vec<Reference> {
        (0..self.chain.len())
            .map(|archive| Reference { snapshot: Arc::clone(self), archive })
            .collect()
    }

    /// Where `range` of a stream is known to be zeros: at least one run and at most
    /// `most`, from its start on. They may end before the range does. Zeros that are
    /// stored as anything else may be reported as not zeros.
    ///
    /// # Errors
    /// An index page can't be read, or no block covers a part of the range.
    pub fn zeros(
        &self,
        stream: StreamKind,
        range: Range<u64>,
        most: usize,
    ) -> Result<Vec<Run>, Error> {
        let mut runs = Runs::new(range, most, Careful::SayNo);
        let read = PagesRead::default();
        self.walk(stream, &mut runs, &read, |block, runs| {
            Ok(runs.push(block.end(), block.is_zeros()))
        })?;
        Ok(runs.finish())
    }

    /// Where `range` of a stream differs from the same range of the same stream of
    /// `reference`; as for [`Snapshot::zeros`]. What can't be known to be the same, as
    /// where blocks have other borders or no hash, is reported as changed.
    ///
    /// # Errors
    /// As for [`Snapshot::zeros`], in either archive.
    pub fn changed(
        &self,
        stream: StreamKind,
        range: Range<u64>,
        most: usize,
        reference: &Reference,
    ) -> Result<Vec<Run>, Error> {
        let mut runs = Runs::new(range, most, Careful::SayYes);
        let mut compared = 0;
        let read = PagesRead::default();
        self.walk(stream, &mut runs, &read, |block, runs| {
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
                let is_enough = compared >= MAX_BLOCKS_COMPARED || read.is_enough();
                if !runs.push(at, changed) || is_enough {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(runs.finish())
    }

    /// Shows `visit` the blocks from where `runs` begins until it has seen enough.
    fn walk(
        &self,
        stream: StreamKind,
        runs: &mut Runs,
        read: &PagesRead,
        mut visit: impl FnMut(&Block, &mut Runs) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        for _ in 0..MAX_PAGES {
            let start = runs.at;
            if let Some(id) = self.page_covering(0, stream, start) {
                let page = read.page(self, id)?;
                while runs.at < runs.range.end
                    && let Some(located) = page.block_at(runs.at)
                {
                    let page = |id| Ok(read.page(self, id)?);
                    let block = self.expect_page(self.follow(id, located, runs.at, page))?;
                    if !visit(&block, runs)? || read.is_enough() {
                        return Ok(());
                    }
                }
            }
            if runs.at >= runs.range.end {
                return Ok(());
            }
            // Where this page ends the next one has to go on.
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
    fn is_same(&self, block: &Block, reference: &Reference, other: &Block) -> bool {
        let theirs = &reference.snapshot;
        match (block.is_zeros(), other.is_zeros()) {
            (true, true) => return true,
            // Where one of the two is zeros, a parent's block in the other is looked at closely.
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
        // The same block of the same file, as where both are thin over it.
        let is_stored = matches!(block.located.entry.content, Content::Stored { .. });
        is_stored && block.located == other.located && {
            let is_same_archive =
                std::ptr::eq(self, Arc::as_ptr(theirs)) && block.archive == other.archive;
            let files = self.chain.get(block.archive).zip(theirs.chain.get(other.archive));
            is_same_archive || files.is_some_and(|(ours, theirs)| ours.has_bytes_of(theirs))
        }
    }

    /// Returns true if a block is left to a parent by hash, and the hash is that of zeros.
    fn is_zero_reference(&self, block: &Block) -> bool {
        !block.is_undecided
            && self.zeros.are_in_parent(&block.located.entry, block.decoded_length())
    }
}

impl Reference {
    /// Which file the archive is; `None` if it is none.
    pub fn file_id(&self) -> Option<FileId> {
        self.snapshot.chain.get(self.archive)?.storage().file_id()
    }

    /// The block of the reference that covers byte `at`; `None` if none does.
    fn block_at(
        &self,
        stream: StreamKind,
        at: u64,
        read: &PagesRead,
    ) -> Result<Option<Block>, Error> {
        let snapshot = &self.snapshot;
        let page = |id| Ok(read.page(snapshot, id)?);
        match snapshot.expect_page(snapshot.resolve(self.archive, stream, at, page)) {
            Ok(block) => Ok(Some(block)),
            Err(Error { problem, .. }) if problem.label() == "uncovered" => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Counter of the index pages that a question has read from files.
#[derive(Debug, Default)]
struct PagesRead(Cell<u32>);

impl PagesRead {
    fn page(&self, snapshot: &Snapshot, id: PageId) -> Result<Arc<Page>, Error> {
        if let Some(page) = snapshot.pages.get(snapshot.id, id) {
            return Ok(page);
        }
        self.0.set(self.0.get() + 1);
        snapshot.page(id)
    }

    fn is_enough(&self) -> bool {
        self.0.get() >= MAX_PAGES_READ
    }
}

/// Which answer is never wrong, and may therefore spread to aligned borders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Careful {
    SayYes,
    SayNo,
}

/// Runs in the making.
#[derive(Debug)]
struct Runs {
    range: Range<u64>,
    most: usize,
    careful: bool,
    /// Up to where blocks have been seen.
    at: u64,
    /// What the last blocks had in common: where they begin, and the answer. It ends at
    /// `at`.
    pending: Option<(u64, bool)>,
    /// Up to where runs have been made.
    made: u64,
    runs: Vec<Run>,
}

impl Runs {
    fn new(range: Range<u64>, most: usize, careful: Careful) -> Self {
        let careful = careful == Careful::SayYes;
        let (at, made) = (range.start, range.start);
        Self { range, most: most.max(1), careful, at, pending: None, made, runs: Vec::new() }
    }

    /// Adds what is so, or isn't, up to `end`. `false` if there is no room for more.
    fn push(&mut self, end: u64, is_so: bool) -> bool {
        let has_room = match self.pending {
            Some((_, pending)) if pending == is_so => true,
            Some((start, pending)) => {
                let has_room = self.settle(start, self.at, pending);
                // What comes behind runs that were left out can't be told any more.
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
            self.settle(start, self.at, is_so);
        }
        self.runs
    }

    /// Makes runs of what is so, or isn't, from `start` to `end`. `false` if there is no
    /// room for more.
    fn settle(&mut self, start: u64, end: u64, is_so: bool) -> bool {
        if is_so == self.careful {
            return self.extend(end, is_so);
        }
        // The bold answer shrinks to aligned borders, or to those of the question.
        let bold_start =
            if start == self.range.start { start } else { start.next_multiple_of(ALIGNMENT) };
        let bold_end = if end == self.range.end { end } else { end - end % ALIGNMENT };
        if bold_start >= bold_end {
            return self.extend(end, self.careful);
        }
        self.extend(bold_start, self.careful)
            && self.extend(bold_end, is_so)
            && self.extend(end, self.careful)
    }

    fn extend(&mut self, end: u64, is_so: bool) -> bool {
        let Some(length) = end.checked_sub(self.made).filter(|&length| length > 0) else {
            return true;
        };
        let is_full = self.runs.len() == self.most;
        match self.runs.last_mut() {
            Some(last) if last.is_so == is_so => last.length += length,
            _ if is_full => return false,
            _ => self.runs.push(Run { length, is_so }),
        }
        self.made = end;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(careful: Careful, most: usize, blocks: &[(u64, bool)]) -> Vec<(u64, bool)> {
        let mut runs = Runs::new(100..10_000, most, careful);
        for (end, is_so) in blocks {
            if !runs.push(*end, *is_so) {
                break;
            }
        }
        runs.finish().iter().map(|run| (run.length, run.is_so)).collect()
    }

    #[test]
    fn neighbours_of_a_kind_are_one_run() {
        let blocks = [(612, true), (1124, true), (2148, false), (20_000, false)];
        // From 100 to 1124: the borders of the question may stay, 1124 becomes 1024.
        assert_eq!(runs(Careful::SayNo, 9, &blocks), [(924, true), (8976, false)]);
    }

    #[test]
    fn borders_move_to_where_nothing_becomes_untrue() {
        let blocks = [(1000, false), (3000, true), (20_000, false)];
        assert_eq!(runs(Careful::SayNo, 9, &blocks), [(924, false), (1536, true), (7440, false)]);
        assert_eq!(runs(Careful::SayYes, 9, &blocks), [(412, false), (2560, true), (6928, false)]);
        // A run without two borders disappears if it must shrink, and stays if it may grow.
        let small = [(1000, false), (1010, true), (20_000, false)];
        assert_eq!(runs(Careful::SayNo, 9, &small), [(9900, false)]);
        assert_eq!(runs(Careful::SayYes, 9, &small), [(412, false), (512, true), (8976, false)]);
    }

    #[test]
    fn no_more_runs_than_asked_for() {
        let blocks = [(1024, false), (2048, true), (4096, false), (20_000, true)];
        assert_eq!(runs(Careful::SayNo, 1, &blocks), [(924, false)]);
        assert_eq!(runs(Careful::SayNo, 2, &blocks), [(924, false), (1024, true)]);
        assert_eq!(runs(Careful::SayNo, 4, &blocks).len(), 4);
    }
}
