//! Decides when a store may be sent requests: limit of requests in flight, pauses, retries, and a
//! circuit breaker.

use std::time::Duration;

use tokio::time::Instant;

use crate::metrics::BreakerState;

/// Initial and minimum limit of requests in flight.
const MIN_LIMIT: usize = 16;
/// Backoff before the first retry; it doubles with each.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
/// Maximum backoff.
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Longest pause that a store can ask for.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Consecutive failures that open the breaker.
const BREAKING_FAILURES: u32 = 10;
/// Time between probes while the breaker is open.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Time after a throttled request in which the store counts as overloaded.
const OVERLOAD_MEMORY: Duration = Duration::from_secs(5);
/// Requests that earn one retry.
const REQUESTS_PER_RETRY: u32 = 10;
/// Retries that can be saved up, also at the start.
const MAX_SAVED_RETRIES: u32 = 10;

/// State of a store, as its responses show it. Pure: the caller passes the time.
#[derive(Debug)]
pub(crate) struct FlowControl {
    /// Requests that may be in flight.
    limit: usize,
    max_limit: usize,
    /// Successes since the limit was last raised.
    successes: usize,
    /// Time of the last decrease of the limit.
    decreased: Option<Instant>,
    /// End of the pause that the store asked for.
    paused_until: Option<Instant>,
    /// Time of the last throttled request.
    throttled: Option<Instant>,
    /// Throttled requests since the last success.
    throttles: u32,
    /// Failures since the last success.
    failures: u32,
    breaker: Breaker,
    /// Budget of retries, in requests.
    saved: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Breaker {
    Closed,
    /// At that time, the next request is sent to find out whether the store works again. It may
    /// hang, so that later ones don't wait for its end.
    Open {
        probe_at: Instant,
    },
}

/// Number of permits that have been handed out.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct InFlight {
    /// All of them.
    pub(crate) total: usize,
    /// Those of lower priority than demand.
    pub(crate) low: usize,
}

/// Answer to the question whether a request may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It may be sent.
    Admitted,
    /// Ask again when a request ends.
    Full,
    /// Ask again at this time.
    NotBefore(Instant),
}

/// Reason for which requests wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WaitCause {
    /// For a free slot, or for the response.
    Fetch,
    /// For the next attempt after a failure.
    Retry,
    /// For the end of a pause that the store asked for.
    Throttled,
    /// For a store that is down.
    Breaker,
}

/// End of a request, as far as it says something about the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The store has answered, with the bytes or with a final error.
    Answered,
    /// The store asks for fewer requests.
    Throttled { retry_after: Option<Duration> },
    /// The store is down or doesn't work.
    Failed,
    /// The request was given up before its end.
    Canceled,
}

impl FlowControl {
    /// Starts with a closed breaker.
    pub(crate) fn new(max_limit: usize) -> Self {
        let max_limit = max_limit.max(1);
        Self {
            limit: MIN_LIMIT.min(max_limit),
            max_limit,
            successes: 0,
            decreased: None,
            paused_until: None,
            throttled: None,
            throttles: 0,
            failures: 0,
            breaker: Breaker::Closed,
            saved: MAX_SAVED_RETRIES * REQUESTS_PER_RETRY,
        }
    }

    /// Decides whether the next request may be sent. A quarter of the limit is reserved for
    /// demand. The caller sends what is admitted.
    pub(crate) fn admit(
        &mut self,
        now: Instant,
        in_flight: InFlight,
        is_demand: bool,
    ) -> Admission {
        if let Some(until) = self.pause_end(now) {
            return Admission::NotBefore(until);
        }
        match self.breaker {
            Breaker::Open { probe_at } if now < probe_at => Admission::NotBefore(probe_at),
            Breaker::Open { .. } => {
                self.breaker = Breaker::Open { probe_at: now + PROBE_INTERVAL };
                Admission::Admitted
            }
            Breaker::Closed if self.has_room(in_flight, is_demand) => {
                self.saved = (self.saved + 1).min(MAX_SAVED_RETRIES * REQUESTS_PER_RETRY);
                Admission::Admitted
            }
            Breaker::Closed => Admission::Full,
        }
    }

    /// Returns true if a hedged request may be sent at once.
    pub(crate) fn admits_hedge(&self, now: Instant, in_flight: InFlight) -> bool {
        let is_overloaded = self.throttled.is_some_and(|at| now < at + OVERLOAD_MEMORY);
        self.breaker == Breaker::Closed
            && self.pause_end(now).is_none()
            && !is_overloaded
            && self.has_room(in_flight, true)
    }

