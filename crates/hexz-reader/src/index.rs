//! The index: a master index that lists pages, and pages that list blocks.
//!
//! The master index is kept in memory (32 bytes for each 4096 blocks); pages are loaded on demand.
//! Finding a block takes two binary searches: one for its page and one on the page.

use std::ops::Range;

use super::error::ErrorKind;
use super::fields::FieldReader;
use super::header::{Extent, HEADER_SIZE};
use super::layout::{EntryForm, PAGE_HEADER_LEN};
use super::limits::{MAX_BLOCK, MAX_PAGE_BLOCKS, MAX_STREAM, max_stored};
use super::zeros::ZeroHashes;
use super::{BlockHash, StreamKind};

/// Length of a page's entry in the master index, in bytes.
const PAGE_ENTRY: u64 = 28;
/// Length of a replaced signature, which remains behind the master index, in bytes.
const OLD_SIGNATURE: usize = 64;

/// Offset that marks a block that lives in a parent.
pub(super) const IN_PARENT: u64 = u64::MAX;

/// Location of an index page and start of the range that it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageRef {
    pub(super) place: Extent,
    /// Number of the page's first block within the archive.
    pub(super) start_block: u64,
    /// Start offset of the page's first block in the stream, in bytes.
    pub(super) start_logical: u64,
}

impl PageRef {
    pub(super) fn block_count(&self, entries: EntryForm) -> u32 {
        self.place.length.saturating_sub(PAGE_HEADER_LEN) / entries.size()
    }
}

/// Size and pages of a stream; the pages are in ascending order of their ranges.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct StreamIndex {
    /// Size of the stream, in bytes: as stated in the master index, or the sum of the blocks'
    /// lengths if the master index states 0 but lists blocks.
    pub(super) size: u64,
    /// End offset of the blocks, in bytes: equal to `size`, or less in a converted tar archive.
    pub(super) end: u64,
    /// True if `size` is the sum of the blocks' lengths.
    pub(super) is_size_summed: bool,
    pub(super) pages: Vec<PageRef>,
}

impl StreamIndex {
    /// Returns the last page that starts at or before byte `at` of the stream.
    pub(super) fn page_at(&self, at: u64) -> Option<usize> {
        self.pages.partition_point(|page| page.start_logical <= at).checked_sub(1)
    }

    /// Returns the offset at which a page must end: the start of the next page, or the end of the
    /// blocks.
    pub(super) fn page_end(&self, page: usize) -> u64 {
        self.pages.get(page + 1).map_or(self.end, |next| next.start_logical)
    }

    /// Returns true if the master index states 0 bytes but lists blocks. `hexz pack` writes that
    /// for a pipe or a block device, whose size it doesn't know.
    pub(super) fn has_unstated_size(&self) -> bool {
        self.size == 0 && !self.pages.is_empty()
    }

    /// Computes the size that the master index doesn't state from the bytes of the last two pages.
    /// The last page must start where the page before it ends.
    pub(super) fn set_size(
        &mut self,
        before_last: Option<&[u8]>,
        last: &[u8],
        entries: EntryForm,
    ) -> Result<(), ErrorKind> {
        let end = |page: Option<&PageRef>, bytes| {
            let start = page.map_or(0, |page| page.start_logical);
            let mut lengths = raw_entries(bytes, entries).map(|entry| u64::from(entry.length));
            lengths
                .try_fold(start, u64::checked_add)
                .ok_or(ErrorKind::Invalid("an index page's range"))
        };
        let start = match (self.pages.as_slice(), before_last) {
            ([.., before, _], Some(bytes)) => end(Some(before), bytes)?,
            _ => 0,
        };
        if self.pages.last().is_some_and(|last| last.start_logical != start) {
            return Err(ErrorKind::Invalid("the order of the index pages"));
        }
        self.size = end(self.pages.last(), last)?;
        check_size(self.size)?;
        self.end = self.size;
        self.is_size_summed = true;
        Ok(())
    }
}

/// Indexes of both streams.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct MasterIndex {
    pub(super) main: StreamIndex,
    pub(super) auxiliary: StreamIndex,
}

impl MasterIndex {
    /// Parses the master index. Pages must lie before `index_offset`. If the archive `is_signed`,
    /// replaced signatures may follow the master index.
    pub(super) fn parse(
        bytes: &[u8],
        index_offset: u64,
        is_signed: bool,
    ) -> Result<Self, ErrorKind> {
        let mut fields = FieldReader::new(bytes);
        let main_pages = pages(&mut fields, index_offset)?;
        let auxiliary_pages = pages(&mut fields, index_offset)?;
        check_disjoint(main_pages.iter().chain(&auxiliary_pages))?;
        let main = stream(main_pages, fields.u64("the main stream's size")?)?;
        let auxiliary = stream(auxiliary_pages, fields.u64("the auxiliary stream's size")?)?;
        let left = fields.left();
        if left > 0 && !(is_signed && left.is_multiple_of(OLD_SIGNATURE)) {
            return Err(ErrorKind::Invalid("the end of the master index"));
        }
        Ok(Self { main, auxiliary })
    }

