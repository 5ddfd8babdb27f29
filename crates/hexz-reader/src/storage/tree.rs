//! BLAKE3 tree of a storage, for verifying parts of it, and files that contain such a tree.
//!
//! A tree file allows verifying parts of an archive without hashing all of it first. It needs no
//! trust, since its values have to add up to the expected digest. Its format:
//!
//! ```text
//! 0   "B3TREE", version 1, and 18: the binary logarithm of the group length
//! 8   length of the hashed file in bytes, 64 bits, little-endian
//! 16  BLAKE3 chaining value of each group, 32 bytes each
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::hash::SubtreeHashes;
use super::{GroupHashes, Storage};

/// Length of a group, in bytes: the unit of verification, with one value in the tree. Smaller
/// groups need more memory, larger ones more time for small reads.
pub const GROUP_LEN: u64 = 256 * 1024;

/// Memory for the value of a group, in bytes.
const CHAINING_VALUE_LEN: u64 = 32;

/// Start of a tree file.
const FILE_MAGIC: [u8; 8] = *b"B3TREE\x01\x12";
/// Length of the head of a tree file, in bytes.
const FILE_HEAD_LEN: usize = 16;

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
        let length = storage.length();
        let memory = budget.reserve(memory_of(length))?;
        Ok(Self::new(length, SubtreeHashes::of(storage, GROUP_LEN)?, memory))
    }

    fn new(length: u64, units: SubtreeHashes, memory: TreeReservation) -> Self {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Self { length, units, id, _memory: memory }
    }

    /// Reads the tree of a storage of `length` bytes from a tree file. Returns `None` if `file` has
    /// no tree for that length. A storage of one group has none: it can only be hashed.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub(crate) fn from_file(
        file: &dyn Storage,
        length: u64,
        budget: &Arc<TreeBudget>,
    ) -> Result<Option<Self>, TreeError> {
        let values_len = memory_of(length);
        if length <= GROUP_LEN || file.length() != values_len + FILE_HEAD_LEN as u64 {
            return Ok(None);
        }
        let mut head = [0; FILE_HEAD_LEN];
        file.read_exact_at(&mut head, 0)?;
        if head != file_head(length) {
            return Ok(None);
        }
        let memory = budget.reserve(values_len)?;
        let count = usize::try_from(length.div_ceil(GROUP_LEN)).unwrap_or(usize::MAX);
        let mut values = vec![[0; 32]; count];
        file.read_exact_at(values.as_flattened_mut(), FILE_HEAD_LEN as u64)?;
        Ok(Some(Self::new(length, SubtreeHashes::from_values(values, GROUP_LEN), memory)))
    }

    /// Writes a tree file.
    pub(crate) fn write_file(&self, out: &mut dyn io::Write) -> io::Result<()> {
        out.write_all(&file_head(self.length))?;
        out.write_all(self.units.values().as_flattened())
    }

    /// Returns the number of hashed bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Returns a number that no other tree of this process has.
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

impl GroupHashes for HashTree {
    fn matches(&self, group: u64, bytes: &[u8]) -> bool {
        self.units.matches(group, bytes)
    }

    fn root(&self) -> [u8; 32] {
        self.units.root()
    }
}

/// Returns the head of the tree file for a storage of `length` bytes.
fn file_head(length: u64) -> [u8; FILE_HEAD_LEN] {
    let mut head = [0; FILE_HEAD_LEN];
    let (magic, rest) = head.split_at_mut(FILE_MAGIC.len());
    magic.copy_from_slice(&FILE_MAGIC);
    rest.copy_from_slice(&length.to_le_bytes());
    head
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
    fn tree_files_contain_the_tree() {
        for length in [GROUP_LEN + 1, 2 * GROUP_LEN, 5 * GROUP_LEN + 77] {
            let bytes = noise(length);
            let storage: Arc<[u8]> = Arc::from(bytes.as_slice());
            let budget = TreeBudget::new(1 << 20);
            let tree = HashTree::of(&storage, &budget).unwrap();
            let mut file = Vec::new();
            tree.write_file(&mut file).unwrap();
            let read = |file: &[u8], length| {
                HashTree::from_file(&Arc::<[u8]>::from(file), length, &budget).unwrap()
            };
            let same = read(&file, length).unwrap();
            assert_eq!((same.root(), same.length()), (tree.root(), length));
            assert_ne!(same.id(), tree.id());
            let group = usize::try_from(GROUP_LEN).unwrap();
            for (number, group) in (0..).zip(bytes.chunks(group)) {
                assert!(same.matches(number, group));
            }
            // Another value leads to another root.
            let mut forged = file.clone();
            *forged.last_mut().unwrap() ^= 1;
            assert_ne!(read(&forged, length).unwrap().root(), tree.root());
            assert!(read(&file, length - 1).is_none() && read(&file, length + 1).is_none());
            assert!(read(&file[..file.len() - 1], length).is_none());
            assert!(read(&[file.as_slice(), &[0]].concat(), length).is_none());
            for at in 0..FILE_HEAD_LEN {
                let mut other = file.clone();
                other[at] ^= 1;
                assert!(read(&other, length).is_none(), "{at}");
            }
        }
    }

    #[test]
    fn tree_file_of_one_group_is_of_no_use() {
        let storage: Arc<[u8]> = Arc::from(noise(GROUP_LEN));
        let budget = TreeBudget::new(1 << 20);
        let mut file = Vec::new();
        HashTree::of(&storage, &budget).unwrap().write_file(&mut file).unwrap();
        assert_eq!(file.len(), FILE_HEAD_LEN);
        let file: Arc<[u8]> = Arc::from(file);
        assert!(HashTree::from_file(&file, GROUP_LEN, &budget).unwrap().is_none());
    }

    #[test]
    fn memory_of_a_tree_file_is_limited() {
        let storage: Arc<[u8]> = Arc::from(noise(3 * GROUP_LEN));
        let mut file = Vec::new();
        HashTree::of(&storage, &TreeBudget::new(96)).unwrap().write_file(&mut file).unwrap();
        let file: Arc<[u8]> = Arc::from(file);
        let budget = TreeBudget::new(95);
        let error = HashTree::from_file(&file, 3 * GROUP_LEN, &budget).unwrap_err();
        assert!(matches!(error, TreeError::Memory { needed: 96, limit: 95 }), "{error}");
        assert_eq!(budget.used(), 0);
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
