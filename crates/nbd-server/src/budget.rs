//! Memory budget for replies: a small reserve for each connection, and a pool shared by all.
//!
//! Bytes for a reply are taken from the budget before work on its request starts, and returned once
//! the socket has accepted them. Small requests fit in the connection's own reserve and so make
//! progress whatever other clients do. Large requests, and many at once, share the pool, of which
//! no connection may hold more than its cap. A client that does not read its replies soon
//! exhausts what it can take; then no more requests are read from it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::count_guard::CountGuard;
use super::wire::MAX_PAYLOAD;

/// Bytes reserved for each connection: one request of the Linux client's default size, or 32
/// requests of 4 KiB.
pub const RESERVE: u32 = 128 * 1024;

/// The memory pool that all connections share.
#[derive(Debug)]
pub struct Budget {
    pool: Arc<Semaphore>,
    /// Size of the pool in bytes.
    size: usize,
    /// Number of bytes of the pool that one connection may hold.
    per_connection: u32,
    /// Number of connections that are waiting for free bytes in the pool.
    waiting: AtomicUsize,
}

impl Budget {
    /// Creates a pool of `bytes`, but at least large enough for one request of the maximum payload,
    /// which would otherwise wait forever. For the same reason, a connection that holds nothing
    /// else of the pool may hold one request larger than `per_connection`. In all other cases a
    /// connection may hold at most `per_connection` bytes.
    pub fn new(bytes: u32, per_connection: u32) -> Arc<Self> {
        let size = bytes.max(MAX_PAYLOAD) as usize;
        Arc::new(Self {
            pool: Arc::new(Semaphore::new(size)),
            size,
            per_connection: per_connection.max(1),
            waiting: AtomicUsize::new(0),
        })
    }

    /// Returns the number of bytes of the pool that connections hold now, and the pool's size.
    pub fn in_use(&self) -> (u64, u64) {
        let size = self.size as u64;
        (size.saturating_sub(self.pool.available_permits() as u64), size)
    }
}

/// One connection's access to the budget: its own reserve, and its part of the shared pool.
#[derive(Debug)]
pub(crate) struct ConnectionBudget {
    reserve: Arc<Semaphore>,
    budget: Arc<Budget>,
    quota: Arc<PoolQuota>,
    /// Admits one request of this connection at a time to the pool's queue, so that a connection
    /// with hundreds of requests does not delay all others.
    queue: Semaphore,
    /// Number of this connection's requests that are waiting in the pool's queue: 0 or 1.
    waiting: AtomicUsize,
    /// Total bytes sent to the client.
    sent: AtomicU64,
}

