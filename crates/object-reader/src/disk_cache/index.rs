//! Index of the chunks on disk: which slot holds which chunk. Pure.

use std::collections::HashMap;

use super::format::DiskKey;
use super::sieve::Sieve;
use crate::object::ObjectId;

/// Link to no slot.
const NONE: u32 = u32::MAX;

/// Chunks by key. Takes 41 bytes per slot.
///
/// A slot is free, or holds a chunk, or is taken: it is being written or about to be freed.
#[derive(Debug)]
pub(super) struct Index {
    entries: Vec<IndexEntry>,
    /// First slot of each list of entries.
    buckets: Vec<u32>,
    sieve: Sieve,
    /// First free slot.
    free: u32,
    /// Slots being read, with the number of readers. They aren't evicted.
    pinned: HashMap<u32, Pin>,
    used: u32,
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct IndexEntry {
    key: DiskKey,
    /// Number of bytes; 0 if the slot holds no chunk.
    length: u32,
    /// Next slot of the same bucket, or the next free one.
    next: u32,
}

#[derive(Debug, Default)]
struct Pin {
    readers: u32,
    /// True if the slot is to be freed after the last read.
    is_removed: bool,
}

impl Index {
    /// Creates an index in which all slots are free.
    pub(super) fn new(slots: u32) -> Self {
        let key = DiskKey { object: ObjectId::default(), chunk: 0 };
        let next = |slot| if slot + 1 < slots { slot + 1 } else { NONE };
        let entry = |slot| IndexEntry { key, length: 0, next: next(slot) };
        Self {
            entries: (0..slots).map(entry).collect(),
            buckets: vec![NONE; to_usize(slots)],
            sieve: Sieve::new(slots),
            free: if slots > 0 { 0 } else { NONE },
            pinned: HashMap::new(),
            used: 0,
            bytes: 0,
        }
    }

    /// Creates an index with the given chunks, the first ones to be evicted first. Of two slots
    /// with the same chunk, the later one counts.
    pub(super) fn with_chunks(
        slots: u32,
        chunks: impl IntoIterator<Item = (u32, DiskKey, u32, bool)>,
    ) -> Self {
        let mut index = Self::new(slots);
        for (slot, key, length, is_sequential) in chunks {
            if let Some(older) = index.find(&key) {
                index.detach(older);
            }
            index.insert(slot, key, length, is_sequential);
        }
        index.free = NONE;
        for slot in (0..slots).rev() {
            if index.entry(slot).is_some_and(|entry| entry.length == 0) {
                index.push_free(slot);
            }
        }
        index
    }

    /// Returns the number of slots with a chunk.
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    /// Returns the number of bytes of all chunks.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns the memory in use, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.entries.capacity() * size_of::<IndexEntry>()
            + self.buckets.capacity() * size_of::<u32>()
            + self.sieve.memory()
    }

    /// Returns true if there is such a chunk.
    pub(super) fn contains(&self, key: &DiskKey) -> bool {
        self.find(key).is_some()
    }

    /// Finds a chunk, counts a use of it, and pins its slot until [`unpin`](Self::unpin).
    pub(super) fn pin(&mut self, key: &DiskKey) -> Option<u32> {
        let slot = self.find(key)?;
        self.sieve.visit(slot);
        self.pinned.entry(slot).or_default().readers += 1;
        Some(slot)
    }

    /// Ends a read of a slot.
    pub(super) fn unpin(&mut self, slot: u32) {
        let Some(pin) = self.pinned.get_mut(&slot) else { return };
        pin.readers = pin.readers.saturating_sub(1);
        if pin.readers == 0 && self.pinned.remove(&slot).is_some_and(|pin| pin.is_removed) {
            self.push_free(slot);
        }
    }

    /// Removes the chunk of a pinned slot, which is freed after the last read. Returns false if
    /// that has been done.
    pub(super) fn remove_pinned(&mut self, slot: u32) -> bool {
        let Some(pin) = self.pinned.get_mut(&slot) else { return false };
        let is_first = !std::mem::replace(&mut pin.is_removed, true);
        if is_first {
            self.detach(slot);
        }
        is_first
    }

    /// Takes a free slot, or one whose chunk is evicted: then the second value is true.
    pub(super) fn take(&mut self) -> Option<(u32, bool)> {
        if let Some(entry) = self.entry(self.free) {
            return Some((std::mem::replace(&mut self.free, entry.next), false));
        }
        let slot = self.sieve.evict(|slot| self.pinned.contains_key(&slot))?;
        self.detach(slot);
        Some((slot, true))
    }

    /// Adds the chunk of a slot that was taken.
    pub(super) fn insert(&mut self, slot: u32, key: DiskKey, length: u32, is_sequential: bool) {
        let bucket = self.bucket(&key);
        let Some(first) = self.buckets.get_mut(bucket) else { return };
        let Some(entry) = self.entries.get_mut(to_usize(slot)) else { return };
        *entry = IndexEntry { key, length, next: *first };
        *first = slot;
        self.sieve.insert(slot, is_sequential);
        self.used += 1;
        self.bytes += u64::from(length);
    }

