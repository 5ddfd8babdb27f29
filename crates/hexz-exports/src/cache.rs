//! Caches values that are costly to produce, bounded in bytes, with single flight: concurrent
//! requests for a value produce it once.

use std::collections::HashMap;
use std::future::Future;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use bytes::Bytes;
use hexz_reader::cache::bounded;
use parking_lot::Mutex;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::sync::oneshot;

/// Cost of a cached value besides its bytes: key, slot and reference count.
const OVERHEAD: u64 = 128;

/// Minimum size of a shard in bytes. A shard must hold several of the largest values, or it
/// wouldn't keep them.
const MIN_SHARD_SIZE: u64 = 128 * 1024 * 1024;

/// A cache of byte strings.
///
/// Frequently used values stay while others pass through. Uses in quick succession count as one:
/// reading a value in small parts, or reading a neighbor that lies across two requests, is no
/// reason to keep it.
#[derive(Debug)]
pub struct ByteCache<K> {
    cache: Cache<K, Bytes, LengthWeighter>,
    recent: RecentUses,
    /// Values in flight, each with its waiters. (The underlying cache has a similar feature, but
    /// counts each waiter as a use of the value.)
    flights: Arc<Flights<K>>,
}

/// Waiters of each value in flight.
type Flights<K> = Mutex<HashMap<K, Vec<oneshot::Sender<Bytes>>>>;

#[derive(Debug, Clone, Copy)]
struct LengthWeighter;

impl<K> Weighter<K, Bytes> for LengthWeighter {
    fn weight(&self, _: &K, value: &Bytes) -> u64 {
        value.len() as u64 + OVERHEAD
    }
}

impl<K: Hash + Eq + Clone> ByteCache<K> {
    /// Creates a cache of at most `budget` bytes, for values of mostly `typical` bytes.
    pub fn new(budget: u64, typical: u64) -> Self {
        Self::with_clock(budget, typical, uptime)
    }

    fn with_clock(budget: u64, typical: u64, clock: fn() -> u64) -> Self {
        let cache = bounded(budget, typical, MIN_SHARD_SIZE, LengthWeighter);
        Self { cache, recent: RecentUses::new(clock), flights: Arc::default() }
    }

    /// Returns the value if it is cached, and counts a use of it.
    pub fn get(&self, key: &K) -> Option<Bytes> {
        if self.recent.is_separate_use(key) { self.cache.get(key) } else { self.cache.peek(key) }
    }

    /// Returns the total weight of all values and its limit, both in bytes.
    pub fn usage(&self) -> (u64, u64) {
        (self.cache.weight(), self.cache.capacity())
    }

    /// Returns true if the value is cached. Doesn't count as a use.
    pub fn contains(&self, key: &K) -> bool {
        self.cache.contains_key(key)
    }

    /// Returns the value if it is cached. Doesn't count as a use.
    pub fn peek(&self, key: &K) -> Option<Bytes> {
        self.cache.peek(key)
    }

    /// Caches a value that was made without [`get_or_insert_with`](Self::get_or_insert_with).
    pub fn insert(&self, key: K, value: Bytes) {
        self.cache.insert(key, value);
    }

    /// Returns the cached value, or awaits `make` and caches its result.
    ///
    /// Concurrent callers with the same `flight` wait for the first one. If its `make` fails or
    /// is dropped, the next waiter runs its own. Values that may turn out not to match `key` have
    /// separate flights, so that only their own readers wait for them.
    ///
    /// # Errors
    /// Those of `make`.
    pub async fn get_or_insert_with<E>(
        &self,
        key: &K,
        flight: &K,
        make: impl Future<Output = Result<Bytes, E>>,
    ) -> Result<Bytes, E> {
        let role = self.get_or_join(key, flight);
        let flight = match self.wait_or_lead(key, flight, role).await {
            Ok(value) => return Ok(value),
            Err(flight) => flight,
        };
        let value = make.await?;
        flight.finish(self, key.clone(), &value);
        Ok(value)
    }

    /// Waits for the value in the given role. If all callers before this one fail or are gone,
    /// returns the flight: it is the caller's turn to produce the value.
    pub async fn wait_or_lead(
        &self,
        key: &K,
        flight: &K,
        mut role: Role<K>,
    ) -> Result<Bytes, Flight<K>> {
        loop {
            match role {
                Role::Cached(value) => return Ok(value),
                Role::Leader(flight) => return Err(flight),
                Role::Follower(value) => match value.await {
                    Ok(value) => return Ok(value),
                    // The leader failed or is gone; try to take over.
                    Err(_) => role = self.get_or_join(key, flight),
                },
            }
        }
    }

