//! Memory for replies: a small reserve for each connection, and a pool for all.
//!
//! A reply's bytes are taken from here before its request is worked on, and given back
//! once the socket has taken them. Small requests always find room in the connection's
//! own reserve, so whatever other clients do, they go on; large ones, and many at once,
//! share the pool. A client that reads no replies soon has nothing left to take from,
//! and is not read from any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::wire::MAX_PAYLOAD;

/// Bytes that each connection has for itself: a request of the size that the Linux client
/// uses by default, or 32 of 4 KiB.
pub const RESERVE: u32 = 128 * 1024;

/// The pool that connections share.
#[derive(Debug)]
pub struct Budget {
    pool: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Budget {
    /// A pool of `bytes`, or of one largest request if that is more: otherwise such a
    /// request would wait for ever.
    pub fn new(bytes: u32) -> Arc<Self> {
        Arc::new(Self {
            pool: Arc::new(Semaphore::new(bytes.max(MAX_PAYLOAD) as usize)),
            waiting: AtomicUsize::new(0),
        })
    }
}

/// One connection's share.
#[derive(Debug)]
pub struct Share {
    reserve: Arc<Semaphore>,
    budget: Arc<Budget>,
    /// How many bytes of the pool this connection holds.
    pooled: Arc<AtomicUsize>,
    /// One request of this connection at a time stands in the pool's queue, so that one
    /// with hundreds of them isn't in front of everybody else.
    line: Semaphore,
    /// How many requests of this connection wait for room in the pool.
    waiting: AtomicUsize,
    /// Bytes that its client has been sent.
    sent: AtomicU64,
}

impl Share {
    /// A connection's share of `budget`.
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            reserve: Arc::new(Semaphore::new(RESERVE as usize)),
            budget,
            pooled: Arc::default(),
            line: Semaphore::new(1),
            waiting: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// Takes `bytes`, waiting until they are free. At most [`MAX_PAYLOAD`].
    pub async fn take(&self, bytes: u32) -> Hold {
        if let Some(hold) = self.take_now(bytes) {
            return hold;
        }
        let _in_all = Counted::new(&self.budget.waiting);
        let _here = Counted::new(&self.waiting);
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

    /// Takes `bytes` if they are free.
    pub fn take_now(&self, bytes: u32) -> Option<Hold> {
        if let Ok(permit) = Arc::clone(&self.reserve).try_acquire_many_owned(bytes) {
            return Some(Hold::reserved(permit));
        }
        let permit = Arc::clone(&self.budget.pool).try_acquire_many_owned(bytes).ok()?;
        Some(self.hold_pooled(permit))
    }

    /// Takes `bytes` if they are free, and else waits for `enough`, which the reserve has
    /// sooner or later whatever others do. Says how many it took.
    pub async fn take_up_to(&self, bytes: u32, enough: u32) -> (Hold, u32) {
        if bytes > enough
            && let Ok(permit) = Arc::clone(&self.budget.pool).try_acquire_many_owned(bytes)
        {
            return (self.hold_pooled(permit), bytes);
        }
        let bytes = bytes.min(enough);
        (self.take(bytes).await, bytes)
    }

    /// Counts bytes that the client has been sent.
    pub fn note_sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that the client has been sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Whether this connection keeps others from the pool.
    pub fn is_in_the_way(&self) -> bool {
        let others_wait =
            self.budget.waiting.load(Ordering::Relaxed) > self.waiting.load(Ordering::Relaxed);
        others_wait && self.pooled() > 0
    }

    /// How many bytes of the pool this connection holds.
    pub fn pooled(&self) -> u64 {
        self.pooled.load(Ordering::Relaxed) as u64
    }

    async fn wait_for_pool(&self, bytes: u32) -> Hold {
        let _first_in_line = self.line.acquire().await;
        match Arc::clone(&self.budget.pool).acquire_many_owned(bytes).await {
            Ok(permit) => self.hold_pooled(permit),
            // Nobody closes the semaphore.
            Err(_) => Hold::nothing(),
        }
    }

    fn hold_pooled(&self, permit: OwnedSemaphorePermit) -> Hold {
        self.pooled.fetch_add(permit.num_permits(), Ordering::Relaxed);
        Hold { permit: Some(permit), pooled: Some(Arc::clone(&self.pooled)) }
    }
}

/// Bytes that are taken until this is dropped.
#[derive(Debug)]
pub struct Hold {
    permit: Option<OwnedSemaphorePermit>,
    pooled: Option<Arc<AtomicUsize>>,
}

impl Hold {
    /// Gives back what turned out not to be needed.
    pub fn shrink_to(&mut self, bytes: usize) {
        if let Some(permit) = &mut self.permit
            && let Some(rest) = permit.num_permits().checked_sub(bytes)
            && let Some(rest) = permit.split(rest)
        {
            drop(Self { permit: Some(rest), pooled: self.pooled.clone() });
        }
    }

    fn reserved(permit: OwnedSemaphorePermit) -> Self {
        Self { permit: Some(permit), pooled: None }
    }

    fn nothing() -> Self {
        Self { permit: None, pooled: None }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let (Some(pooled), Some(permit)) = (&self.pooled, &self.permit) {
            pooled.fetch_sub(permit.num_permits(), Ordering::Relaxed);
        }
    }
}

/// Counts itself for as long as it lives, cancellation included.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_pool_leaves_the_reserves_alone() {
        let budget = Budget::new(0);
        let greedy = Share::new(Arc::clone(&budget));
        let all = greedy.take(MAX_PAYLOAD).await;
        assert!(!greedy.is_in_the_way());

        let modest = Share::new(Arc::clone(&budget));
        let first = modest.take(RESERVE).await;
        let mut second = Box::pin(modest.take(4096));
        assert!(futures_pending(&mut second).await);
        assert!(greedy.is_in_the_way() && !modest.is_in_the_way());

        drop(first);
        second.await;
        assert!(!greedy.is_in_the_way());
        drop(all);
    }

    #[tokio::test]
    async fn nobody_is_in_its_own_way() {
        let share = Share::new(Budget::new(0));
        let _all = share.take(MAX_PAYLOAD).await;
        let mut more = Box::pin(share.take(MAX_PAYLOAD));
        assert!(futures_pending(&mut more).await);
        assert!(!share.is_in_the_way());
    }

    async fn futures_pending<F: Future + Unpin>(future: &mut F) -> bool {
        tokio::select! {
            biased;
            _ = future => false,
            () = tokio::task::yield_now() => true,
        }
    }
}
