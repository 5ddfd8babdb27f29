//! Sources of archive bytes, with a fixed length and exact reads at an offset.

mod counted;
mod file;
mod hash;
mod source;
mod stamp;
mod tree;
mod verified;

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;

pub(crate) use counted::CountedStorage;
pub use counted::ReadCounters;
pub use file::{FileStamp, FileStorage};
pub(crate) use hash::blake3;
pub use source::{RemoteError, RemoteSource, URL_SCHEMES, is_url};
pub use stamp::{FileId, ObjectStamp, Stamp};
pub use tree::GROUP_LEN;
pub(crate) use tree::{HashTree, TreeBudget, TreeError};
pub(crate) use verified::{GroupCache, Mismatch, VerifiedStorage};

/// A read of a remote source in progress.
pub type Fetch = Pin<Box<dyn Future<Output = io::Result<Bytes>> + Send>>;

/// A prefetch from a remote source in progress. It returns the number of bytes that were fetched.
pub type Prefetch = Pin<Box<dyn Future<Output = io::Result<u64>> + Send>>;

/// Urgency of a [`Fetch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchPriority {
    /// A client waits for the bytes.
    Demand,
    /// A client will probably need the bytes soon.
    Ahead,
}

/// Hashes of the groups of a storage, against which its bytes are verified.
pub trait GroupHashes: Send + Sync + std::fmt::Debug {
    /// Returns true if `bytes` are those of the group with that number: [`GROUP_LEN`] bytes, or
    /// fewer at the end.
    fn matches(&self, group: u64, bytes: &[u8]) -> bool;

    /// Returns the BLAKE3 hash of all bytes.
    fn root(&self) -> [u8; 32];
}

/// A read-only source of bytes with random access.
///
/// Reads may block, so callers must not use it on the async runtime's worker threads.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// Returns the length in bytes, as of opening.
    fn length(&self) -> u64;

    /// Fills `buffer` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The buffer can't be filled completely. If the source has become shorter, the error is
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fills `buffer` like [`read_exact_at`](Self::read_exact_at), but only if that needs no
    /// waiting: the bytes are in memory, such as in the page cache. Otherwise returns false, and
    /// the content of `buffer` is unspecified.
    ///
    /// # Errors
    /// As for `read_exact_at`. A source may also return false and leave the error to it.
    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let _ = (buffer, offset);
        Ok(false)
    }

    /// Returns true if opening the same name again would give the same bytes, as far as can be told
    /// without reading them.
    fn is_current(&self) -> bool {
        true
    }

    /// Returns attributes that change whenever the bytes do; `None` if there are none.
    fn stamp(&self) -> Option<Stamp> {
        None
    }

    /// Returns the BLAKE3 hash of all bytes, if every read is verified against it.
    fn verified_blake3(&self) -> Option<[u8; 32]> {
        None
    }

    /// Returns the identity of the file or object; `None` if the source is neither. Authorization
    /// for reading a file depends on it, so a wrapper must pass it on.
    fn file_id(&self) -> Option<FileId>;

    /// Returns true if reads wait for a network. Such a source implements [`fetch`](Self::fetch).
    fn is_remote(&self) -> bool {
        false
    }

    /// Reads the bytes of `range` without blocking the thread. Returns `None` if the source isn't
    /// remote. A wrapper must pass it on, or its check of the bytes is bypassed.
    fn fetch(&self, range: Range<u64>, priority: FetchPriority) -> Option<Fetch> {
        let _ = (range, priority);
        None
    }

    /// Returns true unless reading the bytes of `range` waits for a network or a slow disk.
    fn is_in_memory(&self, range: Range<u64>) -> bool {
        let _ = range;
        !self.is_remote()
    }

    /// Brings the bytes of `range` into the caches of the source, behind all fetches. Returns `None`
    /// if the source isn't remote or has no caches.
    fn prefetch(&self, range: Range<u64>) -> Option<Prefetch> {
        let _ = range;
        None
    }

    /// Returns the same source with all bytes verified against `hashes` before they are used, if it
    /// can do that itself. Otherwise the caller verifies what it reads.
    fn verified_by(&self, hashes: Arc<dyn GroupHashes>) -> Option<Arc<dyn Storage>> {
        let _ = hashes;
        None
    }
}

/// Storage in memory.
impl Storage for Arc<[u8]> {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .map(|bytes| buffer.copy_from_slice(bytes))
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_exact_at(buffer, offset).map(|()| true)
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_reads_are_exact() {
        let storage: Arc<[u8]> = Arc::from(*b"0123456789");
        let mut buffer = [0; 4];
        storage.read_exact_at(&mut buffer, 6).unwrap();
        assert_eq!(&buffer, b"6789");
        for offset in [7, 10, 11, u64::MAX] {
            assert!(storage.read_exact_at(&mut buffer, offset).is_err(), "{offset}");
        }
    }
}
