//! Reads and writes of slots, which block. They are jobs of the pool.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;

use super::Shared;
use super::file::Files;
use super::format::{DiskKey, Entry, Record, hash};
use super::index::Index;
use crate::metrics::DiskCacheStats;

/// Counters since the start.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) bad: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) dropped: AtomicU64,
}

impl Counters {
    /// Returns all counters, together with the present state.
    pub(super) fn stats(&self, bytes: u64, used: u32, slots: u32, is_off: bool) -> DiskCacheStats {
        DiskCacheStats {
            bytes,
            slots_used: used.into(),
            slots: slots.into(),
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed),
            bad: self.bad.load(Relaxed),
            evicted: self.evicted.load(Relaxed),
            writes_dropped: self.dropped.load(Relaxed),
            is_off,
        }
    }
}

/// Builds the index from the entries, and returns it with the number of the next write.
pub(super) fn load(files: &Files) -> io::Result<(Index, u32)> {
    let mut entries = files.entries()?;
    // The order of eviction is that of the writes, and sequential readers' chunks come first.
    entries.sort_unstable_by_key(|(_, entry)| (!entry.is_sequential, entry.generation));
    let newest = entries.iter().map(|(_, entry)| entry.generation).max();
    let chunks = entries
        .into_iter()
        .filter(|(_, entry)| u64::from(entry.length) <= super::CHUNK_SIZE)
        .map(|(slot, entry)| (slot, entry.key, entry.length, entry.is_sequential));
    let index = Index::with_chunks(files.head.slots, chunks);
    Ok((index, newest.map_or(0, |newest| newest.saturating_add(1))))
}

impl Shared {
    /// Writes a chunk to a free slot, or to one whose chunk is evicted.
    pub(super) fn write(&self, key: DiskKey, bytes: &Bytes, is_sequential: bool) {
        let taken = self.chunks.lock().index.take();
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        let mut is_written = false;
        if let Some((slot, is_evicted)) = taken {
            self.counters.evicted.fetch_add(is_evicted.into(), Relaxed);
            let generation = self.generation.fetch_add(1, Relaxed);
            let entry = Entry { key, length, hash: hash(bytes), generation, is_sequential };
            let written = self
                .files
                .write_chunk(slot, bytes)
                .and_then(|()| self.files.write_entry(slot, Some(&entry)));
            is_written = self.check(written).is_some();
        }
        let mut chunks = self.chunks.lock();
        chunks.pending.remove(&key);
        match taken {
            Some((slot, _)) if is_written => chunks.index.insert(slot, key, length, is_sequential),
            Some(_) => {}
            None => {
                self.counters.dropped.fetch_add(1, Relaxed);
            }
        }
    }

    /// Writes the record of an object.
    pub(super) fn write_record(&self, record: &Record) {
        let Record { store, key, opened, .. } = record;
        let number = self.objects.lock().assign(store, key, *opened);
        if let Some(bytes) = record.encode(&self.files.head.nonce, number) {
            self.check(self.files.write_record(number, &bytes));
        }
    }

    /// Makes what was written safe from a power failure.
    pub(super) fn flush(&self) {
        if !self.is_off.load(Relaxed) {
            self.check(self.files.sync());
        }
    }

    /// Returns the result of an operation, or switches the cache off.
    fn check<T>(&self, result: io::Result<T>) -> Option<T> {
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        if !self.is_off.swap(true, Relaxed) {
            tracing::error!(
                reason = "disk_cache_off",
                "the disk cache fails and is off until the next start: {error}; check the disk"
            );
        }
        None
    }
}

/// A slot that is not reused before this is dropped.
#[derive(Debug)]
pub(super) struct Pinned {
    shared: Arc<Shared>,
    slot: u32,
}

impl Pinned {
    /// Takes charge of a slot that has been pinned.
    pub(super) fn new(shared: &Arc<Shared>, slot: u32) -> Self {
        Self { shared: Arc::clone(shared), slot }
    }

    /// Reads the chunk. If it isn't what was written, it is removed.
    pub(super) fn read(self, key: &DiskKey, length: u64) -> Option<Bytes> {
        let shared = &self.shared;
        if shared.is_off.load(Relaxed) {
            return None;
        }
        let is_right = |entry: &Entry| entry.key == *key && u64::from(entry.length) == length;
        let entry = shared.check(shared.files.entry(self.slot))?.filter(is_right);
        if let Some(entry) = entry {
            let bytes = shared.check(shared.files.chunk(self.slot, entry.length))?;
            if bytes.len() as u64 == length && hash(&bytes) == entry.hash {
                shared.counters.hits.fetch_add(1, Relaxed);
                return Some(bytes.into());
            }
        }
        shared.counters.misses.fetch_add(1, Relaxed);
        self.remove()?.clear();
        None
    }

    /// Removes the chunk from the index, unless that has been done.
    pub(super) fn remove(self) -> Option<Self> {
        let is_first = self.shared.chunks.lock().index.remove_pinned(self.slot);
        self.shared.counters.bad.fetch_add(is_first.into(), Relaxed);
        is_first.then_some(self)
    }

    /// Removes the chunk from the disk.
    pub(super) fn clear(self) {
        self.shared.check(self.shared.files.write_entry(self.slot, None));
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.shared.chunks.lock().index.unpin(self.slot);
    }
}
