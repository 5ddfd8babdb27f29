//! Multithreaded BLAKE3 hashing of a whole storage.
//!
//! BLAKE3 is a binary tree. A storage is divided into units whose length is a power of two. Each
//! unit is a subtree with a chaining value, and the hash is computed from these values.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use super::Storage;

/// Number of bytes that a thread takes at a time.
const TASK_BYTES: u64 = 8 * 1024 * 1024;
/// Number of bytes that are read at a time.
const BUFFER_LEN: usize = 256 * 1024;
/// Niceness of the hashing threads. Hashing an archive isn't urgent, and clients are being served
/// meanwhile.
const NICE: i32 = 10;

/// Hashes all of `storage`. The result is the same as that of the program `b3sum`. Memory is one
/// buffer of 256 KiB per thread, and 32 bytes for each 8 MiB.
///
/// # Errors
/// A part of the storage can't be read.
pub(crate) fn blake3(storage: &dyn Storage) -> io::Result<[u8; 32]> {
    Ok(SubtreeHashes::of(storage, TASK_BYTES)?.root())
}

/// Chaining values of a storage, one for each unit.
#[derive(Debug)]
pub(super) struct SubtreeHashes {
    /// Length of a unit in bytes: a power of two, and at most [`TASK_BYTES`].
    unit: u64,
    /// Chaining value of each unit, in order. Empty if there is at most one unit, which has no
    /// chaining value because it is the root.
    values: Vec<ChainingValue>,
    /// BLAKE3 hash of all bytes.
    root: [u8; 32],
}

impl SubtreeHashes {
    /// Hashes all of `storage`. Memory is one buffer of 256 KiB per thread, and 32 bytes for each
    /// unit.
    pub(super) fn of(storage: &dyn Storage, unit: u64) -> io::Result<Self> {
        let length = storage.length();
        if length <= unit {
            let mut hasher = blake3::Hasher::new();
            hash_range(storage, 0..length, &mut hasher, &mut Vec::new())?;
            let root = *hasher.finalize().as_bytes();
            return Ok(Self { unit, values: Vec::new(), root });
        }
        let values = hash_units(storage, unit)?;
        let (left, right) = values.split_at(left_subtree_count(values.len()));
        let root = *merge_subtrees_root(&merge_subtrees(left), &merge_subtrees(right), Mode::Hash)
            .as_bytes();
        Ok(Self { unit, values, root })
    }

    /// Returns the BLAKE3 hash of all bytes.
    pub(super) fn root(&self) -> [u8; 32] {
        self.root
    }

    /// Returns true if `bytes` match the chaining value of the unit `number`.
    pub(super) fn matches(&self, number: u64, bytes: &[u8]) -> bool {
        if self.values.is_empty() {
            return number == 0 && blake3::hash(bytes) == self.root;
        }
        let value = usize::try_from(number).ok().and_then(|number| self.values.get(number));
        let Some(value) = value.filter(|_| !bytes.is_empty() && bytes.len() as u64 <= self.unit)
        else {
            return false;
        };
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(number * self.unit);
        hasher.update(bytes);
        hasher.finalize_non_root() == *value
    }
}

