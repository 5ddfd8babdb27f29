//! Limits the rate of log lines that a peer can cause at will, so that they can't fill the disk.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::{TokenBucket, TokenRate};

/// A token bucket that also counts what it suppressed.
#[derive(Debug)]
pub struct RateLimit {
    rate: TokenRate,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bucket: TokenBucket,
    suppressed: u64,
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
    /// Creates a limit that allows `burst` lines at once, and then one per `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        let rate = TokenRate::new(burst, interval);
        let bucket = TokenBucket::full(&rate, Instant::now());
        Self { rate, state: Mutex::new(State { bucket, suppressed: 0 }) }
    }

    /// Returns `None` if the line must be suppressed, otherwise the number of lines suppressed
    /// since the last one that was allowed.
    pub fn allow(&self) -> Option<Suppressed> {
        self.allow_at(Instant::now()).map(Suppressed)
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        if !state.bucket.take(&self.rate, now) {
            state.suppressed += 1;
            return None;
        }
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_is_followed_by_a_steady_rate() {
        let limit = RateLimit::new(3, Duration::from_secs(1));
        let start = Instant::now();
        let at = |seconds| limit.allow_at(start + Duration::from_secs(seconds));
        assert_eq!([at(0), at(0), at(0), at(0), at(0)], [Some(0), Some(0), Some(0), None, None]);
        assert_eq!([at(2), at(2), at(2)], [Some(2), Some(0), None]);
        assert_eq!([at(100), at(100), at(100), at(100)], [Some(1), Some(0), Some(0), None]);
    }

    #[test]
    fn fractions_of_an_interval_are_not_lost() {
        let limit = RateLimit::new(1, Duration::from_secs(1));
        let start = Instant::now();
        let at = |millis| limit.allow_at(start + Duration::from_millis(millis)).is_some();
        assert_eq!(
            [at(0), at(999), at(1000), at(1999), at(2000)],
            [true, false, true, false, true]
        );
        let limit = RateLimit::new(2, Duration::from_secs(1));
        let start = Instant::now();
        let at = |millis| limit.allow_at(start + Duration::from_millis(millis)).is_some();
        // At 1.5 s, half an interval is left over, and earns the next line at 2 s.
        assert_eq!([at(0), at(0), at(1500), at(1999), at(2000)], [true, true, true, false, true]);
    }
}
