//! Writes archives for tests: whatever the format allows, with the places of all fields,
//! so that a test can put something else there.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU32;
use std::ops::Range;
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::pbkdf2;
use aws_lc_rs::signature::Ed25519KeyPair;
use hexz_reader::{Compression, Layout};

/// The region that the header has to itself, in bytes.
pub const HEADER_REGION: usize = 4096;
/// Encrypted archives of tests have this password.
pub const PASSWORD: &str = "correct horse battery staple";

const SALT: [u8; 16] = *b"sixteen salt byt";

/// Where the fields of a page's entry in the master index are, from its start.
pub mod page_entry {
    pub const OFFSET: usize = 0;
    pub const LENGTH: usize = 8;
    pub const START_BLOCK: usize = 12;
    pub const START_LOGICAL: usize = 20;
}

/// Where the fields of a block's entry on its page are, from its start. Entries of layouts A and
/// X end before the hash.
pub mod block_entry {
    pub const OFFSET: usize = 0;
    pub const STORED_LENGTH: usize = 8;
    pub const LENGTH: usize = 12;
    pub const CHECKSUM: usize = 16;
    pub const HASH: usize = 20;
}

/// A block to be written.
#[derive(Debug, Clone)]
pub enum Piece {
    /// Stored in this archive.
    Data(Vec<u8>),
    /// So many zeros, of which nothing is stored.
    Zeros(u32),
    /// Left to a parent that has a block of these bytes.
    InParent(Vec<u8>),
    /// Left to the parent, which has these bytes at the same offset. The hash is that of the
    /// parent's block that covers the first of them, or zeros.
    ByOffset { bytes: Vec<u8>, hash: [u8; 32] },
    /// Stored just so, neither compressed nor encrypted by the writer.
    Raw { stored: Vec<u8>, length: u32, hash: [u8; 32] },
}

impl Piece {
    /// How many bytes it has in the stream.
    pub fn length(&self) -> u32 {
        match self {
            Self::Data(bytes) | Self::InParent(bytes) | Self::ByOffset { bytes, .. } => {
                bytes.len() as u32
            }
            Self::Zeros(length) | Self::Raw { length, .. } => *length,
        }
    }

    /// Its bytes in the stream.
    pub fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Data(bytes) | Self::InParent(bytes) | Self::ByOffset { bytes, .. } => {
                bytes.clone()
            }
            Self::Zeros(length) | Self::Raw { length, .. } => vec![0; *length as usize],
        }
    }
}

/// How long a stream pieces make.
fn size(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.length())).sum()
}

/// The stream that pieces make.
pub fn image(pieces: &[Piece]) -> Vec<u8> {
    pieces.iter().flat_map(Piece::bytes).collect()
}

/// Bytes that don't compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new_derive_key("noise")
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Bytes that compress well, the same for the same seed.
pub fn text(seed: u64, length: usize) -> Vec<u8> {
    let words = noise(seed, 64);
    (0..length).map(|i| b'a' + words[(i / 3 + i / 50) % 64] % 20).collect()
}

