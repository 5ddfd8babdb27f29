//! Queue of the requests to a store: who may send next.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::call::Call;
use super::flow_control::{Admission, FlowControl, InFlight, Outcome, WaitCause};
use super::jitter;
use crate::metrics::BreakerState;
use crate::object::Priority;

/// Admits requests in the order of priority and arrival, when [`FlowControl`] allows it.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    /// Notified when the breaker closes.
    recovered: Notify,
    runtime: Handle,
    this: Weak<Self>,
}

#[derive(Debug)]
struct GateState {
    flow: FlowControl,
    queue: BTreeMap<(Priority, u64), QueuedCall>,
    in_flight: InFlight,
    /// Time at which the queue is looked at without another reason.
    timer: Option<Instant>,
    /// Cause that the queued requests have been given.
    cause: WaitCause,
    /// Time at which the breaker opened, while it is open.
    opened: Option<Instant>,
}

#[derive(Debug)]
struct QueuedCall {
    admit: oneshot::Sender<Permit>,
    call: Arc<Call>,
}

/// Snapshot of a gate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GateStats {
    pub(crate) in_flight: usize,
    pub(crate) queued: usize,
    pub(crate) limit: usize,
    pub(crate) breaker: BreakerState,
}

/// Change of the breaker's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BreakerChange {
    /// The store is down.
    Opened,
    /// The store works again.
    Closed {
        /// Time for which the breaker was open.
        after: Duration,
    },
}

impl Gate {
    /// Creates a gate for at most `max_limit` requests in flight.
    pub(crate) fn new(max_limit: usize, runtime: Handle) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            state: Mutex::new(GateState {
                flow: FlowControl::new(max_limit),
                queue: BTreeMap::new(),
                in_flight: InFlight::default(),
                timer: None,
                cause: WaitCause::Fetch,
                opened: None,
            }),
            recovered: Notify::new(),
            runtime,
            this: Weak::clone(this),
        })
    }

    /// Waits until the request may be sent.
    ///
    /// Cancellation: a dropped future leaves the queue.
    pub(crate) async fn acquire(&self, call: &Arc<Call>) -> Permit {
        let (admit, admitted) = oneshot::channel();
        {
            let mut state = self.state.lock();
            call.wait_for(state.cause);
            let queued = QueuedCall { admit, call: Arc::clone(call) };
            state.queue.insert((call.priority(), call.number), queued);
        }
        let _place = QueuePlace { gate: self, call };
        self.admit_queued();
        match admitted.await {
            Ok(permit) => permit,
            // Only the place's end removes a request without a permit.
            Err(_) => std::future::pending().await,
        }
    }

    /// Returns a permit for a hedged request, if it may be sent at once.
    pub(crate) fn try_acquire_hedge(&self) -> Option<Permit> {
        let mut state = self.state.lock();
        let is_idle = state.queue.is_empty();
        if !is_idle || !state.flow.admits_hedge(Instant::now(), state.in_flight) {
            return None;
        }
        Some(self.permit(&mut state, Priority::Demand))
    }

    /// Raises the priority of a request, which may be queued.
    pub(crate) fn raise(&self, call: &Call, priority: Priority) {
        if call.priority() <= priority {
            return;
        }
        {
            let mut state = self.state.lock();
            let old = call.priority();
            if old <= priority {
                return;
            }
            call.set_priority(priority);
            if let Some(queued) = state.queue.remove(&(old, call.number)) {
                state.queue.insert((priority, call.number), queued);
            }
        }
        self.admit_queued();
    }

    /// Returns the time to wait before the next attempt after `attempts` failed ones; `None` if
    /// the breaker is open.
    pub(crate) fn backoff(&self, attempts: u32) -> Option<Duration> {
        self.state.lock().flow.backoff(attempts, jitter())
    }

    /// Returns a future that ends when the breaker closes after this call.
    pub(crate) fn recovered(&self) -> Notified<'_> {
        self.recovered.notified()
    }

    /// Waits until the request may be sent, unless the store is down: then it is sent only as a
    /// probe that is due.
    pub(crate) async fn acquire_if_up(&self, call: &Arc<Call>) -> Option<Permit> {
        {
            let now = Instant::now();
            let mut state = self.state.lock();
            if state.flow.breaker() == BreakerState::Open {
                let in_flight = state.in_flight;
                let admission = state.flow.admit(now, in_flight, true);
                let is_due = admission == Admission::Admitted;
                return is_due.then(|| self.permit(&mut state, Priority::Demand));
            }
        }
        Some(self.acquire(call).await)
    }

    /// Returns the present state.
    pub(crate) fn stats(&self) -> GateStats {
        let state = self.state.lock();
        GateStats {
            in_flight: state.in_flight.total,
            queued: state.queue.len(),
            limit: state.flow.limit(),
            breaker: state.flow.breaker(),
        }
    }

    /// Admits as many requests as may be sent now.
    fn admit_queued(&self) {
        while let Some((admit, permit)) = self.next() {
            // If the receiver is gone, the permit is returned at once.
            drop(admit.send(permit));
        }
    }

    /// Takes the next request from the queue if it may be sent.
    fn next(&self) -> Option<(oneshot::Sender<Permit>, Permit)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        let state = &mut *state;
        let first = state.queue.first_entry()?;
        let (priority, _) = *first.key();
        let admission = state.flow.admit(now, state.in_flight, priority == Priority::Demand);
        let admitted = match admission {
            Admission::Admitted => {
                let admit = first.remove().admit;
                Some((admit, self.permit(state, priority)))
            }
            Admission::Full => None,
            Admission::NotBefore(time) => {
                self.set_timer(state, time);
                None
            }
        };
        state.update_cause(now);
        admitted
    }

    fn permit(&self, state: &mut GateState, priority: Priority) -> Permit {
        let is_low = priority != Priority::Demand;
        state.in_flight.total += 1;
        state.in_flight.low += usize::from(is_low);
        let gate = Weak::clone(&self.this);
        Permit { gate, is_low, sent: Instant::now(), outcome: Outcome::Canceled }
    }

    /// Looks at the queue again at `time`.
    fn set_timer(&self, state: &mut GateState, time: Instant) {
        if state.timer.is_some_and(|timer| timer <= time) {
            return;
        }
        state.timer = Some(time);
        let gate = Weak::clone(&self.this);
        self.runtime.spawn(async move {
            tokio::time::sleep_until(time).await;
            if let Some(gate) = gate.upgrade() {
                {
                    let mut state = gate.state.lock();
                    state.timer = state.timer.filter(|timer| *timer != time);
                }
                gate.admit_queued();
            }
        });
    }

    fn end(&self, permit: &Permit) -> Option<BreakerChange> {
        let now = Instant::now();
        let change = {
            let mut state = self.state.lock();
            state.in_flight.total -= 1;
            state.in_flight.low -= usize::from(permit.is_low);
            state.flow.end(now, permit.sent, permit.outcome, jitter());
            state.update_opened(now)
        };
        if matches!(change, Some(BreakerChange::Closed { .. })) {
            self.recovered.notify_waiters();
        }
        self.admit_queued();
        change
    }
}

