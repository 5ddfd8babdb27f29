//! Chunks on a local disk, which survive restarts.
//!
//! A folder holds three files that are allocated at the start: the bytes in slots of 256 KiB, an
//! entry for each slot, and a record for each object that was opened; [`mod@format`] draws them. The
//! [`index`] in memory finds the slot of a chunk, and [`sieve`] decides which slot is reused. A
//! small [`pool`] of threads reads and writes.
//!
//! Nothing is trusted that comes from the disk: the hash of a chunk is checked at every read. So
//! writes need no order, and a crash nothing but a start: a torn entry fails its CRC, an entry with
//! other bytes fails their hash, and both are misses. If the disk fails, the cache switches itself
//! off. No read fails because of it.

mod allocation;
mod error;
mod file;
mod format;
mod index;
mod inspect;
mod objects;
mod pool;
mod sieve;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::allocation::Allocation;
pub use self::error::DiskCacheError;
use self::file::Files;
pub(crate) use self::format::DiskKey;
use self::format::Record;
use self::index::Index;
pub use self::inspect::{CachedObject, DiskCacheCheck, DiskCacheContents};
use self::objects::Objects;
use self::pool::{Class, Pool};
use self::slots::{Counters, Pinned};
use crate::fetcher::CHUNK_SIZE;
use crate::metrics::DiskCacheStats;
use crate::object::Priority;
use crate::store::Version;

/// Records of objects.
const RECORDS: u32 = 4096;
/// Minimum size: with fewer slots, most chunks would be evicted before they are used again.
const MIN_SLOTS: u32 = 64;
/// Chunks that wait to be written.
const MAX_QUEUED: usize = 64;
/// Interval at which the queue is checked by who waits for it.
const QUEUE_POLL: Duration = Duration::from_millis(2);
/// Time after which chunks that were written are safe from a power failure.
const FLUSH_INTERVAL: Duration = Duration::from_secs(30);

/// Settings of a [`DiskCache`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskCacheConfig {
    /// Folder of the files, of which no other process may use the cache. It is created if its
    /// parent exists.
    pub folder: PathBuf,
    /// Size in bytes, at least [`DiskCache::MIN_SIZE`]. The space is reserved at the start.
    pub size: u64,
}

/// An open disk cache.
///
/// No path is opened after [`open`](Self::open), and no thread is started before the first use: a
/// process can enter a sandbox in between that allows only reads and writes of open files.
#[derive(Debug)]
pub struct DiskCache {
    folder: PathBuf,
    shared: Arc<Shared>,
    pool: Arc<Pool>,
}

/// State that jobs use.
#[derive(Debug)]
struct Shared {
    files: Files,
    chunks: Mutex<Chunks>,
    objects: Mutex<Objects>,
    counters: Counters,
    /// Number of the next write.
    generation: AtomicU32,
    /// True after a failure of the disk.
    is_off: AtomicBool,
}

#[derive(Debug)]
struct Chunks {
    index: Index,
    /// Chunks that are queued or being written.
    pending: HashSet<DiskKey>,
}

impl DiskCache {
    /// Minimum size, in bytes.
    pub const MIN_SIZE: u64 = MIN_SLOTS as u64 * CHUNK_SIZE;
    /// Memory for chunks that wait to be written, in bytes, besides [`memory`](Self::memory).
    pub const MAX_QUEUED_BYTES: u64 = MAX_QUEUED as u64 * CHUNK_SIZE;

    /// Opens the cache in a folder, or creates one.
    ///
    /// If the size has changed, the chunks that still fit are kept. If the file system has not
    /// enough space, the cache is smaller. Files that are damaged or of another version are
    /// overwritten. Reads the entries of all slots: 26 MB for a cache of 100 GiB.
    ///
    /// # Errors
    /// The folder is in use or can't be used, or there is no space at all.
    pub fn open(config: &DiskCacheConfig) -> Result<Arc<Self>, DiskCacheError> {
        Self::open_with(config, Allocation::Full, MIN_SLOTS)
    }

    fn open_with(
        config: &DiskCacheConfig,
        allocation: Allocation,
        min_slots: u32,
    ) -> Result<Arc<Self>, DiskCacheError> {
        let files = Files::open(config, allocation, min_slots)?;
        let io_error = |name: &str, error| DiskCacheError::io(&config.folder.join(name), error);
        let (index, generation) = slots::load(&files).map_err(|error| io_error("slots", error))?;
        let objects = Objects::load(&files).map_err(|error| io_error("objects", error))?;
        let shared = Arc::new(Shared {
            files,
            chunks: Mutex::new(Chunks { index, pending: HashSet::new() }),
            objects: Mutex::new(objects),
            counters: Counters::default(),
            generation: AtomicU32::new(generation),
            is_off: AtomicBool::new(false),
        });
        let flushed = Arc::clone(&shared);
        let pool = Pool::new(FLUSH_INTERVAL, move || flushed.flush());
        Ok(Arc::new(Self { folder: config.folder.clone(), shared, pool }))
    }

    /// Returns the folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns the memory in use besides queued chunks, in bytes: at most 48 for each slot, and
    /// 200 KiB.
    pub fn memory(&self) -> u64 {
        let index = self.shared.chunks.lock().index.memory();
        (index + self.shared.objects.lock().memory()) as u64
    }