/// Metadata of a converted tar archive whose files have that many bytes.
pub fn tar_metadata(total_bytes: u64) -> Vec<u8> {
    let source = format!(r#"{{"format":"tar","source_files":[],"total_bytes":{total_bytes}}}"#);
    format!(r#"{{"source":{source}}}"#).into_bytes()
}

/// Returns true if entries of that layout have no hash.
fn has_short_entries(layout: Layout) -> bool {
    matches!(layout, Layout::A | Layout::X)
}

/// An archive to be written.
#[derive(Debug, Clone)]
pub struct ArchiveWriter {
    /// Form of the header and of block entries.
    pub layout: Layout,
    pub compression: Compression,
    /// For Zstandard; empty for none.
    pub dictionary: Vec<u8>,
    /// Makes it an encrypted archive.
    pub password: Option<&'static str>,
    pub iterations: u32,
    /// Whether stored blocks get their hash. Those of encrypted archives never do.
    pub hashed: bool,
    /// Whether equal blocks share one stored copy. Those of encrypted archives can't.
    pub deduplicated: bool,
    pub blocks_per_page: usize,
    pub parents: Vec<String>,
    pub metadata: Option<Vec<u8>>,
    pub signature: Option<[u8; 64]>,
    /// Number of replaced signatures of 64 bytes that are left behind the master index.
    pub old_signatures: usize,
    /// Size of the main stream according to the master index, unless it is that of the pieces:
    /// 0 for a packed pipe, more for a converted tar archive.
    pub stated_main_size: Option<u64>,
    pub main: Vec<Piece>,
    pub auxiliary: Vec<Piece>,
}

impl Default for ArchiveWriter {
    fn default() -> Self {
        Self {
            layout: Layout::D,
            compression: Compression::Zstd,
            dictionary: Vec::new(),
            password: None,
            iterations: 3,
            hashed: true,
            deduplicated: true,
            blocks_per_page: 4096,
            parents: Vec::new(),
            metadata: None,
            signature: None,
            old_signatures: 0,
            stated_main_size: None,
            main: Vec::new(),
            auxiliary: Vec::new(),
        }
    }
}

/// The archive's bytes, and what is where in them.
#[derive(Debug, Clone)]
pub struct Written {
    pub bytes: Vec<u8>,
    pub main: Vec<WrittenPage>,
    pub auxiliary: Vec<WrittenPage>,
    /// Fields of the header and the master index by name.
    fields: BTreeMap<&'static str, Range<usize>>,
}

#[derive(Debug, Clone)]
pub struct WrittenPage {
    /// Where its entry in the master index begins.
    pub entry: usize,
    /// Where it is itself.
    pub place: Range<usize>,
    pub blocks: Vec<WrittenBlock>,
}

#[derive(Debug, Clone)]
pub struct WrittenBlock {
    /// Where its entry on its page begins.
    pub entry: usize,
    /// Where its bytes are stored; empty if they aren't.
    pub stored: Range<usize>,
}

impl Written {
    /// Where a field of the header or the master index is.
    pub fn field(&self, name: &str) -> Range<usize> {
        self.fields.get(name).unwrap_or_else(|| panic!("there is no field \"{name}\"")).clone()
    }

    /// Puts another value into a field of the header or the master index.
    pub fn set(&mut self, name: &str, value: &[u8]) -> &mut Self {
        assert_eq!(self.field(name).len(), value.len(), "the length of \"{name}\"");
        self.put(self.field(name).start, value)
    }

    /// Puts other bytes anywhere.
    pub fn put(&mut self, at: usize, value: &[u8]) -> &mut Self {
        self.bytes[at..at + value.len()].copy_from_slice(value);
        self
    }

    /// Where the master index begins.
    pub fn index_offset(&self) -> usize {
        self.field("main page count").start
    }

    /// Signs it, in the place that the writer's signature has made.
    pub fn sign(&mut self, key: &Ed25519KeyPair) -> &mut Self {
        let digest = digest(&SHA256, &self.bytes[self.signed()]);
        let signature = key.sign(digest.as_ref());
        self.set("signature", signature.as_ref())
    }

    /// What the signature is of.
    pub fn signed(&self) -> Range<usize> {
        self.index_offset()..self.field("signature").start
    }

    pub fn save(&self, path: &Path) {
        std::fs::write(path, &self.bytes).unwrap();
    }
}

impl ArchiveWriter {
    /// An archive of one image, cut into blocks of one size.
    pub fn of_image(image: &[u8], block: usize) -> Self {
        let main = image.chunks(block).map(|chunk| Piece::Data(chunk.to_vec())).collect();
        Self { main, ..Self::default() }
    }

    /// Hash in the entry of a piece of this archive; zeros where there is none.
    pub fn entry_hash(&self, piece: &Piece) -> [u8; 32] {
        match piece {
            _ if has_short_entries(self.layout) => [0; 32],
            Piece::Zeros(_) => [0; 32],
            Piece::ByOffset { hash, .. } | Piece::Raw { hash, .. } => *hash,
            Piece::Data(_) if !self.hashed || self.password.is_some() => [0; 32],
            Piece::Data(bytes) | Piece::InParent(bytes) => *blake3::hash(bytes).as_bytes(),
        }
    }

    /// References by offset to a stream of this archive, in blocks of one size.
    pub fn referred_by_offset(&self, pieces: &[Piece], block: usize) -> Vec<Piece> {
        let image = image(pieces);
        let covering = |start: usize| {
            let mut end = 0;
            let piece = pieces.iter().find(|piece| {
                end += piece.length() as usize;
                start < end
            });
            self.entry_hash(piece.expect("the stream is longer"))
        };
        (0..image.len())
            .step_by(block)
            .map(|start| {
                let bytes = image[start..image.len().min(start + block)].to_vec();
                Piece::ByOffset { bytes, hash: covering(start) }
            })
            .collect()
    }

    pub fn write(&self) -> Written {
        let mut file = Body {
            writer: self,
            key: self.password.map(|password| key(password, self.iterations)),
            bytes: vec![0; HEADER_REGION],
            stored: HashMap::new(),
            number: 0,
        };
        file.bytes.extend(&self.dictionary);
        let mut main = file.pages(&self.main);
        let mut auxiliary = file.pages(&self.auxiliary);
        let mut fields = Fields { bytes: file.bytes, places: BTreeMap::new() };

        let index_offset = fields.bytes.len();
        for (name, pages) in
            [("main page count", &mut main), ("auxiliary page count", &mut auxiliary)]
        {
            fields.put(name, &(pages.len() as u64).to_le_bytes());
            for (page, start) in pages {
                page.entry = fields.bytes.len();
                fields.bytes.extend((page.place.start as u64).to_le_bytes());
                fields.bytes.extend((page.place.len() as u32).to_le_bytes());
                fields.bytes.extend(start.block.to_le_bytes());
                fields.bytes.extend(start.logical.to_le_bytes());
            }
        }
        let main_size = self.stated_main_size.unwrap_or_else(|| size(&self.main));
        fields.put("main size", &main_size.to_le_bytes());
        fields.put("auxiliary size", &size(&self.auxiliary).to_le_bytes());
        if self.old_signatures > 0 {
            fields.put("old signatures", &vec![0x5a; 64 * self.old_signatures]);
        }
        let metadata = self.metadata.as_ref().map(|bytes| fields.put("metadata", bytes));
        let signature = self.signature.as_ref().map(|bytes| fields.put("signature", bytes));

        let mut header = Fields { bytes: Vec::new(), places: fields.places };
        self.header(&mut header, index_offset, metadata, signature);
        assert!(header.bytes.len() <= HEADER_REGION, "the header is too long");
        fields.bytes[..header.bytes.len()].copy_from_slice(&header.bytes);

        let without_starts =
            |pages: Vec<(WrittenPage, _)>| pages.into_iter().map(|(page, _)| page).collect();
        Written {
            bytes: fields.bytes,
            main: without_starts(main),
            auxiliary: without_starts(auxiliary),
            fields: header.places,
        }
    }

    fn header(
        &self,
        header: &mut Fields,
        index_offset: usize,
        metadata: Option<Range<usize>>,
        signature: Option<Range<usize>>,
    ) {
        header.put("magic", b"HEXZ");
        header.put("version", &1_u32.to_le_bytes());
        header.put("block size", &65536_u32.to_le_bytes());
        header.put("index offset", &(index_offset as u64).to_le_bytes());
        match self.layout {
            Layout::A | Layout::B => {
                assert!(self.parents.len() <= 1, "this layout has one parent at most");
                header.put("parent flag", &[self.parents.len() as u8]);
            }
            _ => {
                header.put("parent count", &(self.parents.len() as u64).to_le_bytes());
            }
        }
        for parent in &self.parents {
            header.put("parent length", &(parent.len() as u64).to_le_bytes());
            header.put("parent", parent.as_bytes());
        }
        let dictionary = HEADER_REGION..HEADER_REGION + self.dictionary.len();
        let dictionary = Some(dictionary).filter(|place| !place.is_empty());
        header.put_extent("dictionary offset", "dictionary length", dictionary);
        header.put_extent("metadata offset", "metadata length", metadata);
        header.put_extent("signature offset", "signature length", signature);
        header.put("encryption", &[self.password.is_some().into()]);
        if self.password.is_some() {
            header.put("salt", &SALT);
            header.put("iterations", &self.iterations.to_le_bytes());
        }
        let compression: u32 = match self.compression {
            Compression::Lz4 => 0,
            Compression::Zstd => 1,
        };
        header.put("compression", &compression.to_le_bytes());
        let features = [true, !self.auxiliary.is_empty(), true].map(u8::from);
        header.put("features", &features);
        match self.layout {
            Layout::D => {
                header.put("chunking flag", &[1]);
                let chunking = [16_u32, 16_384, 262_144].map(u32::to_le_bytes);
                header.put("chunking", chunking.as_flattened());
            }
            // In layouts that had no such field, this is padding.
            _ => {
                header.put("chunking flag", &[0]);
            }
        }
    }

    fn compress(&self, block: &[u8]) -> Vec<u8> {
        match self.compression {
            Compression::Lz4 => lz4_flex::block::compress_prepend_size(block),
            Compression::Zstd => {
                let mut compressor =
                    zstd::bulk::Compressor::with_dictionary(3, &self.dictionary).unwrap();
                compressor.compress(block).unwrap()
            }
        }
    }
}

/// Where a page begins, counted in blocks and in bytes.
#[derive(Debug, Clone, Copy)]
struct Start {
    block: u64,
    logical: u64,
}

/// The blocks and pages as they are written.
struct Body<'a> {
    writer: &'a ArchiveWriter,
    key: Option<LessSafeKey>,
    bytes: Vec<u8>,
    /// What is stored already, for de-duplication.
    stored: HashMap<Vec<u8>, Range<usize>>,
    /// How many blocks there are so far.
    number: u64,
}

impl Body<'_> {
    fn pages(&mut self, pieces: &[Piece]) -> Vec<(WrittenPage, Start)> {
        let mut logical = 0;
        let mut pages = Vec::new();
        for pieces in pieces.chunks(self.writer.blocks_per_page) {
            let start = Start { block: self.number, logical };
            let mut page = (pieces.len() as u64).to_le_bytes().to_vec();
            let mut blocks = Vec::new();
            for piece in pieces {
                let (entry, stored) = self.block(piece);
                blocks.push(WrittenBlock { entry: page.len(), stored });
                page.extend(entry);
                self.number += 1;
                logical += u64::from(piece.length());
            }
            let at = self.bytes.len();
            self.bytes.extend(&page);
            blocks.iter_mut().for_each(|block| block.entry += at);
            pages.push((WrittenPage { entry: 0, place: at..at + page.len(), blocks }, start));
        }
        pages
    }

    /// Stores a block: its entry, and where its bytes are.
    fn block(&mut self, piece: &Piece) -> (Vec<u8>, Range<usize>) {
        let (mut entry, stored) = self.block_with_hash(piece);
        if has_short_entries(self.writer.layout) {
            entry.truncate(block_entry::HASH);
        }
        (entry, stored)
    }

    fn block_with_hash(&mut self, piece: &Piece) -> (Vec<u8>, Range<usize>) {
        let length = piece.length();
        let layout = self.writer.layout;
        let hash = |bytes: &[u8]| *blake3::hash(bytes).as_bytes();
        match piece {
            Piece::Zeros(_) => (entry(0, 0, length, 0, [0; 32]), 0..0),
            Piece::InParent(bytes) => {
                assert!(!has_short_entries(layout), "this layout has no hashes");
                (entry(u64::MAX, 0, length, 0, hash(bytes)), 0..0)
            }
            Piece::ByOffset { hash, .. } => {
                assert!(layout != Layout::D, "this layout refers to parents by hash");
                (entry(u64::MAX, 0, length, 0, *hash), 0..0)
            }
            Piece::Raw { stored, hash, .. } => self.store(stored.clone(), length, *hash),
            Piece::Data(bytes) => {
                let hashed = self.writer.hashed && self.key.is_none();
                let hash = if hashed { hash(bytes) } else { [0; 32] };
                let mut stored = self.writer.compress(bytes);
                if let Some(key) = &self.key {
                    encrypt(key, self.number, &mut stored);
                }
                self.store(stored, length, hash)
            }
        }
    }

    fn store(&mut self, stored: Vec<u8>, length: u32, hash: [u8; 32]) -> (Vec<u8>, Range<usize>) {
        let known = self.stored.get(&stored).filter(|_| self.writer.deduplicated).cloned();
        let place = known.unwrap_or_else(|| {
            let start = self.bytes.len();
            self.bytes.extend(&stored);
            start..self.bytes.len()
        });
        let checksum = crc32fast::hash(&stored);
        let entry = entry(place.start as u64, place.len() as u32, length, checksum, hash);
        self.stored.insert(stored, place.clone());
        (entry, place)
    }
}

