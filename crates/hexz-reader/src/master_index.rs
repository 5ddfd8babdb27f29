//! The master index, which lists the index pages of both streams.
//!
//! It is kept in memory (32 bytes for each 4096 blocks); pages are loaded on demand. Finding a block
//! takes two binary searches: one for its page and one on the page (`index_page.rs`).

use super::StreamKind;
use super::error::ErrorKind;
use super::fields::FieldReader;
use super::header::{Extent, HEADER_SIZE};
use super::index_page::lengths;
use super::layout::{EntryForm, PAGE_HEADER_LEN};
use super::limits::{MAX_PAGE_BLOCKS, MAX_STREAM};

/// Length of a page's entry in the master index, in bytes.
const PAGE_ENTRY: u64 = 28;
/// Length of a replaced signature, which remains behind the master index, in bytes.
const OLD_SIGNATURE: usize = 64;

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
            lengths(bytes, entries)
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
            Err(ErrorKind::Invalid("an index page's location"))
        }
    }
}

fn pages(fields: &mut FieldReader<'_>, index_offset: u64) -> Result<Vec<PageRef>, ErrorKind> {
    let count = fields.u64("the number of index pages")?;
    if count > fields.left() as u64 / PAGE_ENTRY {
        return Err(ErrorKind::Truncated("the master index"));
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
                Err(ErrorKind::Invalid("an index page's location"))
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
    if disjoint { Ok(()) } else { Err(ErrorKind::Invalid("an index page's location")) }
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
    Err(ErrorKind::TooLarge { what: "the size of a stream in bytes", got: size, limit: MAX_STREAM })
}
