//! Storage wrapper that counts reads.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::{Fetch, FetchPriority, FileId, GroupHashes, Prefetch, Stamp, Storage};

/// Counters of reads, shared by any number of storages.
#[derive(Debug, Default)]
pub struct ReadCounters {
    count: AtomicU64,
    bytes: AtomicU64,
}

impl ReadCounters {
    /// Returns the number of reads, including failed ones.
    pub fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Returns the number of bytes that were read successfully.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }
}

/// Storage wrapper that counts reads, including failed ones, but not those that would have had to
/// wait.
#[derive(Debug)]
pub(crate) struct CountedStorage {
    inner: Arc<dyn Storage>,
    counters: Arc<ReadCounters>,
}

impl CountedStorage {
    pub(crate) fn new(inner: Arc<dyn Storage>, counters: Arc<ReadCounters>) -> Self {
        Self { inner, counters }
    }
}

impl Storage for CountedStorage {
    fn length(&self) -> u64 {
        self.inner.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.counters.count.fetch_add(1, Relaxed);
        self.inner.read_exact_at(buffer, offset)?;
        self.counters.bytes.fetch_add(buffer.len() as u64, Relaxed);
        Ok(())
    }

    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        let is_read = self.inner.try_read_exact_at(buffer, offset)?;
        if is_read {
            self.counters.count.fetch_add(1, Relaxed);
            self.counters.bytes.fetch_add(buffer.len() as u64, Relaxed);
        }
        Ok(is_read)
    }

    fn is_current(&self) -> bool {
        self.inner.is_current()
    }

    fn stamp(&self) -> Option<Stamp> {
        self.inner.stamp()
    }

    fn verified_blake3(&self) -> Option<[u8; 32]> {
        self.inner.verified_blake3()
    }

    fn file_id(&self) -> Option<FileId> {
        self.inner.file_id()
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }

    fn fetch(&self, range: Range<u64>, priority: FetchPriority) -> Option<Fetch> {
        let fetch = self.inner.fetch(range, priority)?;
        let counters = Arc::clone(&self.counters);
        counters.count.fetch_add(1, Relaxed);
        Some(Box::pin(async move {
            let bytes = fetch.await?;
            counters.bytes.fetch_add(bytes.len() as u64, Relaxed);
            Ok(bytes)
        }))
    }

    fn is_in_memory(&self, range: Range<u64>) -> bool {
        self.inner.is_in_memory(range)
    }

    fn prefetch(&self, range: Range<u64>) -> Option<Prefetch> {
        self.inner.prefetch(range)
    }

    fn verified_by(&self, hashes: Arc<dyn GroupHashes>) -> Option<Arc<dyn Storage>> {
        let inner = self.inner.verified_by(hashes)?;
        Some(Arc::new(Self::new(inner, Arc::clone(&self.counters))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_reads_and_successful_bytes_are_counted() {
        let reads = Arc::new(ReadCounters::default());
        let memory: Arc<dyn Storage> = Arc::new(Arc::<[u8]>::from(*b"0123456789"));
        let counted = CountedStorage::new(memory, Arc::clone(&reads));
        let mut buffer = [0; 4];
        counted.read_exact_at(&mut buffer, 3).unwrap();
        assert!(counted.read_exact_at(&mut buffer, 7).is_err());
        assert_eq!((&buffer, reads.count(), reads.bytes()), (b"3456", 2, 4));
        assert!(counted.try_read_exact_at(&mut buffer, 4).unwrap());
        assert_eq!((&buffer, reads.count(), reads.bytes()), (b"4567", 3, 8));
        assert_eq!(counted.length(), 10);
    }
}
