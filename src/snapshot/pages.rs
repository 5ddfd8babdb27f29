//! Index pages in memory, of all snapshots together.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::StreamKind;
use super::error::Error;
use super::index::Page;
use crate::cache::bounded;

/// Index pages that have been read, bounded in bytes. Snapshots that are opened with the
/// same one share the memory.
#[derive(Debug)]
pub struct IndexPages {
    pages: Cache<Key, Arc<Page>, PageMemory>,
}

/// An index page of one archive of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PageId {
    /// The archive's place in the chain.
    pub(super) archive: usize,
    pub(super) stream: StreamKind,
    /// The page's place in the stream.
    pub(super) page: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// The number that no other snapshot of this process has.
    snapshot: u64,
    page: PageId,
}

#[derive(Debug, Clone)]
struct PageMemory;

impl Weighter<Key, Arc<Page>> for PageMemory {
    fn weight(&self, _: &Key, page: &Arc<Page>) -> u64 {
        page.memory()
    }
}

impl IndexPages {
    /// Room for pages of so many bytes together, or for four of the largest if that is more:
    /// with less, pages would be read again and again.
    pub fn new(bytes: u64) -> Arc<Self> {
        /// A page of 4096 blocks in memory, in bytes, rounded up.
        const LARGEST: u64 = 512 * 1024;
        // A shard must hold several of the largest pages, or they would not be kept at all.
        let pages = bounded(bytes.max(4 * LARGEST), LARGEST, 8 * LARGEST, PageMemory);
        Arc::new(Self { pages })
    }

    /// A page, if it is in memory.
    pub(super) fn get(&self, snapshot: u64, page: PageId) -> Option<Arc<Page>> {
        self.pages.get(&Key { snapshot, page })
    }

    /// A page from memory, or by `load`, which is called once however many ask.
    pub(super) fn get_or_load(
        &self,
        snapshot: u64,
        page: PageId,
        load: impl FnOnce() -> Result<Page, Error>,
    ) -> Result<Arc<Page>, Error> {
        self.pages.get_or_insert_with(&Key { snapshot, page }, || load().map(Arc::new))
    }
}
