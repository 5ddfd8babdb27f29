//! The Hexz archive format, version 1, for reading.
//!
//! ```text
//! 0             header, in a region of 4096 bytes            header.rs
//! 4096          dictionary, if any                           codec.rs
//!   …           compressed blocks and index pages, mixed     index.rs
//! index_offset  master index                                 index.rs
//!   …           metadata and signature, if any
//! ```
//!
//! Every published version of Hexz calls its format version 1, and there are several layouts
//! of it (`layout.rs`).
//!
//! A stream (main or auxiliary) is cut into blocks; a page of the index lists up to 4096
//! of them. A block is stored here, or is zeros, or lives in a parent archive (`chain.rs`):
//! it is found there by its BLAKE3 hash (`parents.rs`), or is whatever the parent has at the
//! same offset (`references.rs`). A stored block becomes the
//! stream's bytes by CRC-32, decryption, decompression, length and hash (`archive.rs`);
//! whatever doesn't fit is an error, never zeros. Before anything of an archive is used, it
//! can be asked to be signed (`signature.rs`), or to be a certain file (`digest.rs`);
//! `verify.rs` reads all of it, `facts/` says what is in it without reading blocks.
//!
//! Everything here blocks while it reads, except what says that it doesn't.

mod archive;
mod chain;
mod codec;
mod crypto;
mod digest;
mod error;
mod extents;
pub mod facts;
mod faults;
mod fields;
mod header;
mod image;
mod index;
mod layout;
pub mod limits;
mod metadata;
mod pages;
mod parents;
mod password;
mod references;
mod said;
mod signature;
mod verify;
mod zeros;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use archive::Archive;
pub use digest::{Digest, DigestMemory, Digests, DigestsError, format_line};
use error::printable;
pub use error::{Ambiguity, Error, Problem};
pub use extents::{Reference, Run};
pub use faults::Fault;
pub use header::{Chunking, Compression};
pub use image::ImageFormat;
use index::{Content, Entry, Located, Page, StreamIndex};
pub use layout::Layout;
use metadata::Metadata;
pub use pages::IndexPages;
use pages::PageId;
use parents::{HashIndex, InParent, Parents};
pub use password::{Password, PasswordSource};
use references::Miss;
pub use references::{ReferenceChoice, ReferenceChoiceError, ReferenceMode};
use said::may_say;
pub use signature::{VerifyKey, VerifyKeyError};
pub use verify::{Progress, Summary};
use zeros::ZeroHashes;

pub use crate::background::Background;
use crate::storage::{Reads, Storage};

/// One of an archive's two sequences of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// The disk.
    Main,
    /// What goes with it, such as a virtual machine's memory.
    Auxiliary,
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "main",
            Self::Auxiliary => "auxiliary",
        })
    }
}

