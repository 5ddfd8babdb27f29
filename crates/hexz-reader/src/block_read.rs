//! Reading of blocks, in three steps: [`Snapshot::stored_block`] finds out which bytes of which
//! archive are needed, a source provides them, and [`Snapshot::decode`] makes a block of them.
//!
//! The first step reads nothing and the last one only computes, so both work with any source,
//! including one that is asynchronous. [`Snapshot::read_block`] takes all steps with the archives'
//! own [storage](crate::storage::Storage), and waits for it.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

use super::error::{Error, ErrorKind};
use super::header::Extent;
use super::index_page::{Content, IndexPage, LocatedBlock};
use super::page_cache::PageId;
use super::parent_index::ParentBlock;
use super::references::LocateError;
use super::{Block, Snapshot, StreamKind};
use crate::storage::FetchPriority;

/// Result of a lookup that reads nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup<T> {
    /// The result.
    Found(T),
    /// The lookup needs something that isn't in memory.
    NotInMemory(Missing),
}

/// Data that a lookup needs and that isn't in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// An index page.
    Page(PageId),
    /// The index of the parents' hashes: [`Snapshot::build_parent_index`].
    ParentIndex,
    /// Bytes of the parents, which tell what an ambiguous reference means:
    /// [`Snapshot::read_block`].
    ParentBytes,
}

/// The stored bytes that a block is decoded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBlock {
    archive: usize,
    located: LocatedBlock,
}

impl StoredBlock {
    /// Returns the index in the chain of the archive that stores the bytes.
    pub fn chain_index(&self) -> usize {
        self.archive
    }

    /// Returns the offset of the bytes in the archive.
    pub fn offset(&self) -> u64 {
        self.place().offset
    }

    /// Returns the number of bytes; zero if the block is zeros, which aren't stored.
    pub fn length(&self) -> u32 {
        self.place().length
    }

    fn place(&self) -> Extent {
        self.located.entry.stored_place().unwrap_or(Extent { offset: 0, length: 0 })
    }
}

/// A read from a remote archive in progress.
pub type ArchiveFetch = Pin<Box<dyn Future<Output = Result<Bytes, Error>> + Send>>;

/// A prefetch from a remote archive in progress.
pub type ArchivePrefetch = Pin<Box<dyn Future<Output = Result<u64, Error>> + Send>>;

/// Context of a block read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadContext {
    /// Number of ambiguous references followed to reach the block.
    pub(crate) depth: u32,
    /// True to build the index of the parents' hashes when it is needed. If false, a missing index
    /// is an error.
    pub(crate) may_build_index: bool,
}

impl ReadContext {
    /// Context of a read that does whatever is necessary.
    pub(crate) const UNLIMITED: Self = Self { depth: 0, may_build_index: true };
}

impl Snapshot {
    /// Returns true if an archive of the chain is remote, so that reads wait for a network.
    pub fn is_remote(&self) -> bool {
        self.chain.iter().any(|archive| archive.file.storage.is_remote())
    }

    /// Returns true if this archive of the chain is remote.
    pub fn is_archive_remote(&self, chain_index: usize) -> bool {
        self.chain.get(chain_index).is_some_and(|archive| archive.file.storage.is_remote())
    }

    /// Finds the block that covers byte `at` of a stream. Reads nothing.
    ///
    /// # Errors
    /// The index is damaged, or no block covers that byte.
    pub fn lookup(&self, stream: StreamKind, at: u64) -> Result<Lookup<Block>, Error> {
        match self.resolve(0, stream, at, |id| self.page_in_memory(id)) {
            Ok(block) => Ok(Lookup::Found(block)),
            Err(LocateError::NotInMemory(missing)) => Ok(Lookup::NotInMemory(missing)),
            Err(LocateError::Failed { error, .. }) => Err(error),
        }
    }

    /// Returns true if reading a block needs no waiting for a store: its stored bytes are in a local
    /// file or in memory, and so is what tells where they are.
    pub fn is_at_hand(&self, block: &Block) -> bool {
        let Ok(Lookup::Found(stored)) = self.stored_block(block) else { return false };
        let Some(archive) = self.chain.get(stored.archive) else { return false };
        let place = stored.place();
        place.end().is_some_and(|end| archive.file.storage.is_in_memory(place.offset..end))
    }

