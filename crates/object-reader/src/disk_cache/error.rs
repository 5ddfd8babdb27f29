//! Failures to open a disk cache.

use std::io;
use std::path::{Path, PathBuf};

/// Failure to open or inspect a disk cache. Once it is open, failures only cause misses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskCacheError {
    /// Another process uses the folder.
    #[error(
        "{}: the disk cache is in use by another process; give each its own folder",
        folder.display()
    )]
    InUse {
        /// Folder of the cache.
        folder: PathBuf,
    },
    /// The configured size is too small.
    #[error("{}: a disk cache of {size} bytes is too small; it needs {minimum}", folder.display())]
    TooSmall {
        /// Folder of the cache.
        folder: PathBuf,
        /// Configured size, in bytes.
        size: u64,
        /// Minimum size, in bytes.
        minimum: u64,
    },
    /// The file system is full.
    #[error(
        "{}: no space for a disk cache: {available} bytes are free, at least {minimum} are needed; \
         free some, or use another folder",
        folder.display()
    )]
    NoSpace {
        /// Folder of the cache.
        folder: PathBuf,
        /// Bytes that are free or in use by the cache.
        available: u64,
        /// Minimum size, in bytes.
        minimum: u64,
    },
    /// The folder holds no disk cache.
    #[error("{}: no disk cache, or one of another version", folder.display())]
    NotACache {
        /// Folder that was to be inspected.
        folder: PathBuf,
    },
    /// A file or the folder can't be used.
    #[error("{}: {error}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What is wrong with it.
        error: io::Error,
    },
}

impl DiskCacheError {
    /// Returns the stable label for logs and metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "disk_cache_in_use",
            Self::TooSmall { .. } => "disk_cache_too_small",
            Self::NoSpace { .. } => "disk_cache_no_space",
            Self::NotACache { .. } => "disk_cache_unknown",
            Self::Io { .. } => "disk_cache_io",
        }
    }

    /// Describes a failed operation on a file or folder.
    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        Self::Io { path: path.to_owned(), error }
    }
}
