//! A reader of archives that is as simple as the format's description: everything is looked
//! for from the beginning, nothing is kept, whatever isn't right is `None`.

use std::io::Read;
use std::num::NonZeroU32;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::pbkdf2;

use crate::archive::{About, Entry, HEADER, Layout, PASSWORD, SALT};
use crate::lz4;

const MAX_BLOCK: u32 = 32 << 20;

/// The longest stored form of a block of `length` bytes: out of proportion it is refused.
fn max_stored(length: u32) -> u32 {
    length.saturating_add(length / 128).saturating_add(1024)
}

/// An archive without parents whose header is known.
#[derive(Debug)]
pub struct Archive<'a> {
    bytes: &'a [u8],
    about: About,
    dictionary: &'a [u8],
    index_offset: u64,
    /// Size of an index entry, in bytes: 20 without a hash, 52 with one.
    entry_size: u32,
    pub streams: [Stream; 2],
}

#[derive(Debug)]
pub struct Stream {
    /// As the master index states it, or the sum of the blocks' lengths where that is 0.
    pub size: u64,
    pages: Vec<Page>,
}

#[derive(Debug, Clone, Copy)]
struct Page {
    offset: u64,
    length: u32,
    start_block: u64,
    start: u64,
}

/// A block of a stream.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    pub entry: Entry,
    pub start: u64,
    /// None where it has a number beyond all.
    number: Option<u64>,
}

impl<'a> Archive<'a> {
    pub fn open(bytes: &'a [u8], about: About, index_offset: u64) -> Option<Self> {
        let mut fields = Fields(&bytes[index_offset as usize..]);
        let pages = [fields.pages()?, fields.pages()?];
        let sizes = [fields.u64()?, fields.u64()?];
        if !fields.0.is_empty() {
            return None;
        }
        let all: Vec<&Page> = pages.iter().flatten().collect();
        for (number, page) in all.iter().enumerate() {
            let end = page.offset.checked_add(page.length.into())?;
            let is_apart = all[..number].iter().all(|other| {
                end <= other.offset || other.offset + u64::from(other.length) <= page.offset
            });
            if !is_apart || page.length < 8 || page.offset < HEADER as u64 || end > index_offset {
                return None;
            }
        }
        let entry_size = match all.first() {
            Some(page) => {
                let count = Fields(&bytes[page.offset as usize..]).u64()?;
                let is_size = |size: &u32| {
                    u128::from(count) * u128::from(*size) + 8 == u128::from(page.length)
                };
                [20, 52].into_iter().find(is_size)?
            }
            None => 52,
        };
        let is_whole = |page: &&Page| {
            let blocks = (page.length - 8) / entry_size;
            page.length == 8 + entry_size * blocks && (1..=4096).contains(&blocks)
        };
        if !all.iter().all(is_whole) {
            return None;
        }
        let [main, auxiliary] = pages;
        let streams =
            [Stream { size: sizes[0], pages: main }, Stream { size: sizes[1], pages: auxiliary }];
        let dictionary = &bytes[HEADER..HEADER + about.dictionary as usize];
        let mut archive = Self { bytes, about, dictionary, index_offset, entry_size, streams };
        for stream in 0..2 {
            archive.find_size(stream)?;
        }
        Some(archive)
    }

    /// Checks the order of a stream's pages, and sets its size if the master index states 0.
    fn find_size(&mut self, stream: usize) -> Option<()> {
        let Stream { size, pages } = &self.streams[stream];
        if !pages.windows(2).all(|pair| pair[0].start < pair[1].start) || *size >= 1 << 63 {
            return None;
        }
        let Some(last) = pages.last() else { return Some(()) };
        if *size > 0 {
            return (last.start < *size).then_some(());
        }
        // It begins where the page before it ends, which nothing else shows.
        let mut start = 0;
        if let [.., before, _] = pages.as_slice() {
            start = before.start;
            for entry in self.entries(before)? {
                start = start.checked_add(entry.length.into())?;
            }
        }
        if last.start != start {
            return None;
        }
        let mut size = last.start;
        for entry in self.entries(last)? {
            size = size.checked_add(entry.length.into())?;
        }
        // Nothing but the blocks themselves shows that their lengths are right.
        for block in self.blocks(last, size)?.iter().filter(|block| block.number.is_some()) {
            let entry = &block.entry;
            let is_stored = entry.offset != u64::MAX && !entry.has_no_place();
            if is_stored && !entry.is_stored_zeros() {
                let stored = &self.bytes[entry.offset as usize..][..entry.stored as usize];
                match self.stated_length(stored) {
                    Some(length) if length == u64::from(entry.length) => {}
                    Some(_) => return None,
                    None => drop(self.read(block)?),
                }
            }
        }
        self.streams[stream].size = Some(size).filter(|size| *size < 1 << 63)?;
        Some(())
    }