    /// Returns the cached value, or the caller's role in the `flight` that produces it.
    pub fn get_or_join(&self, key: &K, flight: &K) -> Role<K> {
        if let Some(value) = self.get(key) {
            return Role::Cached(value);
        }
        let mut flights = self.flights.lock();
        // It may have been inserted since the last lookup.
        if let Some(value) = self.cache.peek(key) {
            return Role::Cached(value);
        }
        if let Some(waiting) = flights.get_mut(flight) {
            let (sender, value) = oneshot::channel();
            waiting.push(sender);
            return Role::Follower(value);
        }
        flights.insert(flight.clone(), Vec::new());
        let key = Some(flight.clone());
        Role::Leader(Flight { flights: Arc::clone(&self.flights), key })
    }
}

/// Role of a caller in the flight of a value.
#[derive(Debug)]
pub enum Role<K: Hash + Eq + Clone> {
    /// No flight: the value is already cached.
    Cached(Bytes),
    /// The caller produces the value.
    Leader(Flight<K>),
    /// The caller waits for the value. An error means that the leader has failed or is gone, and
    /// that another caller may take over.
    Follower(oneshot::Receiver<Bytes>),
}

/// Guard of a value in flight. If it is dropped before the value is there, the waiters are notified
/// and one of them takes over.
#[derive(Debug)]
pub struct Flight<K: Hash + Eq + Clone> {
    flights: Arc<Flights<K>>,
    /// Identifies the flight until it is finished.
    key: Option<K>,
}

impl<K: Hash + Eq + Clone> Flight<K> {
    /// Caches the value under `key`, and passes it to the waiters.
    pub fn finish(mut self, cache: &ByteCache<K>, key: K, value: &Bytes) {
        cache.insert(key, value.clone());
        for waiting in self.end() {
            // The waiter may be gone.
            waiting.send(value.clone()).unwrap_or_else(drop);
        }
    }

    /// Ends the flight and returns its waiters.
    fn end(&mut self) -> Vec<oneshot::Sender<Bytes>> {
        let ended = self.key.take().and_then(|key| self.flights.lock().remove(&key));
        ended.unwrap_or_default()
    }
}

impl<K: Hash + Eq + Clone> Drop for Flight<K> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Table of recently used keys, which remembers uses for one to two seconds. It is lossy: keys
/// that share a slot may displace each other. Since it is part of every lookup, it is just a
/// table of atomic integers, each with part of a key's hash and the second of the last counted
/// use.
#[derive(Debug)]
struct RecentUses {
    slots: Box<[AtomicU64]>,
    hasher: RandomState,
    clock: fn() -> u64,
}

impl RecentUses {
    /// Number of slots: twice the number of blocks in a cache of 2 GiB.
    const SLOTS: u64 = 1 << 16;
    /// Mask of the time within a slot; the other bits are the hash.
    const TIME: u64 = 0xffff;

    fn new(clock: fn() -> u64) -> Self {
        let slots = (0..Self::SLOTS).map(|_| AtomicU64::new(0)).collect();
        Self { slots, hasher: RandomState::new(), clock }
    }

