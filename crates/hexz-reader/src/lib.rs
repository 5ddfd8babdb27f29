//! Reader for the Hexz archive format, version 1.
//!
//! ```text
//! 0             header, in a region of 4096 bytes            header.rs
//! 4096          dictionary, if any                           codec.rs
//!   …           compressed blocks and index pages, mixed     index.rs
//! index_offset  master index                                 index.rs
//!   …           metadata and signature, if any
//! ```
//!
//! Every published version of Hexz calls its format version 1, although there are several layouts
//! of it (`layout.rs`).
//!
//! A stream (main or auxiliary) is divided into blocks, and an index page lists up to 4096 of them.
//! A block is stored in the archive, is all zeros, or lives in a parent archive (`chain.rs`). A
//! block in a parent is found by its BLAKE3 hash (`parents.rs`), or is the parent's data at the
//! same offset (`references.rs`).
//!
//! Reading a stored block checks its CRC-32, decrypts and decompresses it, and checks its length
//! and hash (`archive.rs`). Any mismatch is an error; it never reads as zeros. Before anything in
//! an archive is used, its signature (`signature.rs`) or its digest (`digest.rs`) can be verified.
//! `verify.rs` reads every block; `summary/` summarizes the content without reading blocks.
//!
//! All functions block while they read, unless documented otherwise.

mod archive;
mod background;
pub mod cache;
mod chain;
mod codec;
mod crypto;
mod digest;
mod error;
mod extents;
mod faults;
mod fields;
mod header;
mod image;
mod index;
mod layout;
pub mod limits;
mod log_limit;
mod metadata;
mod pages;
mod parents;
mod password;
mod references;
mod signature;
pub mod storage;
pub mod summary;
mod verify;
mod zeros;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use archive::Archive;
pub use digest::{Digest, DigestMemory, Digests, DigestsError, format_line};
use error::printable;
pub use error::{Ambiguity, Error, ErrorKind};
pub use extents::{DiffBase, Run};
pub use faults::Fault;
pub use header::{Chunking, Compression};
pub use image::ImageFormat;
use index::{Content, Entry, Located, Page, StreamIndex};
pub use layout::Layout;
pub use log_limit::LogLimit;
use metadata::Metadata;
pub use pages::IndexPageCache;
use pages::PageId;
use parents::{HashIndex, InParent, Parents};
pub use password::{Password, PasswordSource};
use references::Miss;
pub use references::{ReferenceChoice, ReferenceChoiceError, ReferenceMode};
pub use signature::{VerifyKey, VerifyKeyError};
pub use verify::{VerifyProgress, VerifyStats};
use zeros::ZeroHashes;

pub use background::BackgroundExecutor;
use storage::{ReadCounters, Storage};

/// One of the two byte streams of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// Disk image.
    Main,
    /// Data that accompanies the disk, such as a virtual machine's memory.
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

/// BLAKE3-256 hash of a block, or 32 zero bytes if the packer recorded none.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub [u8; 32]);

impl BlockHash {
    /// Placeholder for a missing hash.
    pub(crate) const NONE: Self = Self([0; 32]);