    pub(super) fn stream(&self, kind: StreamKind) -> &StreamIndex {
        match kind {
            StreamKind::Main => &self.main,
            StreamKind::Auxiliary => &self.auxiliary,
        }
    }

    /// Returns true if both indexes list the same pages and state the same sizes.
    pub(super) fn has_same_pages(&self, other: &Self) -> bool {
        let stated = |stream: &StreamIndex| if stream.is_size_summed { 0 } else { stream.size };
        [(&self.main, &other.main), (&self.auxiliary, &other.auxiliary)]
            .iter()
            .all(|(a, b)| a.pages == b.pages && stated(a) == stated(b))
    }

    pub(super) fn streams_mut(&mut self) -> [&mut StreamIndex; 2] {
        [&mut self.main, &mut self.auxiliary]
    }

    /// Returns the first page of the main stream, or else of the auxiliary stream.
    pub(super) fn first_page(&self) -> Option<&PageRef> {
        self.main.pages.first().or(self.auxiliary.pages.first())
    }

    /// Checks that every page has a whole number of entries of the given form, within the limit.
    pub(super) fn check_pages(&self, entries: EntryForm) -> Result<(), ErrorKind> {
        let is_whole = |page: &PageRef| {
            let count = page.block_count(entries);
            (1..=MAX_PAGE_BLOCKS).contains(&count.into())
                && count * entries.size() + PAGE_HEADER_LEN == page.place.length
        };
        if self.main.pages.iter().chain(&self.auxiliary.pages).all(is_whole) {
            Ok(())
        } else {
            Err(ErrorKind::Invalid("an index page's place"))
        }
    }
}

fn pages(fields: &mut FieldReader<'_>, index_offset: u64) -> Result<Vec<PageRef>, ErrorKind> {
    let count = fields.u64("the number of index pages")?;
    if count > fields.left() as u64 / PAGE_ENTRY {
        return Err(ErrorKind::Truncated("its master index"));
    }
    (0..count)
        .map(|_| {
            let offset = fields.u64("a page's offset")?;
            let length = fields.u32("a page's length")?;
            let page = PageRef {
                place: Extent { offset, length },
                start_block: fields.u64("a page's first block")?,
                start_logical: fields.u64("a page's first byte")?,
            };
            let inside =
                offset >= HEADER_SIZE && page.place.end().is_some_and(|end| end <= index_offset);
            if inside && length > PAGE_HEADER_LEN {
                Ok(page)
            } else {
                Err(ErrorKind::Invalid("an index page's place"))
            }
        })
        .collect()
}

/// Rejects pages that share bytes. A small file could otherwise claim any number of blocks by
/// listing one page repeatedly, and one page can't be correct for two ranges.
fn check_disjoint<'a>(pages: impl Iterator<Item = &'a PageRef>) -> Result<(), ErrorKind> {
    let mut places: Vec<Extent> = pages.map(|page| page.place).collect();
    places.sort_unstable_by_key(|place| place.offset);
    let disjoint = places
        .windows(2)
        .all(|pair| matches!(pair, [a, b] if a.end().is_some_and(|end| end <= b.offset)));
    if disjoint { Ok(()) } else { Err(ErrorKind::Invalid("an index page's place")) }
}

fn stream(pages: Vec<PageRef>, size: u64) -> Result<StreamIndex, ErrorKind> {
    check_size(size)?;
    let ascending =
        pages.windows(2).all(|pair| matches!(pair, [a, b] if a.start_logical < b.start_logical));
    let inside = size == 0 || pages.last().is_none_or(|last| last.start_logical < size);
    if ascending && inside {
        Ok(StreamIndex { size, end: size, is_size_summed: false, pages })
    } else {
        Err(ErrorKind::Invalid("the order of the index pages"))
    }
}

fn check_size(size: u64) -> Result<(), ErrorKind> {
    if size <= MAX_STREAM {
        return Ok(());
    }
    Err(ErrorKind::TooLarge { what: "a stream's size in bytes", got: size, limit: MAX_STREAM })
}

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
                return Err(ErrorKind::Invalid("a block's place in the file"));
            }
        }
        Ok(IndexEntry { content, hash })
    }
}
