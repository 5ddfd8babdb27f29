//! Caches that are bounded in memory.

use std::hash::Hash;

use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

/// Creates a cache of at most `budget`, in the unit of `weighter`, for values that mostly weigh
/// `typical`. Shards have at least `smallest_shard`, since a value that is large for its shard
/// wouldn't be kept.
pub fn bounded<K: Hash + Eq, V: Clone, W: Weighter<K, V> + Clone>(
    budget: u64,
    typical: u64,
    smallest_shard: u64,
    weighter: W,
) -> Cache<K, V, W> {
    /// Maximum number of shards; more don't improve performance on common machines.
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
        // Building fails only if a field is missing, and all of them are set.
        Err(_) => Cache::with_weighter(items, budget, weighter),
    }
}
