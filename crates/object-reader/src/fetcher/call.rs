//! One request of the fetcher, from the queue over all attempts to the response.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::flow_control::WaitCause;
use crate::metrics::WaitStats;
use crate::object::Priority;
use crate::store::StoreError;

/// State of a request that its readers share.
#[derive(Debug)]
pub(crate) struct Call {
    /// Number in the order of arrival. All attempts have the same place in the queue.
    pub(super) number: u64,
    /// Priority at the start, which isn't raised later.
    pub(super) initial_priority: Priority,
    state: Mutex<CallState>,
    raised: Notify,
}

#[derive(Debug)]
struct CallState {
    priority: Priority,
    /// True while a request has been sent and not been answered.
    is_sent: bool,
    last_error: Option<StoreError>,
    /// Time spent so far, and what has been waited for since when.
    waits: WaitStats,
    cause: WaitCause,
    since: Instant,
}

impl Call {
    /// Creates the state of a request that is about to be queued.
    pub(crate) fn new(priority: Priority) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let state = CallState {
            priority,
            is_sent: false,
            last_error: None,
            waits: WaitStats::default(),
            cause: WaitCause::Fetch,
            since: Instant::now(),
        };
        let number = COUNT.fetch_add(1, Relaxed);
        Self { number, initial_priority: priority, state: Mutex::new(state), raised: Notify::new() }
    }

    /// Returns the highest priority of all readers so far.
    pub(crate) fn priority(&self) -> Priority {
        self.state.lock().priority
    }

    /// Changes the priority. A queued request must be moved by its queue.
    pub(super) fn set_priority(&self, priority: Priority) {
        self.state.lock().priority = priority;
        self.raised.notify_one();
    }

    /// Waits until the priority changes, unless it has changed since the last call.
    pub(crate) async fn raised(&self) {
        self.raised.notified().await;
    }

    /// Returns true while a request has been sent and not been answered.
    pub(crate) fn is_sent(&self) -> bool {
        self.state.lock().is_sent
    }

    /// Takes note that a request is sent.
    pub(super) fn sent(&self) {
        self.state.lock().is_sent = true;
    }

    /// Takes note that a request has failed.
    pub(super) fn failed(&self, error: StoreError) {
        let mut state = self.state.lock();
        state.is_sent = false;
        state.last_error = Some(error);
    }

    /// Returns the error of the last attempt.
    pub(crate) fn last_error(&self) -> Option<StoreError> {
        self.state.lock().last_error.clone()
    }

    /// Changes what the request waits for.
    pub(super) fn wait_for(&self, cause: WaitCause) {
        let mut state = self.state.lock();
        state.update(Instant::now());
        state.cause = cause;
    }

    /// Returns the time waited so far, by cause.
    pub(crate) fn waits(&self) -> WaitStats {
        let mut state = self.state.lock();
        state.update(Instant::now());
        state.waits
    }
}

impl CallState {
    fn update(&mut self, now: Instant) {
        let waited = now.saturating_duration_since(self.since);
        *self.waits.of(self.cause) += waited;
        self.since = now;
    }
}

impl WaitStats {
    fn of(&mut self, cause: WaitCause) -> &mut Duration {
        match cause {
            WaitCause::Fetch => &mut self.fetch,
            WaitCause::Retry => &mut self.retry,
            WaitCause::Throttled => &mut self.throttled,
            WaitCause::Breaker => &mut self.breaker,
        }
    }
}