    /// Returns true if the packer recorded a hash.
    pub fn is_present(&self) -> bool {
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

/// Options for opening a snapshot.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Directories that are searched for parents, in addition to the archive's own directory.
    pub parent_dirs: Vec<PathBuf>,
    /// True if the archive may name parents anywhere on this machine.
    pub allow_parent_anywhere: bool,
    /// Source of the password for encrypted archives of the chain. The password is wiped once their
    /// keys have been derived.
    pub password: Option<PasswordSource>,
    /// Maximum number of key derivation iterations that an encrypted archive may request.
    pub max_key_iterations: u32,
    /// Worker that derives keys. Snapshots opened with the same worker derive their keys one at a
    /// time.
    pub background: Arc<BackgroundExecutor>,
    /// Set to true once the caller no longer waits for the snapshot. A key derivation that is
    /// still queued is skipped, and opening fails with [`ErrorKind::Abandoned`].
    pub is_abandoned: Arc<AtomicBool>,
    /// True to open a directory archive as its bare stream.
    pub raw: bool,
    /// Decisions for references to parents that can be read by offset or by hash, with different
    /// bytes. Without a decision, reading such a block is an error.
    pub reference_choices: Arc<[ReferenceChoice]>,
    /// True to read ranges that no block covers as zeros instead of failing.
    pub zero_uncovered: bool,
    /// True to compare each decoded block with its BLAKE3 hash. Without that, damage to stored
    /// bytes is still detected (CRC-32), but an index entry that points to another block of the
    /// same length is not. Blocks of encrypted archives have no hash in any case.
    pub verify_hashes: bool,
    /// Keys for required signatures. Unless empty, each archive of the chain must have a valid
    /// signature by one of these keys. The signature covers the master index and the metadata, but
    /// not the header, the index pages or the blocks.
    pub verify_keys: Arc<[VerifyKey]>,
    /// Required digests. If given, the digest of each archive of the chain must be among them.
    /// Opening an archive then reads all of it; later reads are verified against the resulting hash
    /// tree.
    pub digests: Option<Arc<Digests>>,
    /// Memory for digest verification, shared with other snapshots.
    pub digest_memory: DigestMemory,
    /// Cache of index pages, shared with other snapshots.
    pub index_pages: Arc<IndexPageCache>,
    /// Read counters, shared with other snapshots.
    pub read_counters: Arc<ReadCounters>,
    /// Rate limit for log lines, shared with other snapshots.
    pub log_limit: Arc<LogLimit>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            parent_dirs: Vec::new(),
            allow_parent_anywhere: false,
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
            index_pages: IndexPageCache::new(limits::DEFAULT_INDEX_BUDGET),
            read_counters: Arc::default(),
            log_limit: Arc::default(),
        }
    }
}

/// Block of a stream, or a part of one: its range of the stream and the location of its bytes.
///
/// It is a part if a reference by offset covers only some of an ancestor's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    stream: StreamKind,
    /// Index in the chain of the archive that has the entry.
    archive: usize,
    /// Whole block, as recorded in that archive.
    located: Located,
    start: u64,
    length: u32,
    /// True if the block is a reference that may be by offset or by hash, so its hash isn't known
    /// to match its bytes.
    is_undecided: bool,
}

impl Block {
    fn whole(archive: usize, stream: StreamKind, located: Located) -> Self {
        let Located { start, length, .. } = located;
        Self { stream, archive, located, start, length, is_undecided: false }
    }

    /// Returns the part of another block of the stream that lies within this one.
    fn part_of(&self, archive: usize, located: Located) -> Self {
        let start = self.start.max(located.start);
        let end = self.end().min(located.end());
        // Not longer than a block, whose length fits 32 bits.
        let length = u32::try_from(end.saturating_sub(start)).unwrap_or_default();
        Self { archive, located, start, length, ..*self }
    }

    /// Returns the start offset in the stream, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Returns the length in the stream, in bytes; never zero.
    pub fn length(&self) -> u32 {
        self.length
    }

    /// Returns the end offset in the stream, in bytes.
    pub fn end(&self) -> u64 {
        self.start() + u64::from(self.length())
    }

    /// Returns the number of bytes of the whole block that precede this part.
    pub fn offset_in_decoded(&self) -> u32 {
        u32::try_from(self.start - self.located.start).unwrap_or_default()
    }

    /// Returns the length of the whole block, in bytes: the length that [`Snapshot::read_block`]
    /// returns.
    pub fn decoded_length(&self) -> u32 {
        self.located.length
    }

    /// Returns the start offset of the whole block in the stream, in bytes.
    pub fn decoded_start(&self) -> u64 {
        self.located.start
    }

    /// Returns the index in the chain of the archive that has the block; 0 is the snapshot's own.
    pub fn chain_index(&self) -> usize {
        self.archive
    }

    /// Returns true if the block is known to be all zeros without reading it.
    pub fn is_zeros(&self) -> bool {
        self.located.entry.content == Content::Zeros
    }

    /// Returns the hash of the whole block, if the packer recorded one. Equal hashes mean equal
    /// bytes, in any archive.
    pub fn hash(&self) -> Option<BlockHash> {
        let hash = self.located.entry.hash;
        (hash.is_present() && !self.is_undecided).then_some(hash)
    }

