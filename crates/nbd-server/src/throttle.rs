//! Rate limit of a client, shared by all of its connections.
//!
//! This isn't the token bucket of nbd-telemetry, which limits log lines and new connections. That
//! one grants or denies one token at once; this one grants amounts larger than the bucket, which
//! are paid for later, makes others wait in a queue, and follows tokio's clock. The engine also
//! depends on no other package of this workspace.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::count_guard::CountGuard;

/// Capacity of the token buckets, as a time at the configured rate: a client that was idle for this
/// long may send as much at once.
const BURST: Duration = Duration::from_secs(1);

/// Rate limit on requests and on the bytes that they ask to read, shared by several connections.
/// There is a token bucket for each of the two. A request is admitted when neither bucket is in
/// debt, and then charged. A request of any size is therefore admitted, and later ones wait until
/// its debt is paid.
///
/// Waiting requests form one FIFO queue, so no connection is starved.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: Option<NonZeroU64>,
    requests_per_second: Option<NonZeroU64>,
    /// A mutex of the standard library: a single one isn't worth another dependency of the engine.
    debts: Mutex<DebtDeadlines>,
    queue: Semaphore,
    waiting: AtomicUsize,
}

/// Times at which all admitted bytes and requests will have been paid for.
#[derive(Debug, Clone, Copy)]
struct DebtDeadlines {
    bytes: Instant,
    requests: Instant,
}

impl Throttle {
    /// Creates a limit in bytes and requests per second; `None` means unlimited.
    pub fn new(
        bytes_per_second: Option<NonZeroU64>,
        requests_per_second: Option<NonZeroU64>,
    ) -> Self {
        let now = Instant::now();
        Self {
            bytes_per_second,
            requests_per_second,
            debts: Mutex::new(DebtDeadlines { bytes: now, requests: now }),
            queue: Semaphore::new(1),
            waiting: AtomicUsize::new(0),
        }
    }

    /// Returns true if no debt is outstanding. A new limit would behave identically, so this one
    /// can be discarded.
    pub fn is_debt_free(&self) -> bool {
        let debts = self.debts();
        debts.bytes.max(debts.requests) <= Instant::now()
    }

    /// Admits a request for `bytes` bytes if it need not wait. Returns false otherwise.
    pub(super) fn try_acquire(&self, bytes: u32) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0 && self.charge(bytes).is_ok()
    }

    /// Admits a request for `bytes` bytes, after waiting for its turn.
    ///
    /// Cancel safe: a canceled request leaves the queue and is not charged.
    pub(super) async fn acquire(&self, bytes: u32) {
        let _count = CountGuard::new(&self.waiting);
        let _turn = self.queue.acquire().await;
        while let Err(debt) = self.charge(bytes) {
            tokio::time::sleep(debt).await;
        }
    }

    fn debts(&self) -> MutexGuard<'_, DebtDeadlines> {
        self.debts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Charges a request.
    ///
    /// # Errors
    /// The remaining time until no bucket is in debt.
    fn charge(&self, bytes: u32) -> Result<(), Duration> {
        let now = Instant::now();
        let mut debts = self.debts();
        let paid = debts.bytes.max(debts.requests);
        let debt = paid.saturating_duration_since(now).saturating_sub(BURST);
        if !debt.is_zero() {
            return Err(debt);
        }
        debts.bytes = debts.bytes.max(now) + cost(bytes.into(), self.bytes_per_second);
        debts.requests = debts.requests.max(now) + cost(1, self.requests_per_second);
        Ok(())
    }
}

