//! Finding blocks in parents by their hash.
//!
//! Most blocks that a thin archive leaves to its parents are at the same place there, so
//! that page is asked first. Only when it doesn't know the block, an index of all
//! parents' hashes is made: 8 bytes for each stored block, 32 bits of its hash and its
//! ordinal number. Equal fingerprints are told apart by the whole hash on its page.

use std::sync::{Arc, Mutex};

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

/// The index of parents' hashes, made when it is first needed.
#[derive(Debug, Default)]
pub(super) struct Parents {
    index: Mutex<Option<Arc<HashIndex>>>,
}

impl Parents {
    /// The index, which the first caller makes while others wait.
    pub(super) fn index(&self, chain: &[Archive], zeros: &ZeroHashes) -> Arc<HashIndex> {
        let mut index = self.index.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Arc::clone(index.get_or_insert_with(|| Arc::new(HashIndex::build(chain, zeros))))
    }
}

/// Where each stored block of the ancestors is, by hash.
#[derive(Debug)]
pub(super) struct HashIndex {
    /// Sorted by fingerprint.
    entries: Vec<Fingerprint>,
    /// The ordinal number of each page's first block, ascending.
    pages: Vec<(u32, PageId)>,
}

/// 32 bits of a hash above the 32-bit ordinal number of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Fingerprint(u64);

impl Fingerprint {
    fn new(hash: &BlockHash, ordinal: u32) -> Self {
        Self(Self::lowest(hash).0 | u64::from(ordinal))
    }

    /// The least that a block with this hash can have.
    fn lowest(hash: &BlockHash) -> Self {
        let bits = hash.0.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        Self(u64::from(bits) << 32)
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
                            entries.push(Fingerprint::new(hash, ordinal));
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
        Self { entries, pages }
    }

    /// The places of the blocks whose fingerprint is that of `hash`, nearest ancestor
    /// first: a page, and a position on it.
    pub(super) fn candidates(&self, hash: &BlockHash) -> impl Iterator<Item = (PageId, usize)> {
        let lowest = Fingerprint::lowest(hash);
        let first = self.entries.partition_point(|entry| *entry < lowest);
        self.entries
            .iter()
            .skip(first)
            .take_while(move |entry| entry.same_hash_bits(lowest))
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

    #[test]
    fn equal_fingerprints_are_all_found() {
        let mut same = [7; 32];
        let page = PageId { archive: 1, stream: StreamKind::Main, page: 0 };
        let later = PageId { page: 1, ..page };
        let mut entries = vec![
            Fingerprint::new(&BlockHash([9; 32]), 0),
            Fingerprint::new(&BlockHash([7; 32]), 1),
            Fingerprint::new(&BlockHash([5; 32]), 2),
        ];
        same[31] = 0; // another block, the same fingerprint
        entries.push(Fingerprint::new(&BlockHash(same), 3));
        entries.sort_unstable();
        let index = HashIndex { entries, pages: vec![(0, page), (2, later)] };
        let found: Vec<_> = index.candidates(&BlockHash([7; 32])).collect();
        assert_eq!(found, [(page, 1), (later, 1)]);
        assert_eq!(index.candidates(&BlockHash([8; 32])).count(), 0);
    }
}
