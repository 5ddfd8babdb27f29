//! The BLAKE3 of everything that a storage holds, on several threads.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use super::Storage;

/// What one thread hashes at a time, in bytes: a subtree of BLAKE3's tree, so a power of two.
const SUBTREE: u64 = 8 * 1024 * 1024;
/// What is read at once, in bytes.
const PIECE: usize = 256 * 1024;
/// How much nicer these threads are: hashing an archive takes as long as it takes, and others
/// are being served meanwhile.
const NICE: i32 = 10;

/// See [`hashed`].
static HASHED: AtomicU64 = AtomicU64::new(0);

/// How many bytes this process has hashed so far: a sign for those who wait that it gets on.
pub fn hashed() -> u64 {
    HASHED.load(Ordering::Relaxed)
}

/// Hashes all of `storage`, whose BLAKE3 is that of the program `b3sum`.
///
/// `see` is shown every piece that was hashed, with where it begins, in any order; hashing
/// ends early when it says that it has seen enough. Memory is a piece for each thread, and
/// 32 bytes for each 8 MiB.
///
/// # Errors
/// A part can't be read, or `see` was not content ([`io::ErrorKind::InvalidData`]).
pub fn blake3(
    storage: &dyn Storage,
    see: &(dyn Fn(u64, &[u8]) -> bool + Sync),
) -> io::Result<[u8; 32]> {
    let length = storage.length();
    let subtrees = length.div_ceil(SUBTREE);
    if subtrees <= 1 {
        let mut hasher = blake3::Hasher::new();
        hash_range(storage, 0, length, &mut hasher, see)?;
        return Ok(*hasher.finalize().as_bytes());
    }
    let values = Mutex::new(vec![None; usize::try_from(subtrees).unwrap_or(usize::MAX)]);
    let (next, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || {
        while !failed.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let start = number.saturating_mul(SUBTREE);
            if start >= length {
                break;
            }
            let end = length.min(start.saturating_add(SUBTREE));
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset(start);
            if let Err(error) = hash_range(storage, start, end, &mut hasher, see) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
            let mut values = values.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if let Some(value) = usize::try_from(number).ok().and_then(|at| values.get_mut(at)) {
                *value = Some(hasher.finalize_non_root());
            }
        }
        Ok(())
    };
    on_all_cores(usize::try_from(subtrees).unwrap_or(usize::MAX), &work)?;

    let values = values.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    let values: Option<Vec<ChainingValue>> = values.into_iter().collect();
    let (left, right) = values
        .as_deref()
        .and_then(|values| values.split_at_checked(left_of(values.len())))
        .ok_or_else(|| io::Error::other("a part was not hashed"))?;
    Ok(*merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).as_bytes())
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

fn hash_range(
    storage: &dyn Storage,
    start: u64,
    end: u64,
    hasher: &mut blake3::Hasher,
    see: &(dyn Fn(u64, &[u8]) -> bool + Sync),
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut at = start;
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
        let piece = buffer.get_mut(..length).unwrap_or_default();
        storage.read_exact_at(piece, at)?;
        hasher.update(piece);
        if !see(at, piece) {
            return Err(io::ErrorKind::InvalidData.into());
        }
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

/// How many of so many subtrees are on the left: the largest power of two that leaves
/// something on the right.
fn left_of(subtrees: usize) -> usize {
    subtrees.div_ceil(2).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn it_is_the_blake3_of_all_bytes() {
        for length in [
            0,
            1,
            1024,
            SUBTREE - 1,
            SUBTREE,
            SUBTREE + 1,
            2 * SUBTREE,
            3 * SUBTREE,
            3 * SUBTREE + 1025,
            4 * SUBTREE + 1,
            5 * SUBTREE,
            6 * SUBTREE + 77,
        ] {
            let mut bytes = vec![0; usize::try_from(length).unwrap()];
            blake3::Hasher::new().finalize_xof().fill(&mut bytes);
            let expected = *blake3::hash(&bytes).as_bytes();
            let storage: Arc<[u8]> = Arc::from(bytes);
            let seen = AtomicU64::new(0);
            let see = |_: u64, piece: &[u8]| {
                seen.fetch_add(piece.len() as u64, Ordering::Relaxed);
                true
            };
            assert_eq!(blake3(&storage, &see).unwrap(), expected, "{length}");
            assert_eq!(seen.into_inner(), length);
        }
    }

    #[test]
    fn it_ends_early_when_it_is_told_to() {
        for length in [10, usize::try_from(5 * SUBTREE).unwrap()] {
            let storage: Arc<[u8]> = Arc::from(vec![0; length]);
            let error = blake3(&storage, &|at, _| at != 0).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
