//! Deduplicated count of stored copies, several of which may share one location in the file.
//!
//! An exact count has to remember all copies. Up to a limit, all are remembered. Beyond the limit,
//! a sample is kept: copies whose file offset has a hash with a number of leading zero bits, one
//! more bit whenever the sample grows too large. Membership in the sample depends on the offset
//! alone, so a copy counts once however often it is added.

use std::collections::HashMap;

use crate::header::Extent;

/// Maximum number of remembered copies: 36 MB, and half as much again while the table grows. A
/// sample holds at least about half of that, so the standard deviation of an estimate is 0.1 %.
const MAX_REMEMBERED: usize = (1 << 21) / 8 * 7;

/// Set of stored copies, or a sample of it.
#[derive(Debug)]
pub(super) struct DistinctCopies {
    /// Stored length by file offset.
    remembered: HashMap<u64, u32>,
    /// Binary logarithm of the sampling ratio: one of 2^`sampling` copies is in the sample.
    sampling: u32,
    limit: usize,
}

/// Number and size of distinct copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CopyTotals {
    pub(super) copies: u64,
    pub(super) bytes: u64,
    pub(super) is_estimate: bool,
}

impl Default for DistinctCopies {
    fn default() -> Self {
        Self::remembering(MAX_REMEMBERED)
    }
}

impl DistinctCopies {
    fn remembering(limit: usize) -> Self {
        Self { remembered: HashMap::new(), sampling: 0, limit }
    }

    pub(super) fn add(&mut self, place: Extent) {
        if let Some(length) = self.remembered.get_mut(&place.offset) {
            *length = place.length;
            return;
        }
        // Checked before inserting: one more entry would double the table.
        while self.remembered.len() >= self.limit && is_sampled(place.offset, self.sampling) {
            self.sampling += 1;
            let sampling = self.sampling;
            self.remembered.retain(|&offset, _| is_sampled(offset, sampling));
        }
        if is_sampled(place.offset, self.sampling) {
            self.remembered.insert(place.offset, place.length);
        }
    }

    pub(super) fn totals(&self) -> CopyTotals {
        let scaled = |count: u64| count.saturating_mul(1 << self.sampling.min(63));
        CopyTotals {
            copies: scaled(self.remembered.len() as u64),
            bytes: scaled(self.remembered.values().map(|&length| u64::from(length)).sum()),
            is_estimate: self.sampling > 0,
        }
    }
}

fn is_sampled(offset: u64, sampling: u32) -> bool {
    mix(offset).leading_zeros() >= sampling
}

/// Spreads numbers that lie close together (the finalizer of splitmix64).
fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(limit: usize, count: u64) -> CopyTotals {
        let mut copies = DistinctCopies::remembering(limit);
        for round in 0..2 {
            for number in 0..count {
                copies.add(Extent { offset: 4096 + number * 1000, length: 500 });
            }
            assert!(copies.remembered.len() <= limit, "round {round}");
        }
        copies.totals()
    }

    #[test]
    fn few_copies_are_counted_and_many_are_estimated() {
        assert_eq!(of(1000, 999), CopyTotals { copies: 999, bytes: 499_500, is_estimate: false });
        let many = of(20_000, 300_000);
        assert!(many.is_estimate);
        // 2 % is almost three standard deviations here.
        assert!(many.copies.abs_diff(300_000) < 300_000 / 50, "{many:?}");
        assert_eq!(many.bytes, many.copies * 500);
    }
}
