//! Limits the rate of log lines that a peer can cause at will, so that they can't fill the disk.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A token bucket that also counts what it suppressed.
#[derive(Debug)]
pub struct RateLimit {
    burst: u32,
    every: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: u32,
    refilled: Instant,
    held_back: u64,
}

/// Number of lines that were suppressed before this one.
#[derive(Debug, Clone, Copy)]
pub struct Suppressed(u64);

impl Suppressed {
    /// Returns the number as a field of a log line; `None`, so that the field is left out, if it
    /// is zero.
    pub fn field(self) -> Option<u64> {
        (self.0 > 0).then_some(self.0)
    }
}

impl RateLimit {
    /// Creates a limit that allows `burst` lines at once, and then one per `every`.
    pub fn new(burst: u32, every: Duration) -> Self {
        let state = State { tokens: burst, refilled: Instant::now(), held_back: 0 };
        Self { burst, every, state: Mutex::new(state) }
    }

    /// Returns `None` if the line must be suppressed, otherwise the number of lines suppressed
    /// since the last one that was allowed.
    pub fn allow(&self) -> Option<Suppressed> {
        self.allow_at(Instant::now()).map(Suppressed)
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let passed = now.saturating_duration_since(state.refilled);
        let earned = passed.as_nanos() / self.every.as_nanos().max(1);
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            state.tokens = state.tokens.saturating_add(earned).min(self.burst);
            state.refilled = now;
        }
        if state.tokens == 0 {
            state.held_back += 1;
            return None;
        }
        state.tokens -= 1;
        Some(std::mem::take(&mut state.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_a_trickle() {
        let limit = RateLimit::new(3, Duration::from_secs(1));
        let start = Instant::now();
        let at = |seconds| limit.allow_at(start + Duration::from_secs(seconds));
        assert_eq!([at(0), at(0), at(0), at(0), at(0)], [Some(0), Some(0), Some(0), None, None]);
        assert_eq!([at(2), at(2), at(2)], [Some(2), Some(0), None]);
        assert_eq!([at(100), at(100), at(100), at(100)], [Some(1), Some(0), Some(0), None]);
    }
}