    fn find(&self, key: &DiskKey) -> Option<u32> {
        let mut slot = *self.buckets.get(self.bucket(key))?;
        while let Some(entry) = self.entry(slot) {
            if entry.key == *key {
                return Some(slot);
            }
            slot = entry.next;
        }
        None
    }

    /// Removes the chunk of a slot, which is taken then.
    fn detach(&mut self, slot: u32) {
        let Some(removed) = self.entry(slot).filter(|entry| entry.length > 0) else { return };
        let bucket = self.bucket(&removed.key);
        if self.buckets.get(bucket) == Some(&slot) {
            self.buckets.get_mut(bucket).into_iter().for_each(|first| *first = removed.next);
        } else {
            let mut place = self.buckets.get(bucket).copied().unwrap_or(NONE);
            while let Some(entry) = self.entries.get_mut(to_usize(place)) {
                if entry.next == slot {
                    entry.next = removed.next;
                    break;
                }
                place = entry.next;
            }
        }
        if let Some(entry) = self.entries.get_mut(to_usize(slot)) {
            entry.length = 0;
        }
        self.sieve.remove(slot);
        self.used -= 1;
        self.bytes -= u64::from(removed.length);
    }

    fn push_free(&mut self, slot: u32) {
        if let Some(entry) = self.entries.get_mut(to_usize(slot)) {
            entry.next = std::mem::replace(&mut self.free, slot);
        }
    }

    fn entry(&self, slot: u32) -> Option<IndexEntry> {
        self.entries.get(to_usize(slot)).copied()
    }

    fn bucket(&self, key: &DiskKey) -> usize {
        // Identities are hashes already.
        let [a, b, c, d, e, f, g, h, ..] = *key.object.as_bytes();
        let id = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let mixed = (id ^ u64::from(key.chunk)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from((mixed * self.buckets.len() as u64) >> 32).unwrap_or(0)
    }
}

fn to_usize(slot: u32) -> usize {
    usize::try_from(slot).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn key(number: u32) -> DiskKey {
        let id = [u8::try_from(number % 3).unwrap(); 16];
        DiskKey { object: ObjectId::from_bytes(id), chunk: number }
    }

    proptest! {
        /// Compares with a map, and checks that no slot is lost or used twice.
        #[test]
        fn chunks_are_found_until_they_are_evicted_or_removed(
            steps in prop::collection::vec((0_u32..40, 0_u8..4), 0..400),
        ) {
            let mut index = Index::new(16);
            let mut model = BTreeMap::new();
            let mut pinned = Vec::new();
            for (number, step) in steps {
                match step {
                    0 | 1 if !model.contains_key(&number) => {
                        if let Some((slot, is_evicted)) = index.take() {
                            prop_assert!(!pinned.contains(&slot));
                            let before = model.len();
                            model.retain(|_, other| *other != slot);
                            prop_assert_eq!(model.len() < before, is_evicted);
                            index.insert(slot, key(number), number + 1, step == 0);
                            model.insert(number, slot);
                        }
                    }
                    2 => {
                        let slot = index.pin(&key(number));
                        prop_assert_eq!(slot, model.get(&number).copied());
                        pinned.extend(slot);
                    }
                    3 => if let Some(slot) = pinned.pop() {
                        if number % 2 == 0 {
                            let is_removed = index.remove_pinned(slot);
                            let before = model.len();
                            model.retain(|_, other| *other != slot);
                            prop_assert_eq!(model.len() < before, is_removed);
                        }
                        index.unpin(slot);
                    },
                    _ => {}
                }
                for number in 0..40 {
                    prop_assert_eq!(index.contains(&key(number)), model.contains_key(&number));
                }
                prop_assert_eq!(index.used() as usize, model.len());
                let bytes: u64 = model.keys().map(|number| u64::from(*number) + 1).sum();
                prop_assert_eq!(index.bytes(), bytes);
            }
            pinned.into_iter().for_each(|slot| index.unpin(slot));
            let mut slots: Vec<_> = std::iter::from_fn(|| index.take()).map(|(s, _)| s).collect();
            slots.sort_unstable();
            prop_assert_eq!(slots, Vec::from_iter(0..16));
        }
    }

    #[test]
    fn an_index_is_built_from_chunks() {
        let chunks = [(3, key(1), 10, false), (1, key(2), 20, false), (2, key(1), 30, false)];
        let mut index = Index::with_chunks(5, chunks);
        assert_eq!((index.used(), index.bytes()), (2, 50));
        assert_eq!(index.pin(&key(1)), Some(2));
        let taken: Vec<_> = std::iter::from_fn(|| index.take()).collect();
        // Free slots, then the only one that isn't pinned.
        assert_eq!(taken, [(0, false), (3, false), (4, false), (1, true)]);
    }

    #[test]
    fn a_slot_takes_at_most_48_bytes() {
        assert!(Index::new(1000).memory() <= 48 * 1000);
    }
}
