//! Chunks in memory, within a budget of bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};
use tokio::time::Instant;

use super::plan::CHUNK_SIZE;
use crate::metrics::CacheStats;
use crate::object::ObjectId;

/// Memory of a cached chunk besides its bytes: key, slot and reference counts.
const OVERHEAD: u64 = 192;

/// Part of the memory for chunks that were used repeatedly; the rest is for new ones, which
/// readahead needs.
const HOT_SHARE: f64 = 0.5;

/// Minimum size of a shard, in bytes.
const MIN_SHARD_SIZE: u64 = 128 * 1024 * 1024;

/// Identifies a chunk among those of all objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ChunkKey {
    /// Object and verifier.
    pub(crate) namespace: ObjectId,
    /// Number of the chunk within the object.
    pub(crate) number: u64,
}

/// A cache of chunks, each in an allocation of its own: who keeps a slice of a chunk keeps only
/// that chunk.
///
/// Uses of a chunk within a second count as one. Otherwise a sequential reader, which uses each
/// chunk several times in succession, would evict the chunks that are used again and again.
#[derive(Debug)]
pub(crate) struct ChunkCache {
    cache: Cache<ChunkKey, Arc<CachedChunk>, ChunkWeighter>,
    start: Instant,
    hits: AtomicU64,
    misses: AtomicU64,
}

#[derive(Debug)]
struct CachedChunk {
    bytes: Bytes,
    /// Second of the last counted use.
    used: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct ChunkWeighter;

impl Weighter<ChunkKey, Arc<CachedChunk>> for ChunkWeighter {
    fn weight(&self, _: &ChunkKey, chunk: &Arc<CachedChunk>) -> u64 {
        chunk.bytes.len() as u64 + OVERHEAD
    }
}

impl ChunkCache {
    /// Creates a cache of at most `budget` bytes.
    pub(crate) fn new(budget: u64) -> Self {
        let items = usize::try_from(budget / CHUNK_SIZE).unwrap_or(usize::MAX).max(1);
        let shards = usize::try_from(budget / MIN_SHARD_SIZE).unwrap_or(1).clamp(1, 16);
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity(items)
            .weight_capacity(budget)
            .hot_allocation(HOT_SHARE)
            .build();
        let cache = match options {
            Ok(options) => {
                Cache::with_options(options, ChunkWeighter, Default::default(), Default::default())
            }
            // Building fails only if a field is missing, and all of them are set.
            Err(_) => Cache::with_weighter(items, budget, ChunkWeighter),
        };
        Self { cache, start: Instant::now(), hits: AtomicU64::new(0), misses: AtomicU64::new(0) }
    }

    /// Returns the chunk if it is cached, and counts a use, and a hit or a miss.
    pub(crate) fn get(&self, key: &ChunkKey) -> Option<Bytes> {
        let chunk = self.cache.peek(key);
        let counter = if chunk.is_some() { &self.hits } else { &self.misses };
        counter.fetch_add(1, Relaxed);
        let chunk = chunk?;
        let now = self.start.elapsed().as_secs();
        if chunk.used.swap(now, Relaxed) + 1 < now {
            // Only for the use it counts.
            self.cache.get(key);
        }
        Some(chunk.bytes.clone())
    }

    /// Returns the chunk if it is cached. Doesn't count as a use.
    pub(crate) fn peek(&self, key: &ChunkKey) -> Option<Bytes> {
        Some(self.cache.peek(key)?.bytes.clone())
    }

    /// Returns true if the chunk is cached. Doesn't count as a use.
    pub(crate) fn contains(&self, key: &ChunkKey) -> bool {
        self.cache.contains_key(key)
    }

    /// Caches a chunk, which must be in an allocation of its own.
    pub(crate) fn insert(&self, key: ChunkKey, bytes: Bytes) {
        let used = AtomicU64::new(self.start.elapsed().as_secs());
        self.cache.insert(key, Arc::new(CachedChunk { bytes, used }));
    }

    /// Returns the number of bytes that are cached at most.
    pub(crate) fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    /// Returns the counters.
    pub(crate) fn stats(&self) -> CacheStats {
        CacheStats {
            bytes: self.cache.weight(),
            capacity: self.cache.capacity(),
            hits: self.hits.load(Relaxed),
            misses: self.misses.load(Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn key(number: u64) -> ChunkKey {
        ChunkKey { namespace: ObjectId::default(), number }
    }

    fn chunk() -> Bytes {
        Bytes::from(vec![0; usize::try_from(CHUNK_SIZE).unwrap()])
    }

    #[test]
    fn the_cache_stays_within_its_budget() {
        let cache = ChunkCache::new(16 * CHUNK_SIZE);
        for number in 0..100 {
            cache.insert(key(number), chunk());
            assert!(cache.stats().bytes <= 16 * CHUNK_SIZE);
        }
        assert!((0..100).filter(|number| cache.contains(&key(*number))).count() >= 12);
    }

    #[tokio::test(start_paused = true)]
    async fn a_sequential_reader_does_not_evict_chunks_in_use() {
        let cache = ChunkCache::new(64 * CHUNK_SIZE);
        for _ in 0..4 {
            for number in 0..10 {
                if cache.get(&key(number)).is_none() {
                    cache.insert(key(number), chunk());
                }
            }
            tokio::time::advance(Duration::from_secs(5)).await;
        }
        for number in 100..1000 {
            cache.insert(key(number), chunk());
            (0..8).for_each(|_| drop(cache.get(&key(number))));
        }
        assert_eq!((0..10).filter(|number| cache.contains(&key(*number))).count(), 10);
    }
}
