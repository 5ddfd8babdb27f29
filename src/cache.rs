//! Values that are costly to make, bounded in bytes, each made once however many ask.

use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{OptionsBuilder, Weighter};
use tokio::sync::oneshot;

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
///
/// Values that are used again and again stay while others pass through. Uses in quick
/// succession count as one: a client that reads a value in small parts, or the neighbours
/// of one that lies across two requests, is no reason to keep it.
#[derive(Debug)]
pub struct ByteCache<K> {
    cache: Cache<K, Bytes, ByLength>,
    recent: Recent,
    /// Values that are being made, each with those who wait for it. (The cache has something
    /// like it, but takes whoever waits for a reason to keep the value.)
    flights: Mutex<HashMap<K, Vec<oneshot::Sender<Bytes>>>>,
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
        Self::with_clock(budget, typical, uptime)
    }

    fn with_clock(budget: u64, typical: u64, clock: fn() -> u64) -> Self {
        let cache = bounded(budget, typical, SMALLEST_SHARD, ByLength);
        Self { cache, recent: Recent::new(clock), flights: Mutex::default() }
    }

    /// The value, if it is here.
    pub fn get(&self, key: &K) -> Option<Bytes> {
        if self.recent.is_use_of_its_own(key) { self.cache.get(key) } else { self.cache.peek(key) }
    }

    /// What all values weigh together, in bytes, and how much they may.
    pub fn fill(&self) -> (u64, u64) {
        (self.cache.weight(), self.cache.capacity())
    }

    /// Whether the value is here. That is no use of it.
    pub fn contains(&self, key: &K) -> bool {
        self.cache.contains_key(key)
    }

    /// Adds a value that was made without [`get_or_make`](Self::get_or_make).
    pub fn insert(&self, key: K, value: Bytes) {
        self.cache.insert(key, value);
    }

    /// The value, made by `make` if it isn't here.
    ///
    /// Whoever asks for it with the same `flight` meanwhile waits. If `make` fails or is
    /// dropped, the next of them makes it. Values that may turn out not to be what `key`
    /// stands for have flights of their own, so that only their own readers wait for them.
    ///
    /// # Errors
    /// Those of `make`.
    pub async fn get_or_make<E>(
        &self,
        key: &K,
        flight: &K,
        make: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        let flight = loop {
            if let Some(value) = self.get(key) {
                return Ok(value);
            }
            match self.board(key, flight) {
                Boarding::Here(value) => return Ok(value),
                Boarding::First(flight) => break flight,
                // Who was making it may have failed; then it's up to the next.
                Boarding::Later(value) => match value.await {
                    Ok(value) => return Ok(value),
                    Err(_) => continue,
                },
            }
        };
        let value = make.await?;
        self.cache.insert(key.clone(), value.clone());
        for waiting in flight.end() {
            // It may have gone meanwhile.
            waiting.send(value.clone()).unwrap_or_else(drop);
        }
        Ok(value)
    }

    fn board<'a>(&'a self, key: &K, flight: &'a K) -> Boarding<'a, K> {
        let mut flights = self.flights();
        // It may have landed since the last look.
        if let Some(value) = self.cache.peek(key) {
            return Boarding::Here(value);
        }
        if let Some(waiting) = flights.get_mut(flight) {
            let (sender, value) = oneshot::channel();
            waiting.push(sender);
            return Boarding::Later(value);
        }
        flights.insert(flight.clone(), Vec::new());
        Boarding::First(Flight { cache: self, key: flight, is_over: false })
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<K, Vec<oneshot::Sender<Bytes>>>> {
        // Nothing panics while it is locked.
        self.flights.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// How somebody comes by a value.
enum Boarding<'a, K: Hash + Eq + Clone> {
    /// It is here.
    Here(Bytes),
    /// By making it.
    First(Flight<'a, K>),
    /// By waiting for it.
    Later(oneshot::Receiver<Bytes>),
}

/// A value that is being made. If it is dropped before that is done, those who wait hear
/// of it, and one of them takes over.
struct Flight<'a, K: Hash + Eq + Clone> {
    cache: &'a ByteCache<K>,
    key: &'a K,
    is_over: bool,
}

impl<K: Hash + Eq + Clone> Flight<'_, K> {
    /// Who waits for the value.
    fn end(mut self) -> Vec<oneshot::Sender<Bytes>> {
        self.is_over = true;
        self.cache.flights().remove(self.key).unwrap_or_default()
    }
}

impl<K: Hash + Eq + Clone> Drop for Flight<'_, K> {
    fn drop(&mut self) {
        if !self.is_over {
            self.cache.flights().remove(self.key);
        }
    }
}

/// Remembers, for a second or two, which keys were used: of as many as it has slots, and of
/// the others at times. It takes part in every look-up, so it is no more than a table of
/// atomic numbers: a part of the key's hash, and the second in which a use of it counted.
#[derive(Debug)]
struct Recent {
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
    clock: fn() -> u64,
}

impl Recent {
    /// Twice as many as a cache of 2 GiB has blocks.
    const SLOTS: u64 = 1 << 16;
    /// The part of a slot that is the time.
    const TIME: u64 = 0xffff;

    fn new(clock: fn() -> u64) -> Self {
        let slots = (0..Self::SLOTS).map(|_| AtomicU64::new(0)).collect();
        Self { slots, hasher: RandomState::new(), clock }
    }