    /// Starts to read an index page of a remote archive. Returns `None` if the archive is local:
    /// [`load_page`](Self::load_page) reads it.
    pub fn fetch_page(&self, id: PageId, priority: FetchPriority) -> Option<ArchiveFetch> {
        let place = self.chain.get(id.archive)?.page_place(id)?;
        self.fetch(id.archive, place, "read an index page", priority)
    }

    /// Parses an index page that [`fetch_page`](Self::fetch_page) has read, and caches it.
    ///
    /// # Errors
    /// The page is damaged.
    pub fn insert_page(&self, id: PageId, bytes: &[u8]) -> Result<(), Error> {
        let parse = || self.archive(id.archive)?.parse_page(id.stream, id.page, bytes, &self.zeros);
        self.pages.get_or_load(self.id, id, parse).map(drop)
    }

    /// Reads and caches an index page.
    ///
    /// # Errors
    /// The page can't be read or is damaged.
    pub fn load_page(&self, id: PageId) -> Result<(), Error> {
        self.page(id).map(drop)
    }

    /// Starts to read the stored bytes of a block from a remote archive. Returns `None` if the
    /// archive is local, or nothing is stored.
    pub fn fetch_block(
        &self,
        block: &StoredBlock,
        priority: FetchPriority,
    ) -> Option<ArchiveFetch> {
        let place = block.place();
        (place.length > 0).then(|| self.fetch(block.archive, place, "read a block", priority))?
    }

    /// Starts to bring a part of an archive of the chain into the caches of its source, behind all
    /// other reads. The result is the number of bytes that were fetched. Returns `None` if the
    /// archive is local.
    pub fn prefetch(&self, chain_index: usize, range: Range<u64>) -> Option<ArchivePrefetch> {
        let file = &self.chain.get(chain_index)?.file;
        let (path, offset) = (Arc::clone(&file.path), range.start);
        let prefetch = file.storage.prefetch(range)?;
        Some(Box::pin(async move {
            prefetch.await.map_err(|error| Error {
                path,
                offset: Some(offset),
                kind: ErrorKind::from_read_error("prefetch", error),
            })
        }))
    }

    fn fetch(
        &self,
        archive: usize,
        place: Extent,
        purpose: &'static str,
        priority: FetchPriority,
    ) -> Option<ArchiveFetch> {
        let file = &self.chain.get(archive)?.file;
        let fetch = file.storage.fetch(place.offset..place.end()?, priority)?;
        let path = Arc::clone(&file.path);
        Some(Box::pin(async move {
            fetch.await.map_err(|error| Error {
                path,
                offset: Some(place.offset),
                kind: ErrorKind::from_read_error(purpose, error),
            })
        }))
    }

    /// Checks and decodes a block like [`decode`](Self::decode), from bytes that can't be modified.
    ///
    /// # Errors
    /// As for `decode`.
    pub fn decode_copy(&self, stored: &StoredBlock, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        self.archive(stored.archive)?.decode_copy(&stored.located, bytes)
    }

    /// Reads and decodes a block whose stored bytes were found by
    /// [`stored_block`](Self::stored_block).
    ///
    /// # Errors
    /// The stored bytes can't be read or don't match the index.
    pub fn read_stored(&self, stored: &StoredBlock) -> Result<Vec<u8>, Error> {
        self.archive(stored.archive)?.read_block(&stored.located)
    }

    /// Finds the stored bytes of a block in this archive or its ancestors. Reads nothing.
    ///
    /// # Errors
    /// No parent has the block.
    pub fn stored_block(&self, block: &Block) -> Result<Lookup<StoredBlock>, Error> {
        let (archive, located) = match block.located.entry.content {
            Content::InParent if block.is_ambiguous => {
                return Ok(Lookup::NotInMemory(Missing::ParentBytes));
            }
            Content::InParent => {
                let page = |id| self.page_in_memory(id);
                let index = || Ok(self.parents.get().ok_or(Missing::ParentIndex)?);
                match self.find_in_parents(block, page, index) {
                    Ok(ParentBlock { archive, block }) => (archive, block),
                    Err(LocateError::NotInMemory(missing)) => {
                        return Ok(Lookup::NotInMemory(missing));
                    }
                    Err(LocateError::Failed { error, .. }) => return Err(error),
                }
            }
            _ => (block.archive, block.located),
        };
        Ok(Lookup::Found(StoredBlock { archive, located }))
    }