/// Returns the time in which `amount` is paid for at the given rate.
fn cost(amount: u64, per_second: Option<NonZeroU64>) -> Duration {
    const SECOND: u128 = Duration::from_secs(1).as_nanos();
    let Some(rate) = per_second else { return Duration::ZERO };
    let nanoseconds = (u128::from(amount) * SECOND).div_ceil(u128::from(rate.get()));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const MIB: u32 = 1024 * 1024;

    fn throttle(bytes: u64, requests: u64) -> Arc<Throttle> {
        Arc::new(Throttle::new(NonZeroU64::new(bytes), NonZeroU64::new(requests)))
    }

    /// Returns the time that `requests` requests take one after another, in seconds.
    async fn taken(throttle: &Throttle, requests: u32, bytes: u32) -> f64 {
        let started = Instant::now();
        for _ in 0..requests {
            throttle.acquire(bytes).await;
        }
        started.elapsed().as_secs_f64()
    }

    #[track_caller]
    fn assert_near(seconds: f64, expected: f64) {
        // The paused clock has a resolution of milliseconds.
        assert!((seconds - expected).abs() < 0.02, "{seconds} s, expected {expected}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_second_burst_is_followed_by_the_rate() {
        let by_bytes = throttle(100 * u64::from(MIB), 0);
        assert_near(taken(&by_bytes, 101, MIB).await, 0.0);
        assert_near(taken(&by_bytes, 1000, MIB).await, 10.0);
        let by_requests = throttle(0, 100);
        assert_near(taken(&by_requests, 101, MIB).await, 0.0);
        assert_near(taken(&by_requests, 1000, 0).await, 10.0);
        // The stricter of the two limits applies.
        assert_near(taken(&throttle(100, 10), 61, 1).await, 5.0);
        assert_near(taken(&throttle(10, 100), 61, 1).await, 5.0);
        assert_near(taken(&throttle(0, 0), 1000, MIB).await, 0.0);
        // After a pause, the bucket is full again, but not fuller than before.
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert_near(taken(&by_requests, 101, 0).await, 0.0);
        assert!(!by_requests.try_acquire(0));
    }

    #[tokio::test(start_paused = true)]
    async fn request_larger_than_the_bucket_is_admitted_and_paid_later() {
        let throttle = throttle(u64::from(MIB), 0);
        assert!(throttle.try_acquire(32 * MIB));
        assert!(!throttle.try_acquire(0));
        assert_near(taken(&throttle, 1, 1).await, 31.0);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_connections_are_not_starved() {
        const SECONDS: u32 = 10;
        let throttle = throttle(0, 100);
        let mut connections = Vec::new();
        for number in 0..4 {
            let throttle = Arc::clone(&throttle);
            connections.push(tokio::spawn(async move {
                let mut passed = 0;
                let until = Instant::now() + Duration::from_secs(SECONDS.into());
                while Instant::now() < until {
                    // One connection tries eagerly; another one is slow to ask.
                    if number == 0 && throttle.try_acquire(0) {
                        passed += 1;
                        continue;
                    }
                    throttle.acquire(0).await;
                    passed += 1;
                    if number == 1 {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
                passed
            }));
        }
        let mut all = 0;
        for (number, connection) in connections.into_iter().enumerate() {
            let passed: u32 = connection.await.unwrap();
            all += passed;
            let fair = 100 * SECONDS / 4;
            // The burst goes to whichever connection comes first.
            assert!((fair - 20..fair + 120).contains(&passed), "{number}: {passed}");
        }
        assert!((1090..1120).contains(&all), "{all}");
    }

    #[tokio::test(start_paused = true)]
    async fn new_requests_do_not_overtake_waiting_ones() {
        let throttle = throttle(0, 1);
        assert!(throttle.try_acquire(0) && throttle.try_acquire(0));
        let mut first = Box::pin(throttle.acquire(0));
        assert!(tokio::time::timeout(Duration::ZERO, &mut first).await.is_err());
        // It may proceed now, but has not been woken up yet.
        tokio::time::advance(Duration::from_secs(5)).await;
        assert!(!throttle.try_acquire(0));
        first.await;
        assert!(throttle.try_acquire(0));
    }

    #[tokio::test(start_paused = true)]
    async fn throttle_is_debt_free_once_all_requests_are_paid() {
        let throttle = throttle(0, 1);
        assert!(throttle.is_debt_free());
        assert!(throttle.try_acquire(0));
        assert!(!throttle.is_debt_free());
        tokio::time::advance(Duration::from_millis(999)).await;
        assert!(!throttle.is_debt_free());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(throttle.is_debt_free());
    }

    #[tokio::test(start_paused = true)]
    async fn canceled_request_leaves_the_queue() {
        let throttle = throttle(0, 1);
        assert!(throttle.try_acquire(0) && throttle.try_acquire(0));
        let waiting = tokio::spawn({
            let throttle = Arc::clone(&throttle);
            async move { throttle.acquire(0).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(throttle.waiting.load(Ordering::Relaxed), 1);
        waiting.abort();
        assert!(waiting.await.is_err());
        assert_near(taken(&throttle, 1, 0).await, 1.0);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(throttle.try_acquire(0));
    }
}
