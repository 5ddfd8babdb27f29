//! A snapshot: an archive with its ancestors.
//!
//! Reading has two steps: [`Snapshot::locate`] finds the block that covers an offset, and
//! [`Snapshot::read_block`] reads it from the archive that stores it (`block_read.rs`).
//! References to parents are followed in `references.rs` (`resolve`, `follow`, `read_ambiguous`);
//! `extents.rs` and `verify.rs` have further methods.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::archive::Archive;
use super::block_read::{Lookup, ReadContext};
use super::error::{Error, ErrorKind, printable};
use super::header::Compression;
use super::image::{self, ImageFormat};
use super::index_page::{IndexPage, LocatedBlock};
use super::known::KnownVersions;
use super::log_limit::LogLimit;
use super::master_index::StreamIndex;
use super::metadata::StreamOrigin;
use super::page_cache::{IndexPageCache, PageId};
use super::parent_index::LazyParentIndex;
use super::references::LocateError;
use super::zeros::ZeroHashes;
use super::{Block, OpenOptions, Remark, StreamKind, chain};
use crate::storage::{RemoteSource, Storage};

/// An archive and all its ancestors, open for reading.
///
/// ```no_run
/// use hexz_reader::{OpenOptions, Snapshot, StreamKind};
///
/// # fn main() -> Result<(), hexz_reader::Error> {
/// let snapshot = Snapshot::open("disk.hxz".as_ref(), &OpenOptions::default())?;
/// let mut at = 0;
/// while at < snapshot.size(StreamKind::Main) {
///     let block = snapshot.locate(StreamKind::Main, at)?;
///     if !block.is_zeros() {
///         let bytes = snapshot.read_block(&block)?;
///         println!("{} bytes at {at}", bytes.len());
///     }
///     at = block.end();
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) id: u64,
    /// The archive itself, followed by its ancestors, nearest first.
    pub(crate) chain: Vec<Archive>,
    pub(crate) pages: Arc<IndexPageCache>,
    pub(crate) parents: LazyParentIndex,
    pub(crate) zeros: ZeroHashes,
    pub(crate) log_limit: Arc<LogLimit>,
}