    /// The decoded length that a stored block states, if it does.
    fn stated_length(&self, stored: &[u8]) -> Option<u64> {
        if self.about.encrypted {
            None
        } else if self.about.zstd {
            zstd_content_size(stored)
        } else {
            stored.get(..4).map(little_endian)
        }
    }

    /// The block that covers byte `at` of a stream.
    pub fn block_at(&self, stream: usize, at: u64) -> Option<Block> {
        let Stream { size, pages } = &self.streams[stream];
        if at >= *size {
            return None;
        }
        let page = pages.iter().rposition(|page| page.start <= at)?;
        let end = pages.get(page + 1).map_or(*size, |next| next.start);
        let blocks = self.blocks(&pages[page], end)?;
        let block = blocks.into_iter().rfind(|block| block.start <= at)?;
        block.number?;
        // A reference by offset means a parent's blocks, and there are no parents.
        let Entry { offset, hash, .. } = block.entry;
        let is_by_offset = offset == u64::MAX && hash == [0; 32] && self.layout() != Layout::D;
        (!is_by_offset).then_some(block)
    }

    /// Layout by the header and by the entries that there really are.
    pub fn layout(&self) -> Layout {
        match (self.about.layout, self.entry_size == 52) {
            (Layout::A | Layout::B, true) => Layout::B,
            (Layout::A | Layout::B, false) => Layout::A,
            (Layout::D, true) => Layout::D,
            (Layout::C | Layout::X, true) => Layout::C,
            (Layout::C | Layout::D | Layout::X, false) => Layout::X,
        }
    }

    /// The entries of a page.
    fn entries(&self, page: &Page) -> Option<Vec<Entry>> {
        let mut fields = Fields(&self.bytes[page.offset as usize..][..page.length as usize]);
        fields.u64()?;
        let mut entries = Vec::new();
        while !fields.0.is_empty() {
            entries.push(Entry {
                offset: fields.u64()?,
                stored: fields.u32()?,
                length: fields.u32()?,
                checksum: fields.u32()?,
                hash: match self.entry_size {
                    52 => fields.take(32)?.try_into().ok()?,
                    _ => [0; 32],
                },
            });
        }
        Some(entries)
    }

    /// The blocks of a page, which have to reach to `end`.
    fn blocks(&self, page: &Page, end: u64) -> Option<Vec<Block>> {
        let entries = self.entries(page)?;
        if little_endian(&self.bytes[page.offset as usize..][..8]) != entries.len() as u64 {
            return None;
        }
        let mut blocks = Vec::new();
        let mut start = page.start;
        for entry in entries {
            if entry.length == 0
                || entry.length > MAX_BLOCK
                || entry.stored > max_stored(entry.length)
            {
                return None;
            }
            let is_elsewhere = entry.offset == u64::MAX || entry.has_no_place();
            if !is_elsewhere && !entry.is_stored_zeros() {
                let end = entry.offset.checked_add(entry.stored.into())?;
                if entry.offset < HEADER as u64 || entry.stored == 0 || end > self.index_offset {
                    return None;
                }
            }
            let number = page.start_block.checked_add(blocks.len() as u64);
            blocks.push(Block { entry, start, number });
            start = start.checked_add(entry.length.into()).filter(|start| *start <= end)?;
        }
        (start == end).then_some(blocks)
    }