/// Computes the chaining values of a storage of more than one unit.
fn hash_units(storage: &dyn Storage, unit: u64) -> io::Result<Vec<ChainingValue>> {
    let length = storage.length();
    let count = usize::try_from(length.div_ceil(unit)).unwrap_or(usize::MAX);
    let values = Mutex::new(vec![ChainingValue::default(); count]);
    let (next, has_failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let hash_unit = |number: u64, buffer: &mut Vec<u8>| {
        let start = number.saturating_mul(unit);
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(start);
        hash_range(storage, start..length.min(start.saturating_add(unit)), &mut hasher, buffer)?;
        let mut values = values.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(value) = usize::try_from(number).ok().and_then(|at| values.get_mut(at)) {
            *value = hasher.finalize_non_root();
        }
        Ok(())
    };
    let per_share = TASK_BYTES / unit;
    let work = || {
        let mut buffer = Vec::new();
        while !has_failed.load(Ordering::Relaxed) {
            let first = next.fetch_add(1, Ordering::Relaxed).saturating_mul(per_share);
            let end = first.saturating_add(per_share).min(count as u64);
            if first >= end {
                break;
            }
            if let Err(error) = (first..end).try_for_each(|number| hash_unit(number, &mut buffer)) {
                has_failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    let shares = usize::try_from(length.div_ceil(TASK_BYTES)).unwrap_or(usize::MAX);
    on_all_cores(shares, &work)?;
    Ok(values.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// Runs `work` on one thread per core, but on at most `most` threads.
fn on_all_cores(most: usize, work: &(dyn Fn() -> io::Result<()> + Sync)) -> io::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(most);
    std::thread::scope(|scope| {
        let low_priority_work = || {
            nbd_telemetry::lower_thread_priority(NICE);
            work()
        };
        let threads: Vec<_> = (0..cores)
            .map_while(|_| {
                std::thread::Builder::new()
                    .name("hash".to_owned())
                    .spawn_scoped(scope, low_priority_work)
                    .ok()
            })
            .collect();
        // If no thread can be spawned, the calling thread does the work.
        let alone = if threads.is_empty() { work() } else { Ok(()) };
        let results: Vec<io::Result<()>> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked"))))
            .collect();
        results.into_iter().fold(alone, Result::and)
    })
}

/// Feeds `range` of the storage to the hasher, using `buffer` for reading.
fn hash_range(
    storage: &dyn Storage,
    range: Range<u64>,
    hasher: &mut blake3::Hasher,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(range.end - at).unwrap_or(BUFFER_LEN).min(BUFFER_LEN);
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let piece = buffer.get_mut(..length).unwrap_or_default();
        storage.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += length as u64;
    }
    Ok(())
}

/// Merges adjacent subtrees into one chaining value.
fn merge_subtrees(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [] => ChainingValue::default(),
        [value] => *value,
        values => {
            let (left, right) = values.split_at(left_subtree_count(values.len()));
            merge_subtrees_non_root(&merge_subtrees(left), &merge_subtrees(right), Mode::Hash)
        }
    }
}

/// Returns the number of subtrees in the left half: the largest power of two that leaves at least
/// one for the right half.
fn left_subtree_count(subtrees: usize) -> usize {
    subtrees.div_ceil(2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Returns pseudorandom bytes, of which no two pieces are alike.
    fn noise(length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn parallel_hash_equals_blake3() {
        const UNIT: u64 = 256 * 1024;
        for length in [
            0,
            1,
            1024,
            UNIT - 1,
            UNIT,
            UNIT + 1,
            3 * UNIT,
            TASK_BYTES - 1,
            TASK_BYTES,
            TASK_BYTES + 1,
            2 * TASK_BYTES,
            3 * TASK_BYTES,
            3 * TASK_BYTES + 1025,
            4 * TASK_BYTES + 1,
            5 * TASK_BYTES,
            6 * TASK_BYTES + 77,
        ] {
            let bytes = noise(length);
            let expected = *blake3::hash(&bytes).as_bytes();
            let storage: Arc<[u8]> = Arc::from(bytes);
            assert_eq!(blake3(&storage).unwrap(), expected, "{length}");
            assert_eq!(SubtreeHashes::of(&storage, UNIT).unwrap().root(), expected, "{length}");
        }
    }

    /// Storage that fails to read byte `bad`.
    #[derive(Debug)]
    struct Broken {
        length: u64,
        bad: u64,
    }

    impl Storage for Broken {
        fn file_id(&self) -> Option<crate::storage::FileId> {
            None
        }

        fn length(&self) -> u64 {
            self.length
        }

        fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let range = offset..offset + buffer.len() as u64;
            if range.contains(&self.bad) { Err(io::ErrorKind::NotSeekable.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn read_errors_are_returned() {
        for (length, bad) in [(10, 9), (5 * TASK_BYTES, 0), (5 * TASK_BYTES, 5 * TASK_BYTES - 1)] {
            let error = blake3(&Broken { length, bad }).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotSeekable);
        }
    }
}
