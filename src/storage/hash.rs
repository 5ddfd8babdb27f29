//! The BLAKE3 of everything that a storage holds, on several threads.
//!
//! BLAKE3 is a binary tree. A storage is cut into units of a power of two bytes; each is a
//! subtree with a chaining value, and the values together make the hash.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use super::Storage;

/// Bytes that one thread hashes at a time.
const SHARE: u64 = 8 * 1024 * 1024;
/// Bytes that are read at once.
const PIECE: usize = 256 * 1024;
/// How much nicer these threads are: hashing an archive takes as long as it takes, and others
/// are being served meanwhile.
const NICE: i32 = 10;

/// See [`hashed`].
static HASHED: AtomicU64 = AtomicU64::new(0);

/// Number of bytes that this process has hashed so far, which tells those who wait that hashing
/// makes progress.
pub fn hashed() -> u64 {
    HASHED.load(Ordering::Relaxed)
}

/// Hashes all of `storage`, whose BLAKE3 is that of the program `b3sum`. Memory is a piece for
/// each thread, and 32 bytes for each 8 MiB.
///
/// # Errors
/// A part can't be read.
pub fn blake3(storage: &dyn Storage) -> io::Result<[u8; 32]> {
    Ok(Units::of(storage, SHARE)?.root())
}

/// The chaining values of a storage, one for each unit.
#[derive(Debug)]
pub(super) struct Units {
    /// Bytes of a unit; a power of two, and at most [`SHARE`].
    unit: u64,
    /// One for each unit, in order. None if there is at most one unit, which has no chaining
    /// value since it is the root.
    values: Vec<ChainingValue>,
    /// Of all bytes.
    root: [u8; 32],
}

impl Units {
    /// Hashes all of `storage`. Memory is a piece for each thread, and 32 bytes for each unit.
    pub(super) fn of(storage: &dyn Storage, unit: u64) -> io::Result<Self> {
        let length = storage.length();
        if length <= unit {
            let mut hasher = blake3::Hasher::new();
            hash_range(storage, 0..length, &mut hasher, &mut Vec::new())?;
            let root = *hasher.finalize().as_bytes();
            return Ok(Self { unit, values: Vec::new(), root });
        }
        let values = values(storage, unit)?;
        let (left, right) = values.split_at(left_of(values.len()));
        let root = *merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).as_bytes();
        Ok(Self { unit, values, root })
    }

    /// The BLAKE3 of all bytes.
    pub(super) fn root(&self) -> [u8; 32] {
        self.root
    }

    /// Returns true if `bytes` are those of the unit with that number.
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

/// The chaining values of more than one unit.
fn values(storage: &dyn Storage, unit: u64) -> io::Result<Vec<ChainingValue>> {
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
    let per_share = SHARE / unit;
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
    let shares = usize::try_from(length.div_ceil(SHARE)).unwrap_or(usize::MAX);
    on_all_cores(shares, &work)?;
    Ok(values.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// Does `work` on as many threads as there are cores, if there is work for so many.
fn on_all_cores(most: usize, work: &(dyn Fn() -> io::Result<()> + Sync)) -> io::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(most);
    std::thread::scope(|scope| {
        let nicely = || {
            // On Linux this is about the calling thread alone.
            if let Err(error) = rustix::process::nice(NICE) {
                tracing::debug!("hashing threads keep their priority: {error}");
            }
            work()
        };
        let threads: Vec<_> = (0..cores)
            .map_while(|_| {
                std::thread::Builder::new().name("hash".to_owned()).spawn_scoped(scope, nicely).ok()
            })
            .collect();
        // Where no thread can be had, this one has to do.
        let alone = if threads.is_empty() { work() } else { Ok(()) };
        let results: Vec<io::Result<()>> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("it panicked"))))
            .collect();
        results.into_iter().fold(alone, Result::and)
    })
}

/// Adds `range` of the storage to what is hashed. The buffer is lent for the pieces.
fn hash_range(
    storage: &dyn Storage,
    range: Range<u64>,
    hasher: &mut blake3::Hasher,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let length = usize::try_from(range.end - at).unwrap_or(PIECE).min(PIECE);
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let piece = buffer.get_mut(..length).unwrap_or_default();
        storage.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += length as u64;
        HASHED.fetch_add(length as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// The value of neighbouring subtrees together.
fn merge(values: &[ChainingValue]) -> ChainingValue {
    match values {
        [] => ChainingValue::default(),
        [value] => *value,
        values => {
            let (left, right) = values.split_at(left_of(values.len()));
            merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
        }
    }
}

/// Number of subtrees on the left of so many: the largest power of two that leaves something
/// on the right.
fn left_of(subtrees: usize) -> usize {
    subtrees.div_ceil(2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Bytes of which no two pieces are alike.
    fn noise(length: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn it_is_the_blake3_of_all_bytes() {
        const UNIT: u64 = 256 * 1024;
        for length in [
            0,
            1,
            1024,
            UNIT - 1,
            UNIT,
            UNIT + 1,
            3 * UNIT,
            SHARE - 1,
            SHARE,
            SHARE + 1,
            2 * SHARE,
            3 * SHARE,
            3 * SHARE + 1025,
            4 * SHARE + 1,
            5 * SHARE,
            6 * SHARE + 77,
        ] {
            let bytes = noise(length);
            let expected = *blake3::hash(&bytes).as_bytes();
            let storage: Arc<[u8]> = Arc::from(bytes);
            assert_eq!(blake3(&storage).unwrap(), expected, "{length}");
            assert_eq!(Units::of(&storage, UNIT).unwrap().root(), expected, "{length}");
        }
    }

    /// Fails where `bad` is read.
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
    fn a_part_that_can_not_be_read_is_an_error() {
        for (length, bad) in [(10, 9), (5 * SHARE, 0), (5 * SHARE, 5 * SHARE - 1)] {
            let error = blake3(&Broken { length, bad }).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotSeekable);
        }
    }
}