    /// Takes note of the end of a request that was sent at `sent`.
    pub(crate) fn end(&mut self, now: Instant, sent: Instant, outcome: Outcome, jitter: f64) {
        match outcome {
            Outcome::Answered => self.succeed(),
            Outcome::Throttled { retry_after } => self.throttle(now, sent, retry_after, jitter),
            Outcome::Failed => {
                self.failures = self.failures.saturating_add(1);
                if self.failures >= BREAKING_FAILURES && self.breaker == Breaker::Closed {
                    self.breaker = Breaker::Open { probe_at: now + PROBE_INTERVAL };
                }
            }
            Outcome::Canceled => {}
        }
    }

    /// Returns the time to wait before the retry after the given number of failed attempts, of
    /// which the last one failed without being throttled. `None` if the breaker is open: the next
    /// probe decides then.
    ///
    /// `jitter` is a random number from 0 to 1. Retries beyond the budget aren't refused, since
    /// their readers have nothing better, but are made at the lowest rate.
    pub(crate) fn backoff(&mut self, attempts: u32, jitter: f64) -> Option<Duration> {
        if self.breaker != Breaker::Closed {
            return None;
        }
        Some(match self.saved.checked_sub(REQUESTS_PER_RETRY) {
            Some(saved) => {
                self.saved = saved;
                // Without other requests, the breaker takes long to open. Recovery shall not be
                // noticed later than with an open one.
                exponential(attempts).min(PROBE_INTERVAL).mul_f64(jitter)
            }
            None => MAX_BACKOFF.mul_f64(0.5 + jitter / 2.0),
        })
    }

    /// Returns the reason for which a request that isn't sent now has to wait.
    pub(crate) fn wait_cause(&self, now: Instant) -> WaitCause {
        if self.breaker != Breaker::Closed {
            WaitCause::Breaker
        } else if self.pause_end(now).is_some() {
            WaitCause::Throttled
        } else {
            WaitCause::Fetch
        }
    }

    /// Returns the limit of requests in flight.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Returns the state of the circuit breaker.
    pub(crate) fn breaker(&self) -> BreakerState {
        match self.breaker {
            Breaker::Closed => BreakerState::Closed,
            Breaker::Open { .. } => BreakerState::Open,
        }
    }

    fn has_room(&self, in_flight: InFlight, is_demand: bool) -> bool {
        let low_limit = self.limit - self.limit / 4;
        in_flight.total < self.limit && (is_demand || in_flight.low < low_limit)
    }

    fn pause_end(&self, now: Instant) -> Option<Instant> {
        self.paused_until.filter(|until| now < *until)
    }

    fn succeed(&mut self) {
        self.failures = 0;
        self.throttles = 0;
        self.successes += 1;
        if self.successes >= self.limit {
            self.successes = 0;
            self.limit = (self.limit + 1).min(self.max_limit);
        }
        self.breaker = Breaker::Closed;
    }

    fn throttle(
        &mut self,
        now: Instant,
        sent: Instant,
        retry_after: Option<Duration>,
        jitter: f64,
    ) {
        // A burst of responses to requests that were sent before the last decrease is one event.
        if self.decreased.is_none_or(|decreased| sent >= decreased) {
            self.limit = (self.limit / 2).max(MIN_LIMIT.min(self.max_limit));
            self.decreased = Some(now);
            self.successes = 0;
            self.throttles = self.throttles.saturating_add(1);
        }
        self.throttled = Some(now);
        let pause = match retry_after {
            // Gateways that were throttled together don't come back together.
            Some(asked) => asked.min(MAX_PAUSE) + FIRST_BACKOFF.mul_f64(jitter),
            None => exponential(self.throttles.saturating_sub(1)).mul_f64(0.5 + jitter / 2.0),
        };
        self.paused_until = self.paused_until.max(Some(now + pause));
    }
}

