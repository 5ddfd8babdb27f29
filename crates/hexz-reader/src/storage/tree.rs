//! BLAKE3 tree of a storage, for verifying parts of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Storage;
use super::hash::SubtreeHashes;

/// Length of a group, in bytes: the unit of verification, with one value in the tree. Smaller
/// groups need more memory, larger ones more time for small reads.
pub const GROUP_LEN: u64 = 256 * 1024;

/// Memory for the value of a group, in bytes.
const CHAINING_VALUE_LEN: u64 = 32;

/// BLAKE3 hash of a storage with its tree: 32 bytes for each [`GROUP_LEN`]. The hash is computed
/// from these values, so they are as trustworthy as the hash.
#[derive(Debug)]
pub(crate) struct HashTree {
    length: u64,
    units: SubtreeHashes,
    /// Number of the tree, unique within this process.
    id: u64,
    _memory: TreeReservation,
}

/// Reason why the tree of a storage can't be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    /// A part of the storage can't be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The values would exceed the memory limit for all trees.
    #[error("the hash trees would take {needed} bytes of memory, more than {limit}")]
    Memory {
        /// Memory needed for all trees, in bytes.
        needed: u64,
        /// Memory allowed for all trees, in bytes.
        limit: u64,
    },
}

impl HashTree {
    /// Hashes all of `storage` on all cores.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub(crate) fn of(storage: &dyn Storage, budget: &Arc<TreeBudget>) -> Result<Self, TreeError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let length = storage.length();
        let memory = budget.reserve(memory_of(length))?;
        let units = SubtreeHashes::of(storage, GROUP_LEN)?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Self { length, units, id, _memory: memory })
    }

    /// Returns the BLAKE3 hash of all bytes.
    pub(crate) fn root(&self) -> [u8; 32] {
        self.units.root()
    }

    /// Returns the number of hashed bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Returns true if `bytes` match the hash of the whole group with that number.
    pub(crate) fn matches(&self, group: u64, bytes: &[u8]) -> bool {
        self.units.matches(group, bytes)
    }

    /// Returns a number that no other tree of this process has.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

/// Returns the memory for the tree of `length` bytes, in bytes.
fn memory_of(length: u64) -> u64 {
    length.div_ceil(GROUP_LEN).saturating_mul(CHAINING_VALUE_LEN)
}

/// Memory budget for the values of hash trees.
#[derive(Debug)]
pub(crate) struct TreeBudget {
    limit: u64,
    used: AtomicU64,
}

impl TreeBudget {
    /// Creates a budget of `limit` bytes.
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, used: AtomicU64::new(0) })
    }

    /// Returns the memory reserved by trees, in bytes.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns true if there is memory for the tree of a storage of `length` bytes.
    pub(crate) fn has_room_for(&self, length: u64) -> bool {
        self.used().checked_add(memory_of(length)).is_some_and(|used| used <= self.limit)
    }

    fn reserve(self: &Arc<Self>, bytes: u64) -> Result<TreeReservation, TreeError> {
        let add = |used: u64| used.checked_add(bytes).filter(|&used| used <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => Ok(TreeReservation { budget: Arc::clone(self), bytes }),
            Err(used) => {
                Err(TreeError::Memory { needed: used.saturating_add(bytes), limit: self.limit })
            }
        }
    }
}

/// A reservation from a budget, released on drop.
#[derive(Debug)]
struct TreeReservation {
    budget: Arc<TreeBudget>,
    bytes: u64,
}

impl Drop for TreeReservation {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn groups_match_only_their_own_value() {
        for length in
            [0, 1, GROUP_LEN - 1, GROUP_LEN, GROUP_LEN + 1, 5 * GROUP_LEN, 6 * GROUP_LEN + 77]
        {
            let bytes = noise(length);
            let storage: Arc<[u8]> = Arc::from(bytes.as_slice());
            let tree = HashTree::of(&storage, &TreeBudget::new(1 << 20)).unwrap();
            assert_eq!(tree.root(), *blake3::hash(&bytes).as_bytes());
            assert_eq!(tree.length(), length);
            let mut groups: Vec<_> =
                bytes.chunks(usize::try_from(GROUP_LEN).unwrap()).map(<[u8]>::to_vec).collect();
            if groups.is_empty() {
                groups.push(Vec::new());
            }
            let count = groups.len() as u64;
            for (number, group) in (0..).zip(&mut groups) {
                assert!(tree.matches(number, group), "group {number} of {length}");
                for other in (0..=count).filter(|&other| other != number) {
                    assert!(!tree.matches(other, group), "group {number} of {length} as {other}");
                }
                for at in [0, group.len() / 2, group.len().saturating_sub(1)] {
                    let Some(byte) = group.get_mut(at) else { continue };
                    *byte ^= 1;
                    assert!(!tree.matches(number, group), "group {number} of {length}");
                    group[at] ^= 1;
                }
                group.push(0);
                assert!(!tree.matches(number, group), "group {number} of {length} and a byte");
                group.pop();
                if group.pop().is_some() {
                    assert!(!tree.matches(number, group), "group {number} of {length}, cut");
                }
            }
        }
    }

    #[test]
    fn memory_is_reserved_and_released() {
        let storage: Arc<[u8]> = Arc::from(noise(3 * GROUP_LEN + 1));
        let budget = TreeBudget::new(4 * CHAINING_VALUE_LEN + 1);
        assert!(budget.has_room_for(4 * GROUP_LEN) && !budget.has_room_for(4 * GROUP_LEN + 1));
        let tree = HashTree::of(&storage, &budget).unwrap();
        assert_eq!(budget.used(), 4 * CHAINING_VALUE_LEN);
        assert!(!budget.has_room_for(1) && budget.has_room_for(0));
        let error = HashTree::of(&storage, &budget).unwrap_err();
        assert!(matches!(error, TreeError::Memory { needed: 256, limit: 129 }), "{error}");
        assert_eq!(budget.used(), 4 * CHAINING_VALUE_LEN);
        drop(tree);
        assert_eq!(budget.used(), 0);
        assert!(HashTree::of(&storage, &budget).is_ok());
    }
}
