//! Inspection of a folder that no process has to use, for commands.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::CHUNK_SIZE;
use super::DiskCache;
use super::error::DiskCacheError;
use super::file::{FILE_NAMES, Files, is_locked, lock};
use super::format::hash;
use crate::object::ObjectId;
use crate::store::Version;

/// Contents of a disk cache.
#[derive(Debug, Clone)]
pub struct DiskCacheContents {
    /// True if a process uses the cache. Then the contents may be changing.
    pub is_in_use: bool,
    /// Size, in bytes.
    pub size: u64,
    /// Number of slots.
    pub slots: u64,
    /// Objects that were opened, those with the most bytes first. One whose chunks have been
    /// evicted has no bytes.
    pub objects: Vec<CachedObject>,
    /// Chunks of objects, or of versions, that have no record any more.
    pub other_chunks: u64,
    /// Bytes of these chunks.
    pub other_bytes: u64,
}

/// An object in a disk cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedObject {
    /// Label of the store.
    pub store: String,
    /// Key of the object.
    pub key: String,
    /// Version that is cached.
    pub version: Version,
    /// Time at which the object was last opened.
    pub opened: SystemTime,
    /// Number of cached chunks.
    pub chunks: u64,
    /// Number of cached bytes.
    pub bytes: u64,
}

/// Result of a check of a disk cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskCacheCheck {
    /// Chunks whose bytes match their hashes.
    pub good: u64,
    /// Chunks whose bytes don't match. They are misses when they are read.
    pub bad: u64,
    /// Bytes that were read.
    pub bytes: u64,
}

impl DiskCache {
    /// Lists the objects in the cache of a folder, without locking or changing it.
    ///
    /// # Errors
    /// There is no cache, or it can't be read.
    pub fn inspect(folder: &Path) -> Result<DiskCacheContents, DiskCacheError> {
        let io_error = |error| DiskCacheError::io(&folder.join("slots"), error);
        let files = Files::open_to_read(folder)?;
        let mut by_object: HashMap<ObjectId, (u64, u64)> = HashMap::new();
        for (_, entry) in files.entries().map_err(io_error)? {
            let (chunks, bytes) = by_object.entry(entry.key.object).or_default();
            *chunks += 1;
            *bytes += u64::from(entry.length);
        }
        let records = files.records();
        let mut objects: Vec<_> = records
            .map_err(|error| DiskCacheError::io(&folder.join("objects"), error))?
            .into_iter()
            .map(|(_, record)| {
                let id = ObjectId::of(&record.store, &record.key, &record.version);
                let (chunks, bytes) = by_object.remove(&id).unwrap_or_default();
                let opened = UNIX_EPOCH.checked_add(Duration::from_secs(record.opened));
                CachedObject {
                    store: record.store,
                    key: record.key,
                    version: record.version,
                    opened: opened.unwrap_or(UNIX_EPOCH),
                    chunks,
                    bytes,
                }
            })
            .collect();
        objects.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.key.cmp(&b.key)));
        let slots = u64::from(files.head.slots);
        Ok(DiskCacheContents {
            is_in_use: is_locked(&files.slots).map_err(io_error)?,
            size: slots * CHUNK_SIZE,
            slots,
            objects,
            other_chunks: by_object.values().map(|(chunks, _)| chunks).sum(),
            other_bytes: by_object.values().map(|(_, bytes)| bytes).sum(),
        })
    }

    /// Compares all chunks in the cache of a folder with their hashes, without locking or changing
    /// it. If a process uses the cache, chunks that it is writing may count as bad.
    ///
    /// # Errors
    /// There is no cache, or it can't be read.
    pub fn check(folder: &Path) -> Result<DiskCacheCheck, DiskCacheError> {
        let io_error = |name: &str, error| DiskCacheError::io(&folder.join(name), error);
        let files = Files::open_to_read(folder)?;
        let mut check = DiskCacheCheck::default();
        for (slot, entry) in files.entries().map_err(|error| io_error("slots", error))? {
            let length = entry.length.min(u32::try_from(CHUNK_SIZE).unwrap_or(u32::MAX));
            let bytes = files.chunk(slot, length).map_err(|error| io_error("chunks", error))?;
            check.bytes += bytes.len() as u64;
            let is_good =
                bytes.len() as u64 == u64::from(entry.length) && hash(&bytes) == entry.hash;
            *if is_good { &mut check.good } else { &mut check.bad } += 1;
        }
        Ok(check)
    }

    /// Removes the files of the cache in a folder.
    ///
    /// # Errors
    /// There is no cache, a process uses it, or a file can't be removed.
    pub fn clear(folder: &Path) -> Result<(), DiskCacheError> {
        let files = Files::open_to_read(folder)?;
        lock(&files.slots, folder, &folder.join("slots"))?;
        // Without `slots`, the others are nothing.
        FILE_NAMES.iter().try_for_each(|name| {
            let path = folder.join(name);
            std::fs::remove_file(&path).map_err(|error| DiskCacheError::io(&path, error))
        })
    }
}
