//! Cache of index pages, shared by all snapshots.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::StreamKind;
use super::error::Error;
use super::index_page::IndexPage;
use crate::cache::bounded;

/// Cache of index pages, bounded in bytes. Snapshots that are opened with the same cache share its
/// memory.
#[derive(Debug)]
pub struct IndexPageCache {
    pages: Cache<Key, Arc<IndexPage>, PageMemory>,
}

/// Identity of an index page within a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageId {
    /// Index of the archive in the chain.
    pub(super) archive: usize,
    pub(super) stream: StreamKind,
    /// Number of the page in the stream.
    pub(super) page: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// Number of the snapshot, unique within this process.
    snapshot: u64,
    page: PageId,
}

#[derive(Debug, Clone)]
struct PageMemory;

impl Weighter<Key, Arc<IndexPage>> for PageMemory {
    fn weight(&self, _: &Key, page: &Arc<IndexPage>) -> u64 {
        page.memory()
    }
}

impl IndexPageCache {
    /// Creates a cache of `bytes` bytes, but at least the size of four of the largest pages: a
    /// smaller cache would read pages again and again.
    pub fn new(bytes: u64) -> Arc<Self> {
        /// Size of a page of 4096 blocks in memory, in bytes, rounded up.
        const LARGEST: u64 = 512 * 1024;
        // A shard must hold several of the largest pages, or it would not keep them at all.
        let pages = bounded(bytes.max(4 * LARGEST), LARGEST, 8 * LARGEST, PageMemory);
        Arc::new(Self { pages })
    }

    /// Returns a page if it is in memory.
    pub(super) fn get(&self, snapshot: u64, page: PageId) -> Option<Arc<IndexPage>> {
        self.pages.get(&Key { snapshot, page })
    }

    /// Returns a page from memory, or loads it by `load`. Concurrent loads of a page are
    /// deduplicated.
    pub(super) fn get_or_load(
        &self,
        snapshot: u64,
        page: PageId,
        load: impl FnOnce() -> Result<IndexPage, Error>,
    ) -> Result<Arc<IndexPage>, Error> {
        self.pages.get_or_insert_with(&Key { snapshot, page }, || load().map(Arc::new))
    }
}