/// Returns the maximum backoff after the given number of earlier failures.
fn exponential(failures: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << failures.min(16)).min(MAX_BACKOFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: bool = true;

    fn in_flight(total: usize, low: usize) -> InFlight {
        InFlight { total, low }
    }

    /// Ends a request. Returns true if that closes the breaker.
    fn end(flow: &mut FlowControl, now: Instant, outcome: Outcome) -> bool {
        let before = flow.breaker();
        flow.end(now, now, outcome, 0.0);
        (before, flow.breaker()) == (BreakerState::Open, BreakerState::Closed)
    }

    #[test]
    fn a_quarter_of_the_limit_is_reserved_for_demand() {
        let (mut flow, now) = (FlowControl::new(64), Instant::now());
        assert_eq!(flow.admit(now, in_flight(11, 11), !DEMAND), Admission::Admitted);
        assert_eq!(flow.admit(now, in_flight(12, 12), !DEMAND), Admission::Full);
        assert_eq!(flow.admit(now, in_flight(12, 12), DEMAND), Admission::Admitted);
        assert_eq!(flow.admit(now, in_flight(16, 12), DEMAND), Admission::Full);
    }

    #[test]
    fn the_limit_rises_by_one_per_window_and_is_halved_once_per_burst() {
        let (mut flow, now) = (FlowControl::new(64), Instant::now());
        assert!(!(0..16).any(|_| end(&mut flow, now, Outcome::Answered)));
        assert_eq!(flow.limit(), 17);
        assert!(!(0..5000).any(|_| end(&mut flow, now, Outcome::Answered)));
        assert_eq!(flow.limit(), 64);
        let later = now + Duration::from_secs(1);
        for _ in 0..30 {
            flow.end(later, now, Outcome::Throttled { retry_after: None }, 0.0);
        }
        assert_eq!(flow.limit(), 32);
        flow.end(later, later, Outcome::Throttled { retry_after: None }, 0.0);
        flow.end(later, later, Outcome::Throttled { retry_after: None }, 0.0);
        assert_eq!(flow.limit(), 16);
        assert_eq!(FlowControl::new(4).limit(), 4);
    }

    #[test]
    fn nothing_is_sent_before_the_time_that_the_store_asks_for() {
        let (mut flow, now) = (FlowControl::new(64), Instant::now());
        let second = Duration::from_secs(1);
        end(&mut flow, now, Outcome::Throttled { retry_after: Some(second) });
        // A shorter one doesn't cut the pause.
        end(&mut flow, now, Outcome::Throttled { retry_after: None });
        assert_eq!(
            flow.admit(now, InFlight::default(), DEMAND),
            Admission::NotBefore(now + second)
        );
        assert_eq!(flow.wait_cause(now), WaitCause::Throttled);
        let later = now + second;
        assert_eq!(flow.admit(later, InFlight::default(), DEMAND), Admission::Admitted);
        assert!(!flow.admits_hedge(later, InFlight::default()));
        assert!(flow.admits_hedge(now + OVERLOAD_MEMORY, InFlight::default()));
    }

    #[test]
    fn the_breaker_opens_after_ten_failures_in_a_row_and_probes_once_a_second() {
        let (mut flow, now) = (FlowControl::new(64), Instant::now());
        let none = InFlight::default();
        for outcome in [Outcome::Failed, Outcome::Answered, Outcome::Failed] {
            for _ in 0..9 {
                assert!(!end(&mut flow, now, outcome));
            }
        }
        assert_eq!(flow.admit(now, none, DEMAND), Admission::Admitted);
        end(&mut flow, now, Outcome::Failed);
        assert_eq!(flow.wait_cause(now), WaitCause::Breaker);
        assert_eq!(flow.backoff(0, 1.0), None);
        let mut probe = now + PROBE_INTERVAL;
        for _ in 0..3 {
            assert_eq!(flow.admit(now, none, DEMAND), Admission::NotBefore(probe));
            assert_eq!(flow.admit(probe, none, DEMAND), Admission::Admitted);
            // Also while a probe hangs, there is one a second.
            probe += PROBE_INTERVAL;
        }
        end(&mut flow, probe, Outcome::Failed);
        assert_eq!(flow.breaker(), BreakerState::Open);
        assert!(end(&mut flow, now, Outcome::Answered));
        assert_eq!(flow.admit(now, none, DEMAND), Admission::Admitted);
    }

    #[test]
    fn retries_back_off_and_are_slow_beyond_the_budget() {
        let mut flow = FlowControl::new(64);
        let delays: Vec<_> = (0..10).filter_map(|attempt| flow.backoff(attempt, 1.0)).collect();
        let millis: Vec<_> = delays.iter().map(Duration::as_millis).collect();
        assert_eq!(millis, [50, 100, 200, 400, 800, 1000, 1000, 1000, 1000, 1000]);
        assert_eq!(flow.backoff(0, 0.0), Some(MAX_BACKOFF / 2));
        for _ in 0..10 {
            flow.admit(Instant::now(), InFlight::default(), DEMAND);
        }
        assert_eq!(flow.backoff(0, 0.5), Some(FIRST_BACKOFF / 2));
        assert_eq!(flow.backoff(0, 0.0), Some(MAX_BACKOFF / 2));
    }
}
