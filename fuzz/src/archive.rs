//! Archives to be judged: the bytes of one, written field by field, and the storage that it
//! is read from, which notices reads that go beyond it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use arbitrary::Arbitrary;
use hexz_reader::storage::{FileId, Storage};
use hexz_reader::{Error, OpenOptions, Password, Snapshot};

/// The region that the header has to itself, in bytes.
pub const HEADER: usize = 4096;
pub const PASSWORD: &[u8] = b"the password of archives that are fuzzed";
pub const SALT: [u8; 16] = *b"sixteen salt byt";

/// Bytes, and zeros behind them up to a length.
#[derive(Debug)]
pub struct Memory {
    pub bytes: Vec<u8>,
    pub length: u64,
}

impl Storage for Memory {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).expect("a read without an end");
        assert!(end <= self.length, "{offset}..{end} of {} bytes", self.length);
        buffer.fill(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = self.bytes.get(start..).unwrap_or_default();
        let count = there.len().min(buffer.len());
        buffer[..count].copy_from_slice(&there[..count]);
        Ok(())
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// Opens an archive beside which there is nothing.
pub fn open(storage: Memory, raw: bool, password: bool) -> Result<Arc<Snapshot>, Box<Error>> {
    let password = password.then(|| Password::new(PASSWORD.to_vec()).into());
    let options = OpenOptions { raw, password, ..OpenOptions::default() };
    let name = Path::new("/nonexistent/folder/fuzzed.hxz");
    Snapshot::from_storage(name, Arc::new(storage), &options).map(Arc::new).map_err(Box::new)
}

/// Published layout of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Arbitrary)]
pub enum Layout {
    #[default]
    D,
    C,
    B,
    A,
    X,
}

impl Layout {
    /// Returns true if the header has a list of parents, not an optional one.
    pub fn has_parent_list(self) -> bool {
        !matches!(self, Self::A | Self::B)
    }

    /// Returns true if the header has chunking parameters.
    pub fn has_chunking(self) -> bool {
        self == Self::D
    }

    /// Returns true if index entries have a hash.
    pub fn has_hashes(self) -> bool {
        !matches!(self, Self::A | Self::X)
    }
}

/// What the header says, of what isn't fuzzed in it.
#[derive(Debug, Clone, Copy, Default)]
pub struct About {
    pub layout: Layout,
    pub zstd: bool,
    pub encrypted: bool,
    /// The length of the dictionary, which stands behind the header.
    pub dictionary: u32,
}

/// The header of an archive whose master index is at `index_offset`. Layouts with an optional
/// parent name the first of `parents` only.
pub fn header(about: About, parents: &[&str], index_offset: u64) -> Vec<u8> {
    let mut out = b"HEXZ".to_vec();
    out.extend(1_u32.to_le_bytes());
    out.extend(65536_u32.to_le_bytes());
    out.extend(index_offset.to_le_bytes());
    if about.layout.has_parent_list() {
        put_parents(&mut out, parents);
    } else {
        put_parent(&mut out, parents.first().copied());
    }
    let has_dictionary = u8::from(about.dictionary > 0);
    out.push(has_dictionary);
    if about.dictionary > 0 {
        out.extend((HEADER as u64).to_le_bytes());
    }
    out.push(has_dictionary);
    if about.dictionary > 0 {
        out.extend(about.dictionary.to_le_bytes());
    }
    // Neither metadata nor signature.
    out.extend([0; 4]);
    out.push(about.encrypted.into());
    if about.encrypted {
        out.extend(SALT);
        out.extend(1_u32.to_le_bytes());
    }
    out.extend(u32::from(about.zstd).to_le_bytes());
    out.extend([1, 1, 1]);
    if about.layout.has_chunking() {
        out.push(1);
        [16_u32, 16384, 262_144].iter().for_each(|value| out.extend(value.to_le_bytes()));
    }
    out.resize(HEADER, 0);
    out
}

/// Writes the field that names parents, as a list.
pub fn put_parents(out: &mut Vec<u8>, parents: &[&str]) {
    out.extend((parents.len() as u64).to_le_bytes());
    parents.iter().for_each(|parent| put_string(out, parent));
}

/// Writes the older field that names one parent or none.
pub fn put_parent(out: &mut Vec<u8>, parent: Option<&str>) {
    out.push(parent.is_some().into());
    if let Some(parent) = parent {
        put_string(out, parent);
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// An archive in the making.
#[derive(Debug, Default)]
pub struct Writer {
    pub bytes: Vec<u8>,
    /// Where fields of the index are, and how long each is.
    pub fields: Vec<(usize, usize)>,
}

impl Writer {
    /// Room for the header, and the dictionary.
    pub fn new(dictionary: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes.extend(dictionary);
        Self { bytes, fields: Vec::new() }
    }

    pub fn field(&mut self, value: &[u8]) {
        self.fields.push((self.bytes.len(), value.len()));
        self.bytes.extend(value);
    }

    /// Adds stored bytes; returns where they are.
    pub fn store(&mut self, bytes: &[u8]) -> u64 {
        let at = self.bytes.len() as u64;
        self.bytes.extend(bytes);
        at
    }

    /// Adds a page of blocks; returns its place.
    pub fn page(&mut self, blocks: &[Entry], layout: Layout) -> (u64, u32) {
        let at = self.bytes.len();
        self.field(&(blocks.len() as u64).to_le_bytes());
        for block in blocks {
            self.field(&block.offset.to_le_bytes());
            self.field(&block.stored.to_le_bytes());
            self.field(&block.length.to_le_bytes());
            self.field(&block.checksum.to_le_bytes());
            if layout.has_hashes() {
                self.field(&block.hash);
            }
        }
        (at as u64, (self.bytes.len() - at) as u32)
    }

    /// Adds the master index of both streams' pages, and puts the header in front. Returns where
    /// the index is.
    pub fn finish(
        &mut self,
        about: About,
        parents: &[&str],
        pages: &[Vec<Page>; 2],
        sizes: [u64; 2],
    ) -> u64 {
        let index_offset = self.bytes.len() as u64;
        for pages in pages {
            self.field(&(pages.len() as u64).to_le_bytes());
            for Page { place: (offset, length), start_block, start } in pages {
                self.field(&offset.to_le_bytes());
                self.field(&length.to_le_bytes());
                self.field(&start_block.to_le_bytes());
                self.field(&start.to_le_bytes());
            }
        }
        sizes.iter().for_each(|size| self.field(&size.to_le_bytes()));
        self.bytes[..HEADER].copy_from_slice(&header(about, parents, index_offset));
        index_offset
    }
}

/// A page, as the master index has it.
#[derive(Debug, Clone, Copy)]
pub struct Page {
    /// Where it is, and how long.
    pub place: (u64, u32),
    /// The number of its first block, over both streams.
    pub start_block: u64,
    /// Where it begins in its stream.
    pub start: u64,
}

/// A block's entry, as its page has it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Entry {
    pub offset: u64,
    pub stored: u32,
    pub length: u32,
    pub checksum: u32,
    pub hash: [u8; 32],
}