/// A block's BLAKE3-256, or 32 zeros where the packer gave none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// Stands where the packer gave no hash.
    pub(crate) const NONE: Self = Self([0; 32]);

    /// Returns true if the packer gave a hash.
    pub fn is_given(&self) -> bool {
        *self != Self::NONE
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How a snapshot is to be opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Folders in which parents are looked for, besides the archive's own.
    pub parent_dirs: Vec<PathBuf>,
    /// Whether the archive may name parents anywhere on this machine.
    pub parents_anywhere: bool,
    /// For the archives of the chain that are encrypted. The password is wiped when their
    /// keys have been derived.
    pub password: Option<PasswordSource>,
    /// Iterations of the key derivation that an encrypted archive may ask for, at most.
    pub max_key_iterations: u32,
    /// Where keys are derived. Snapshots that are opened with the same one don't do so at once.
    pub background: Arc<Background>,
    /// Set to true when nobody waits for the snapshot any more. A key whose turn comes later
    /// isn't derived, and opening fails with [`Problem::Abandoned`].
    pub is_abandoned: Arc<AtomicBool>,
    /// Whether a directory archive's bare stream is wanted.
    pub raw: bool,
    /// Decisions for references to parents that may be by offset or by hash, and mean
    /// different bytes then. Without one, such a block is an error.
    pub reference_choices: Arc<[ReferenceChoice]>,
    /// If true, ranges that no block covers read as zeros instead of being errors.
    pub zero_uncovered: bool,
    /// Whether a block that was decoded is compared with its BLAKE3. Without it, damage to
    /// stored bytes is still found (CRC-32), but not an index entry that leads to another
    /// block of the same length. Blocks of encrypted archives have no hash anyway.
    pub verify_hashes: bool,
    /// Unless there are none, each archive of the chain has to have a valid signature by one
    /// of these keys. It covers the master index and the metadata, and neither the header nor
    /// the index pages nor the blocks.
    pub verify_keys: Arc<[VerifyKey]>,
    /// If given, each archive of the chain has to have its digest there. All of it is read
    /// when it is opened; whatever is read later is verified by the hash tree that this makes.
    pub digests: Option<Arc<Digests>>,
    /// Memory for that, together with that of other snapshots.
    pub digest_memory: DigestMemory,
    /// Where index pages are kept, together with those of other snapshots.
    pub index_pages: Arc<IndexPages>,
    /// Where it is counted what is read, together with what is read of other snapshots.
    pub reads: Arc<Reads>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            parent_dirs: Vec::new(),
            parents_anywhere: false,
            password: None,
            max_key_iterations: limits::DEFAULT_KDF_ITERATIONS,
            background: Arc::default(),
            is_abandoned: Arc::default(),
            raw: false,
            reference_choices: Arc::default(),
            zero_uncovered: false,
            verify_hashes: true,
            verify_keys: Arc::default(),
            digests: None,
            digest_memory: DigestMemory::default(),
            index_pages: IndexPages::new(limits::DEFAULT_INDEX_BUDGET),
            reads: Arc::default(),
        }
    }
}

/// A block of a stream, or a part of one: its range of the stream, and where to get its
/// bytes.
///
/// It is a part where a reference by offset covers only some of an ancestor's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    stream: StreamKind,
    /// Position in the chain of the archive that has the entry.
    archive: usize,
    /// The whole block, as that archive has it.
    located: Located,
    start: u64,
    length: u32,
    /// True if it is a reference that may be by offset or by hash, so that its hash isn't
    /// known to be that of its bytes.
    is_undecided: bool,
}

impl Block {
    fn whole(archive: usize, stream: StreamKind, located: Located) -> Self {
        let Located { start, length, .. } = located;
        Self { stream, archive, located, start, length, is_undecided: false }
    }

    /// The part of another block of the stream that lies within this one.
    fn part_of(&self, archive: usize, located: Located) -> Self {
        let start = self.start.max(located.start);
        let end = self.end().min(located.end());
        // No longer than a block, whose length has 32 bits.
        let length = u32::try_from(end.saturating_sub(start)).unwrap_or_default();
        Self { archive, located, start, length, ..*self }
    }

    /// Where it begins in the stream, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its length in the stream, in bytes; never zero.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Where it ends in the stream, in bytes.
    pub fn end(&self) -> u64 {
        self.start() + u64::from(self.length())
    }

    /// Bytes of the whole block that lie before this part of it.
    pub fn skipped(&self) -> u32 {
        u32::try_from(self.start - self.located.start).unwrap_or_default()
    }

    /// Length of the whole block, in bytes: what [`Snapshot::read_block`] returns.
    pub fn decoded_length(&self) -> u32 {
        self.located.length
    }

    /// Where the whole block begins in the stream, in bytes.
    pub fn decoded_start(&self) -> u64 {
        self.located.start
    }

    /// Position in the chain of the archive whose index has the block; 0 is the snapshot's own.
    pub fn archive(&self) -> usize {
        self.archive
    }

    /// Returns true if it is known, without reading it, to be zeros.
    pub fn is_zeros(&self) -> bool {
        self.located.entry.content == Content::Zeros
    }

    /// Hash of the whole block, if the packer gave one: equal hashes mean equal bytes, in any
    /// archive.
    pub fn hash(&self) -> Option<BlockHash> {
        let hash = self.located.entry.hash;
        (hash.is_given() && !self.is_undecided).then_some(hash)
    }

