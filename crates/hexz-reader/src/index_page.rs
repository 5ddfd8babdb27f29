//! Index pages, which list blocks.

use std::ops::Range;

use super::BlockHash;
use super::error::ErrorKind;
use super::fields::FieldReader;
use super::header::{Extent, HEADER_SIZE};
use super::layout::{EntryForm, PAGE_HEADER_LEN};
use super::limits::{MAX_BLOCK, max_stored};
use super::master_index::PageRef;
use super::zeros::ZeroHashes;

/// Offset that marks a block that lives in a parent.
pub(super) const IN_PARENT: u64 = u64::MAX;

/// Source of a block's bytes according to its index entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// The bytes are zeros.
    Zeros,
    /// The entry claims zeros but has the hash of other bytes. It is damaged or forged, and the
    /// content of the block is unknown.
    Contradiction,
    /// The bytes are stored in this archive.
    Stored { place: Extent, checksum: u32 },
    /// The bytes are in a parent.
    InParent,
}

/// Index entry of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IndexEntry {
    pub(super) content: Content,
    pub(super) hash: BlockHash,
}

impl IndexEntry {
    /// Returns the range of the archive that has the block's bytes, if it stores them.
    pub(super) fn stored_place(&self) -> Option<Extent> {
        match self.content {
            Content::Stored { place, .. } => Some(place),
            Content::Zeros | Content::Contradiction | Content::InParent => None,
        }
    }

    /// Returns true if this archive itself has the bytes with that hash.
    pub(super) fn has_bytes_of(&self, hash: &BlockHash) -> bool {
        self.hash == *hash && matches!(self.content, Content::Zeros | Content::Stored { .. })
    }
}

/// An index page, prepared for binary search.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IndexPage {
    pub(super) start_block: u64,
    /// Start offset of each block in the stream, followed by the end offset of the last block.
    starts: Vec<u64>,
    entries: Vec<IndexEntry>,
}

/// A block with its number and its range of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocatedBlock {
    pub(super) entry: IndexEntry,
    /// Number of the block within the archive, part of the nonce of encrypted blocks.
    pub(super) number: u64,
    /// Start offset in the stream, in bytes.
    pub(super) start: u64,
    pub(super) length: u32,
}

impl LocatedBlock {
    /// Returns the end offset in the stream, in bytes.
    pub(super) fn end(&self) -> u64 {
        self.start + u64::from(self.length)
    }
}

/// Properties of an archive's layout that parsing its pages depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageLayout<'a> {
    pub(super) form: EntryForm,
    /// True if references have the hash of their bytes, so that zeros can be recognized by it.
    pub(super) references_by_hash: bool,
    pub(super) zeros: &'a ZeroHashes,
}

impl IndexPage {
    /// Parses the bytes of `page`. Its blocks must end at byte `end` of the stream, and must be
    /// stored before `index_offset`.
    pub(super) fn parse(
        bytes: &[u8],
        page: &PageRef,
        end: u64,
        index_offset: u64,
        layout: PageLayout<'_>,
    ) -> Result<Self, ErrorKind> {
        let PageLayout { form, references_by_hash, zeros } = layout;
        let count = FieldReader::new(bytes).u64("the number of blocks")?;
        if count != u64::from(page.block_count(form)) {
            return Err(ErrorKind::Invalid("an index page's number of blocks"));
        }
        let mut starts = Vec::with_capacity(page.block_count(form) as usize + 1);
        let mut entries = Vec::with_capacity(page.block_count(form) as usize);
        let mut position = page.start_logical;
        for raw in raw_entries(bytes, form) {
            let (entry, length) = (raw.check(index_offset, zeros)?, raw.length);
            starts.push(position);
            entries.push(entry);
            position = position
                .checked_add(length.into())
                .filter(|&position| position <= end)
                .ok_or(ErrorKind::Invalid("an index page's range"))?;
        }
        // This is the only check that detects a damaged length, which moves all later blocks.
        if position != end {
            return Err(ErrorKind::Invalid("an index page's range"));
        }
        starts.push(position);
        if references_by_hash {
            zeros.mark_parents_zeros(&mut entries, &starts);
        }
        Ok(Self { start_block: page.start_block, starts, entries })
    }

    /// Returns the block that covers byte `at` of the stream, if any does.
    pub(super) fn block_at(&self, at: u64) -> Option<LocatedBlock> {
        self.block(self.starts.partition_point(|&start| start <= at).checked_sub(1)?)
    }

