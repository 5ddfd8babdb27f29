//! Finds the blocks that an archive leaves to its parents, by their hash.
//!
//! Most of them are at the same offset in a parent, so the page at that offset is searched first.
//! Only if it doesn't list the block, the index of all parents' hashes is built and searched.

use std::sync::Arc;

use super::block_read::Missing;
use super::error::{Error, ErrorKind, printable};
use super::index_page::{IndexEntry, IndexPage, LocatedBlock};
use super::page_cache::PageId;
use super::parent_index::{HashIndex, ParentBlock};
use super::references::LocateError;
use super::{Block, BlockHash, Snapshot};

impl Snapshot {
    /// Returns true if the index of the parents' hashes has been built.
    pub fn has_parent_index(&self) -> bool {
        self.parents.get().is_some()
    }

    /// Builds the index of the parents' hashes, if it hasn't been built.
    ///
    /// # Errors
    /// A store failed. Damaged pages aren't an error: their blocks can't be found.
    pub fn build_parent_index(&self) -> Result<(), Error> {
        self.parent_index().map(drop)
    }

    pub(crate) fn parent_index(&self) -> Result<Arc<HashIndex>, Error> {
        self.parents.get_or_build(&self.chain, &self.zeros, &self.log_limit)
    }

    /// Finds the ancestor's block that a reference by hash means. Gets index pages from `page`, and
    /// the index of hashes, if it is needed, from `index`.
    pub(super) fn find_in_parents(
        &self,
        block: &Block,
        page: impl Fn(PageId) -> Result<Arc<IndexPage>, LocateError>,
        index: impl FnOnce() -> Result<Arc<HashIndex>, LocateError>,
    ) -> Result<ParentBlock, LocateError> {
        let LocatedBlock { start: at, length, entry: IndexEntry { hash, .. }, .. } = block.located;
        let file = &self.archive(block.archive)?.file;
        let unresolvable =
            || file.error(ErrorKind::Unresolvable { stream: block.stream, at, hash });
        if !hash.is_present() {
            return Err(unresolvable().into());
        }
        // A page that can't be read may list other blocks only, so it isn't an error by itself. If
        // the block isn't found, it is the better explanation.
        let mut unread = None;
        let mut load = |id| match page(id) {
            Ok(page) => Ok(Some(page)),
            Err(LocateError::Failed { error, .. }) => {
                unread.get_or_insert(error);
                Ok(None)
            }
            Err(LocateError::NotInMemory(missing)) => Err(missing),
        };
        let found = match self.find_at_same_offset(block, &mut load)? {
            Some(found) => Some(found),
            None => self.find_by_index(&hash, &*index()?, &mut load)?,
        };
        // Blocks with the same hash have the same length, unless an index is damaged.
        found
            .filter(|found| found.block.length == length)
            .ok_or_else(|| unread.unwrap_or_else(unresolvable).into())
    }

    /// Searches each ancestor's page that covers the same offset of the same stream.
    fn find_at_same_offset(
        &self,
        block: &Block,
        load: &mut impl FnMut(PageId) -> Result<Option<Arc<IndexPage>>, Missing>,
    ) -> Result<Option<ParentBlock>, Missing> {
        let LocatedBlock { start, entry: IndexEntry { hash, .. }, .. } = block.located;
        for archive in 1..self.chain.len() {
            if let Some(page) = self.page_covering(archive, block.stream, start)
                && let Some(page) = load(page)?
            {
                let same_place =
                    page.block_at(start).filter(|candidate| candidate.entry.has_bytes_of(&hash));
                if let Some(block) = same_place.or_else(|| page.block_with_hash(&hash)) {
                    return Ok(Some(ParentBlock { archive, block }));
                }
            }
        }
        Ok(None)
    }

    fn find_by_index(
        &self,
        hash: &BlockHash,
        index: &HashIndex,
        load: &mut impl FnMut(PageId) -> Result<Option<Arc<IndexPage>>, Missing>,
    ) -> Result<Option<ParentBlock>, Missing> {
        for (page, position) in index.candidates(hash) {
            let archive = page.archive;
            let block = load(page)?.and_then(|page| page.block(position));
            if let Some(block) = block.filter(|block| block.entry.hash == *hash) {
                return Ok(Some(ParentBlock { archive, block }));
            }
        }
        tracing::debug!(blocks = index.len(), "{}: no parent has {hash}", printable(self.path()));
        Ok(None)
    }
}
