//! Storage wrapper that verifies every read against a hash tree.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::tree::{GROUP_LEN, HashTree};
use super::{FileId, GroupHashes, Stamp, Storage};
use crate::cache::bounded;

/// Storage wrapper that compares bytes with a hash tree whenever they are read.
///
/// A change is detected regardless of who made it, by which means, and whether timestamps reveal
/// it. Reading a part of a group reads and hashes the whole group. Recently read groups are kept,
/// since subsequent reads mostly hit the same group.
#[derive(Debug)]
pub(crate) struct VerifiedStorage {
    source: Arc<dyn Storage>,
    tree: Arc<HashTree>,
    recent: Arc<GroupCache>,
}

/// Cache of recently verified groups, shared by all storages.
#[derive(Debug)]
pub(crate) struct GroupCache {
    groups: Cache<GroupKey, Bytes, Length>,
}

/// Cache key: a group of one storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GroupKey {
    tree: u64,
    group: u64,
}

#[derive(Debug, Clone, Copy)]
struct Length;

impl Weighter<GroupKey, Bytes> for Length {
    fn weight(&self, _: &GroupKey, group: &Bytes) -> u64 {
        group.len() as u64
    }
}

impl GroupCache {
    /// Creates a cache of `bytes` bytes.
    pub(crate) fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { groups: bounded(bytes, GROUP_LEN, bytes.max(GROUP_LEN), Length) })
    }
}

/// Error inside an [`io::Error`] for a rejected read: the bytes differ from those that were hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the {length} bytes at byte {start} are not those that were hashed")]
pub(crate) struct Mismatch {
    /// Start offset of the group, in bytes.
    pub start: u64,
    /// Length of the group, in bytes.
    pub length: u64,
}

impl Mismatch {
    /// Returns the mismatch inside an error, if there is one.
    pub(crate) fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

impl From<Mismatch> for io::Error {
    fn from(mismatch: Mismatch) -> Self {
        Self::new(io::ErrorKind::InvalidData, mismatch)
    }
}

impl VerifiedStorage {
    /// Creates a storage that verifies reads of `source` against `tree`.
    pub(crate) fn new(
        source: Arc<dyn Storage>,
        tree: Arc<HashTree>,
        recent: Arc<GroupCache>,
    ) -> Self {
        Self { source, tree, recent }
    }

    /// Fills `buffer` from within one group, starting `skipped` bytes behind its start.
    fn read_part(&self, group: u64, buffer: &mut [u8], skipped: u64) -> io::Result<()> {
        let start = group * GROUP_LEN;
        let length = (self.tree.length() - start).min(GROUP_LEN);
        if buffer.len() as u64 == length {
            return self.read_group(group, buffer);
        }
        let key = GroupKey { tree: self.tree.id(), group };
        let bytes = self.recent.groups.get_or_insert_with(&key, || {
            let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
            self.read_group(group, &mut bytes).map(|()| Bytes::from(bytes))
        })?;
        let part = usize::try_from(skipped)
            .ok()
            .and_then(|from| bytes.get(from..from.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }

    /// Fills `buffer` with a whole group and verifies it.
    fn read_group(&self, group: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = group * GROUP_LEN;
        let mismatch = Mismatch { start, length: buffer.len() as u64 };
        match self.source.read_exact_at(buffer, start) {
            // These bytes existed when the storage was hashed, so their absence is a mismatch.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(mismatch.into());
            }
            read => read?,
        }
        if self.tree.matches(group, buffer) {
            return Ok(());
        }
        // A caller that ignores the error must not get unverified bytes.
        buffer.fill(0);
        Err(mismatch.into())
    }
}

impl Storage for VerifiedStorage {
    fn length(&self) -> u64 {
        self.tree.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.length()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut left, mut at) = (buffer, offset);
        while !left.is_empty() {
            let (group, skipped) = (at / GROUP_LEN, at % GROUP_LEN);
            let count = usize::try_from(GROUP_LEN - skipped).unwrap_or_default().min(left.len());
            let (part, rest) = left.split_at_mut(count);
            self.read_part(group, part, skipped)?;
            left = rest;
            at += count as u64;
        }
        Ok(())
    }