    /// Checks and decodes `bytes`, the [`StoredBlock::length`] bytes that are stored at
    /// [`StoredBlock::offset`]. Returns the whole block. Encrypted bytes are decrypted in place.
    ///
    /// # Errors
    /// The bytes don't match the index.
    pub fn decode(&self, stored: &StoredBlock, bytes: &mut [u8]) -> Result<Vec<u8>, Error> {
        self.archive(stored.archive)?.decode(&stored.located, bytes)
    }

    /// Reads, checks and decodes a whole block: exactly [`Block::decoded_length`] bytes. The
    /// block's own bytes are the [`Block::length`] bytes from [`Block::offset_in_decoded`] on.
    ///
    /// # Errors
    /// The stored bytes can't be read or don't match the index, or no parent has the block.
    pub fn read_block(&self, block: &Block) -> Result<Vec<u8>, Error> {
        self.read_block_as(block, ReadContext::UNLIMITED)
    }

    /// Reads a block like [`Snapshot::read_block`], but never builds the index of the parents'
    /// hashes, which takes as long as reading all their index pages. Returns `None` if the index is
    /// needed and hasn't been built by [`Snapshot::build_parent_index`].
    ///
    /// # Errors
    /// As for [`Snapshot::read_block`].
    pub fn try_read_block(&self, block: &Block) -> Result<Option<Vec<u8>>, Error> {
        match self.read_block_as(block, ReadContext { depth: 0, may_build_index: false }) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(Error { kind: ErrorKind::IndexNotBuilt, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads a block like [`Snapshot::read_block`], but only if that takes no waiting: index pages
    /// and stored bytes are in memory, such as in the page cache. Otherwise returns `None`.
    ///
    /// # Errors
    /// As for [`Snapshot::read_block`].
    pub fn read_block_in_memory(&self, block: &Block) -> Result<Option<Vec<u8>>, Error> {
        let Lookup::Found(StoredBlock { archive, located }) = self.stored_block(block)? else {
            return Ok(None);
        };
        self.archive(archive)?.read_block_in_memory(&located).transpose()
    }

    pub(crate) fn read_block_as(
        &self,
        block: &Block,
        reading: ReadContext,
    ) -> Result<Vec<u8>, Error> {
        match block.located.entry.content {
            Content::InParent if block.is_ambiguous => self.read_ambiguous(block, reading),
            Content::InParent => {
                let ParentBlock { archive, block } = self.load_from_parents(block, reading)?;
                self.archive(archive)?.read_block(&block)
            }
            _ => self.archive(block.archive)?.read_block(&block.located),
        }
    }

    /// Finds the ancestor's block that a reference by hash means, and reads the pages for that. If
    /// the index of hashes is needed and hasn't been built, builds it or fails, as `reading` says.
    pub(crate) fn load_from_parents(
        &self,
        block: &Block,
        reading: ReadContext,
    ) -> Result<ParentBlock, Error> {
        let index = || match reading.may_build_index {
            true => Ok(self.parent_index()?),
            false => Ok(self.parents.get().ok_or(Missing::ParentIndex)?),
        };
        match self.find_in_parents(block, |id| Ok(self.page(id)?), index) {
            Err(LocateError::NotInMemory(Missing::ParentIndex)) => {
                Err(self.archive(block.archive)?.file.error(ErrorKind::IndexNotBuilt))
            }
            found => found.map_err(|error| self.failure(error).0),
        }
    }

    pub(crate) fn page_in_memory(&self, id: PageId) -> Result<Arc<IndexPage>, LocateError> {
        self.pages.get(self.id, id).ok_or(LocateError::NotInMemory(Missing::Page(id)))
    }
}
