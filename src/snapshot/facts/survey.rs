//! Going through an archive's index pages.

use super::copies::Copies;
use super::{Holder, Stored, Stream};
use crate::snapshot::archive::Archive;
use crate::snapshot::error::{Error, Problem};
use crate::snapshot::header::Extent;
use crate::snapshot::index::{self, Content, Located};
use crate::snapshot::parents::InParent;
use crate::snapshot::{Block, Snapshot, StreamKind};

/// Faults that are kept; more are only counted.
const MAX_FAULTS: usize = 100;

/// Goes through the index pages.
pub(super) struct Survey<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) holders: Vec<Holder>,
    pub(super) copies: Copies,
    pub(super) stored: Stored,
    pub(super) faults: Faults,
}

impl Survey<'_> {
    pub(super) fn stream(&mut self, own: &Archive, kind: StreamKind) -> Stream {
        let index = own.stream(kind);
        let mut stream = Stream {
            size: index.size,
            pages: index.pages.len() as u64,
            page_bytes: index.pages.iter().map(|page| u64::from(page.place.length)).sum(),
            ..Stream::default()
        };
        let first = index.pages.first().map_or(index.size, |page| page.start_logical);
        if first > 0 {
            stream.unknown.bytes += first;
            self.faults.add(self.snapshot.uncovered(kind, 0));
        }
        for (number, place) in index.pages.iter().enumerate() {
            match own.load_page_and_bytes(kind, number, &self.snapshot.zeros) {
                Ok((page, bytes)) => {
                    for (block, place) in page.blocks().zip(index::places(&bytes)) {
                        self.block(&mut stream, Block { stream: kind, located: block }, place);
                    }
                }
                Err(error) => {
                    stream.unknown.blocks += u64::from(place.block_count());
                    stream.unknown.bytes += index.page_end(number) - place.start_logical;
                    self.faults.add(error);
                }
            }
        }
        stream
    }

    /// `place` is what the index says, also where the block is known to be zeros.
    fn block(&mut self, stream: &mut Stream, block: Block, place: Extent) {
        let length = block.length();
        stream.lengths.add(length);
        let is_stored = place.length > 0 && place.offset != index::IN_PARENT;
        match block.located.entry.content {
            Content::Stored { .. } => {
                stream.stored.add(length);
                self.hold(0, length);
            }
            Content::Zeros => {
                stream.zeros.add(length);
                if is_stored {
                    stream.stored_zeros.add(length);
                }
            }
            Content::Contradiction => stream.contradictory.add(length),
            Content::InParent => self.inherited(stream, &block),
        }
        if is_stored {
            self.stored.blocks += 1;
            self.stored.bytes += u64::from(length);
            self.stored.unshared += u64::from(place.length);
            self.copies.add(place);
        }
    }

    fn inherited(&mut self, stream: &mut Stream, block: &Block) {
        let length = block.length();
        match self.snapshot.find_in_parents(block) {
            Ok(InParent { block: Located { entry, .. }, .. })
                if entry.content == Content::Zeros =>
            {
                stream.zeros.add(length);
            }
            Ok(InParent { archive, .. }) => {
                stream.in_parents.add(length);
                self.hold(archive, length);
            }
            Err(error) => {
                stream.unresolvable.add(length);
                // That parents are missing has been said.
                let is_told = matches!(error.problem, Problem::Unresolvable { .. })
                    && stream.unresolvable.blocks > 1;
                if !is_told {
                    self.faults.add(error);
                }
            }
        }
    }

    fn hold(&mut self, archive: usize, length: u32) {
        if let Some(holder) = self.holders.get_mut(archive) {
            holder.blocks += 1;
            holder.bytes += u64::from(length);
        }
    }
}

/// What is wrong.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) kept: Vec<Error>,
    pub(super) more: u64,
}

impl Faults {
    pub(super) fn add(&mut self, error: Error) {
        if self.kept.len() < MAX_FAULTS {
            self.kept.push(error);
        } else {
            self.more += 1;
        }
    }
}
