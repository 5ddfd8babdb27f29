//! Rate limit on new connections per address.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use nbd_telemetry::{TokenBucket, TokenRate};
use parking_lot::Mutex;

use crate::admission::slots::ClientKey;

/// Burst, in seconds' worth of connections: a machine may reconnect at once all that it had open.
const BURST_SECONDS: u32 = 10;

/// Maximum number of addresses with a bucket of their own. When it is reached, full buckets are
/// dropped; if that isn't enough, all further addresses share one bucket.
const MAX_ADDRESSES: usize = 65_536;

/// A token bucket for each address; a connection costs one token.
#[derive(Debug)]
pub(crate) struct ConnectionRateLimiter {
    rate: TokenRate,
    table: Mutex<BucketTable>,
}

#[derive(Debug)]
struct BucketTable {
    /// Buckets by address. `None` is the shared bucket of addresses beyond [`MAX_ADDRESSES`].
    buckets: HashMap<Option<ClientKey>, TokenBucket>,
    /// Time at which full buckets were last dropped.
    swept: Option<Instant>,
}

impl ConnectionRateLimiter {
    /// Allows each address `per_second` connections on average, with bursts of [`BURST_SECONDS`]
    /// seconds' worth.
    pub(crate) fn new(per_second: u32) -> Self {
        let per_second = per_second.max(1);
        let interval = Duration::from_secs(1) / per_second;
        Self {
            rate: TokenRate::new(per_second.saturating_mul(BURST_SECONDS), interval),
            table: Mutex::new(BucketTable { buckets: HashMap::new(), swept: None }),
        }
    }

    /// Takes a token from the bucket of `address`; returns false if there is none.
    pub(crate) fn allow(&self, address: ClientKey) -> bool {
        self.allow_at(address, Instant::now())
    }

    fn allow_at(&self, address: ClientKey, now: Instant) -> bool {
        /// Minimum time between sweeps; one takes a millisecond.
        const SWEEP: Duration = Duration::from_secs(1);
        let mut table = self.table.lock();
        let BucketTable { buckets, swept } = &mut *table;
        let is_full = buckets.len() >= MAX_ADDRESSES;
        if is_full && swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP) {
            buckets.retain(|_, bucket| !bucket.is_full(&self.rate, now));
            *swept = Some(now);
        }
        let key = Some(address)
            .filter(|_| buckets.len() < MAX_ADDRESSES || buckets.contains_key(&Some(address)));
        let bucket = buckets.entry(key).or_insert_with(|| TokenBucket::full(&self.rate, now));
        bucket.take(&self.rate, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> ClientKey {
        ClientKey::Address(std::net::IpAddr::V4(number.into()))
    }

    #[test]
    fn each_address_gets_a_burst_then_a_steady_rate() {
        let rates = ConnectionRateLimiter::new(2);
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
        let rates = ConnectionRateLimiter::new(1);
        let start = Instant::now();
        let addresses = u32::try_from(MAX_ADDRESSES).unwrap() + 1000;
        let allowed = (0..addresses).filter(|&number| rates.allow_at(address(number), start));
        assert_eq!(allowed.count(), MAX_ADDRESSES + BURST_SECONDS as usize);
        assert_eq!(rates.table.lock().buckets.len(), MAX_ADDRESSES + 1);
        assert!(rates.allow_at(address(addresses), start + Duration::from_secs(100)));
        assert!(rates.table.lock().buckets.len() < 10);
    }
}