    /// Reads from groups that have been verified recently. Others are left to `read_exact_at`,
    /// since hashing a group takes long compared with decoding a block.
    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let (group, skipped) = (offset / GROUP_LEN, offset % GROUP_LEN);
        let recent = self.recent.groups.get(&GroupKey { tree: self.tree.id(), group });
        let part = recent.as_ref().and_then(|bytes| {
            let start = usize::try_from(skipped).ok()?;
            bytes.get(start..start.checked_add(buffer.len())?)
        });
        match part {
            Some(part) => buffer.copy_from_slice(part),
            None => return Ok(false),
        }
        Ok(true)
    }

    fn is_current(&self) -> bool {
        self.source.is_current()
    }

    fn stamp(&self) -> Option<Stamp> {
        self.source.stamp()
    }

    fn file_id(&self) -> Option<FileId> {
        self.source.file_id()
    }

    fn verified_blake3(&self) -> Option<[u8; 32]> {
        Some(self.tree.root())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{CountedStorage, FileStorage, ReadCounters, TreeBudget};
    use parking_lot::Mutex;

    /// Storage in memory whose bytes can be changed.
    #[derive(Debug)]
    struct Memory(Mutex<Vec<u8>>);

    impl Storage for Memory {
        fn file_id(&self) -> Option<FileId> {
            None
        }

        fn length(&self) -> u64 {
            self.0.lock().len() as u64
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let bytes: Arc<[u8]> = Arc::from(self.0.lock().as_slice());
            bytes.read_exact_at(buffer, offset)
        }
    }

    fn size(bytes: u64) -> usize {
        usize::try_from(bytes).unwrap()
    }

    struct Setting {
        bytes: Vec<u8>,
        memory: Arc<Memory>,
        reads: Arc<ReadCounters>,
        verified: VerifiedStorage,
    }

    impl Setting {
        fn new(length: u64, recent: u64) -> Self {
            let mut bytes = vec![0; size(length)];
            blake3::Hasher::new().finalize_xof().fill(&mut bytes);
            let memory = Arc::new(Memory(Mutex::new(bytes.clone())));
            let tree = HashTree::of(memory.as_ref(), &TreeBudget::new(1 << 20)).unwrap();
            let reads = Arc::new(ReadCounters::default());
            let source: Arc<dyn Storage> = Arc::<Memory>::clone(&memory);
            let source = Arc::new(CountedStorage::new(source, Arc::clone(&reads)));
            let recent = GroupCache::new(recent);
            let verified = VerifiedStorage::new(source, Arc::new(tree), recent);
            Self { bytes, memory, reads, verified }
        }

        fn read(&self, at: u64, length: usize) -> Result<Vec<u8>, Option<Mismatch>> {
            let mut buffer = vec![0xa5; length];
            match self.verified.read_exact_at(&mut buffer, at) {
                Ok(()) => Ok(buffer),
                Err(error) => Err(Mismatch::of(&error)),
            }
        }
    }

    #[test]
    fn reads_are_exact_across_groups() {
        let length = 3 * GROUP_LEN + 100;
        let setting = Setting::new(length, 8 * GROUP_LEN);
        for (at, count) in [
            (0, 1),
            (GROUP_LEN - 1, 2),
            (10, 2 * GROUP_LEN),
            (0, length),
            (GROUP_LEN, GROUP_LEN),
            (3 * GROUP_LEN, 100),
            (length - 1, 1),
            (length, 0),
        ] {
            let range = size(at)..size(at + count);
            let read = setting.read(at, size(count)).unwrap();
            assert!(read == setting.bytes[range], "{count} bytes at {at}");
        }
        for (at, count) in [(length, 1), (length - 1, 2), (u64::MAX, 1), (u64::MAX, 2)] {
            assert_eq!(setting.read(at, count), Err(None), "{count} bytes at {at}");
        }
    }

    #[test]
    fn only_groups_that_were_verified_are_read_without_waiting() {
        let length = 2 * GROUP_LEN + 100;
        let setting = Setting::new(length, 8 * GROUP_LEN);
        let try_read = |at: u64, count: usize| {
            let mut buffer = vec![0; count];
            setting.verified.try_read_exact_at(&mut buffer, at).unwrap().then_some(buffer)
        };
        let expected = |at: u64, count: usize| setting.bytes[size(at)..][..count].to_vec();
        assert_eq!(try_read(5, 10), None);
        setting.read(5, 10).unwrap();
        // The group is read once more from memory, whatever happens to the source.
        setting.memory.0.lock().fill(0);
        for (at, count) in [(5, 10), (0, size(GROUP_LEN)), (GROUP_LEN - 1, 1)] {
            assert_eq!(try_read(at, count), Some(expected(at, count)), "{count} bytes at {at}");
        }
        for (at, count) in [(GROUP_LEN - 1, 2), (GROUP_LEN, 1), (length, 1), (u64::MAX, 1)] {
            assert_eq!(try_read(at, count), None, "{count} bytes at {at}");
        }
    }

    #[test]
    fn changed_groups_fail_and_others_are_read() {
        let length = 3 * GROUP_LEN + 100;
        // The cache is empty, so each read shows the current bytes.
        let setting = Setting::new(length, 0);
        for changed in [0, 2, 3] {
            let at = changed * GROUP_LEN + 50;
            setting.memory.0.lock()[size(at)] ^= 1;
            for group in 0..4 {
                let (start, count) =
                    (group * GROUP_LEN, (length - group * GROUP_LEN).min(GROUP_LEN));
                let expected = &setting.bytes[size(start)..size(start + count)];
                let mismatch = Some(Mismatch { start, length: count });
                let (part, whole) = (setting.read(start + 7, 3), setting.read(start, size(count)));
                if group == changed {
                    assert_eq!((part, whole), (Err(mismatch), Err(mismatch)));
                } else {
                    assert_eq!(part.unwrap(), expected[7..10]);
                    assert!(whole.unwrap() == expected);
                }
            }
            setting.memory.0.lock()[size(at)] ^= 1;
        }
    }

    #[test]
    fn buffer_is_cleared_on_a_mismatch() {
        let setting = Setting::new(2 * GROUP_LEN, 0);
        setting.memory.0.lock()[0] ^= 1;
        let mut buffer = vec![0xa5; size(GROUP_LEN)];
        assert!(setting.verified.read_exact_at(&mut buffer, 0).is_err());
        assert!(buffer.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn truncated_storage_is_a_mismatch() {
        let setting = Setting::new(2 * GROUP_LEN, 0);
        setting.memory.0.lock().truncate(size(GROUP_LEN) + 10);
        assert!(setting.read(0, 10).is_ok());
        assert!(matches!(setting.read(GROUP_LEN, 5), Err(Some(_))));
    }

    #[test]
    fn stamp_and_currency_are_those_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let file: Arc<dyn Storage> = Arc::new(FileStorage::open(&path).unwrap());
        let tree = Arc::new(HashTree::of(file.as_ref(), &TreeBudget::new(99)).unwrap());
        let recent = GroupCache::new(0);
        let verified = VerifiedStorage::new(Arc::clone(&file), tree, recent);
        assert!(verified.stamp().is_some() && verified.stamp() == file.stamp());
        assert_eq!(verified.verified_blake3(), Some(*blake3::hash(b"0123456789").as_bytes()));
        assert_eq!(file.verified_blake3(), None);
        assert!(verified.is_current());
        std::fs::remove_file(&path).unwrap();
        assert!(!verified.is_current());
    }

    /// Storage whose reads fail, like a broken disk.
    #[derive(Debug)]
    struct Broken;

    impl Storage for Broken {
        fn file_id(&self) -> Option<FileId> {
            None
        }

        fn length(&self) -> u64 {
            10
        }

        fn read_exact_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Err(io::ErrorKind::TimedOut.into())
        }
    }

    #[test]
    fn read_errors_are_not_mismatches() {
        let sound: Arc<[u8]> = Arc::from(*b"0123456789");
        let tree = Arc::new(HashTree::of(&sound, &TreeBudget::new(99)).unwrap());
        let verified = VerifiedStorage::new(Arc::new(Broken), tree, GroupCache::new(0));
        let error = verified.read_exact_at(&mut [0; 3], 1).unwrap_err();
        assert_eq!((error.kind(), Mismatch::of(&error)), (io::ErrorKind::TimedOut, None));
    }

    #[test]
    fn group_cache_is_bounded() {
        let setting = Setting::new(64 * GROUP_LEN, 8 * GROUP_LEN);
        for at in 0..8 {
            setting.read(at * 1000, 1000).unwrap();
        }
        assert_eq!(setting.reads.count(), 1);
        for group in 0..64 {
            setting.read(group * GROUP_LEN, 10).unwrap();
        }
        assert!(setting.verified.recent.groups.len() <= 8);
        // Cached groups have been verified.
        setting.memory.0.lock().fill(0);
        for group in 0..64 {
            if let Ok(bytes) = setting.read(group * GROUP_LEN, 10) {
                let start = size(group * GROUP_LEN);
                assert_eq!(bytes, setting.bytes[start..start + 10]);
            }
        }
    }
}