    /// Estimates the work to read and decode the block, in nanoseconds: one for each stored byte,
    /// and one for each decoded byte. The stored length of a block in a parent is unknown. An
    /// ambiguous block is also read, hashed and looked up.
    pub fn estimated_cost(&self) -> u64 {
        let decoded = u64::from(self.decoded_length());
        match self.located.entry.content {
            Content::Stored { place, .. } => decoded + u64::from(place.length),
            Content::InParent if self.is_undecided => 4 * decoded,
            Content::InParent | Content::Contradiction => 2 * decoded,
            Content::Zeros => 0,
        }
    }

    /// Returns the file offset of the stored block, in bytes, if it is stored in the snapshot's own
    /// archive.
    pub fn stored_offset(&self) -> Option<u64> {
        match self.located.entry.content {
            Content::Stored { place, .. } if self.archive == 0 => Some(place.offset),
            _ => None,
        }
    }
}

/// Context of a block read.
#[derive(Debug, Clone, Copy)]
struct Reading {
    /// Number of ambiguous references followed to reach the block.
    depth: u32,
    /// True to build the index of the parents' hashes when it is needed. If false, a missing index
    /// is an error.
    builds_index: bool,
}

/// Property of an archive that is valid but may surprise its users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remark {
    /// The master index states 0 bytes but lists blocks.
    UnstatedSize {
        /// Affected stream.
        stream: StreamKind,
        /// Sum of the blocks' lengths, in bytes, which is served as the size.
        size: u64,
    },
    /// The blocks end before the stated length.
    EndsEarly {
        /// Affected stream.
        stream: StreamKind,
        /// End offset of the blocks, in bytes.
        end: u64,
        /// Stated length, in bytes.
        size: u64,
        /// True if the uncovered bytes read as zeros, false if reading them is an error.
        reads_zeros: bool,
    },
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnstatedSize { stream, size } => write!(
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
    /// The archive itself, followed by its ancestors, nearest first.
    chain: Vec<Archive>,
    pages: Arc<IndexPageCache>,
    parents: Parents,
    zeros: ZeroHashes,
    log_limit: Arc<LogLimit>,
}

