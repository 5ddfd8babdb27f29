//! Multithreaded BLAKE3 hashing of a whole storage.
//!
//! BLAKE3 is a binary tree. A storage is divided into units whose length is a power of two. Each
//! unit is a subtree with a chaining value, and the hash is computed from these values.
//!
//! `blake3::Hasher::update_rayon` also hashes on several threads, but returns the hash alone, while
//! here the values of the units are needed. Distributing units with rayon was measured to be as
//! fast as the threads below, which need no pool to have a lower priority.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};
use parking_lot::Mutex;

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
    /// Length of a unit in bytes, a power of two.
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
            let root = hash_range(storage, 0..length, &mut vec![0; BUFFER_LEN])?.finalize();
            return Ok(Self { unit, values: Vec::new(), root: root.into() });
        }
        Ok(Self::from_values(hash_units(storage, unit)?, unit))
    }

    /// Computes the hash from the chaining values of two or more units.
    pub(super) fn from_values(values: Vec<ChainingValue>, unit: u64) -> Self {
        let (left, right) = values.split_at(left_subtree_count(values.len()));
        let root = merge_subtrees_root(&merge_subtrees(left), &merge_subtrees(right), Mode::Hash);
        Self { unit, values, root: root.into() }
    }

    /// Returns the chaining value of each unit; none if there is at most one unit.
    pub(super) fn values(&self) -> &[ChainingValue] {
        &self.values
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
    let mut values = vec![ChainingValue::default(); count];
    let units_per_task = usize::try_from(TASK_BYTES / unit).unwrap_or(usize::MAX).max(1);
    let task_count = count.div_ceil(units_per_task);
    let starts = (0..).step_by(units_per_task).map(|number: u64| number * unit);
    let tasks = Mutex::new(starts.zip(values.chunks_mut(units_per_task)));

    on_all_cores(task_count, || {
        let mut buffer = vec![0; BUFFER_LEN];
        loop {
            let Some((mut start, task)) = tasks.lock().next() else { return Ok(()) };
            for value in task {
                let end = length.min(start.saturating_add(unit));
                match hash_range(storage, start..end, &mut buffer) {
                    Ok(hasher) => *value = hasher.finalize_non_root(),
                    Err(error) => {
                        // The other threads stop after the task that they have begun.
                        tasks.lock().by_ref().for_each(drop);
                        return Err(error);
                    }
                }
                start = end;
            }
        }
    })?;
    Ok(values)
}

/// Runs `work` on one low-priority thread per core, but on at most `most` threads.
fn on_all_cores(most: usize, work: impl Fn() -> io::Result<()> + Sync) -> io::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(most);
    let low_priority_work = || {
        nbd_telemetry::lower_thread_priority(NICE);
        work()
    };
    std::thread::scope(|scope| {
        let spawn = || {
            let thread = std::thread::Builder::new().name("hash".to_owned());
            thread.spawn_scoped(scope, low_priority_work).ok()
        };
        let threads: Vec<_> = (0..cores).map_while(|_| spawn()).collect();
        // If no thread can be spawned, the calling thread does the work.
        let alone = if threads.is_empty() { work() } else { Ok(()) };
        let join = |thread: std::thread::ScopedJoinHandle<'_, io::Result<()>>| {
            thread.join().unwrap_or_else(|_| Err(io::Error::other("hashing panicked")))
        };
        threads.into_iter().map(join).fold(alone, Result::and)
    })
}

/// Returns a hasher that has been fed with `range` of the storage, read by means of `buffer`.
fn hash_range(
    storage: &dyn Storage,
    range: Range<u64>,
    buffer: &mut [u8],
) -> io::Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(range.start);
    let mut at = range.start;
    while at < range.end {
        let left = usize::try_from(range.end - at).unwrap_or(usize::MAX);
        let piece = match buffer.get_mut(..left) {
            Some(last) => last,
            None => &mut *buffer,
        };
        storage.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += piece.len() as u64;
    }
    Ok(hasher)
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
            for unit in [UNIT, 2 * TASK_BYTES] {
                assert_eq!(SubtreeHashes::of(&storage, unit).unwrap().root(), expected, "{length}");
            }
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