impl ConnectionBudget {
    /// Creates a connection's part of `budget`.
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        Self {
            reserve: Arc::new(Semaphore::new(RESERVE as usize)),
            quota: Arc::new(PoolQuota::new(budget.per_connection)),
            budget,
            queue: Semaphore::new(1),
            waiting: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// Takes `bytes`, at most [`MAX_PAYLOAD`], and waits until they are free.
    pub(crate) async fn acquire(&self, bytes: u32) -> MemoryPermit {
        if let Some(permit) = self.try_acquire(bytes) {
            return permit;
        }
        if bytes > RESERVE {
            return self.wait_for_pool(bytes).await;
        }
        tokio::select! {
            permit = Arc::clone(&self.reserve).acquire_many_owned(bytes) => {
                permit.map_or_else(|_| MemoryPermit::empty(), MemoryPermit::reserved)
            }
            permit = self.wait_for_pool(bytes) => permit,
        }
    }

    /// Takes `bytes` if they are free now.
    pub(crate) fn try_acquire(&self, bytes: u32) -> Option<MemoryPermit> {
        if let Ok(permit) = Arc::clone(&self.reserve).try_acquire_many_owned(bytes) {
            return Some(MemoryPermit::reserved(permit));
        }
        self.try_acquire_pooled(bytes)
    }

    /// Takes `bytes` if the pool has them free now. Otherwise takes no more than `fallback` bytes
    /// and waits for them if necessary; if they fit in the reserve, it eventually has them,
    /// whatever other connections do. Returns the number of bytes taken.
    pub(crate) async fn acquire_up_to(&self, bytes: u32, fallback: u32) -> (MemoryPermit, u32) {
        if bytes > fallback
            && let Some(permit) = self.try_acquire_pooled(bytes)
        {
            return (permit, bytes);
        }
        let bytes = bytes.min(fallback);
        (self.acquire(bytes).await, bytes)
    }

    /// Records `bytes` as sent to the client.
    pub(crate) fn record_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the total number of bytes sent to the client.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns true if this connection holds pool memory that others are waiting for. Connections
    /// that are only waiting for their own cap do not count as waiting.
    pub(crate) fn blocks_others(&self) -> bool {
        let others_wait =
            self.budget.waiting.load(Ordering::Relaxed) > self.waiting.load(Ordering::Relaxed);
        others_wait && self.pooled() > 0
    }

    /// Returns the number of bytes of the pool that this connection holds.
    pub(crate) fn pooled(&self) -> u64 {
        self.quota.held.load(Ordering::Relaxed) as u64
    }

    fn try_acquire_pooled(&self, bytes: u32) -> Option<MemoryPermit> {
        let room = self.quota.available.try_acquire_many(self.quota.quota_cost(bytes)).ok()?;
        let permit = Arc::clone(&self.budget.pool).try_acquire_many_owned(bytes).ok()?;
        room.forget();
        Some(MemoryPermit::pooled(permit, &self.quota))
    }

    /// Waits until this connection is below its cap, then until the pool has enough free bytes.
    /// Permits that the connection already holds do not depend on this wait, so all of them are
    /// returned eventually.
    async fn wait_for_pool(&self, bytes: u32) -> MemoryPermit {
        let _first_in_queue = self.queue.acquire().await;
        let room = self.quota.available.acquire_many(self.quota.quota_cost(bytes)).await;
        let _in_all = CountGuard::new(&self.budget.waiting);
        let _here = CountGuard::new(&self.waiting);
        let permit = Arc::clone(&self.budget.pool).acquire_many_owned(bytes).await;
        match (room, permit) {
            (Ok(room), Ok(permit)) => {
                room.forget();
                MemoryPermit::pooled(permit, &self.quota)
            }
            // The semaphores are never closed.
            _ => MemoryPermit::empty(),
        }
    }
}

/// One connection's cap on pool memory, and its current usage.
#[derive(Debug)]
struct PoolQuota {
    /// Unused part of the cap, in bytes. A request larger than the cap takes the whole cap.
    available: Semaphore,
    cap: u32,
    /// Number of bytes of the pool that the connection holds.
    held: AtomicUsize,
}

impl PoolQuota {
    fn new(cap: u32) -> Self {
        Self { available: Semaphore::new(cap as usize), cap, held: AtomicUsize::new(0) }
    }

    /// Returns the number of bytes of the cap that a request for `bytes` takes.
    fn quota_cost(&self, bytes: u32) -> u32 {
        bytes.min(self.cap)
    }

    /// Accounts for a permit that shrinks from `before` to `after` bytes.
    fn shrink(&self, before: usize, after: usize) {
        let cap = self.cap as usize;
        self.held.fetch_sub(before - after, Ordering::Relaxed);
        self.available.add_permits(before.min(cap) - after.min(cap));
    }
}

/// Permit for bytes of the budget; returns them when dropped.
#[derive(Debug)]
pub(crate) struct MemoryPermit {
    permit: Option<OwnedSemaphorePermit>,
    /// The connection's account in the pool, if the bytes come from the pool.
    quota: Option<Arc<PoolQuota>>,
}

impl MemoryPermit {
    /// Shrinks the permit to `bytes` and returns the rest.
    pub(crate) fn shrink_to(&mut self, bytes: usize) {
        let Some(permit) = &mut self.permit else { return };
        let before = permit.num_permits();
        let Some(rest) = before.checked_sub(bytes).and_then(|rest| permit.split(rest)) else {
            return;
        };
        drop(rest);
        if let Some(quota) = &self.quota {
            quota.shrink(before, bytes);
        }
    }

    fn reserved(permit: OwnedSemaphorePermit) -> Self {
        Self { permit: Some(permit), quota: None }
    }

    /// Creates a permit for bytes of the pool. Their part of the cap has been taken already.
    fn pooled(permit: OwnedSemaphorePermit, quota: &Arc<PoolQuota>) -> Self {
        quota.held.fetch_add(permit.num_permits(), Ordering::Relaxed);
        Self { permit: Some(permit), quota: Some(Arc::clone(quota)) }
    }

