//! Index of the parents' blocks by their hash.
//!
//! It takes 8 bytes for each stored block: a 32-bit fingerprint of its hash, and its ordinal
//! number. Blocks with equal fingerprints are distinguished by the whole hash on their page.
//! Fingerprints are keyed at random, so an attacker can't construct blocks with the same
//! fingerprint.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use parking_lot::Mutex;

use super::archive::Archive;
use super::error::{Error, ErrorKind, printable};
use super::index_page::LocatedBlock;
use super::limits::MAX_PARENT_BLOCKS;
use super::log_limit::LogLimit;
use super::page_cache::PageId;
use super::zeros::ZeroHashes;
use super::{BlockHash, StreamKind};

/// A block found in an ancestor.
#[derive(Debug)]
pub(super) struct ParentBlock {
    /// Index of the ancestor in the chain.
    pub(super) archive: usize,
    pub(super) block: LocatedBlock,
}

/// Maximum number of blocks with a matching fingerprint whose hashes are compared. With the maximum
/// number of blocks, one in 32 shares its fingerprint with another one by chance.
const MAX_CANDIDATES: usize = 16;

/// Index of the parents' hashes, built on first use.
#[derive(Debug, Default)]
pub(super) struct LazyParentIndex {
    index: Mutex<Option<Arc<HashIndex>>>,
}

impl LazyParentIndex {
    /// Returns the index, if it has been built.
    pub(super) fn get(&self) -> Option<Arc<HashIndex>> {
        self.index.lock().clone()
    }

    /// Returns the index. The first caller builds it while others wait.
    ///
    /// # Errors
    /// A store failed. The next caller tries again.
    pub(super) fn get_or_build(
        &self,
        chain: &[Archive],
        zeros: &ZeroHashes,
        log_limit: &LogLimit,
    ) -> Result<Arc<HashIndex>, Error> {
        let mut index = self.index.lock();
        if let Some(built) = index.as_ref() {
            return Ok(Arc::clone(built));
        }
        let built = Arc::new(HashIndex::build(chain, zeros, log_limit)?);
        *index = Some(Arc::clone(&built));
        Ok(built)
    }
}

/// Locations of the ancestors' stored blocks, by hash.
#[derive(Debug)]
pub(super) struct HashIndex {
    /// Fingerprints in ascending order.
    entries: Vec<Fingerprint>,
    /// Ordinal number of each page's first block, in ascending order.
    pages: Vec<(u32, PageId)>,
    key: RandomState,
}

/// 32 bits of a keyed hash of the block's hash, followed by the 32-bit ordinal number of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Fingerprint(u64);

impl Fingerprint {
    fn new(hash: &BlockHash, ordinal: u32, key: &RandomState) -> Self {
        Self(Self::lowest(hash, key).0 | u64::from(ordinal))
    }

    /// Returns the lowest fingerprint of a block with this hash.
    fn lowest(hash: &BlockHash, key: &RandomState) -> Self {
        Self(key.hash_one(hash.0) & !u64::from(u32::MAX))
    }

    fn ordinal(self) -> u32 {
        let [_, _, _, _, ordinal @ ..] = self.0.to_be_bytes();
        u32::from_be_bytes(ordinal)
    }

    fn has_same_hash_bits(self, other: Self) -> bool {
        self.0 >> 32 == other.0 >> 32
    }
}

/// Index pages that can't be read. They are logged in one line: an archive may have millions of
/// pages, and must not control the number of our log lines.
#[derive(Default)]
struct DamagedPages {
    first: Option<Error>,
    count: usize,
}

impl DamagedPages {
    fn record(&mut self, error: Error) {
        self.first.get_or_insert(error);
        self.count += 1;
    }

    fn log(&self, log_limit: &LogLimit) {
        if let Some(error) = &self.first
            && let Some(held_back) = log_limit.allow()
        {
            tracing::error!(
                reason = error.label(),
                pages = self.count,
                held_back,
                "index pages of a parent can't be read, so their blocks can't be found: {error}",
            );
        }
    }
}