    /// Returns the counters and the present state.
    pub fn stats(&self) -> DiskCacheStats {
        let (used, bytes) = {
            let chunks = self.shared.chunks.lock();
            (chunks.index.used(), chunks.index.bytes())
        };
        let slots = self.shared.files.head.slots;
        self.shared.counters.stats(bytes, used, slots, self.is_off())
    }

    /// Returns the version that an object had when it was last opened.
    pub fn known_version(&self, store: &str, key: &str) -> Option<Version> {
        let number = self.shared.objects.lock().find(store, key)?;
        let bytes = self.shared.files.record(number).ok()?;
        let record = Record::decode(&bytes, &self.shared.files.head.nonce, number)?;
        (record.store == store && record.key == key).then_some(record.version)
    }

    /// Returns the keys of all objects of a store that were opened, and their versions.
    pub(crate) fn known_objects(&self, store: &str) -> Vec<(String, Version)> {
        let records = self.shared.files.records().unwrap_or_default();
        let records = records.into_iter().map(|(_, record)| record);
        let of_store = records.filter(|record| record.store == store);
        of_store.map(|record| (record.key, record.version)).collect()
    }

    /// Records the version of an object that is opened.
    pub(crate) fn record_version(&self, store: &str, key: &str, version: &Version) {
        if self.is_off() {
            return;
        }
        let (shared, record) = (Arc::clone(&self.shared), objects::record(store, key, version));
        // If the queue is full, the next opening records it.
        self.pool.push(Class::Write, MAX_QUEUED, move || shared.write_record(&record));
    }

    /// Returns true if a chunk is on disk, as far as known without reading it.
    pub(crate) fn contains(&self, key: &DiskKey) -> bool {
        !self.is_off() && self.shared.chunks.lock().index.contains(key)
    }

    /// Counts a chunk that was needed and isn't on disk.
    pub(crate) fn count_miss(&self) {
        self.shared.counters.misses.fetch_add(1, Relaxed);
    }

    /// Reads a chunk of `length` bytes. `None` if it isn't there, or isn't what was written: then
    /// it is removed.
    ///
    /// Cancellation: the read isn't made if it hasn't begun.
    pub(crate) async fn read(
        &self,
        key: DiskKey,
        length: u64,
        priority: Priority,
    ) -> Option<Bytes> {
        let pinned = self.pin(&key)?;
        let (reply, bytes) = oneshot::channel();
        let class = match priority {
            Priority::Demand => Class::Demand,
            Priority::Ahead | Priority::Background => Class::Ahead,
        };
        self.pool.push(class, MAX_QUEUED, move || {
            if !reply.is_closed() {
                // The reader may be gone.
                reply.send(pinned.read(&key, length)).unwrap_or_else(drop);
            }
        });
        bytes.await.ok().flatten()
    }

    /// Writes a chunk at some later time, unless it is there, or too many chunks are queued.
    pub(crate) fn insert(&self, key: DiskKey, bytes: Bytes, is_sequential: bool) {
        if self.is_off() || bytes.is_empty() || bytes.len() as u64 > CHUNK_SIZE {
            return;
        }
        {
            let mut chunks = self.shared.chunks.lock();
            if chunks.index.contains(&key) || !chunks.pending.insert(key) {
                return;
            }
        }
        let shared = Arc::clone(&self.shared);
        let write = move || shared.write(key, &bytes, is_sequential);
        if !self.pool.push(Class::Write, MAX_QUEUED, write) {
            self.shared.counters.dropped.fetch_add(1, Relaxed);
            self.shared.chunks.lock().pending.remove(&key);
        }
    }

    /// Waits until most queued chunks are written, at most for `timeout`.
    pub(crate) async fn wait_for_writes(&self, timeout: Duration) {
        let is_written = async {
            while self.shared.chunks.lock().pending.len() > MAX_QUEUED / 4 && !self.is_off() {
                tokio::time::sleep(QUEUE_POLL).await;
            }
        };
        // A disk that hangs holds nobody up for longer.
        tokio::time::timeout(timeout, is_written).await.unwrap_or_default();
    }

    /// Removes a chunk that its verifier rejects.
    pub(crate) fn reject(&self, key: &DiskKey) {
        if let Some(pinned) = self.pin(key).and_then(Pinned::remove) {
            self.pool.push(Class::Write, usize::MAX, move || pinned.clear());
        }
    }

    /// Writes what is queued, and makes it safe from a power failure, without waiting for that.
    /// Afterwards the cache isn't used any more.
    pub fn start_closing(&self) {
        self.pool.close();
    }

    /// Closes the cache, and waits until everything is written. Blocks the thread. Dropping the
    /// cache does the same, and unlocks the folder.
    pub fn close(&self) {
        self.pool.close();
        self.pool.join();
        self.shared.is_off.store(true, Relaxed);
    }

    fn pin(&self, key: &DiskKey) -> Option<Pinned> {
        if self.is_off() {
            return None;
        }
        let slot = self.shared.chunks.lock().index.pin(key)?;
        Some(Pinned::new(&self.shared, slot))
    }

    fn is_off(&self) -> bool {
        self.shared.is_off.load(Relaxed)
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        self.close();
    }
}
