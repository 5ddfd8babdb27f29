//! Provides a counter for events that happen on nearly every request.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// Number of stripes: covers the threads that serve clients on common machines. With more
/// threads, some share a stripe.
const SHARDS: usize = 16;

/// A counter sharded over several cache lines, each used by some of the threads only, so that
/// threads don't contend.
#[derive(Debug, Default)]
pub(super) struct ShardedCounter([CounterShard; SHARDS]);

#[derive(Debug, Default)]
#[repr(align(128))]
struct CounterShard(AtomicU64);

impl ShardedCounter {
    pub(super) fn add(&self, count: u64) {
        if let Some(CounterShard(part)) = self.0.get(shard_index()) {
            part.fetch_add(count, Relaxed);
        }
    }

    pub(super) fn sum(&self) -> u64 {
        self.0.iter().map(|CounterShard(part)| part.load(Relaxed)).sum()
    }
}

/// Returns the index of this thread's stripe.
fn shard_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Relaxed) % SHARDS);
        }
        mine.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concurrent_additions_are_all_counted() {
        let counter = ShardedCounter::default();
        std::thread::scope(|scope| {
            for _ in 0..2 * SHARDS {
                scope.spawn(|| (0..1000).for_each(|_| counter.add(2)));
            }
        });
        assert_eq!(counter.sum(), 4000 * SHARDS as u64);
    }
}