impl Snapshot {
    /// Opens the archive at `path` and all its ancestors, and checks header and master index of
    /// each.
    ///
    /// A remote archive whose source knows a version is opened in that version, and so are its
    /// ancestors; whether they are current is then checked for all of them at the same time.
    ///
    /// # Errors
    /// An archive is missing, unreadable, damaged, encrypted with another password, or not the
    /// expected one. The error names the file and suggests a remedy.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        if let Some(known) = KnownVersions::of(path, options) {
            let remote = Some(Arc::clone(&known) as Arc<dyn RemoteSource>);
            let opened = Self::open_once(path, &OpenOptions { remote, ..options.clone() });
            let is_current = |opened: Result<&Self, &Error>| opened.is_ok_and(Self::is_current);
            if !known.is_used() || is_current(opened.as_ref()) {
                return opened;
            }
        }
        Self::open_once(path, options)
    }

    fn open_once(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        Self::from_chain(chain::open(path, None, options)?, options)
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
        Self::from_chain(chain::open(name, Some(storage), options)?, options)
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
                digests.require(&archive.file.path)?;
            }
            if archive.header.encryption.is_some() && options.password.is_none() {
                return Err(archive.file.error(ErrorKind::PasswordNeeded));
            }
        }
        Self::from_chain(chain, &unhashed)
    }

    pub(crate) fn from_chain(chain: Vec<Archive>, options: &OpenOptions) -> Result<Self, Error> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        if let Some(archive) = chain.first()
            && archive.metadata == Some(StreamOrigin::Manifest)
            && !options.raw
        {
            return Err(archive.file.error(ErrorKind::DirectoryArchive));
        }
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            chain,
            pages: Arc::clone(&options.index_pages),
            parents: LazyParentIndex::default(),
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
        &self.own().file.path
    }

    /// Returns the paths of the ancestors, nearest first.
    pub fn parents(&self) -> impl Iterator<Item = &Path> {
        self.chain.iter().skip(1).map(|archive| archive.file.path.as_ref())
    }

    /// Returns true if opening the snapshot again would find the same files: no archive of the
    /// chain has been replaced or written to. Remote archives are checked concurrently.
    pub fn is_current(&self) -> bool {
        let is_remote = |archive: &&Archive| archive.file.storage.is_remote();
        let (remote, local): (Vec<&Archive>, Vec<_>) = self.chain.iter().partition(is_remote);
        if let [] | [_] = remote.as_slice() {
            return self.chain.iter().all(Archive::is_current);
        }
        let are_current = |archives: Vec<&Archive>| {
            std::thread::scope(|scope| {
                let checks: Vec<_> = archives
                    .into_iter()
                    .map(|archive| scope.spawn(|| archive.is_current()))
                    .collect();
                checks.into_iter().all(|check| check.join().unwrap_or(true))
            })
        };
        local.into_iter().all(Archive::is_current) && are_current(remote)
    }

    /// Returns the size of a stream in bytes; zero if the stream doesn't exist.
    pub fn size(&self, stream: StreamKind) -> u64 {
        self.own().stream(stream).size
    }

    /// Returns the compression of the archive's own blocks.
    pub fn compression(&self) -> Compression {
        self.own().header.compression
    }

    /// Returns true if blocks are compared with their hashes, so that equal hashes guarantee equal
    /// bytes.
    pub fn verifies_hashes(&self) -> bool {
        self.own().verify_hashes
    }

    /// Returns true if the archive's own blocks are encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.own().header.encryption.is_some()
    }

    /// Returns the nominal block size, in bytes. Actual blocks may be larger or smaller.
    pub fn block_size(&self) -> u32 {
        self.own().header.block_size
    }

    /// Returns the properties of the archive itself that users should know about.
    pub fn remarks(&self) -> Vec<Remark> {
        let own = self.own();
        let mut remarks = Vec::new();
        for stream in StreamKind::ALL {
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

    /// Logs the [remarks](Self::remarks) as warnings, each with the advice that `hint` returns for
    /// it, and a main stream in another [format](Self::image_format) than that of a raw disk.
    pub fn log_remarks(&self, hint: impl Fn(&Remark) -> Option<&'static str>) {
        let warn = |reason: &str, hint: Option<&str>, what: &dyn fmt::Display| {
            if let Some(held_back) = self.log_limit.allow() {
                tracing::warn!(reason, hint, held_back, "{}: {what}", printable(self.path()));
            }
        };
        for remark in self.remarks() {
            warn(remark.label(), hint(&remark), &remark);
        }
        if let Ok(Some(image)) = self.known_image_format() {
            warn("not_a_raw_image", None, &image);
        }
    }

    /// Detects the format like [`image_format`](Self::image_format), but makes no requests for
    /// that: of a remote archive, only what is in memory is considered.
    fn known_image_format(&self) -> Result<Option<ImageFormat>, Error> {
        if !self.is_remote() {
            return self.image_format();
        }
        let Lookup::Found(block) = self.lookup(StreamKind::Main, 0)? else { return Ok(None) };
        let bytes = self.read_block_in_memory(&block)?.unwrap_or_default();
        Ok(ImageFormat::of(bytes.get(..image::SIGNATURES_END).unwrap_or(&bytes)))
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
        match self.lookup(stream, at) {
            Ok(Lookup::Found(block)) => Some(Ok(block)),
            Ok(Lookup::NotInMemory(_)) => None,
            Err(error) => Some(Err(error)),
        }
    }

    /// Finds the block that covers byte `at` of a stream of an archive of the chain.
    fn locate_in(&self, archive: usize, stream: StreamKind, at: u64) -> Result<Block, Error> {
        self.or_read_error(self.resolve(archive, stream, at, |id| Ok(self.page(id)?)))
    }

    /// Resolves the part around byte `at` of a block on the page `id`. An error comes with the end
    /// offset of the part that it affects.
    pub(crate) fn follow_with_end(
        &self,
        id: PageId,
        located: LocatedBlock,
        at: u64,
    ) -> Result<Block, (Error, u64)> {
        let block = self.follow(id, located, at, |id| Ok(self.page(id)?));
        block.map_err(|error| {
            let (error, end) = self.failure(error);
            (error, end.clamp(at + 1, located.end()))
        })
    }

    pub(crate) fn or_read_error(&self, block: Result<Block, LocateError>) -> Result<Block, Error> {
        block.map_err(|error| self.failure(error).0)
    }

    pub(crate) fn failure(&self, error: LocateError) -> (Error, u64) {
        match error {
            LocateError::Failed { error, end } => (error, end),
            // Callers load pages that aren't in memory, so this can't happen.
            LocateError::NotInMemory(_) => {
                (self.own().file.error(ErrorKind::Invalid("an index page")), u64::MAX)
            }
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
        self.read_from(0, stream, buffer, offset, ReadContext::UNLIMITED)
    }

    /// Fills `buffer` from a stream of an archive of the chain.
    pub(crate) fn read_from(
        &self,
        archive: usize,
        stream: StreamKind,
        buffer: &mut [u8],
        offset: u64,
        reading: ReadContext,
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

    /// Returns the archive itself.
    #[expect(clippy::indexing_slicing, reason = "a chain starts with the archive itself")]
    pub(crate) fn own(&self) -> &Archive {
        &self.chain[0]
    }

    pub(crate) fn archive(&self, index: usize) -> Result<&Archive, Error> {
        let invalid = || self.own().file.error(ErrorKind::Invalid("the chain of parents"));
        self.chain.get(index).ok_or_else(invalid)
    }

    pub(crate) fn page_covering(
        &self,
        archive: usize,
        stream: StreamKind,
        at: u64,
    ) -> Option<PageId> {
        let index = self.chain.get(archive)?.stream(stream);
        let page = index.page_at(at).filter(|_| at < index.size)?;
        Some(PageId { archive, stream, page })
    }

    /// Returns a page from the cache, or loads it. Concurrent loads of a page are deduplicated.
    pub(crate) fn page(&self, id: PageId) -> Result<Arc<IndexPage>, Error> {
        self.pages.get_or_load(self.id, id, || {
            self.archive(id.archive)?.load_page(id.stream, id.page, &self.zeros)
        })
    }
}
