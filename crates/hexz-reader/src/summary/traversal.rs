//! Traversal of an archive's index pages.

use super::copies::DistinctCopies;
use super::{ChainMember, StoredTotals, StreamSummary};
use crate::archive::Archive;
use crate::block_read::ReadContext;
use crate::error::Error;
use crate::header::Extent;
use crate::index_page::{self, Content, LocatedBlock};
use crate::page_cache::PageId;
use crate::parent_index::ParentBlock;
use crate::{Snapshot, StreamKind};

/// Maximum number of faults that are listed; further ones are only counted.
const MAX_FAULTS: usize = 100;

/// Totals collected while traversing the index pages.
pub(super) struct IndexTraversal<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) holders: Vec<ChainMember>,
    pub(super) copies: DistinctCopies,
    pub(super) stored: StoredTotals,
    pub(super) faults: FaultList,
}

impl IndexTraversal<'_> {
    pub(super) fn summarize_stream(&mut self, own: &Archive, kind: StreamKind) -> StreamSummary {
        let index = own.stream(kind);
        let mut stream = StreamSummary {
            size: index.size,
            pages: index.pages.len() as u64,
            page_bytes: index.pages.iter().map(|page| u64::from(page.place.length)).sum(),
            ..StreamSummary::default()
        };
        let first = index.pages.first().map_or(index.size, |page| page.start_logical);
        if first > 0 {
            stream.unreadable.bytes += first;
            self.faults.add(own.uncovered_error(kind, 0));
        }
        // Not a fault: a converted tar archive ends early, which a remark reports.
        stream.unreadable.bytes += index.size.saturating_sub(index.end.max(first));
        for (number, place) in index.pages.iter().enumerate() {
            match own.load_page_and_bytes(kind, number, &self.snapshot.zeros) {
                Ok((page, bytes)) => {
                    let id = PageId { archive: 0, stream: kind, page: number };
                    let places = index_page::places(&bytes, own.entry_form());
                    for (block, place) in page.blocks().zip(places) {
                        self.count_block(&mut stream, id, block, place);
                    }
                }
                Err(error) => {
                    stream.unreadable.blocks += u64::from(place.block_count(own.entry_form()));
                    stream.unreadable.bytes += index.page_end(number) - place.start_logical;
                    self.faults.add(error);
                }
            }
        }
        stream
    }

    /// Counts a block. `place` is the location recorded in the index, even for blocks known to be
    /// zeros.
    fn count_block(
        &mut self,
        stream: &mut StreamSummary,
        id: PageId,
        block: LocatedBlock,
        place: Extent,
    ) {
        let length = block.length;
        stream.lengths.add(length);
        let is_stored = place.length > 0 && place.offset != index_page::IN_PARENT;
        match block.entry.content {
            Content::Stored { .. } => {
                stream.stored.add(length);
                self.count_source(0, length);
            }
            Content::Zeros => {
                stream.zeros.add(length);
                if is_stored {
                    stream.stored_zeros.add(length);
                }
            }
            Content::Contradiction => stream.contradictory.add(length),
            Content::InParent => self.count_reference(stream, id, block),
        }
        if is_stored {
            self.stored.blocks += 1;
            self.stored.bytes += u64::from(length);
            self.stored.undeduplicated_bytes += u64::from(place.length);
            self.copies.add(place);
        }
    }

    /// Counts a block that is a reference, by the ancestors' blocks that it means: one by hash, or
    /// all that cover its range by offset.
    fn count_reference(&mut self, stream: &mut StreamSummary, id: PageId, located: LocatedBlock) {
        let (mut is_zeros, mut is_ambiguous) = (true, false);
        let mut at = located.start;
        while at < located.end() {
            match self.source_at(id, located, at) {
                Ok((end, source)) => {
                    match source {
                        BlockSource::Zeros => {}
                        BlockSource::Archive(archive) => {
                            is_zeros = false;
                            // Not longer than a block, whose length fits 32 bits.
                            self.count_source(archive, u32::try_from(end - at).unwrap_or(u32::MAX));
                        }
                        BlockSource::Ambiguous => is_ambiguous = true,
                    }
                    at = end;
                }
                Err(error) => {
                    stream.unresolvable.add(located.length);
                    // Missing parents are reported once for all their blocks.
                    let is_reported = error.is_unresolvable() && stream.unresolvable.blocks > 1;
                    if !is_reported {
                        self.faults.add(error);
                    }
                    return;
                }
            }
        }
        let kind = match (is_ambiguous, is_zeros) {
            (true, _) => &mut stream.ambiguous,
            (false, true) => &mut stream.zeros,
            (false, false) => &mut stream.in_parents,
        };
        kind.add(located.length);
    }

    /// Returns the archive that has the bytes of a reference from `at` on, and their end offset.
    fn source_at(
        &self,
        id: PageId,
        located: LocatedBlock,
        at: u64,
    ) -> Result<(u64, BlockSource), Error> {
        let block = self.snapshot.follow_with_end(id, located, at).map_err(|(error, _)| error)?;
        let (archive, entry) = match block.located.entry.content {
            Content::InParent if block.is_ambiguous => {
                return Ok((block.end(), BlockSource::Ambiguous));
            }
            Content::InParent => {
                let ParentBlock { archive, block } =
                    self.snapshot.load_from_parents(&block, ReadContext::UNLIMITED)?;
                (archive, block.entry)
            }
            _ => (block.archive, block.located.entry),
        };
        let is_zeros = entry.content == Content::Zeros;
        Ok((block.end(), if is_zeros { BlockSource::Zeros } else { BlockSource::Archive(archive) }))
    }

    fn count_source(&mut self, archive: usize, length: u32) {
        if let Some(holder) = self.holders.get_mut(archive) {
            holder.blocks += 1;
            holder.bytes += u64::from(length);
        }
    }
}

/// Source of a part of a block.
enum BlockSource {
    /// No archive: the bytes are zeros.
    Zeros,
    /// This archive of the chain.
    Archive(usize),
    /// One archive by offset, another by hash.
    Ambiguous,
}

/// Faults found while traversing the index pages.
#[derive(Default)]
pub(super) struct FaultList {
    pub(super) listed: Vec<Error>,
    pub(super) omitted: u64,
}

impl FaultList {
    pub(super) fn add(&mut self, error: Error) {
        if self.listed.len() < MAX_FAULTS {
            self.listed.push(error);
        } else {
            self.omitted += 1;
        }
    }
}