    /// Estimate of the work to read and decode it, in nanoseconds: one for each byte that is
    /// stored, and for each that is decoded. Of a block in a parent it isn't known what is
    /// stored; an ambiguous one is read, hashed and looked up besides.
    pub fn work(&self) -> u64 {
        let decoded = u64::from(self.decoded_length());
        match self.located.entry.content {
            Content::Stored { place, .. } => decoded + u64::from(place.length),
            Content::InParent if self.is_undecided => 4 * decoded,
            Content::InParent | Content::Contradiction => 2 * decoded,
            Content::Zeros => 0,
        }
    }

    /// Where it is stored in its own archive's file, in bytes, if it is stored there.
    pub fn stored_at(&self) -> Option<u64> {
        match self.located.entry.content {
            Content::Stored { place, .. } if self.archive == 0 => Some(place.offset),
            _ => None,
        }
    }
}

/// How a block is being read.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// Number of ambiguous references that have led to it.
    depth: u32,
    /// True if the index of the parents' hashes is built when it is needed; otherwise that it
    /// is missing is an error.
    builds_index: bool,
}

/// Something about an archive that is no fault, but not what a user would expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remark {
    /// The master index states 0 bytes, and lists blocks.
    SizeNotStated {
        /// Which stream.
        stream: StreamKind,
        /// Sum of the blocks' lengths, in bytes: the size that is served.
        size: u64,
    },
    /// The blocks end before the stated length.
    EndsEarly {
        /// Which stream.
        stream: StreamKind,
        /// Where its blocks end, in bytes.
        end: u64,
        /// Its stated length, in bytes.
        size: u64,
        /// True if the bytes in between read as zeros, false if they can't be read.
        reads_zeros: bool,
    },
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SizeNotStated { stream, size } => write!(
                f,
                "its index states 0 bytes for the {stream} stream, as when a pipe or a block \
                 device is packed: serving the {size} bytes of its blocks"
            ),
            Self::EndsEarly { stream, end, size, reads_zeros } => {
                let then = if *reads_zeros {
                    "read as zeros"
                } else {
                    "can't be read (--zero-uncovered reads them as zeros)"
                };
                write!(
                    f,
                    "blocks end before the stated length, as \"hexz convert tar\" writes it: \
                     bytes {end} to {size} of the {stream} stream {then}"
                )
            }
        }
    }
}

/// An archive and all its ancestors, open for reading.
#[derive(Debug)]
pub struct Snapshot {
    id: u64,
    /// The archive itself, then its ancestors, nearer ones first.
    chain: Vec<Archive>,
    pages: Arc<IndexPages>,
    parents: Parents,
    zeros: ZeroHashes,
}