impl Snapshot {
    /// Opens the archive at `path` and all its ancestors, and checks header and master index of
    /// each.
    ///
    /// # Errors
    /// An archive is missing, unreadable, damaged, encrypted with another password, or not the
    /// expected one. The error names the file and suggests a remedy.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        Self::from_chain(chain::open(path, options)?, options)
    }

    /// Opens an archive that isn't a file. `name` identifies it in messages, and its directory is
    /// searched for parents.
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

    /// Opens the archive at `path`, or in `storage`, to inspect header and index only. Derives no
    /// key, hashes no file and reads no block, so a wrong password or a mismatching digest isn't
    /// detected.
    ///
    /// # Errors
    /// As for [`Snapshot::open`], as far as header and index reveal the problem.
    pub fn open_index(
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
                return Err(ErrorKind::PasswordNeeded.of(&archive.path));
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
            return Err(ErrorKind::DirectoryArchive.of(&archive.path));
        }
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            chain,
            pages: Arc::clone(&options.index_pages),
            parents: Parents::default(),
            zeros: ZeroHashes::default(),
            log_limit: Arc::clone(&options.log_limit),
        })
    }

    /// Returns a number that no other snapshot of this process has.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns the archive's path as given when it was opened.
    pub fn path(&self) -> &Path {
        self.chain.first().map_or(Path::new(""), |archive| &archive.path)
    }

    /// Returns the paths of the ancestors, nearest first.
    pub fn parents(&self) -> impl Iterator<Item = &Path> {
        self.chain.iter().skip(1).map(|archive| archive.path.as_ref())
    }

    /// Returns true if opening the snapshot again would find the same files: no archive of the
    /// chain has been replaced or written to.
    pub fn is_current(&self) -> bool {
        self.chain.iter().all(Archive::is_current)
    }

    /// Returns the size of a stream in bytes; zero if the stream doesn't exist.
    pub fn size(&self, stream: StreamKind) -> u64 {
        self.chain.first().map_or(0, |archive| archive.stream(stream).size)
    }

    /// Returns the compression of the archive's own blocks.
    pub fn compression(&self) -> Compression {
        self.chain.first().map_or(Compression::Zstd, |archive| archive.header.compression)
    }

    /// Returns true if blocks are compared with their hashes, so that equal hashes guarantee equal
    /// bytes.
    pub fn verifies_hashes(&self) -> bool {
        self.chain.first().is_some_and(|archive| archive.verify_hashes)
    }

    /// Returns true if the archive's own blocks are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.chain.first().is_some_and(|archive| archive.header.encryption.is_some())
    }

    /// Returns the nominal block size, in bytes. Actual blocks may be larger or smaller.
    pub fn block_size(&self) -> u32 {
        self.chain.first().map_or(0, |archive| archive.header.block_size)
    }

    /// Returns the properties of the archive itself that users should know about.
    pub fn remarks(&self) -> Vec<Remark> {
        let Some(own) = self.chain.first() else { return Vec::new() };
        let mut remarks = Vec::new();
        for stream in [StreamKind::Main, StreamKind::Auxiliary] {
            let &StreamIndex { size, end, is_size_summed, .. } = own.stream(stream);
            if is_size_summed {
                remarks.push(Remark::UnstatedSize { stream, size });
            }
            if end < size {
                let reads_zeros = own.zero_uncovered;
                remarks.push(Remark::EndsEarly { stream, end, size, reads_zeros });
            }
        }
        remarks
    }

    /// Logs warnings about properties of the archive that may surprise its users.
    pub fn log_remarks(&self) {
        let image = self.image_format().ok().flatten();
        let oddities = self.remarks().into_iter().map(|remark| remark.to_string());
        for oddity in oddities.chain(image.map(|image| image.to_string())) {
            if let Some(held_back) = self.log_limit.allow() {
                tracing::warn!(held_back, "{}: {oddity}", printable(self.path()));
            }
        }
    }

    /// Detects the format of the main stream, if it starts like a disk image format or a compressed
    /// file.
    ///
    /// # Errors
    /// The first bytes of the stream can't be read.
    pub fn image_format(&self) -> Result<Option<ImageFormat>, Error> {
        let length = self.size(StreamKind::Main).min(image::SIGNATURES_END as u64);
        let mut start = vec![0; usize::try_from(length).unwrap_or_default()];
        self.read_exact_at(StreamKind::Main, &mut start, 0)?;
        Ok(ImageFormat::of(&start))
    }

    /// Finds the block that covers byte `at` of a stream.
    ///
    /// # Errors
    /// The index page can't be read or is damaged, or no block covers that byte.
    pub fn locate(&self, stream: StreamKind, at: u64) -> Result<Block, Error> {
        self.locate_in(0, stream, at)
    }

    /// Finds the block that covers byte `at` of a stream without blocking. Returns `None` if an
    /// index page isn't in memory.
    pub fn try_locate(&self, stream: StreamKind, at: u64) -> Option<Result<Block, Error>> {
        let in_memory = |id| self.pages.get(self.id, id).ok_or(Miss::NotInMemory);
        match self.resolve(0, stream, at, in_memory) {
            Ok(block) => Some(Ok(block)),
            Err(Miss::Failed { error, .. }) => Some(Err(error)),
            Err(Miss::NotInMemory) => None,
        }
    }

    /// Finds the block that covers byte `at` of a stream of an archive of the chain.
    fn locate_in(&self, archive: usize, stream: StreamKind, at: u64) -> Result<Block, Error> {
        self.expect_page(self.resolve(archive, stream, at, |id| Ok(self.page(id)?)))
    }

    /// Resolves the part around byte `at` of a block on the page `id`. An error comes with the end
    /// offset of the part that it affects.
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
            // Callers load pages that aren't in memory, so this can't happen.
            Miss::NotInMemory => {
                (ErrorKind::Invalid("an index page").of(&Arc::from(self.path())), u64::MAX)
            }
        }
    }

    /// Reads, checks and decodes a whole block: exactly [`Block::decoded_length`] bytes. The
    /// block's own bytes are the [`Block::length`] bytes from [`Block::offset_in_decoded`] on.
    ///
    /// # Errors
    /// The stored bytes can't be read or don't match the index, or no parent has the block.
    pub fn read_block(&self, block: &Block) -> Result<Vec<u8>, Error> {
        self.read_block_as(block, Reading { depth: 0, builds_index: true })
    }

    /// Reads a block like [`Snapshot::read_block`], but never builds the index of the parents'
    /// hashes, which takes as long as reading all their index pages. Returns `None` if the index is
    /// needed and hasn't been built by [`Snapshot::build_parent_index`].
    ///
    /// # Errors
    /// As for [`Snapshot::read_block`].
    pub fn try_read_block(&self, block: &Block) -> Result<Option<Vec<u8>>, Error> {
        match self.read_block_as(block, Reading { depth: 0, builds_index: false }) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error { kind: ErrorKind::IndexNotBuilt, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Returns true if the index of the parents' hashes has been built.
    pub fn has_parent_index(&self) -> bool {
        self.parents.built().is_some()
    }

    /// Builds the index of the parents' hashes, if it hasn't been built.
    pub fn build_parent_index(&self) {
        self.parent_index();
    }

    fn parent_index(&self) -> Arc<HashIndex> {
        self.parents.index(&self.chain, &self.zeros, &self.log_limit)
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

    /// Fills `buffer` with the bytes of a stream, starting at `offset`.
    ///
    /// # Errors
    /// As for [`Snapshot::locate`] and [`Snapshot::read_block`]; also if the range exceeds the
    /// stream.
    pub fn read_exact_at(
        &self,
        stream: StreamKind,
        buffer: &mut [u8],
        offset: u64,
    ) -> Result<(), Error> {
        let reading = Reading { depth: 0, builds_index: true };
        self.read_from(0, stream, buffer, offset, reading)
    }

    /// Fills `buffer` from a stream of an archive of the chain.
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
            kind: ErrorKind::Invalid("the chain of parents"),
        })
    }

    fn page_covering(&self, archive: usize, stream: StreamKind, at: u64) -> Option<PageId> {
        let index = self.chain.get(archive)?.stream(stream);
        let page = index.page_at(at).filter(|_| at < index.size)?;
        Some(PageId { archive, stream, page })
    }

    /// Returns a page from the cache, or loads it. Concurrent loads of a page are deduplicated.
    fn page(&self, id: PageId) -> Result<Arc<Page>, Error> {
        self.pages.get_or_load(self.id, id, || {
            self.archive(id.archive)?.load_page(id.stream, id.page, &self.zeros)
        })
    }

    /// Finds the ancestor's block that a reference by hash means. If that needs the index of hashes
    /// and it hasn't been built, builds it or fails, depending on `builds_index`.
    fn find_in_parents(&self, block: &Block, builds_index: bool) -> Result<InParent, Error> {
        let Located { start: at, length, entry: Entry { hash, .. }, .. } = block.located;
        let path = &self.archive(block.archive)?.path;
        let unresolvable = || ErrorKind::Unresolvable { stream: block.stream, at, hash }.of(path);
        if !hash.is_present() {
            return Err(unresolvable());
        }
        // A page that can't be read may list other blocks only, so it isn't an error by itself. If
        // the block isn't found, it is the better explanation.
        let mut unread = None;
        let found = match self.find_at_same_place(block, &mut unread) {
            Some(found) => Some(found),
            None => {
                let index = match builds_index {
                    true => Some(self.parent_index()),
                    false => self.parents.built(),
                };
                let index = index.ok_or_else(|| ErrorKind::IndexNotBuilt.of(path))?;
                self.find_by_index(&hash, &index, &mut unread)
            }
        };
        // Blocks with the same hash have the same length, unless an index is damaged.
        found
            .filter(|found| found.block.length == length)
            .ok_or_else(|| unread.unwrap_or_else(unresolvable))
    }

    /// Searches each ancestor's page that covers the same offset of the same stream.
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
        tracing::debug!(path = %nbd_telemetry::escape::name(self.path()), blocks = index.len(), "hash in no parent");
        None
    }

    /// Returns a page, or records the first reason why a page can't be loaded.
    fn page_or_note(&self, id: PageId, unread: &mut Option<Error>) -> Option<Arc<Page>> {
        self.page(id).map_err(|error| unread.get_or_insert(error)).ok()
    }
}
