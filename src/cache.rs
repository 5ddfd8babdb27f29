//! Values that are costly to make, bounded in bytes, each made once however many ask.

use std::future::Future;
use std::hash::Hash;

use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

/// What a cached value costs besides its bytes: key, slot, reference count.
const OVERHEAD: u64 = 128;

/// A shard must hold several of even the largest values, or it would not keep them.
const SMALLEST_SHARD: u64 = 128 * 1024 * 1024;

/// A cache of at most `budget` in the unit of `weighter`, for values that mostly weigh
/// `typical`, in shards of at least `smallest_shard`: a value that is large for its shard
/// would not be kept.
pub(crate) fn bounded<K: Hash + Eq, V: Clone, W: Weighter<K, V> + Clone>(
    budget: u64,
    typical: u64,
    smallest_shard: u64,
    weighter: W,
) -> Cache<K, V, W> {
    /// More don't make it faster on the machines that there are.
    const MOST_SHARDS: usize = 16;
    let shards = usize::try_from(budget / smallest_shard).unwrap_or(1).clamp(1, MOST_SHARDS);
    let items = usize::try_from(budget / typical.max(1)).unwrap_or(usize::MAX).max(16);
    let options = OptionsBuilder::new()
        .shards(shards)
        .estimated_items_capacity(items)
        .weight_capacity(budget)
        .hot_allocation(0.75)
        .build();
    match options {
        Ok(options) => {
            Cache::with_options(options, weighter, Default::default(), Default::default())
        }
        // Only a missing field makes it fail, and none is missing.
        Err(_) => Cache::with_weighter(items, budget, weighter),
    }
}

/// A cache of byte strings. It doesn't know what they mean.
#[derive(Debug)]
pub struct ByteCache<K> {
    cache: Cache<K, Bytes, ByLength>,
}

#[derive(Debug, Clone, Copy)]
struct ByLength;

impl<K> Weighter<K, Bytes> for ByLength {
    fn weight(&self, _: &K, value: &Bytes) -> u64 {
        value.len() as u64 + OVERHEAD
    }
}

impl<K: Hash + Eq + Clone> ByteCache<K> {
    /// A cache of at most `budget` bytes, for values of mostly `typical` bytes.
    pub fn new(budget: u64, typical: u64) -> Self {
        let cache = bounded(budget, typical, SMALLEST_SHARD, ByLength);
        Self { cache }
    }

    /// The value, if it is here.
    pub fn get(&self, key: &K) -> Option<Bytes> {
        self.cache.get(key)
    }

    /// The value, made by `make` if it isn't here.
    ///
    /// Whoever asks for it meanwhile waits. If `make` fails or is dropped, the next of
    /// them makes it.
    ///
    /// # Errors
    /// Those of `make`.
    pub async fn get_or_make<E>(
        &self,
        key: &K,
        make: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        self.cache.get_or_insert_async(key, make).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[tokio::test]
    async fn many_ask_and_one_makes() {
        let cache = Arc::new(ByteCache::new(1 << 20, 100));
        let made = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..20)
            .map(|_| {
                let (cache, made) = (Arc::clone(&cache), Arc::clone(&made));
                tokio::spawn(async move {
                    let make = async {
                        made.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                        Ok::<_, ()>(Bytes::from_static(b"value"))
                    };
                    cache.get_or_make(&1, make).await
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap(), "value");
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn a_failure_is_not_kept() {
        let cache = ByteCache::new(1 << 20, 100);
        assert_eq!(cache.get_or_make(&1, async { Err("no") }).await, Err("no"));
        let value = Bytes::from_static(b"yes");
        assert_eq!(cache.get_or_make(&1, async { Ok::<_, &str>(value) }).await, Ok("yes".into()));
    }

    #[tokio::test]
    async fn it_stays_within_its_budget() {
        let cache = ByteCache::new(100_000, 1000);
        for key in 0..1000 {
            let make = async { Ok::<_, ()>(Bytes::from(vec![0; 1000])) };
            cache.get_or_make(&key, make).await.unwrap();
            assert!(cache.cache.weight() <= 100_000);
        }
        assert!(cache.cache.len() > 50);
    }
}