    fn empty() -> Self {
        Self { permit: None, quota: None }
    }
}

impl Drop for MemoryPermit {
    fn drop(&mut self) {
        // Release the pool's bytes before the cap's: a request that wakes up because of the cap
        // should find the pool's bytes free.
        let held = self.permit.take().map_or(0, |permit| permit.num_permits());
        if let Some(quota) = &self.quota {
            quota.shrink(held, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MIB: u32 = 1024 * 1024;
    const CAP: u32 = 8 * MIB;

    fn budget() -> Arc<Budget> {
        Budget::new(0, MAX_PAYLOAD)
    }

    #[tokio::test]
    async fn full_pool_does_not_affect_reserves() {
        let budget = budget();
        let greedy = ConnectionBudget::new(Arc::clone(&budget));
        let all = greedy.acquire(MAX_PAYLOAD).await;
        assert!(!greedy.blocks_others());

        let modest = ConnectionBudget::new(Arc::clone(&budget));
        let first = modest.acquire(RESERVE).await;
        let mut second = Box::pin(modest.acquire(4096));
        assert!(is_pending(&mut second).await);
        assert!(greedy.blocks_others() && !modest.blocks_others());

        drop(first);
        second.await;
        assert!(!greedy.blocks_others());
        drop(all);
    }

    #[tokio::test]
    async fn connection_does_not_block_itself() {
        let connection = ConnectionBudget::new(budget());
        let _all = connection.acquire(MAX_PAYLOAD).await;
        let mut more = Box::pin(connection.acquire(MAX_PAYLOAD));
        assert!(is_pending(&mut more).await);
        assert!(!connection.blocks_others());
    }

    #[tokio::test]
    async fn connection_cannot_exceed_its_cap() {
        let budget = Budget::new(0, CAP);
        let [greedy, other] = [0, 1].map(|_| ConnectionBudget::new(Arc::clone(&budget)));
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(greedy.acquire(MIB).await);
        }
        assert_eq!(greedy.pooled(), u64::from(CAP));
        assert!(greedy.try_acquire(RESERVE + 1).is_none());
        let mut more = Box::pin(greedy.acquire(MIB));
        assert!(is_pending(&mut more).await);
        // The reserve is not subject to the cap.
        let reserve = greedy.acquire(RESERVE).await;
        let mut small = Box::pin(greedy.acquire(1));
        assert!(is_pending(&mut small).await);

        // A connection that waits only for its own cap is not blocked by others.
        let _theirs = other.acquire(CAP).await;
        assert!(!other.blocks_others() && !greedy.blocks_others());
        drop(reserve);
        small.await;
        held.pop();
        more.await;
    }

    #[tokio::test]
    async fn request_larger_than_the_cap_is_served_alone() {
        let connection = ConnectionBudget::new(Budget::new(0, CAP));
        let one = connection.acquire(MIB).await;
        let mut large = Box::pin(connection.acquire(MAX_PAYLOAD));
        assert!(is_pending(&mut large).await);
        // Later requests do not overtake it; otherwise it could wait forever.
        assert!(connection.try_acquire(MIB).is_none());
        assert!(matches!(connection.acquire_up_to(2 * RESERVE, RESERVE).await, (_, RESERVE)));
        drop(one);
        let mut large = large.await;
        assert_eq!(connection.pooled(), u64::from(MAX_PAYLOAD));
        assert!(connection.try_acquire(RESERVE + 1).is_none());
        // Shrinking frees room for others only below the cap.
        large.shrink_to(CAP as usize + 1);
        assert!(connection.try_acquire(RESERVE + 1).is_none());
        large.shrink_to(6 * MIB as usize);
        assert_eq!(connection.pooled(), u64::from(6 * MIB));
        let rest = connection.try_acquire(2 * MIB).unwrap();
        assert!(connection.try_acquire(RESERVE + 1).is_none());
        drop((large, rest));
        assert_eq!(connection.pooled(), 0);
        assert!(connection.try_acquire(CAP).is_some());
    }

    #[tokio::test]
    async fn canceled_wait_releases_everything() {
        let budget = Budget::new(0, CAP);
        let [first, second] = [0, 1].map(|_| ConnectionBudget::new(Arc::clone(&budget)));
        let all = first.acquire(MAX_PAYLOAD).await;
        {
            let mut waiting = Box::pin(second.acquire(CAP));
            assert!(is_pending(&mut waiting).await);
            assert!(first.blocks_others());
            assert!(second.try_acquire(RESERVE + 1).is_none());
        }
        assert!(!first.blocks_others());
        drop(all);
        assert!(second.try_acquire(CAP).is_some());
    }

    /// Every request is eventually served whatever the others do, and no connection exceeds its
    /// cap.
    #[tokio::test(start_paused = true)]
    async fn all_requests_are_eventually_served() {
        const CONNECTIONS: u64 = 12;
        const REQUESTS: u64 = 40;
        const SIZES: [u32; 5] = [MAX_PAYLOAD, 3 * MIB, 256 * 1024, 5000, RESERVE];
        const USED: u32 = 1000;
        for cap in [1, RESERVE, CAP, MAX_PAYLOAD, u32::MAX] {
            let budget = Budget::new(0, cap);
            let mut tasks = tokio::task::JoinSet::new();
            for connection in 0..CONNECTIONS {
                let account = Arc::new(ConnectionBudget::new(Arc::clone(&budget)));
                for number in 0..REQUESTS {
                    let account = Arc::clone(&account);
                    tasks.spawn(async move {
                        let random = (connection * REQUESTS + number).wrapping_mul(0x9e37_79b9);
                        tokio::time::sleep(Duration::from_millis(random % 50)).await;
                        let bytes = SIZES[(random % 5) as usize];
                        let mut permit = match random % 3 {
                            0 => account.acquire_up_to(bytes, RESERVE).await.0,
                            _ => account.acquire(bytes).await,
                        };
                        let held = u32::try_from(account.pooled()).unwrap();
                        assert!(held <= cap || held == USED || SIZES.contains(&held), "{held}");
                        tokio::time::sleep(Duration::from_millis(random % 7)).await;
                        permit.shrink_to(USED as usize);
                        tokio::time::sleep(Duration::from_millis(random % 11)).await;
                    });
                }
            }
            let all = async { while tasks.join_next().await.is_some_and(|done| done.is_ok()) {} };
            tokio::time::timeout(Duration::from_secs(60), all).await.unwrap();
            assert!(tasks.is_empty());
            let unused = budget.pool.available_permits();
            assert_eq!((unused, budget.waiting.load(Ordering::Relaxed)), (MAX_PAYLOAD as usize, 0));
        }
    }

    #[tokio::test]
    async fn connection_without_pool_memory_blocks_no_others() {
        let budget = budget();
        let [greedy, waiting, idle] = [0, 1, 2].map(|_| ConnectionBudget::new(Arc::clone(&budget)));
        let _all = greedy.acquire(MAX_PAYLOAD).await;
        let _reserved = idle.acquire(RESERVE).await;
        let mut more = Box::pin(waiting.acquire(RESERVE + 1));
        assert!(is_pending(&mut more).await);
        assert!(greedy.blocks_others() && !idle.blocks_others());
    }

    #[tokio::test]
    async fn request_of_reserve_size_needs_no_pool_memory() {
        let budget = budget();
        let [greedy, modest] = [0, 1].map(|_| ConnectionBudget::new(Arc::clone(&budget)));
        let _all = greedy.acquire(MAX_PAYLOAD).await;
        let first = modest.acquire(RESERVE).await;
        let mut second = Box::pin(modest.acquire(RESERVE));
        assert!(is_pending(&mut second).await);
        drop(first);
        second.await;
    }

    #[tokio::test]
    async fn large_requests_use_the_pool_and_small_ones_the_reserve() {
        let connection = ConnectionBudget::new(budget());
        for (bytes, pooled) in [(2 * RESERVE, 2 * RESERVE), (RESERVE, 0), (RESERVE - 1, 0)] {
            let (_permit, taken) = connection.acquire_up_to(bytes, RESERVE).await;
            assert_eq!((taken, connection.pooled()), (bytes, u64::from(pooled)));
        }
    }

    #[tokio::test]
    async fn held_and_sent_bytes_are_counted() {
        let budget = budget();
        let connection = ConnectionBudget::new(Arc::clone(&budget));
        let all = u64::from(MAX_PAYLOAD);
        assert_eq!(budget.in_use(), (0, all));
        let permit = connection.acquire(RESERVE + 1).await;
        assert_eq!(budget.in_use(), (u64::from(RESERVE) + 1, all));
        drop(permit);
        assert_eq!(budget.in_use(), (0, all));
        [5, 7].into_iter().for_each(|bytes| connection.record_sent(bytes));
        assert_eq!(connection.sent(), 12);
    }

    async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = tokio::task::yield_now() => true,
        }
    }
}