    /// Returns the block at a position of the page.
    pub(super) fn block(&self, position: usize) -> Option<LocatedBlock> {
        let entry = *self.entries.get(position)?;
        let start = *self.starts.get(position)?;
        let end = *self.starts.get(position + 1)?;
        Some(LocatedBlock {
            entry,
            number: self.start_block.checked_add(position as u64)?,
            start,
            length: u32::try_from(end - start).ok()?,
        })
    }

    /// Returns the range of the stream that the block at a position covers.
    pub(super) fn range(&self, position: usize) -> Option<Range<u64>> {
        Some(*self.starts.get(position)?..*self.starts.get(position + 1)?)
    }

    /// Iterates over the blocks in order.
    pub(super) fn blocks(&self) -> impl Iterator<Item = LocatedBlock> + '_ {
        (0..self.entries.len()).filter_map(|position| self.block(position))
    }

    /// Returns the first block with that hash whose bytes this archive itself has.
    pub(super) fn block_with_hash(&self, hash: &BlockHash) -> Option<LocatedBlock> {
        self.block(self.entries.iter().position(|entry| entry.has_bytes_of(hash))?)
    }

    /// Returns the memory that the page takes, in bytes.
    pub(super) fn memory(&self) -> u64 {
        let starts = self.starts.capacity() * size_of::<u64>();
        let entries = self.entries.capacity() * size_of::<IndexEntry>();
        (size_of::<Self>() + starts + entries) as u64
    }
}

/// Iterates over the locations recorded in a page that has been parsed, including those of blocks
/// that are known to be zeros.
pub(super) fn places(bytes: &[u8], form: EntryForm) -> impl Iterator<Item = Extent> + '_ {
    raw_entries(bytes, form).map(|entry| entry.place)
}

/// Iterates over the lengths of the blocks of a page, in bytes.
pub(super) fn lengths(bytes: &[u8], form: EntryForm) -> impl Iterator<Item = u64> + '_ {
    raw_entries(bytes, form).map(|entry| entry.length.into())
}

/// An index entry as stored in the file.
struct RawEntry {
    place: Extent,
    length: u32,
    checksum: u32,
    hash: BlockHash,
}

fn raw_entries(page: &[u8], form: EntryForm) -> impl Iterator<Item = RawEntry> + '_ {
    let entries = page.get(PAGE_HEADER_LEN as usize..).unwrap_or_default();
    entries.chunks_exact(form.size() as usize).map_while(move |entry| {
        let mut fields = FieldReader::new(entry);
        let offset = fields.u64("a block's offset").ok()?;
        let place = Extent { offset, length: fields.u32("a block's stored length").ok()? };
        Some(RawEntry {
            place,
            length: fields.u32("a block's length").ok()?,
            checksum: fields.u32("a block's checksum").ok()?,
            hash: match form {
                EntryForm::WithHash => BlockHash(fields.array("a block's hash").ok()?),
                EntryForm::WithoutHash => BlockHash::NONE,
            },
        })
    })
}

