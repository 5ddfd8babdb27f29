//! Rate limit on new connections per address.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::slots::Counted;

/// Burst, in seconds' worth of connections: a machine may reconnect at once all that it had open.
const BURST: u32 = 10;

/// Maximum number of addresses with a bucket of their own. When it is reached, full buckets are
/// dropped; if that isn't enough, all further addresses share one bucket.
const MAX_ADDRESSES: usize = 65_536;

/// A token bucket for each address. Tokens are kept as time: a connection costs `every`.
#[derive(Debug)]
pub(super) struct Rates {
    /// Time that earns one connection.
    every: Duration,
    /// Capacity of a bucket.
    most: Duration,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// Buckets by address. `None` is the shared bucket of addresses beyond [`MAX_ADDRESSES`].
    buckets: HashMap<Option<Counted>, Bucket>,
    /// Time at which full buckets were last dropped.
    swept: Option<Instant>,
}

/// Time saved up by `at`.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    saved: Duration,
    at: Instant,
}

impl Rates {
    /// Allows each address `per_second` connections on average, with bursts of [`BURST`] seconds'
    /// worth.
    pub(super) fn new(per_second: u32) -> Self {
        let every = Duration::from_secs(1) / per_second.max(1);
        Self {
            every,
            most: every * per_second.max(1).saturating_mul(BURST),
            known: Mutex::new(Known { buckets: HashMap::new(), swept: None }),
        }
    }

    /// Takes a token from the bucket of `address`; returns false if there is none.
    pub(super) fn allow(&self, address: Counted) -> bool {
        self.allow_at(address, Instant::now())
    }

    fn allow_at(&self, address: Counted, now: Instant) -> bool {
        /// Minimum time between sweeps; one takes a millisecond.
        const SWEEP: Duration = Duration::from_secs(1);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let Known { buckets, swept } = &mut *known;
        let is_full = buckets.len() >= MAX_ADDRESSES;
        if is_full && swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
            buckets.retain(|_, bucket| bucket.saved_at(now, self.most) < self.most);
            *swept = Some(now);
        }
        let counted = Some(address)
            .filter(|_| buckets.len() < MAX_ADDRESSES || buckets.contains_key(&Some(address)));
        let bucket = buckets.entry(counted).or_insert(Bucket { saved: self.most, at: now });
        *bucket = Bucket { saved: bucket.saved_at(now, self.most), at: now };
        match bucket.saved.checked_sub(self.every) {
            Some(rest) => {
                bucket.saved = rest;
                true
            }
            None => false,
        }
    }
}

impl Bucket {
    fn saved_at(&self, now: Instant, most: Duration) -> Duration {
        self.saved.saturating_add(now.saturating_duration_since(self.at)).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> Counted {
        Counted::Address(std::net::IpAddr::V4(number.into()))
    }

    #[test]
    fn a_burst_then_a_trickle_for_each_address() {
        let rates = Rates::new(2);
        let start = Instant::now();
        let begins = |number, after| {
            (0..100)
                .filter(|_| rates.allow_at(address(number), start + Duration::from_millis(after)))
                .count()
        };
        assert_eq!((begins(1, 0), begins(1, 0), begins(2, 0)), (20, 0, 20));
        assert_eq!((begins(1, 499), begins(1, 500), begins(1, 2500)), (0, 1, 4));
        assert_eq!(begins(1, 1_000_000), 20);
    }

    #[test]
    fn many_addresses_take_bounded_memory() {
        let rates = Rates::new(1);
        let start = Instant::now();
        let addresses = u32::try_from(MAX_ADDRESSES).unwrap() + 1000;
        let allowed = (0..addresses).filter(|&number| rates.allow_at(address(number), start));
        assert_eq!(allowed.count(), MAX_ADDRESSES + BURST as usize);
        assert_eq!(rates.known.lock().unwrap().buckets.len(), MAX_ADDRESSES + 1);
        assert!(rates.allow_at(address(addresses), start + Duration::from_secs(100)));
        assert!(rates.known.lock().unwrap().buckets.len() < 10);
    }
}
