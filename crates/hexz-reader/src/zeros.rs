//! Detection of blocks of zeros by their hash.
//!
//! The usual packer stores runs of zeros as ordinary blocks, whose hash is that of the same number
//! of zero bytes. Hashing zeros for every block's length would cost as much as reading the blocks,
//! so only blocks that are likely to be zeros are considered.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::BlockHash;
use super::header::Extent;
use super::index_page::{Content, IndexEntry};

/// Ratio of decoded to stored length above which a block may be zeros.
const SUSPICIOUS_RATIO: u64 = 64;
/// Stored length that compression may produce for zeros of any length, in bytes.
const MIN_STORED_ALLOWANCE: u64 = 64;
/// Maximum number of zero bytes that are hashed for one snapshot. Packers use few lengths for runs
/// of zeros; an archive that lists thousands of large ones must not keep a core busy. Blocks of
/// further lengths are read like any other.
const MAX_HASHED: u64 = 1 << 30;

/// Hashes of zeros, by length.
#[derive(Debug, Default)]
pub(super) struct ZeroHashes {
    known: Mutex<HashedLengths>,
}

#[derive(Debug, Default)]
struct HashedLengths {
    by_length: HashMap<u32, BlockHash>,
    hashed: u64,
}

impl ZeroHashes {
    /// Returns true if the block stored at `place` is zeros, judged by its hash alone.
    pub(super) fn is_stored_zeros(&self, place: Extent, length: u32, hash: &BlockHash) -> bool {
        let at_most = MIN_STORED_ALLOWANCE + u64::from(length) / SUSPICIOUS_RATIO;
        let suspicious = u64::from(place.length) <= at_most;
        suspicious && hash.is_present() && Some(*hash) == self.hash(length)
    }

    /// Returns true if a block that claims to be zeros has their hash or none.
    pub(super) fn is_consistent(&self, hash: &BlockHash, length: u32) -> bool {
        !hash.is_present() || Some(*hash) == self.hash(length)
    }

    /// Marks the page's blocks that live in a parent and are zeros.
    ///
    /// A run of zeros is cut into blocks of one length, so only lengths that occur at least twice
    /// are hashed. Zeros missed that way are read from the parent.
    pub(super) fn mark_parents_zeros(&self, entries: &mut [IndexEntry], starts: &[u64]) {
        let length_of = |position: usize| {
            let start = starts.get(position)?;
            u32::try_from(starts.get(position + 1)?.checked_sub(*start)?).ok()
        };
        let mut occurrences: HashMap<u32, u32> = HashMap::new();
        for (position, entry) in entries.iter().enumerate() {
            if let (Content::InParent, Some(length)) = (entry.content, length_of(position)) {
                *occurrences.entry(length).or_default() += 1;
            }
        }
        for (position, entry) in entries.iter_mut().enumerate() {
            if let (Content::InParent, Some(length)) = (entry.content, length_of(position))
                && occurrences.get(&length).is_some_and(|&count| count > 1)
                && Some(entry.hash) == self.hash(length)
            {
                entry.content = Content::Zeros;
            }
        }
    }

    /// Returns true if a block that lives in a parent is zeros, judged by its hash.
    ///
    /// Hashes `length` zeros, so call it only for blocks that are likely to be zeros.
    pub(super) fn is_zeros_in_parent(&self, entry: &IndexEntry, length: u32) -> bool {
        entry.content == Content::InParent && Some(entry.hash) == self.hash(length)
    }

    fn hash(&self, length: u32) -> Option<BlockHash> {
        let mut known = self.known.lock();
        if let Some(hash) = known.by_length.get(&length) {
            return Some(*hash);
        }
        if known.hashed > MAX_HASHED {
            return None;
        }
        let hash = hash_zeros(length);
        known.hashed += u64::from(length);
        known.by_length.insert(length, hash);
        Some(hash)
    }
}

fn hash_zeros(length: u32) -> BlockHash {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    let mut hasher = blake3::Hasher::new();
    let mut left = length as usize;
    while left > 0 {
        let piece = ZEROS.get(..left).unwrap_or(&ZEROS);
        hasher.update(piece);
        left -= piece.len();
    }
    BlockHash(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_zeros_are_detected_by_hash_and_length() {
        let zeros = ZeroHashes::default();
        let place = Extent { offset: 4096, length: 20 };
        let hash = BlockHash(*blake3::hash(&vec![0; 100_000]).as_bytes());
        assert!(zeros.is_stored_zeros(place, 100_000, &hash));
        assert!(!zeros.is_stored_zeros(place, 100_001, &hash));
        assert!(!zeros.is_stored_zeros(place, 100_000, &BlockHash([0; 32])));
        // 64 bytes plus a 64th of the length.
        let of = |length| Extent { length, ..place };
        assert!(zeros.is_stored_zeros(of(64 + 1562), 100_000, &hash));
        assert!(!zeros.is_stored_zeros(of(64 + 1563), 100_000, &hash));
    }

    #[test]
    fn claimed_zeros_have_the_zero_hash_or_none() {
        let zeros = ZeroHashes::default();
        assert!(zeros.is_consistent(&BlockHash::NONE, 5));
        assert!(zeros.is_consistent(&hash_zeros(5), 5));
        assert!(
            !zeros.is_consistent(&hash_zeros(5), 6) && !zeros.is_consistent(&BlockHash([1; 32]), 5)
        );
    }

    #[test]
    fn parent_zeros_are_marked_if_their_length_occurs_twice() {
        let in_parent = |hash| IndexEntry { content: Content::InParent, hash };
        let place = Extent { offset: 4096, length: 9000 };
        let stored = Content::Stored { place, checksum: 0 };
        let other = BlockHash([1; 32]);
        let blocks = [
            (100, in_parent(hash_zeros(100)), true),
            (100, in_parent(other), false),
            (200, in_parent(hash_zeros(200)), false),
            (300, in_parent(hash_zeros(300)), true),
            (300, in_parent(hash_zeros(300)), true),
            (300, in_parent(hash_zeros(100)), false),
            (100, IndexEntry { content: stored, hash: hash_zeros(100) }, false),
        ];
        let zeros = ZeroHashes::default();
        for (length, entry, _) in &blocks {
            let has_hash = entry.content == Content::InParent && entry.hash == hash_zeros(*length);
            assert_eq!(zeros.is_zeros_in_parent(entry, *length), has_hash, "{entry:?}");
        }
        let mut entries = blocks.map(|(_, entry, _)| entry);
        let mut starts = vec![1000];
        for (length, ..) in blocks {
            starts.push(starts[starts.len() - 1] + u64::from(length));
        }
        zeros.mark_parents_zeros(&mut entries, &starts);
        let marked = entries.map(|entry| entry.content == Content::Zeros);
        assert_eq!(marked, blocks.map(|(.., are_zeros)| are_zeros));
    }

    #[test]
    fn hashing_of_zeros_is_limited() {
        let zeros = ZeroHashes::default();
        let all = u32::try_from(MAX_HASHED).unwrap();
        assert!(zeros.hash(all).is_some() && zeros.hash(5).is_some());
        assert_eq!(zeros.hash(6), None);
        // Hashes that were computed before remain available.
        assert_eq!(zeros.hash(5), Some(hash_zeros(5)));
    }
}