    /// A block's bytes.
    pub fn read(&self, block: &Block) -> Option<Vec<u8>> {
        let entry = &block.entry;
        if entry.offset == u64::MAX {
            // There are no parents. Whoever knows the hash of zeros needs none where a
            // reference's hash is that of its bytes.
            let is_zeros = self.layout() == Layout::D && entry.is_zeros_by_hash();
            return is_zeros.then(|| vec![0; entry.length as usize]);
        }
        if entry.has_no_place() {
            let is_right = entry.hash == [0; 32] || entry.is_zeros_by_hash();
            return is_right.then(|| vec![0; entry.length as usize]);
        }
        if entry.is_stored_zeros() {
            return Some(vec![0; entry.length as usize]);
        }
        let stored = &self.bytes[entry.offset as usize..][..entry.stored as usize];
        if crc32fast::hash(stored) != entry.checksum {
            return None;
        }
        let mut stored = stored.to_vec();
        if self.about.encrypted {
            let length =
                key().open_in_place(nonce(block.number?), Aad::empty(), &mut stored).ok()?.len();
            stored.truncate(length);
        }
        let bytes = if self.about.zstd {
            zstd_frame(&stored, self.dictionary, entry.length as usize)?
        } else {
            let (size, raw) = stored.split_at_checked(4)?;
            if size != entry.length.to_le_bytes() {
                return None;
            }
            lz4::decode(raw, entry.length as usize)?
        };
        let is_right = entry.hash == [0; 32] || *blake3::hash(&bytes).as_bytes() == entry.hash;
        (is_right && bytes.len() == entry.length as usize).then_some(bytes)
    }
}

impl Entry {
    fn has_no_place(&self) -> bool {
        self.offset == 0 && self.stored == 0
    }

    /// Whether it says by its hash that it is zeros, and is as short as these are. Then what is
    /// stored doesn't matter.
    fn is_stored_zeros(&self) -> bool {
        let is_short = u64::from(self.stored) <= 64 + u64::from(self.length) / 64;
        self.offset != u64::MAX && !self.has_no_place() && is_short && self.is_zeros_by_hash()
    }

    pub fn is_zeros_by_hash(&self) -> bool {
        *blake3::hash(&vec![0; self.length as usize]).as_bytes() == self.hash
    }
}

/// The key of encrypted archives.
pub fn key() -> LessSafeKey {
    let mut key = [0; 32];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, NonZeroU32::MIN, &SALT, PASSWORD, &mut key);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap())
}

/// The nonce of a block.
pub fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// What one frame decodes to, if it is all of `stored`, and not much longer than `most`.
/// Streamed, which is another way than that of the reader.
pub fn zstd_frame(stored: &[u8], dictionary: &[u8], most: usize) -> Option<Vec<u8>> {
    let mut decoder =
        zstd::stream::read::Decoder::with_dictionary(stored, dictionary).ok()?.single_frame();
    let mut bytes = Vec::new();
    decoder.by_ref().take(most as u64 + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() <= most && decoder.finish().is_empty()).then_some(bytes)
}

/// The content size that a Zstandard frame's header states, if it does (RFC 8878, section
/// 3.1.1.1).
fn zstd_content_size(frame: &[u8]) -> Option<u64> {
    let (magic, rest) = frame.split_at_checked(4)?;
    let (&descriptor, rest) = rest.split_first()?;
    // A reserved bit.
    if magic != 0xfd2f_b528_u32.to_le_bytes() || descriptor & 0x08 != 0 {
        return None;
    }
    let is_single_segment = descriptor & 0x20 != 0;
    let window = usize::from(!is_single_segment);
    let dictionary_id = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let (width, added) = match descriptor >> 6 {
        0 if is_single_segment => (1, 0),
        0 => return None,
        1 => (2, 256),
        2 => (4, 0),
        _ => (8, 0),
    };
    Some(little_endian(rest.get(window + dictionary_id..)?.get(..width)?).wrapping_add(added))
}

pub fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn pages(&mut self) -> Option<Vec<Page>> {
        let mut pages = Vec::new();
        for _ in 0..self.u64()? {
            pages.push(Page {
                offset: self.u64()?,
                length: self.u32()?,
                start_block: self.u64()?,
                start: self.u64()?,
            });
        }
        Some(pages)
    }
}
