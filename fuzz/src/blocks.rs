//! The way of a stored block: CRC-32, decryption, decompression, length and hash, against
//! decoders of another kind. Checksums and tags are right unless they are meant to be wrong,
//! so that what is behind them is reached.

use arbitrary::{Arbitrary, Unstructured};
use aws_lc_rs::aead::Aad;

use crate::archive::{About, Entry, Memory, Page, Writer, open};
use crate::index::compare;
use crate::lz4;
use crate::naive::{Archive, key, nonce, zstd_frame};

/// What lengths are found out up to, in bytes.
const MOST: usize = 1 << 17;

#[derive(Debug, Arbitrary)]
enum Source<'a> {
    /// These bytes, as if they were compressed.
    Stored(&'a [u8]),
    /// These bytes, compressed.
    Bytes(&'a [u8]),
    /// One byte again and again, compressed.
    Run(u8, u16),
    /// Two frames, or blocks, in a row.
    Twice(&'a [u8]),
}

#[derive(Debug, Arbitrary)]
enum Length {
    /// What it decodes to, if it does.
    Right,
    Off(i8),
    Any(u32),
}

#[derive(Debug, Arbitrary)]
enum Hash {
    None,
    Right,
    OfZeros,
    Wrong,
}

#[derive(Debug, Arbitrary)]
struct Block<'a> {
    source: Source<'a>,
    length: Length,
    hash: Hash,
    /// Bytes that are changed before checksums are made, and one after that.
    changed: Vec<(u16, u8)>,
    damaged: Option<(u16, u8)>,
    wrong_number: bool,
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    zstd: bool,
    encrypted: bool,
    dictionary: &'a [u8],
    blocks: Vec<Block<'a>>,
    looks: Vec<u64>,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let dictionary = if input.zstd { input.dictionary } else { &[] };
    let about = About {
        zstd: input.zstd,
        encrypted: input.encrypted,
        dictionary: dictionary.len() as u32,
        ..About::default()
    };
    let mut writer = Writer::new(dictionary);
    let entries: Vec<Entry> = (0..)
        .zip(input.blocks.iter().take(16))
        .map(|(number, block)| block.write(number, about, dictionary, &mut writer))
        .collect();
    let size = entries.iter().map(|entry| u64::from(entry.length)).sum();
    let mut pages = Vec::new();
    if !entries.is_empty() {
        pages.push(Page { place: writer.page(&entries, about.layout), start_block: 0, start: 0 });
    }
    let index_offset = writer.finish(about, &[], &[pages, vec![]], [size, 0]);

    let bytes = writer.bytes;
    let judge = Archive::open(&bytes, about, index_offset).expect("an index that makes sense");
    let memory = Memory { length: bytes.len() as u64, bytes: bytes.clone() };
    match open(memory, false, true) {
        Ok(snapshot) => compare(&snapshot, &judge, 0, &input.looks),
        // The password is tried on a block, which may be a damaged one, or on a damaged page.
        Err(error) => {
            let first = judge.block_at(0, 0);
            let is_damaged = |block| judge.read(&block).is_none();
            let tried = first.is_none_or(is_damaged) || entries.len() > 1;
            assert!(input.encrypted && tried, "{error}");
        }
    }
}

impl Block<'_> {
    fn write(&self, number: u64, about: About, dictionary: &[u8], writer: &mut Writer) -> Entry {
        let mut stored = self.compressed(about, dictionary);
        for (at, by) in &self.changed {
            flip(&mut stored, *at, *by);
        }
        if about.zstd && has_large_window(&stored) {
            stored.clear();
        }
        let decoded = if about.zstd {
            zstd_frame(&stored, dictionary, MOST)
        } else {
            stored.get(4..).and_then(|raw| lz4::decode(raw, MOST))
        };
        let decoded = match (decoded, &self.source) {
            (Some(decoded), _) => decoded,
            // What it would be if everything were decoded.
            (None, Source::Twice(bytes)) => [*bytes, *bytes].concat(),
            (None, _) => Vec::new(),
        };
        let length = match self.length {
            Length::Right => decoded.len() as u32,
            Length::Off(by) => (decoded.len() as u32).saturating_add_signed(by.into()),
            // Rarely more than some, as long blocks are slow.
            Length::Any(length) if length.is_multiple_of(1024) => length % (1 << 25),
            Length::Any(length) => length % 10_000,
        };
        let length = length.max(1);
        if !about.zstd
            && let Some((size, _)) = stored.split_first_chunk_mut()
        {
            *size = length.to_le_bytes();
        }
        let hash = match self.hash {
            Hash::None => [0; 32],
            Hash::Right => *blake3::hash(&decoded).as_bytes(),
            Hash::OfZeros => *blake3::hash(&vec![0; length as usize]).as_bytes(),
            Hash::Wrong => [7; 32],
        };
        if about.encrypted {
            let number = number + u64::from(self.wrong_number);
            key().seal_in_place_append_tag(nonce(number), Aad::empty(), &mut stored).unwrap();
        }
        let mut checksum = crc32fast::hash(&stored);
        if let Some((at, by)) = self.damaged {
            flip(&mut stored, at, by);
            // Half of the time the checksum is that of the damaged bytes: the tag is to tell.
            checksum = if by & 1 == 0 { crc32fast::hash(&stored) } else { checksum };
        }
        let offset = writer.store(&stored);
        Entry { offset, stored: (stored.len() as u32).max(1), length, checksum, hash }
    }

    fn compressed(&self, about: About, dictionary: &[u8]) -> Vec<u8> {
        let compress = |bytes: &[u8]| {
            if !about.zstd {
                return lz4_flex::block::compress_prepend_size(bytes);
            }
            // A dictionary can be one that doesn't make sense.
            let compressor = zstd::bulk::Compressor::with_dictionary(1, dictionary);
            compressor.and_then(|mut with| with.compress(bytes)).unwrap_or_default()
        };
        match self.source {
            Source::Stored(bytes) if about.zstd => bytes.to_vec(),
            // Behind the place of the decoded size.
            Source::Stored(bytes) => [&[0; 4], bytes].concat(),
            Source::Bytes(bytes) => compress(bytes),
            Source::Run(byte, length) => compress(&vec![byte; length.into()]),
            Source::Twice(bytes) => [compress(bytes), compress(bytes)].concat(),
        }
    }
}

/// Whether a frame wants a window of more than 128 MiB. The reader decodes into a block, and
/// needs no window; the judge would, and refuses.
fn has_large_window(frame: &[u8]) -> bool {
    let is_single_segment = |descriptor: u8| descriptor & 0x20 != 0;
    match frame {
        [_, _, _, _, descriptor, window, ..] if !is_single_segment(*descriptor) => window >> 3 > 16,
        _ => false,
    }
}

fn flip(bytes: &mut [u8], at: u16, by: u8) {
    if let Some(count) = bytes.len().checked_sub(1) {
        bytes[usize::from(at) % (count + 1)] ^= by;
    }
}