    /// Returns true if this is a separate use, rather than part of one that was counted a moment
    /// ago.
    fn is_separate_use(&self, key: &impl Hash) -> bool {
        let hash = self.hasher.hash_one(key);
        let place = usize::try_from(hash % Self::SLOTS).unwrap_or(0);
        let Some(slot) = self.slots.get(place) else { return true };
        // The offset makes the zero of an unused slot old from the start.
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

/// Returns the seconds since its first call.
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
    async fn concurrent_requests_make_a_value_once() {
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
                    cache.get_or_insert_with(&1, &1, make).await
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap(), "value");
        }
        assert_eq!(made.load(Ordering::Relaxed), 1);
    }

    /// A hostile archive may claim the hash of a block in another one: a value that never arrives
    /// delays only those who asked for it in the same flight.
    #[tokio::test]
    async fn separate_flights_of_a_key_do_not_wait_for_each_other() {
        let cache = ByteCache::new(1 << 20, 100);
        let mut stuck =
            Box::pin(cache.get_or_insert_with(&1, &2, std::future::pending::<Result<_, &str>>()));
        tokio::select! {
            biased;
            _ = &mut stuck => panic!("nothing ends it"),
            () = tokio::task::yield_now() => {}
        }
        let value = Bytes::from_static(b"value");
        let make = async { Ok::<_, &str>(value.clone()) };
        assert_eq!(cache.get_or_insert_with(&1, &3, make).await, Ok(value.clone()));
        // A finished value is shared by its key.
        let never = std::future::pending::<Result<_, &str>>();
        assert_eq!(cache.get_or_insert_with(&1, &2, never).await, Ok(value));
    }

    #[tokio::test]
    async fn failures_are_not_cached() {
        let cache = ByteCache::new(1 << 20, 100);
        assert_eq!(cache.get_or_insert_with(&1, &1, async { Err("no") }).await, Err("no"));
        let value = Bytes::from_static(b"yes");
        assert_eq!(
            cache.get_or_insert_with(&1, &1, async { Ok::<_, &str>(value) }).await,
            Ok("yes".into())
        );
    }

    #[tokio::test]
    async fn a_waiter_takes_over_when_the_leader_fails_or_leaves() {
        for fails in [true, false] {
            let cache = ByteCache::new(1 << 20, 100);
            let mut first = Box::pin(cache.get_or_insert_with(&1, &1, async {
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
            let mut second = Box::pin(cache.get_or_insert_with(&1, &1, make));
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
            assert!(cache.flights.lock().is_empty());
        }
    }

    #[tokio::test]
    async fn waiters_do_not_count_as_uses() {
        let cache = ByteCache::with_clock(200_000, 1000, || NOW.get());
        boot(&cache).await;
        for key in 1000..3000 {
            let make = async || {
                tokio::task::yield_now().await;
                Ok::<_, ()>(Bytes::from(vec![0; 1000]))
            };
            let both = tokio::join!(
                cache.get_or_insert_with(&key, &key, make()),
                cache.get_or_insert_with(&key, &key, make())
            );
            assert!(both.0.is_ok() && both.1.is_ok());
        }
        assert_eq!((0..50).filter(|key| cache.contains(key)).count(), 50);
    }

    #[tokio::test]
    async fn the_cache_stays_within_its_budget() {
        let cache = ByteCache::new(100_000, 1000);
        for key in 0..1000 {
            let make = async { Ok::<_, ()>(Bytes::from(vec![0; 1000])) };
            cache.get_or_insert_with(&key, &key, make).await.unwrap();
            assert!(cache.cache.weight() <= 100_000);
        }
        assert!(cache.cache.len() > 50);
    }

    thread_local! {
        static NOW: std::cell::Cell<u64> = const { std::cell::Cell::new(100) };
    }

    /// Simulates machines that boot: uses 50 of the 170 values that fit.
    async fn boot(cache: &ByteCache<u32>) {
        for _ in 0..3 {
            for key in 0..50 {
                read(cache, key).await;
            }
            NOW.set(NOW.get() + 10);
        }
    }

    /// Uses `key` like a reader that asks for it in four parts.
    async fn read(cache: &ByteCache<u32>, key: u32) {
        for _ in 0..4 {
            let make = async { Ok::<_, ()>(Bytes::from(vec![0; 1000])) };
            cache.get_or_insert_with(&key, &key, make).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_full_scan_does_not_evict_values_in_use() {
        let cache = ByteCache::with_clock(200_000, 1000, || NOW.get());
        boot(&cache).await;
        // A backup of ten times the cache's capacity.
        for key in 1000..3000 {
            read(&cache, key).await;
            NOW.set(NOW.get() + u64::from(key % 50 == 0));
        }
        let kept = (0..50).filter(|key| cache.contains(key)).count();
        assert_eq!(kept, 50);
    }

    #[test]
    fn uses_in_quick_succession_count_once() {
        let recent = RecentUses::new(|| NOW.get());
        let uses = |key: u32| (0..3).filter(|_| recent.is_separate_use(&key)).count();
        assert_eq!([uses(1), uses(1)], [1, 0]);
        NOW.set(NOW.get() + 2);
        assert_eq!(uses(1), 1);
        // The time in the table wraps around.
        NOW.set(NOW.get() + RecentUses::TIME + 3);
        assert_eq!(uses(1), 1);
    }
}