impl RawEntry {
    fn check(&self, index_offset: u64, zeros: &ZeroHashes) -> Result<IndexEntry, ErrorKind> {
        let Self { place, length, checksum, hash } = *self;
        for (what, got, limit) in [
            ("a block's length in bytes", length, MAX_BLOCK),
            ("a block's stored length in bytes", place.length, max_stored(length)),
        ] {
            if got > limit {
                return Err(ErrorKind::TooLarge { what, got: got.into(), limit: limit.into() });
            }
        }
        if length == 0 {
            return Err(ErrorKind::Invalid("a block's length"));
        }
        let content = match place {
            Extent { offset: IN_PARENT, .. } => Content::InParent,
            // Packers write no hash for zeros. A hash that is there must be that of zeros.
            Extent { offset: 0, length: 0 } if !zeros.is_consistent(&hash, length) => {
                Content::Contradiction
            }
            Extent { offset: 0, length: 0 } => Content::Zeros,
            _ if zeros.is_stored_zeros(place, length, &hash) => Content::Zeros,
            _ => Content::Stored { place, checksum },
        };
        if let Content::Stored { place, .. } = content {
            let inside = place.offset >= HEADER_SIZE
                && place.length > 0
                && place.end().is_some_and(|end| end <= index_offset);
            if !inside {
                return Err(ErrorKind::Invalid("a block's location"));
            }
        }
        Ok(IndexEntry { content, hash })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: EntryForm = EntryForm::WithHash;
    const INDEX_OFFSET: u64 = 1 << 40;
    /// Start offset of the pages in the stream, in bytes.
    const START: u64 = 1000;

    /// An entry of a block that lives in a parent.
    const PARENTS: RawEntry = RawEntry {
        place: Extent { offset: IN_PARENT, length: 0 },
        length: 10,
        checksum: 0,
        hash: BlockHash([1; 32]),
    };

    /// Parses a page of these entries.
    fn parse(entries: &[RawEntry]) -> Result<IndexPage, ErrorKind> {
        let mut bytes = (entries.len() as u64).to_le_bytes().to_vec();
        for RawEntry { place, length, checksum, hash } in entries {
            bytes.extend(place.offset.to_le_bytes());
            bytes.extend([place.length, *length, *checksum].map(u32::to_le_bytes).as_flattened());
            bytes.extend(hash.0);
        }
        let place = Extent { offset: HEADER_SIZE, length: u32::try_from(bytes.len()).unwrap() };
        let page = PageRef { place, start_block: 7, start_logical: START };
        let end = START + entries.iter().map(|entry| u64::from(entry.length)).sum::<u64>();
        let zeros = ZeroHashes::default();
        let layout = PageLayout { form: FORM, references_by_hash: false, zeros: &zeros };
        IndexPage::parse(&bytes, &page, end, INDEX_OFFSET, layout)
    }

    #[test]
    fn blocks_follow_one_another_from_the_start_of_the_page() {
        let lengths = [10, 1, 300];
        let page = parse(&lengths.map(|length| RawEntry { length, ..PARENTS })).unwrap();
        let blocks: Vec<_> = page.blocks().collect();
        let found: Vec<_> =
            blocks.iter().map(|block| (block.number, block.start, block.end())).collect();
        assert_eq!(found, [(7, 1000, 1010), (8, 1010, 1011), (9, 1011, 1311)]);
        for (position, block) in blocks.iter().enumerate() {
            assert_eq!(page.block(position), Some(*block));
            assert_eq!(page.range(position), Some(block.start..block.end()));
            for at in [block.start, block.end() - 1] {
                assert_eq!(page.block_at(at), Some(*block));
            }
        }
        assert_eq!((page.block(3), page.range(3)), (None, None));
        assert_eq!((page.block_at(START - 1), page.block_at(1311)), (None, None));
    }

    #[test]
    fn lengths_and_places_of_blocks_are_checked() {
        let stored = |offset, length| Extent { offset, length };
        let entry = |place, length| RawEntry { place, length, ..PARENTS };
        let allowed = max_stored(10);
        for (entry, is_valid) in [
            (entry(PARENTS.place, 0), false),
            (entry(PARENTS.place, 1), true),
            (entry(PARENTS.place, MAX_BLOCK), true),
            (entry(PARENTS.place, MAX_BLOCK + 1), false),
            (entry(stored(HEADER_SIZE, allowed), 10), true),
            (entry(stored(HEADER_SIZE, allowed + 1), 10), false),
            (entry(stored(HEADER_SIZE, 1), 10), true),
            (entry(stored(HEADER_SIZE, 0), 10), false),
            (entry(stored(HEADER_SIZE - 1, 1), 10), false),
            (entry(stored(INDEX_OFFSET - 9, 9), 10), true),
            (entry(stored(INDEX_OFFSET - 9, 10), 10), false),
            (entry(stored(INDEX_OFFSET, 1), 10), false),
            (entry(stored(u64::MAX - 1, 9), 10), false),
        ] {
            let RawEntry { place, length, .. } = entry;
            assert_eq!(parse(&[entry]).is_ok(), is_valid, "{place:?} {length}");
        }
    }

    #[test]
    fn a_parents_block_with_the_same_hash_is_not_the_archives_own() {
        let place = Extent { offset: HEADER_SIZE, length: 5 };
        let [one, other] = [BlockHash([1; 32]), BlockHash([2; 32])];
        let parents = RawEntry { hash: one, ..PARENTS };
        let of_other = RawEntry { place, hash: other, ..PARENTS };
        let own = RawEntry { place, hash: one, ..PARENTS };
        let page = parse(&[parents, of_other, own]).unwrap();
        let start = |hash| page.block_with_hash(&hash).map(|block| block.start);
        assert_eq!((start(one), start(other)), (Some(START + 20), Some(START + 10)));
        assert_eq!(start(BlockHash([3; 32])), None);
    }

    #[test]
    fn memory_of_a_page_grows_with_its_blocks() {
        for blocks in [1, 2, 1000] {
            let entries: Vec<_> = (0..blocks).map(|_| PARENTS).collect();
            let page = parse(&entries).unwrap();
            let starts = (blocks + 1) * size_of::<u64>();
            let entries = blocks * size_of::<IndexEntry>();
            assert_eq!(page.memory(), (size_of::<IndexPage>() + starts + entries) as u64);
        }
    }
}