    /// Whether this use is a new one, rather than a part of one that was counted a moment
    /// ago.
    fn is_use_of_its_own(&self, key: &impl Hash) -> bool {
        let hash = self.hasher.hash_one(key);
        let place = usize::try_from(hash % Self::SLOTS).unwrap_or(0);
        let Some(slot) = self.slots.get(place) else { return true };
        // A slot that was never used is from long ago.
        let now = ((self.clock)() + 2) & Self::TIME;
        let counted = slot.load(Ordering::Relaxed);
        let age = now.wrapping_sub(counted) & Self::TIME;
        if (counted ^ hash) & !Self::TIME == 0 && age <= 1 {
            return false;
        }
        slot.store(hash & !Self::TIME | now, Ordering::Relaxed);
        true
    }
}

/// Seconds since this was first asked for.
fn uptime() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_secs()
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
                    cache.get_or_make(&1, &1, make).await
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap(), "value");
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    /// As when a hostile archive claims another one's hash: a value that can't be made delays
    /// nobody but those who asked for it.
    #[tokio::test]
    async fn other_flights_of_a_key_are_not_waited_for() {
        let cache = ByteCache::new(1 << 20, 100);
        let mut stuck =
            Box::pin(cache.get_or_make(&1, &2, std::future::pending::<Result<_, &str>>()));
        tokio::select! {
            biased;
            _ = &mut stuck => panic!("nothing ends it"),
            () = tokio::task::yield_now() => {}
        }
        let value = Bytes::from_static(b"value");
        let make = async { Ok::<_, &str>(value.clone()) };
        assert_eq!(cache.get_or_make(&1, &3, make).await, Ok(value.clone()));
        // What has been made is shared by its key.
        let never = std::future::pending::<Result<_, &str>>();
        assert_eq!(cache.get_or_make(&1, &2, never).await, Ok(value));
    }

    #[tokio::test]
    async fn a_failure_is_not_kept() {
        let cache = ByteCache::new(1 << 20, 100);
        assert_eq!(cache.get_or_make(&1, &1, async { Err("no") }).await, Err("no"));
        let value = Bytes::from_static(b"yes");
        assert_eq!(
            cache.get_or_make(&1, &1, async { Ok::<_, &str>(value) }).await,
            Ok("yes".into())
        );
    }

    #[tokio::test]
    async fn who_waited_takes_over_from_who_failed_or_left() {
        for fails in [true, false] {
            let cache = ByteCache::new(1 << 20, 100);
            let mut first = Box::pin(cache.get_or_make(&1, &1, async {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                if fails { Err("no") } else { std::future::pending().await }
            }));
            tokio::select! {
                biased;
                _ = &mut first => panic!("it is still being made"),
                () = tokio::task::yield_now() => {}
            }
            let value = Bytes::from_static(b"value");
            let make = async { Ok::<_, &str>(value.clone()) };
            let mut second = Box::pin(cache.get_or_make(&1, &1, make));
            tokio::select! {
                biased;
                _ = &mut second => panic!("there are two of them"),
                () = tokio::task::yield_now() => {}
            }
            if fails {
                assert_eq!(first.await, Err("no"));
            } else {
                drop(first);
            }
            assert_eq!(second.await, Ok(value));
            assert!(cache.flights().is_empty());
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_value_is_no_reason_to_keep_it() {
        let cache = ByteCache::with_clock(200_000, 1000, || NOW.get());
        boot(&cache).await;
        for key in 1000..3000 {
            let make = async || {
                tokio::task::yield_now().await;
                Ok::<_, ()>(Bytes::from(vec![0; 1000]))
            };
            let both = tokio::join!(
                cache.get_or_make(&key, &key, make()),
                cache.get_or_make(&key, &key, make())
            );
            assert!(both.0.is_ok() && both.1.is_ok());
        }
        assert_eq!((0..50).filter(|key| cache.contains(key)).count(), 50);
    }

    #[tokio::test]
    async fn it_stays_within_its_budget() {
        let cache = ByteCache::new(100_000, 1000);
        for key in 0..1000 {
            let make = async { Ok::<_, ()>(Bytes::from(vec![0; 1000])) };
            cache.get_or_make(&key, &key, make).await.unwrap();
            assert!(cache.cache.weight() <= 100_000);
        }
        assert!(cache.cache.len() > 50);
    }

    thread_local! {
        static NOW: std::cell::Cell<u64> = const { std::cell::Cell::new(100) };
    }

    /// What machines boot from: 50 values of the 170 that there is room for.
    async fn boot(cache: &ByteCache<u32>) {
        for _ in 0..3 {
            for key in 0..50 {
                read(cache, key).await;
            }
            NOW.set(NOW.get() + 10);
        }
    }

    /// Uses `key` as a reader does that asks for it in four parts.
    async fn read(cache: &ByteCache<u32>, key: u32) {
        for _ in 0..4 {
            let make = async { Ok::<_, ()>(Bytes::from(vec![0; 1000])) };
            cache.get_or_make(&key, &key, make).await.unwrap();
        }
    }

    #[tokio::test]
    async fn who_reads_everything_once_pushes_out_nothing_that_is_in_use() {
        let cache = ByteCache::with_clock(200_000, 1000, || NOW.get());
        boot(&cache).await;
        // A backup of ten times as much as there is room for.
        for key in 1000..3000 {
            read(&cache, key).await;
            NOW.set(NOW.get() + u64::from(key % 50 == 0));
        }
        let kept = (0..50).filter(|key| cache.contains(key)).count();
        assert_eq!(kept, 50);
    }

    #[test]
    fn uses_in_quick_succession_are_one() {
        let recent = Recent::new(|| NOW.get());
        let uses = |key: u32| (0..3).filter(|_| recent.is_use_of_its_own(&key)).count();
        assert_eq!([uses(1), uses(1)], [1, 0]);
        NOW.set(NOW.get() + 2);
        assert_eq!(uses(1), 1);
        // The table's times come round.
        NOW.set(NOW.get() + Recent::TIME + 3);
        assert_eq!(uses(1), 1);
    }
}
