//! A reader of archives that is as simple as the format's description: everything is looked
//! for from the beginning, nothing is kept, whatever isn't right is `None`.

use std::io::Read;
use std::num::NonZeroU32;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::pbkdf2;

use crate::archive::{About, Entry, HEADER, PASSWORD, SALT};
use crate::lz4;

const MAX_BLOCK: u32 = 32 << 20;
const MAX_STORED: u32 = MAX_BLOCK + MAX_BLOCK / 128 + 1024;

/// An archive without parents whose header is known.
#[derive(Debug)]
pub struct Archive<'a> {
    bytes: &'a [u8],
    about: About,
    dictionary: &'a [u8],
    index_offset: u64,
    pub streams: [Stream; 2],
}

#[derive(Debug)]
pub struct Stream {
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
            let blocks = page.length.checked_sub(8)? / 52;
            let end = page.offset.checked_add(page.length.into())?;
            let is_whole = page.length == 8 + 52 * blocks && (1..=4096).contains(&blocks);
            let is_apart = all[..number].iter().all(|other| {
                end <= other.offset || other.offset + u64::from(other.length) <= page.offset
            });
            if !is_whole || !is_apart || page.offset < HEADER as u64 || end > index_offset {
                return None;
            }
        }
        for (pages, size) in pages.iter().zip(sizes) {
            let is_ascending = pages.windows(2).all(|pair| pair[0].start < pair[1].start);
            if !is_ascending
                || size >= 1 << 63
                || pages.last().is_some_and(|last| last.start >= size)
            {
                return None;
            }
        }
        let [main, auxiliary] = pages;
        let streams =
            [Stream { size: sizes[0], pages: main }, Stream { size: sizes[1], pages: auxiliary }];
        let dictionary = &bytes[HEADER..HEADER + about.dictionary as usize];
        Some(Self { bytes, about, dictionary, index_offset, streams })
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
        block.number.map(|_| block)
    }

    /// The blocks of a page, which have to reach to `end`.
    fn blocks(&self, page: &Page, end: u64) -> Option<Vec<Block>> {
        let mut fields = Fields(&self.bytes[page.offset as usize..][..page.length as usize]);
        if fields.u64()? != u64::from(page.length - 8) / 52 {
            return None;
        }
        let mut blocks = Vec::new();
        let mut start = page.start;
        while !fields.0.is_empty() {
            let entry = Entry {
                offset: fields.u64()?,
                stored: fields.u32()?,
                length: fields.u32()?,
                checksum: fields.u32()?,
                hash: fields.take(32)?.try_into().ok()?,
            };
            if entry.length == 0 || entry.length > MAX_BLOCK || entry.stored > MAX_STORED {
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
            // There are no parents; whoever knows the hash of zeros needs none.
            return entry.is_zeros_by_hash().then(|| vec![0; entry.length as usize]);
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
