//! How often an address may begin a connection.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::slots::Counted;

/// How many seconds' worth of connections may come at once: a machine that begins again
/// with all that it had open.
const BURST: u32 = 10;

/// Addresses whose connections are counted. Those that have long been quiet are forgotten;
/// if there are still more, all further ones are counted together.
const MAX_ADDRESSES: usize = 65_536;

/// A token bucket for each address.
#[derive(Debug)]
pub(super) struct Rates {
    /// What it takes to earn one connection.
    every: Duration,
    /// What can be saved up.
    most: Duration,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// The bucket of nobody is that of all who are too many.
    buckets: HashMap<Option<Counted>, Bucket>,
    /// When those who were quiet were forgotten the last time.
    swept: Option<Instant>,
}

/// Time that was saved up until then.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    saved: Duration,
    at: Instant,
}

impl Rates {
    /// Lets each address begin `per_second` connections, averaged over some seconds.
    pub(super) fn new(per_second: u32) -> Self {
        let every = Duration::from_secs(1) / per_second.max(1);
        Self {
            every,
            most: every * per_second.max(1).saturating_mul(BURST),
            known: Mutex::new(Known { buckets: HashMap::new(), swept: None }),
        }
    }

    /// Whether `address` may begin another one now.
    pub(super) fn allow(&self, address: Counted) -> bool {
        self.allow_at(address, Instant::now())
    }

    fn allow_at(&self, address: Counted, now: Instant) -> bool {
        /// Going through all of them takes a millisecond.
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