impl GateState {
    /// Takes note of the breaker's state. Returns the change, if there was one.
    fn update_opened(&mut self, now: Instant) -> Option<BreakerChange> {
        match (self.flow.breaker(), self.opened) {
            (BreakerState::Open, None) => {
                self.opened = Some(now);
                Some(BreakerChange::Opened)
            }
            (BreakerState::Closed, Some(opened)) => {
                self.opened = None;
                Some(BreakerChange::Closed { after: now.duration_since(opened) })
            }
            (BreakerState::Open, Some(_)) | (BreakerState::Closed, None) => None,
        }
    }

    /// Tells the queued requests what they wait for, if that has changed.
    fn update_cause(&mut self, now: Instant) {
        let cause = self.flow.wait_cause(now);
        if std::mem::replace(&mut self.cause, cause) != cause {
            self.queue.values().for_each(|queued| queued.call.wait_for(cause));
        }
    }
}

/// Permission to send one request. Dropped, it makes room for the next one.
#[derive(Debug)]
pub(crate) struct Permit {
    gate: Weak<Gate>,
    is_low: bool,
    sent: Instant,
    outcome: Outcome,
}

impl Permit {
    /// Restarts the clock, if the request wasn't sent at once.
    pub(crate) fn start(&mut self) {
        self.sent = Instant::now();
    }

    /// Ends the request with the given outcome. One that is dropped instead was canceled, which
    /// doesn't change the breaker.
    pub(crate) fn finish(mut self, outcome: Outcome) -> Option<BreakerChange> {
        self.outcome = outcome;
        // Without its gate, dropping the permit does nothing.
        std::mem::take(&mut self.gate).upgrade()?.end(&self)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.upgrade() {
            gate.end(self);
        }
    }
}

/// Place of a request in the queue.
struct QueuePlace<'a> {
    gate: &'a Gate,
    call: &'a Call,
}

impl Drop for QueuePlace<'_> {
    fn drop(&mut self) {
        self.gate.state.lock().queue.remove(&(self.call.priority(), self.call.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_change_of_the_breaker_is_reported_once() {
        let gate = Gate::new(16, Handle::current());
        let call = Arc::new(Call::new(Priority::Demand));
        let mut changes = Vec::new();
        for _ in 0..13 {
            changes.push(gate.acquire(&call).await.finish(Outcome::Failed));
        }
        drop(gate.acquire(&call).await);
        for _ in 0..2 {
            changes.push(gate.acquire(&call).await.finish(Outcome::Answered));
        }
        let mut expected = [None; 15];
        expected[9] = Some(BreakerChange::Opened);
        // Later requests are probes, one a second.
        expected[13] = Some(BreakerChange::Closed { after: Duration::from_secs(5) });
        let rounded = changes.into_iter().map(|change| match change {
            Some(BreakerChange::Closed { after }) => {
                Some(BreakerChange::Closed { after: Duration::from_secs(after.as_secs()) })
            }
            other => other,
        });
        assert_eq!(rounded.collect::<Vec<_>>(), expected);
        assert_eq!(gate.stats().in_flight, 0);
    }
}
