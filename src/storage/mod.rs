//! Where an archive's bytes come from: a length, and exact reads at a position.

mod counted;
mod file;
mod hash;
mod tree;
mod verified;

use std::io;
use std::sync::Arc;

pub(crate) use counted::Counted;
pub use counted::Reads;
pub use file::{FileId, FileStamp, FileStorage};
pub use hash::{blake3, hashed};
pub use tree::{GROUP, HashTree, TreeBudget, TreeError};
pub use verified::{Mismatch, RecentGroups, VerifiedStorage};

/// A read-only, positioned source of bytes.
///
/// Reads may block, so they are called off the runtime's threads.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// The length in bytes when it was opened.
    fn length(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// Any failure to fill it whole; a source that has become shorter is
    /// [`io::ErrorKind::UnexpectedEof`].
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Whether opening the same name again would give the same bytes, as far as can be
    /// seen without reading them.
    fn is_current(&self) -> bool {
        true
    }

    /// What changes when the bytes do; `None` if there is nothing of the kind.
    fn stamp(&self) -> Option<FileStamp> {
        None
    }

    /// The BLAKE3 of all bytes, if every read is verified against it.
    fn verified_blake3(&self) -> Option<[u8; 32]> {
        None
    }

    /// Which file it is; `None` if it is none. Who may read a file is decided by this, so a
    /// source that wraps another one has to pass it on.
    fn file_id(&self) -> Option<FileId>;
}

/// Bytes in memory.
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
