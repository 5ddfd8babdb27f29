//! Token buckets.

use std::time::{Duration, Instant};

/// Rate at which a [`TokenBucket`] is filled, and its capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRate {
    /// Time that earns one token.
    interval: Duration,
    /// Time that earns all tokens of a full bucket.
    capacity: Duration,
}

/// A token bucket. Tokens are kept as the time that earns them, so fractions of one aren't lost.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    /// Time saved up by `at`.
    saved: Duration,
    at: Instant,
}

impl TokenRate {
    /// Creates a rate of one token per `interval`, for buckets that hold `burst` tokens.
    pub fn new(burst: u32, interval: Duration) -> Self {
        Self { interval, capacity: interval.saturating_mul(burst) }
    }
}

impl TokenBucket {
    /// Creates a full bucket.
    pub fn full(rate: &TokenRate, now: Instant) -> Self {
        Self { saved: rate.capacity, at: now }
    }

    /// Takes a token; returns false if there is none.
    pub fn take(&mut self, rate: &TokenRate, now: Instant) -> bool {
        *self = Self { saved: self.saved_at(rate, now), at: now };
        match self.saved.checked_sub(rate.interval) {
            Some(rest) => {
                self.saved = rest;
                true
            }
            None => false,
        }
    }

    /// Returns true if there is a token at the time `now`.
    pub fn has_token(&self, rate: &TokenRate, now: Instant) -> bool {
        self.saved_at(rate, now) >= rate.interval
    }

    /// Returns true if the bucket is full at the time `now`.
    pub fn is_full(&self, rate: &TokenRate, now: Instant) -> bool {
        self.saved_at(rate, now) == rate.capacity
    }

    fn saved_at(&self, rate: &TokenRate, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.at);
        self.saved.saturating_add(passed).min(rate.capacity)
    }
}
