//! Memory budget for replies: a small reserve for each connection, and a pool shared by all.
//!
//! Bytes for a reply are taken from the budget before work on its request starts, and returned once
//! the socket has accepted them. Small requests fit in the connection's own reserve and so make
//! progress whatever other clients do. Large requests, and many at once, share the pool, of which
//! no connection may hold more than its cap. A client that does not read its replies soon exhausts
//! what it can take; then no more requests are read from it.

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
    each: u32,
    /// Number of connections that are waiting for free bytes in the pool.
    waiting: AtomicUsize,
}

impl Budget {
    /// Creates a pool of `bytes`, but at least large enough for one request of the maximum payload,
    /// which would otherwise wait forever. For the same reason, a connection that holds nothing
    /// else of the pool may hold one request larger than `each`. In all other cases a connection
    /// may hold at most `each` bytes.
    pub fn new(bytes: u32, each: u32) -> Arc<Self> {
        let size = bytes.max(MAX_PAYLOAD) as usize;
        Arc::new(Self {
            pool: Arc::new(Semaphore::new(size)),
            size,
            each: each.max(1),
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
pub struct Share {
    reserve: Arc<Semaphore>,
    budget: Arc<Budget>,
    part: Arc<Part>,
    /// Admits one request of this connection at a time to the pool's queue, so that a connection
    /// with hundreds of requests does not delay all others.
    line: Semaphore,
    /// Number of this connection's requests that are waiting in the pool's queue: 0 or 1.
    waiting: AtomicUsize,
    /// Total bytes sent to the client.
    sent: AtomicU64,
}

impl Share {
    /// Creates a connection's share of `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            reserve: Arc::new(Semaphore::new(RESERVE as usize)),
            part: Arc::new(Part::new(budget.each)),
            budget,
            line: Semaphore::new(1),
            waiting: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// Takes `bytes`, at most [`MAX_PAYLOAD`], and waits until they are free.
    pub async fn take(&self, bytes: u32) -> Hold {
        if let Some(hold) = self.take_now(bytes) {
            return hold;
        }
        if bytes > RESERVE {
            return self.wait_for_pool(bytes).await;
        }
        tokio::select! {
            permit = Arc::clone(&self.reserve).acquire_many_owned(bytes) => {
                permit.map_or_else(|_| Hold::nothing(), Hold::reserved)
            }
            hold = self.wait_for_pool(bytes) => hold,
        }
    }

    /// Takes `bytes` if they are free now.
    pub fn take_now(&self, bytes: u32) -> Option<Hold> {
        if let Ok(permit) = Arc::clone(&self.reserve).try_acquire_many_owned(bytes) {
            return Some(Hold::reserved(permit));
        }
        self.take_pooled_now(bytes)
    }

    /// Takes `bytes` if the pool has them free now. Otherwise takes no more than `enough` bytes and
    /// waits for them if necessary; if they fit in the reserve, it eventually has them, whatever
    /// other connections do. Returns the number of bytes taken.
    pub async fn take_up_to(&self, bytes: u32, enough: u32) -> (Hold, u32) {
        if bytes > enough
            && let Some(hold) = self.take_pooled_now(bytes)
        {
            return (hold, bytes);
        }
        let bytes = bytes.min(enough);
        (self.take(bytes).await, bytes)
    }

    /// Records `bytes` as sent to the client.
    pub fn note_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the total number of bytes sent to the client.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns true if this connection holds pool memory that others are waiting for. Connections
    /// that are only waiting for their own cap do not count as waiting.
    pub fn is_in_the_way(&self) -> bool {
        let others_wait =
            self.budget.waiting.load(Ordering::Relaxed) > self.waiting.load(Ordering::Relaxed);
        others_wait && self.pooled() > 0
    }

    /// Returns the number of bytes of the pool that this connection holds.
    pub fn pooled(&self) -> u64 {
        self.part.held.load(Ordering::Relaxed) as u64
    }

    fn take_pooled_now(&self, bytes: u32) -> Option<Hold> {
        let room = self.part.room.try_acquire_many(self.part.room_for(bytes)).ok()?;
        let permit = Arc::clone(&self.budget.pool).try_acquire_many_owned(bytes).ok()?;
        room.forget();
        Some(Hold::pooled(permit, &self.part))
    }

    /// Waits until this connection is below its cap, then until the pool has enough free bytes.
    /// Permits that the connection already holds do not depend on this wait, so all of them are
    /// returned eventually.
    async fn wait_for_pool(&self, bytes: u32) -> Hold {
        let _first_in_line = self.line.acquire().await;
        let room = self.part.room.acquire_many(self.part.room_for(bytes)).await;
        let _in_all = CountGuard::new(&self.budget.waiting);
        let _here = CountGuard::new(&self.waiting);
        let permit = Arc::clone(&self.budget.pool).acquire_many_owned(bytes).await;
        match (room, permit) {
            (Ok(room), Ok(permit)) => {
                room.forget();
                Hold::pooled(permit, &self.part)
            }
            // The semaphores are never closed.
            _ => Hold::nothing(),
        }
    }
}

/// One connection's cap on pool memory, and its current usage.
#[derive(Debug)]
struct Part {
    /// Unused part of the cap, in bytes. A request larger than the cap takes the whole cap.
    room: Semaphore,
    cap: u32,
    /// Number of bytes of the pool that the connection holds.
    held: AtomicUsize,
}

impl Part {
    fn new(cap: u32) -> Self {
        Self { room: Semaphore::new(cap as usize), cap, held: AtomicUsize::new(0) }
    }

    /// Returns the number of bytes of the cap that a request for `bytes` takes.
    fn room_for(&self, bytes: u32) -> u32 {
        bytes.min(self.cap)
    }

    /// Accounts for a permit that shrinks from `before` to `after` bytes.
    fn shrink(&self, before: usize, after: usize) {
        let cap = self.cap as usize;
        self.held.fetch_sub(before - after, Ordering::Relaxed);
        self.room.add_permits(before.min(cap) - after.min(cap));
    }
}

/// Permit for bytes of the budget; returns them when dropped.
#[derive(Debug)]
pub struct Hold {
    permit: Option<OwnedSemaphorePermit>,
    /// The connection's account in the pool, if the bytes come from the pool.
    part: Option<Arc<Part>>,
}

impl Hold {
    /// Shrinks the permit to `bytes` and returns the rest.
    pub fn shrink_to(&mut self, bytes: usize) {
        let Some(permit) = &mut self.permit else { return };
        let before = permit.num_permits();
        let Some(rest) = before.checked_sub(bytes).and_then(|rest| permit.split(rest)) else {
            return;
        };
        drop(rest);
        if let Some(part) = &self.part {
            part.shrink(before, bytes);
        }
    }

    fn reserved(permit: OwnedSemaphorePermit) -> Self {
        Self { permit: Some(permit), part: None }
    }

    /// Creates a permit for bytes of the pool. Their part of the cap has been taken already.
    fn pooled(permit: OwnedSemaphorePermit, part: &Arc<Part>) -> Self {
        part.held.fetch_add(permit.num_permits(), Ordering::Relaxed);
        Self { permit: Some(permit), part: Some(Arc::clone(part)) }
    }

    fn nothing() -> Self {
        Self { permit: None, part: None }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Release the pool's bytes before the cap's: a request that wakes up because of the cap
        // should find the pool's bytes free.
        let held = self.permit.take().map_or(0, |permit| permit.num_permits());
        if let Some(part) = &self.part {
            part.shrink(held, 0);
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
    async fn a_full_pool_leaves_the_reserves_alone() {
        let budget = budget();
        let greedy = Share::new(Arc::clone(&budget));
        let all = greedy.take(MAX_PAYLOAD).await;
        assert!(!greedy.is_in_the_way());

        let modest = Share::new(Arc::clone(&budget));
        let first = modest.take(RESERVE).await;
        let mut second = Box::pin(modest.take(4096));
        assert!(is_pending(&mut second).await);
        assert!(greedy.is_in_the_way() && !modest.is_in_the_way());

        drop(first);
        second.await;
        assert!(!greedy.is_in_the_way());
        drop(all);
    }

    #[tokio::test]
    async fn nobody_is_in_its_own_way() {
        let share = Share::new(budget());
        let _all = share.take(MAX_PAYLOAD).await;
        let mut more = Box::pin(share.take(MAX_PAYLOAD));
        assert!(is_pending(&mut more).await);
        assert!(!share.is_in_the_way());
    }

    #[tokio::test]
    async fn one_connection_leaves_the_pool_to_others() {
        let budget = Budget::new(0, CAP);
        let [greedy, other] = [0, 1].map(|_| Share::new(Arc::clone(&budget)));
        let mut held = Vec::new();
        for _ in 0..8 {
            held.push(greedy.take(MIB).await);
        }
        assert_eq!(greedy.pooled(), u64::from(CAP));
        assert!(greedy.take_now(RESERVE + 1).is_none());
        let mut more = Box::pin(greedy.take(MIB));
        assert!(is_pending(&mut more).await);
        // The reserve is not subject to the cap.
        let reserve = greedy.take(RESERVE).await;
        let mut small = Box::pin(greedy.take(1));
        assert!(is_pending(&mut small).await);

        // A connection that waits only for its own cap is not blocked by others.
        let _theirs = other.take(CAP).await;
        assert!(!other.is_in_the_way() && !greedy.is_in_the_way());
        drop(reserve);
        small.await;
        held.pop();
        more.await;
    }

    #[tokio::test]
    async fn what_is_larger_than_the_cap_is_alone() {
        let share = Share::new(Budget::new(0, CAP));
        let one = share.take(MIB).await;
        let mut large = Box::pin(share.take(MAX_PAYLOAD));
        assert!(is_pending(&mut large).await);
        // Later requests do not overtake it; otherwise it could wait forever.
        assert!(share.take_now(MIB).is_none());
        assert!(matches!(share.take_up_to(2 * RESERVE, RESERVE).await, (_, RESERVE)));
        drop(one);
        let mut large = large.await;
        assert_eq!(share.pooled(), u64::from(MAX_PAYLOAD));
        assert!(share.take_now(RESERVE + 1).is_none());
        // Shrinking frees room for others only below the cap.
        large.shrink_to(CAP as usize + 1);
        assert!(share.take_now(RESERVE + 1).is_none());
        large.shrink_to(6 * MIB as usize);
        assert_eq!(share.pooled(), u64::from(6 * MIB));
        let rest = share.take_now(2 * MIB).unwrap();
        assert!(share.take_now(RESERVE + 1).is_none());
        drop((large, rest));
        assert_eq!(share.pooled(), 0);
        assert!(share.take_now(CAP).is_some());
    }

    #[tokio::test]
    async fn who_stops_waiting_leaves_nothing_behind() {
        let budget = Budget::new(0, CAP);
        let [first, second] = [0, 1].map(|_| Share::new(Arc::clone(&budget)));
        let all = first.take(MAX_PAYLOAD).await;
        {
            let mut waiting = Box::pin(second.take(CAP));
            assert!(is_pending(&mut waiting).await);
            assert!(first.is_in_the_way());
            assert!(second.take_now(RESERVE + 1).is_none());
        }
        assert!(!first.is_in_the_way());
        drop(all);
        assert!(second.take_now(CAP).is_some());
    }

    /// Every request is eventually served whatever the others do, and no connection exceeds its
    /// cap.
    #[tokio::test(start_paused = true)]
    async fn all_requests_are_served_in_the_end() {
        const CONNECTIONS: u64 = 12;
        const REQUESTS: u64 = 40;
        const SIZES: [u32; 5] = [MAX_PAYLOAD, 3 * MIB, 256 * 1024, 5000, RESERVE];
        const USED: u32 = 1000;
        for cap in [1, RESERVE, CAP, MAX_PAYLOAD, u32::MAX] {
            let budget = Budget::new(0, cap);
            let mut tasks = tokio::task::JoinSet::new();
            for connection in 0..CONNECTIONS {
                let share = Arc::new(Share::new(Arc::clone(&budget)));
                for number in 0..REQUESTS {
                    let share = Arc::clone(&share);
                    tasks.spawn(async move {
                        let random = (connection * REQUESTS + number).wrapping_mul(0x9e37_79b9);
                        tokio::time::sleep(Duration::from_millis(random % 50)).await;
                        let bytes = SIZES[(random % 5) as usize];
                        let mut hold = match random % 3 {
                            0 => share.take_up_to(bytes, RESERVE).await.0,
                            _ => share.take(bytes).await,
                        };
                        let held = u32::try_from(share.pooled()).unwrap();
                        assert!(held <= cap || held == USED || SIZES.contains(&held), "{held}");
                        tokio::time::sleep(Duration::from_millis(random % 7)).await;
                        hold.shrink_to(USED as usize);
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
    async fn who_holds_nothing_of_the_pool_is_in_nobodys_way() {
        let budget = budget();
        let [greedy, waiting, idle] = [0, 1, 2].map(|_| Share::new(Arc::clone(&budget)));
        let _all = greedy.take(MAX_PAYLOAD).await;
        let _reserved = idle.take(RESERVE).await;
        let mut more = Box::pin(waiting.take(RESERVE + 1));
        assert!(is_pending(&mut more).await);
        assert!(greedy.is_in_the_way() && !idle.is_in_the_way());
    }

    #[tokio::test]
    async fn a_request_as_large_as_the_reserve_needs_no_pool() {
        let budget = budget();
        let [greedy, modest] = [0, 1].map(|_| Share::new(Arc::clone(&budget)));
        let _all = greedy.take(MAX_PAYLOAD).await;
        let first = modest.take(RESERVE).await;
        let mut second = Box::pin(modest.take(RESERVE));
        assert!(is_pending(&mut second).await);
        drop(first);
        second.await;
    }

    #[tokio::test]
    async fn more_than_enough_is_of_the_pool_and_no_more_is_of_the_reserve() {
        let share = Share::new(budget());
        for (bytes, pooled) in [(2 * RESERVE, 2 * RESERVE), (RESERVE, 0), (RESERVE - 1, 0)] {
            let (_hold, taken) = share.take_up_to(bytes, RESERVE).await;
            assert_eq!((taken, share.pooled()), (bytes, u64::from(pooled)));
        }
    }

    #[tokio::test]
    async fn what_is_held_and_what_was_sent_is_counted() {
        let budget = budget();
        let share = Share::new(Arc::clone(&budget));
        let all = u64::from(MAX_PAYLOAD);
        assert_eq!(budget.in_use(), (0, all));
        let hold = share.take(RESERVE + 1).await;
        assert_eq!(budget.in_use(), (u64::from(RESERVE) + 1, all));
        drop(hold);
        assert_eq!(budget.in_use(), (0, all));
        [5, 7].into_iter().for_each(|bytes| share.note_sent(bytes));
        assert_eq!(share.sent(), 12);
    }

    async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = tokio::task::yield_now() => true,
        }
    }
}
