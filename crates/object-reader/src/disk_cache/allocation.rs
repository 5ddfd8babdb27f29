//! Space for the files, which is reserved at the start.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use rustix::io::Errno;

use super::error::DiskCacheError;
use super::{CHUNK_SIZE, DiskCacheConfig};

/// Part of a file system that is left to others when it hasn't enough space: one of so many.
const SPARED_SHARE: u64 = 64;
/// Way in which space is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Allocation {
    /// All of it at the start.
    Full,
    /// Block by block, when they are written. Only tests ask for it.
    #[cfg_attr(not(test), allow(dead_code, reason = "constructed by tests"))]
    Sparse,
    /// All of it, on a file system with so many bytes.
    #[cfg(test)]
    Limited(u64),
}

/// Allocates the file of the chunks, and returns its size: less than configured if the file system
/// has no space for more.
pub(super) fn allocate_chunks(
    file: &File,
    config: &DiskCacheConfig,
    allocation: Allocation,
    minimum: u64,
) -> Result<u64, DiskCacheError> {
    let DiskCacheConfig { folder, size } = config;
    let wanted = size / CHUNK_SIZE * CHUNK_SIZE;
    let io_error = |error| DiskCacheError::io(&folder.join("chunks"), error);
    let old = file.metadata().map_err(io_error)?.len();
    if old > wanted {
        file.set_len(wanted).map_err(io_error)?;
    }
    match allocate(file, wanted, allocation).map_err(io_error)? {
        Allocated::Fully => return Ok(wanted),
        Allocated::Sparsely => {
            if allocation != Allocation::Sparse {
                tracing::warn!(
                    reason = "disk_cache_sparse",
                    "{}: the file system can't reserve space for the disk cache; if it fills up, \
                     the cache switches itself off",
                    folder.display()
                );
            }
            return Ok(wanted);
        }
        Allocated::NoSpace => {}
    }
    // The part that was allocated nevertheless is given back.
    file.set_len(old.min(wanted)).map_err(io_error)?;
    let metadata = file.metadata().map_err(io_error)?;
    let statistics = fstatvfs(file).map_err(|error| io_error(error.into()))?;
    let blocks = statistics.f_bavail.saturating_sub(statistics.f_blocks / SPARED_SHARE);
    let available = metadata.blocks() * 512 + blocks.saturating_mul(statistics.f_frsize);
    let mut size = available.min(wanted - CHUNK_SIZE) / CHUNK_SIZE * CHUNK_SIZE;
    while size >= minimum {
        if metadata.len() > size {
            file.set_len(size).map_err(io_error)?;
        }
        if !matches!(allocate(file, size, allocation).map_err(io_error)?, Allocated::NoSpace) {
            tracing::warn!(
                reason = "disk_cache_smaller",
                size,
                "{}: no space for a disk cache of {wanted} bytes; using {size}",
                folder.display()
            );
            return Ok(size);
        }
        // Metadata of the file system takes space, too.
        size = size.saturating_sub(size / SPARED_SHARE + CHUNK_SIZE) / CHUNK_SIZE * CHUNK_SIZE;
    }
    file.set_len(0).map_err(io_error)?;
    Err(DiskCacheError::NoSpace { folder: folder.clone(), available, minimum })
}

/// Result of an allocation.
pub(super) enum Allocated {
    Fully,
    Sparsely,
    NoSpace,
}

/// Allocates the space up to `size`.
pub(super) fn allocate(file: &File, size: u64, allocation: Allocation) -> io::Result<Allocated> {
    let error = match allocation {
        Allocation::Full => loop {
            match fallocate(file, FallocateFlags::empty(), 0, size) {
                Ok(()) => return Ok(Allocated::Fully),
                Err(Errno::INTR) => {}
                Err(error) => break error,
            }
        },
        Allocation::Sparse => Errno::OPNOTSUPP,
        #[cfg(test)]
        Allocation::Limited(available) if size > available => Errno::NOSPC,
        #[cfg(test)]
        Allocation::Limited(_) => Errno::OPNOTSUPP,
    };
    match error {
        Errno::OPNOTSUPP | Errno::NOSYS => file.set_len(size).map(|()| Allocated::Sparsely),
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => Ok(Allocated::NoSpace),
        error => Err(error.into()),
    }
}

/// Sets the length of a small file.
pub(super) fn set_length(file: &File, length: u64, allocation: Allocation) -> io::Result<()> {
    file.set_len(length)?;
    match allocate(file, length, allocation)? {
        Allocated::Fully | Allocated::Sparsely => Ok(()),
        Allocated::NoSpace => Err(Errno::NOSPC.into()),
    }
}
