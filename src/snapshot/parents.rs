//! Finding blocks in parents by their hash.
//!
//! Most blocks that a thin archive leaves to its parents are at the same place there, so
//! that page is asked first. Only when it doesn't know the block, an index of all
//! parents' hashes is built: 8 bytes for each stored block, a fingerprint of its hash with 32
//! bits and its ordinal number. Equal fingerprints are told apart by the whole hash on its page.
//! Fingerprints are keyed at random, so nobody can make many blocks have the same one.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard};

use super::archive::Archive;
use super::error::{Error, printable};
use super::index::Located;
use super::limits::MAX_PARENT_BLOCKS;
use super::pages::PageId;
use super::said::may_say;
use super::zeros::ZeroHashes;
use super::{BlockHash, StreamKind};

/// A block found in an ancestor.
#[derive(Debug)]
pub(super) struct InParent {
    /// The ancestor's place in the chain.
    pub(super) archive: usize,
    pub(super) block: Located,
}

/// Blocks with the fingerprint of a hash that are compared with it. Among as many blocks as
/// there can be, one in 32 has the same fingerprint as another one by chance.
const MAX_CANDIDATES: usize = 16;

/// The index of parents' hashes, built when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Parents {
    index: Mutex<Option<Arc<HashIndex>>>,
}

impl Parents {
    /// The index, if it has been built.
    pub(super) fn built(&self) -> Option<Arc<HashIndex>> {
        self.lock().clone()
    }

    /// The index, which the first caller builds while others wait.
    pub(super) fn index(&self, chain: &[Archive], zeros: &ZeroHashes) -> Arc<HashIndex> {
        Arc::clone(self.lock().get_or_insert_with(|| Arc::new(HashIndex::build(chain, zeros))))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<HashIndex>>> {
        self.index.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Where each stored block of the ancestors is, by hash.
#[derive(Debug)]
pub(super) struct HashIndex {
    /// Sorted by fingerprint.
    entries: Vec<Fingerprint>,
    /// The ordinal number of each page's first block, ascending.
    pages: Vec<(u32, PageId)>,
    key: RandomState,
}

/// A keyed hash of a block's hash, 32 bits of it, above the 32-bit ordinal number of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Fingerprint(u64);

impl Fingerprint {
    fn new(hash: &BlockHash, ordinal: u32, key: &RandomState) -> Self {
        Self(Self::lowest(hash, key).0 | u64::from(ordinal))
    }

    /// The least that a block with this hash can have.
    fn lowest(hash: &BlockHash, key: &RandomState) -> Self {
        Self(key.hash_one(hash.0) & !u64::from(u32::MAX))
    }

    fn ordinal(self) -> u32 {
        let [_, _, _, _, ordinal @ ..] = self.0.to_be_bytes();
        u32::from_be_bytes(ordinal)
    }

    fn same_hash_bits(self, other: Self) -> bool {
        self.0 >> 32 == other.0 >> 32
    }
}

/// Index pages that can't be read. One line tells of all of them: an archive may have
/// millions, and their number must not be that of our log's lines.
#[derive(Default)]
struct Damaged {
    first: Option<Error>,
    count: usize,
}

impl Damaged {
    fn note(&mut self, error: Error) {
        self.first.get_or_insert(error);
        self.count += 1;
    }

    fn log(&self) {
        if let Some(error) = &self.first
            && let Some(held_back) = may_say()
        {
            let pages = self.count;
            tracing::error!(pages, held_back, "blocks of a parent can't be found: {error}");
        }
    }
}

impl HashIndex {
    /// Makes the index of all blocks that can be known. What is left out, since a page is
    /// damaged or there are too many, can't be found; the log says so, once.
    fn build(chain: &[Archive], zeros: &ZeroHashes) -> Self {
        let mut entries = Vec::new();
        let mut pages = Vec::new();
        let mut ordinal: u32 = 0;
        let mut damaged = Damaged::default();
        let key = RandomState::new();
        // The first is the served archive itself, whose own blocks need no looking up.
        'archives: for (archive, ancestor) in chain.iter().enumerate().skip(1) {
            for stream in [StreamKind::Main, StreamKind::Auxiliary] {
                for page in 0..ancestor.stream(stream).pages.len() {
                    pages.push((ordinal, PageId { archive, stream, page }));
                    let loaded = match ancestor.load_page(stream, page, zeros) {
                        Ok(loaded) => loaded,
                        Err(error) => {
                            damaged.note(error);
                            continue;
                        }
                    };
                    for block in loaded.blocks() {
                        let hash = &block.entry.hash;
                        if hash.is_given() && block.entry.has_bytes_of(hash) {
                            entries.push(Fingerprint::new(hash, ordinal, &key));
                        }
                        ordinal = ordinal.saturating_add(1);
                    }
                    if entries.len() > MAX_PARENT_BLOCKS || ordinal == u32::MAX {
                        if let Some(held_back) = may_say() {
                            tracing::error!(
                                held_back,
                                "{} and the parents behind it have more blocks than can be \
                                 indexed ({MAX_PARENT_BLOCKS})",
                                printable(&ancestor.path),
                            );
                        }
                        break 'archives;
                    }
                }
            }
        }
        damaged.log();
        entries.shrink_to_fit();
        entries.sort_unstable();
        Self { entries, pages, key }
    }

    /// The places of blocks whose fingerprint is that of `hash`, nearest ancestor first: a page,
    /// and a position on it. There are at most [`MAX_CANDIDATES`].
    pub(super) fn candidates(&self, hash: &BlockHash) -> impl Iterator<Item = (PageId, usize)> {
        let lowest = Fingerprint::lowest(hash, &self.key);
        let first = self.entries.partition_point(|entry| *entry < lowest);
        self.entries
            .iter()
            .skip(first)
            .take_while(move |entry| entry.same_hash_bits(lowest))
            .take(MAX_CANDIDATES)
            .filter_map(|entry| {
                let page = self.pages.partition_point(|(start, _)| *start <= entry.ordinal());
                let (start, page) = self.pages.get(page.checked_sub(1)?)?;
                Some((*page, (entry.ordinal() - start) as usize))
            })
    }

    /// How many blocks it knows.
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

    /// Hashes that share whatever part of them an archive's maker likes.
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
        // Blocks that are equal have equal fingerprints, and few of them are looked at.
        let index = index_of(&[[7; 32]; 1000]);
        assert_eq!(index.candidates(&BlockHash([7; 32])).count(), MAX_CANDIDATES);
    }
}