impl Snapshot {
    /// Opens the archive at `path`, finds its ancestors, and checks header and master
    /// index of each.
    ///
    /// # Errors
    /// One of them is missing, unreadable, damaged, encrypted with another password, or
    /// isn't what it should be. The error names the file and what to do.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        Self::from_chain(chain::open(path, options)?, options)
    }

    /// The same for bytes that are no file. `name` stands for it in messages, and its
    /// folder is where parents are looked for.
    ///
    /// # Errors
    /// As for [`Snapshot::open`].
    pub fn from_storage(
        name: &Path,
        storage: Arc<dyn Storage>,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        Self::from_chain(chain::open_storage(name, storage, options)?, options)
    }

    /// Opens the archive at `path`, or what `storage` has of it, for what header and index say
    /// of it: derives no key, hashes no file and reads no block, so it doesn't find out whether
    /// the password is right, or the file the one that a digest is of.
    ///
    /// # Errors
    /// As for [`Snapshot::open`], as far as header and index show it.
    pub(crate) fn open_index(
        path: &Path,
        storage: Option<Arc<dyn Storage>>,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        let unhashed = OpenOptions { digests: None, ..options.clone() };
        let (chain, links) = chain::open_for_index(path, storage, &unhashed)?;
        links.into_iter().try_for_each(|link| link.found.map(drop))?;
        for archive in &chain {
            if let Some(digests) = &options.digests {
                digests.expect(&archive.path)?;
            }
            if archive.header.encryption.is_some() && options.password.is_none() {
                return Err(Problem::PasswordNeeded.of(&archive.path));
            }
        }
        Self::from_chain(chain, &unhashed)
    }

    fn from_chain(chain: Vec<Archive>, options: &OpenOptions) -> Result<Self, Error> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        if let Some(archive) = chain.first()
            && archive.metadata == Some(Metadata::Manifest)
            && !options.raw
        {
            return Err(Problem::DirectoryArchive.of(&archive.path));
        }
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            chain,
            pages: Arc::clone(&options.index_pages),
            parents: Parents::default(),
            zeros: ZeroHashes::default(),
        })
    }

    /// A number that no other snapshot of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The archive's path, as it was given.
    pub fn path(&self) -> &Path {
        self.chain.first().map_or(Path::new(""), |archive| &archive.path)
    }

    /// The paths of its ancestors, nearer ones first.
    pub fn parents(&self) -> impl Iterator<Item = &Path> {
        self.chain.iter().skip(1).map(|archive| archive.path.as_ref())
    }

    /// Whether opening it again would find the same files: none of the chain has been
    /// replaced or written to.
    pub fn is_current(&self) -> bool {
        self.chain.iter().all(Archive::is_current)
    }

    /// A stream's size in bytes; zero for one that isn't there.
    pub fn size(&self, stream: StreamKind) -> u64 {
        self.chain.first().map_or(0, |archive| archive.stream(stream).size)
    }

    /// How its own blocks are compressed.
    pub fn compression(&self) -> Compression {
        self.chain.first().map_or(Compression::Zstd, |archive| archive.header.compression)
    }

    /// Whether blocks are compared with their hashes, so that equal hashes are known to be
    /// equal bytes.
    pub fn verifies_hashes(&self) -> bool {
        self.chain.first().is_some_and(|archive| archive.verify_hashes)
    }

    /// Whether its own blocks are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.chain.first().is_some_and(|archive| archive.header.encryption.is_some())
    }

    /// The nominal block size, in bytes. Real blocks may be larger or smaller.
    pub fn block_size(&self) -> u32 {
        self.chain.first().map_or(0, |archive| archive.header.block_size)
    }

    /// Oddities of the archive itself that users should know of.
    pub fn remarks(&self) -> Vec<Remark> {
        let Some(own) = self.chain.first() else { return Vec::new() };
        let mut remarks = Vec::new();
        for stream in [StreamKind::Main, StreamKind::Auxiliary] {
            let &StreamIndex { size, end, is_size_summed, .. } = own.stream(stream);
            if is_size_summed {
                remarks.push(Remark::SizeNotStated { stream, size });
            }
            if end < size {
                let reads_zeros = own.zero_uncovered;
                remarks.push(Remark::EndsEarly { stream, end, size, reads_zeros });
            }
        }
        remarks
    }

    /// Logs what users of the archive may not expect of it, as a warning.
    pub fn log_oddities(&self) {
        let image = self.image_format().ok().flatten();
        let oddities = self.remarks().into_iter().map(|remark| remark.to_string());
        for oddity in oddities.chain(image.map(|image| image.to_string())) {
            if let Some(held_back) = may_say() {
                tracing::warn!(held_back, "{}: {oddity}", printable(self.path()));
            }
        }
    }

    /// Format of the main stream, if it begins like an image of a disk or a compressed file.
    ///
    /// # Errors
    /// Its first bytes can't be read.
    pub fn image_format(&self) -> Result<Option<ImageFormat>, Error> {
        let length = self.size(StreamKind::Main).min(image::SIGNATURES_END as u64);
        let mut start = vec![0; usize::try_from(length).unwrap_or_default()];
        self.read_exact_at(StreamKind::Main, &mut start, 0)?;
        Ok(ImageFormat::of(&start))
    }

    /// The block that covers byte `at` of a stream.
    ///
    /// # Errors
    /// The index page can't be read or is damaged, or no block covers that byte.
    pub fn locate(&self, stream: StreamKind, at: u64) -> Result<Block, Error> {
        self.locate_in(0, stream, at)
    }

    /// The same without waiting: `None` if an index page isn't in memory.
    pub fn locate_now(&self, stream: StreamKind, at: u64) -> Option<Result<Block, Error>> {
        let in_memory = |id| self.pages.get(self.id, id).ok_or(Miss::NotInMemory);
        match self.resolve(0, stream, at, in_memory) {
            Ok(block) => Some(Ok(block)),
            Err(Miss::Failed { error, .. }) => Some(Err(error)),
            Err(Miss::NotInMemory) => None,
        }
    }

    /// The block that covers byte `at` of a stream of an archive of the chain.
    fn locate_in(&self, archive: usize, stream: StreamKind, at: u64) -> Result<Block, Error> {
        self.expect_page(self.resolve(archive, stream, at, |id| Ok(self.page(id)?)))
    }

    /// The part around byte `at` of a block on the page `id`. An error comes with the end of the
    /// part that it is about.
    fn follow_or_end(&self, id: PageId, located: Located, at: u64) -> Result<Block, (Error, u64)> {
        let block = self.follow(id, located, at, |id| Ok(self.page(id)?));
        block.map_err(|miss| {
            let (error, end) = self.failure(miss);
            (error, end.clamp(at + 1, located.end()))
        })
    }

    fn expect_page(&self, block: Result<Block, Miss>) -> Result<Block, Error> {
        block.map_err(|miss| self.failure(miss).0)
    }

    fn failure(&self, miss: Miss) -> (Error, u64) {
        match miss {
            Miss::Failed { error, end } => (error, end),
            // Pages were read where they weren't in memory.
            Miss::NotInMemory => {
                (Problem::Invalid("an index page").of(&Arc::from(self.path())), u64::MAX)
            }
        }
    }

    /// Reads, checks and decodes a block: exactly [`Block::decoded_length`] bytes, of which
    /// [`Block::length`] from [`Block::skipped`] on are meant.
    ///
    /// # Errors
    /// The stored bytes can't be read, or aren't what the index says; or no parent has
    /// the block.
    pub fn read_block(&self, block: &Block) -> Result<Vec<u8>, Error> {
        self.read_block_as(block, Reading { depth: 0, builds_index: true })
    }

    /// The same without building the index of the parents' hashes, which takes as long as
    /// reading all their index pages: `None` if it is needed, and hasn't been built by
    /// [`Snapshot::index_parents`].
    ///
    /// # Errors
    /// As for [`Snapshot::read_block`].
    pub fn read_indexed_block(&self, block: &Block) -> Result<Option<Vec<u8>>, Error> {
        match self.read_block_as(block, Reading { depth: 0, builds_index: false }) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error { problem: Problem::IndexNotBuilt, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns true if the index of the parents' hashes has been built.
    pub fn has_parent_index(&self) -> bool {
        self.parents.built().is_some()
    }

    /// Builds the index of the parents' hashes.
    pub fn index_parents(&self) {
        self.parents.index(&self.chain, &self.zeros);
    }

    fn read_block_as(&self, block: &Block, reading: Reading) -> Result<Vec<u8>, Error> {
        match block.located.entry.content {
            Content::InParent if block.is_undecided => self.read_undecided(block, reading),
            Content::InParent => {
                let InParent { archive, block } =
                    self.find_in_parents(block, reading.builds_index)?;
                self.archive(archive)?.read_block(&block)
            }
            _ => self.archive(block.archive)?.read_block(&block.located),
        }
    }

    /// Fills `buffer` with the stream's bytes from `offset` on.
    ///
    /// # Errors
    /// As for [`Snapshot::locate`] and [`Snapshot::read_block`]; also beyond the end.
    pub fn read_exact_at(
        &self,
        stream: StreamKind,
        buffer: &mut [u8],
        offset: u64,
    ) -> Result<(), Error> {
        let reading = Reading { depth: 0, builds_index: true };
        self.read_from(0, stream, buffer, offset, reading)
    }

    /// The same from an archive of the chain.
    fn read_from(
        &self,
        archive: usize,
        stream: StreamKind,
        buffer: &mut [u8],
        offset: u64,
        reading: Reading,
    ) -> Result<(), Error> {
        let mut at = offset;
        let mut left = buffer;
        while !left.is_empty() {
            let block = self.locate_in(archive, stream, at)?;
            let data = self.read_block_as(&block, reading)?;
            let skipped = usize::try_from(at - block.decoded_start()).unwrap_or(usize::MAX);
            let wanted = data.get(skipped..).unwrap_or_default();
            let rest = usize::try_from(block.end() - at).unwrap_or(usize::MAX);
            let count = wanted.len().min(left.len()).min(rest);
            let (now, rest) = left.split_at_mut(count);
            now.copy_from_slice(wanted.get(..count).unwrap_or_default());
            left = rest;
            at += count as u64;
        }
        Ok(())
    }

    fn archive(&self, index: usize) -> Result<&Archive, Error> {
        self.chain.get(index).ok_or_else(|| Error {
            path: Arc::from(self.path()),
            offset: None,
            problem: Problem::Invalid("the chain of parents"),
        })
    }

    fn page_covering(&self, archive: usize, stream: StreamKind, at: u64) -> Option<PageId> {
        let index = self.chain.get(archive)?.stream(stream);
        let page = index.page_at(at).filter(|_| at < index.size)?;
        Some(PageId { archive, stream, page })
    }

    /// A page from memory, or from its file; loaded once however many ask.
    fn page(&self, id: PageId) -> Result<Arc<Page>, Error> {
        self.pages.get_or_load(self.id, id, || {
            self.archive(id.archive)?.load_page(id.stream, id.page, &self.zeros)
        })
    }

    /// The block of an ancestor that a reference by hash means. The index of hashes, if it takes
    /// that, is built or is an error.
    fn find_in_parents(&self, block: &Block, builds_index: bool) -> Result<InParent, Error> {
        let Located { start: at, length, entry: Entry { hash, .. }, .. } = block.located;
        let path = &self.archive(block.archive)?.path;
        let unresolvable = || Problem::Unresolvable { stream: block.stream, at, hash }.of(path);
        if !hash.is_given() {
            return Err(unresolvable());
        }
        // A page that can't be read says nothing about blocks of others; but when the block
        // isn't found, that is the better reason.
        let mut unread = None;
        let found = match self.find_at_same_place(block, &mut unread) {
            Some(found) => Some(found),
            None => {
                let index = match builds_index {
                    true => Some(self.parents.index(&self.chain, &self.zeros)),
                    false => self.parents.built(),
                };
                let index = index.ok_or_else(|| Problem::IndexNotBuilt.of(path))?;
                self.find_by_index(&hash, &index, &mut unread)
            }
        };
        // The same bytes have the same length.
        found
            .filter(|found| found.block.length == length)
            .ok_or_else(|| unread.unwrap_or_else(unresolvable))
    }

    /// Asks the page of each ancestor that covers the same place of the same stream.
    fn find_at_same_place(&self, block: &Block, unread: &mut Option<Error>) -> Option<InParent> {
        let Located { start, entry: Entry { hash, .. }, .. } = block.located;
        for archive in 1..self.chain.len() {
            if let Some(page) = self.page_covering(archive, block.stream, start)
                && let Some(page) = self.page_or_note(page, unread)
            {
                let same_place =
                    page.block_at(start).filter(|candidate| candidate.entry.has_bytes_of(&hash));
                if let Some(block) = same_place.or_else(|| page.block_with_hash(&hash)) {
                    return Some(InParent { archive, block });
                }
            }
        }
        None
    }

    fn find_by_index(
        &self,
        hash: &BlockHash,
        index: &HashIndex,
        unread: &mut Option<Error>,
    ) -> Option<InParent> {
        for (page, position) in index.candidates(hash) {
            let archive = page.archive;
            let block = self.page_or_note(page, unread).and_then(|page| page.block(position));
            if let Some(block) = block.filter(|block| block.entry.hash == *hash) {
                return Some(InParent { archive, block });
            }
        }
        tracing::debug!(path = %crate::escape::name(self.path()), blocks = index.len(), "hash in no parent");
        None
    }

    /// A page; if there is none to be had, the first reason for that is noted.
    fn page_or_note(&self, id: PageId, unread: &mut Option<Error>) -> Option<Arc<Page>> {
        self.page(id).map_err(|error| unread.get_or_insert(error)).ok()
    }
}