/// A block's entry, as a page has it.
pub fn entry(offset: u64, stored: u32, length: u32, checksum: u32, hash: [u8; 32]) -> Vec<u8> {
    let mut entry = offset.to_le_bytes().to_vec();
    for field in [stored, length, checksum] {
        entry.extend(field.to_le_bytes());
    }
    entry.extend(hash);
    entry
}

fn key(password: &str, iterations: u32) -> LessSafeKey {
    let mut key = [0; 32];
    let iterations = NonZeroU32::new(iterations).unwrap();
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, iterations, &SALT, password.as_bytes(), &mut key);
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap())
}

fn encrypt(key: &LessSafeKey, number: u64, stored: &mut Vec<u8>) {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&number.to_be_bytes());
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, Aad::empty(), stored).unwrap();
}

/// Bytes to which fields are added, with their names.
struct Fields {
    bytes: Vec<u8>,
    places: BTreeMap<&'static str, Range<usize>>,
}

impl Fields {
    fn put(&mut self, name: &'static str, value: &[u8]) -> Range<usize> {
        let place = self.bytes.len()..self.bytes.len() + value.len();
        self.bytes.extend(value);
        self.places.insert(name, place.clone());
        place
    }

    fn put_extent(&mut self, offset: &'static str, length: &'static str, of: Option<Range<usize>>) {
        let flag = u8::from(of.is_some());
        self.bytes.push(flag);
        if let Some(place) = &of {
            self.put(offset, &(place.start as u64).to_le_bytes());
        }
        self.bytes.push(flag);
        if let Some(place) = &of {
            self.put(length, &(place.len() as u32).to_le_bytes());
        }
    }
}