impl HashIndex {
    /// Builds the index of all blocks whose pages can be read. Blocks on damaged pages, and blocks
    /// beyond the limit, can't be found; both are logged once.
    ///
    /// # Errors
    /// A store failed, which says nothing about the page.
    fn build(chain: &[Archive], zeros: &ZeroHashes, log_limit: &LogLimit) -> Result<Self, Error> {
        let mut entries = Vec::new();
        let mut pages = Vec::new();
        let mut ordinal: u32 = 0;
        let mut damaged = DamagedPages::default();
        let key = RandomState::new();
        // The first archive is the served one, whose own blocks need no lookup.
        'archives: for (archive, ancestor) in chain.iter().enumerate().skip(1) {
            for stream in StreamKind::ALL {
                for page in 0..ancestor.stream(stream).pages.len() {
                    pages.push((ordinal, PageId { archive, stream, page }));
                    let loaded = match ancestor.load_page(stream, page, zeros) {
                        Ok(loaded) => loaded,
                        Err(error) if matches!(error.kind, ErrorKind::Store(..)) => {
                            return Err(error);
                        }
                        Err(error) => {
                            damaged.record(error);
                            continue;
                        }
                    };
                    for block in loaded.blocks() {
                        let hash = &block.entry.hash;
                        if hash.is_present() && block.entry.has_bytes_of(hash) {
                            entries.push(Fingerprint::new(hash, ordinal, &key));
                        }
                        ordinal = ordinal.saturating_add(1);
                    }
                    if entries.len() > MAX_PARENT_BLOCKS || ordinal == u32::MAX {
                        if let Some(held_back) = log_limit.allow() {
                            tracing::error!(
                                reason = "parent_index_full",
                                held_back,
                                "{}: the index of parents' blocks is full ({MAX_PARENT_BLOCKS}), \
                                 so some blocks can't be found",
                                printable(&ancestor.file.path),
                            );
                        }
                        break 'archives;
                    }
                }
            }
        }
        damaged.log(log_limit);
        entries.shrink_to_fit();
        entries.sort_unstable();
        Ok(Self { entries, pages, key })
    }

    /// Returns the locations of blocks whose fingerprint matches `hash`, nearest ancestor first: a
    /// page and a position on it. There are at most [`MAX_CANDIDATES`].
    pub(super) fn candidates(&self, hash: &BlockHash) -> impl Iterator<Item = (PageId, usize)> {
        let lowest = Fingerprint::lowest(hash, &self.key);
        let first = self.entries.partition_point(|entry| *entry < lowest);
        self.entries
            .iter()
            .skip(first)
            .take_while(move |entry| entry.has_same_hash_bits(lowest))
            .take(MAX_CANDIDATES)
            .filter_map(|entry| {
                let page = self.pages.partition_point(|(start, _)| *start <= entry.ordinal());
                let (start, page) = self.pages.get(page.checked_sub(1)?)?;
                Some((*page, (entry.ordinal() - start) as usize))
            })
    }

    /// Returns the number of blocks in the index.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index_of(hashes: &[[u8; 32]]) -> HashIndex {
        let key = RandomState::new();
        let page = PageId { archive: 1, stream: StreamKind::Main, page: 0 };
        let pages = vec![(0, page), (2, PageId { page: 1, ..page })];
        let mut entries: Vec<_> = (0..)
            .zip(hashes)
            .map(|(ordinal, hash)| Fingerprint::new(&BlockHash(*hash), ordinal, &key))
            .collect();
        entries.sort_unstable();
        HashIndex { entries, pages, key }
    }

    #[test]
    fn equal_fingerprints_are_found_nearest_first() {
        let index = index_of(&[[9; 32], [7; 32], [5; 32], [7; 32]]);
        let page = PageId { archive: 1, stream: StreamKind::Main, page: 0 };
        let found: Vec<_> = index.candidates(&BlockHash([7; 32])).collect();
        assert_eq!(found, [(page, 1), (PageId { page: 1, ..page }, 1)]);
        assert_eq!(index.candidates(&BlockHash([8; 32])).count(), 0);
    }

    /// Uses hashes that differ in few bytes, as an attacker may choose them.
    #[test]
    fn fingerprints_of_similar_hashes_differ() {
        let hashes: Vec<[u8; 32]> = (0..10_000_u64)
            .map(|number| {
                let mut hash = [7; 32];
                hash[24..].copy_from_slice(&number.to_be_bytes());
                hash
            })
            .collect();
        let index = index_of(&hashes);
        for hash in &hashes {
            assert!((1..=3).contains(&index.candidates(&BlockHash(*hash)).count()));
        }
        // Equal blocks have equal fingerprints, and only a limited number of them is compared.
        let index = index_of(&[[7; 32]; 1000]);
        assert_eq!(index.candidates(&BlockHash([7; 32])).count(), MAX_CANDIDATES);
    }
}
