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

    /// Returns the form of the entries, if the page list of the only stream reveals it: the second
    /// page starts with the block behind those of the first one. Saves reading the first page.
    pub(super) fn entry_form(&self) -> Option<EntryForm> {
        match (self.main.pages.as_slice(), self.auxiliary.pages.as_slice()) {
            ([first, second, ..], []) | ([], [first, second, ..]) => {
                let count = second.start_block.checked_sub(first.start_block)?;
                EntryForm::of_page(first.place.length, count)
            }
            _ => None,
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX_OFFSET: u64 = HEADER_SIZE + 1000;
    const ENTRY: u32 = 52;

    /// A page of `blocks` blocks, from byte `start_logical` of the stream.
    fn page(offset: u64, blocks: u32, start_logical: u64) -> PageRef {
        let place = Extent { offset, length: PAGE_HEADER_LEN + blocks * ENTRY };
        PageRef { place, start_block: 0, start_logical }
    }

    fn encode(main: &[PageRef], auxiliary: &[PageRef], sizes: [u64; 2]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for pages in [main, auxiliary] {
            bytes.extend((pages.len() as u64).to_le_bytes());
            for page in pages {
                bytes.extend(page.place.offset.to_le_bytes());
                bytes.extend(page.place.length.to_le_bytes());
                bytes.extend(page.start_block.to_le_bytes());
                bytes.extend(page.start_logical.to_le_bytes());
            }
        }
        bytes.extend(sizes.map(u64::to_le_bytes).as_flattened());
        bytes
    }

    fn is_accepted(main: &[PageRef], auxiliary: &[PageRef]) -> bool {
        let bytes = encode(main, auxiliary, [1000, 1000]);
        MasterIndex::parse(&bytes, INDEX_OFFSET, false).is_ok()
    }

    #[test]
    fn pages_lie_between_the_header_and_the_master_index() {
        let at = |offset, length| PageRef { place: Extent { offset, length }, ..page(0, 1, 0) };
        for (page, is_valid) in [
            (at(HEADER_SIZE, 60), true),
            (at(HEADER_SIZE - 1, 60), false),
            (at(INDEX_OFFSET - 60, 60), true),
            (at(INDEX_OFFSET - 59, 60), false),
            (at(u64::MAX, 60), false),
            // A page has a header and at least one entry.
            (at(HEADER_SIZE, PAGE_HEADER_LEN), false),
            (at(HEADER_SIZE, 0), false),
        ] {
            assert_eq!(is_accepted(&[page], &[]), is_valid, "{page:?}");
            assert_eq!(is_accepted(&[], &[page]), is_valid, "{page:?}");
        }
    }

    #[test]
    fn pages_that_share_bytes_are_rejected() {
        let first = page(HEADER_SIZE, 2, 0);
        let end = first.place.end().unwrap();
        for (offset, is_valid) in [(end, true), (end - 1, false), (HEADER_SIZE, false)] {
            let second = page(offset, 1, 500);
            assert_eq!(is_accepted(&[first, second], &[]), is_valid, "{offset}");
            assert_eq!(is_accepted(&[first], &[second]), is_valid, "{offset}");
            // Pages may be stored in any order.
            assert_eq!(is_accepted(&[second], &[first]), is_valid, "{offset}");
        }
    }

    #[test]
    fn only_replaced_signatures_of_a_signed_archive_follow_the_master_index() {
        for (count, is_signed, is_valid) in [
            (0, false, true),
            (0, true, true),
            (OLD_SIGNATURE, true, true),
            (2 * OLD_SIGNATURE, true, true),
            (OLD_SIGNATURE, false, false),
            (OLD_SIGNATURE - 1, true, false),
            (OLD_SIGNATURE + 1, true, false),
            (1, false, false),
        ] {
            let mut bytes = encode(&[], &[], [0, 0]);
            bytes.resize(bytes.len() + count, 0x5a);
            let parsed = MasterIndex::parse(&bytes, INDEX_OFFSET, is_signed);
            assert_eq!(parsed.is_ok(), is_valid, "{count} {is_signed}");
        }
    }

    #[test]
    fn changed_pages_and_sizes_are_detected() {
        let index = |main: u64, auxiliary: u64, pages: &[PageRef]| {
            MasterIndex::parse(&encode(pages, &[], [main, auxiliary]), INDEX_OFFSET, false).unwrap()
        };
        let pages = [page(HEADER_SIZE, 1, 0), page(HEADER_SIZE + 100, 1, 50)];
        let opened = index(80, 7, &pages);
        assert!(opened.has_same_pages(&index(80, 7, &pages)));
        let moved = [pages[0], PageRef { start_logical: 51, ..pages[1] }];
        for changed in [
            index(81, 7, &pages),
            index(80, 8, &pages),
            index(80, 7, &pages[..1]),
            index(80, 7, &moved),
        ] {
            assert!(!opened.has_same_pages(&changed) && !changed.has_same_pages(&opened));
        }
        // A size that isn't stated is 0 in the file, whatever the blocks add up to.
        let mut summed = index(0, 7, &pages);
        summed.main.size = 80;
        summed.main.is_size_summed = true;
        assert!(summed.has_same_pages(&index(0, 7, &pages)));
        assert!(!summed.has_same_pages(&opened));
    }

    #[test]
    fn a_page_has_a_whole_number_of_entries() {
        let check = |length: u32, entries| {
            let place = Extent { offset: HEADER_SIZE, length };
            let pages = vec![PageRef { place, ..page(0, 1, 0) }];
            let stream = || StreamIndex { pages: pages.clone(), ..StreamIndex::default() };
            let main = MasterIndex { main: stream(), ..MasterIndex::default() };
            let auxiliary = MasterIndex { auxiliary: stream(), ..MasterIndex::default() };
            let results = [main, auxiliary].map(|index| index.check_pages(entries).is_ok());
            assert_eq!(results[0], results[1]);
            results[0]
        };
        let most = u32::try_from(MAX_PAGE_BLOCKS).unwrap();
        for (count, is_valid) in [(0, false), (1, true), (2, true), (most, true), (most + 1, false)]
        {
            for entries in [EntryForm::WithHash, EntryForm::WithoutHash] {
                let length = PAGE_HEADER_LEN + count * entries.size();
                assert_eq!(check(length, entries), is_valid, "{count} {entries:?}");
                assert!(!check(length + 1, entries) && !check(length - 1, entries), "{count}");
            }
        }
    }
}
