//! Distribution of block lengths.

use std::collections::BTreeMap;

/// Maximum number of distinct lengths that are counted exactly; some 10 MB. Content-defined
/// chunking produces a few hundred thousand at most.
const MAX_EXACT_LENGTHS: usize = 1 << 18;
/// Precision beyond that limit: a new length is rounded down by less than one part in `PRECISION`.
const PRECISION: u32 = 256;

/// Number of blocks of each length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LengthHistogram {
    counts: BTreeMap<u32, u64>,
    blocks: u64,
    bytes: u64,
    is_rounded: bool,
}

impl LengthHistogram {
    pub(super) fn add(&mut self, length: u32) {
        self.blocks += 1;
        self.bytes += u64::from(length);
        if self.counts.len() >= MAX_EXACT_LENGTHS && !self.counts.contains_key(&length) {
            self.is_rounded = true;
            *self.counts.entry(round_down(length)).or_default() += 1;
        } else {
            *self.counts.entry(length).or_default() += 1;
        }
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Returns the total length of all blocks, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns true if there were so many distinct lengths that some were rounded down, by less
    /// than 0.4 %.
    pub fn is_rounded(&self) -> bool {
        self.is_rounded
    }

    /// Returns the smallest length, in bytes.
    pub fn smallest(&self) -> Option<u32> {
        self.counts.keys().next().copied()
    }

    /// Returns the largest length, in bytes.
    pub fn largest(&self) -> Option<u32> {
        self.counts.keys().next_back().copied()
    }

    /// Returns the mean length, rounded down to whole bytes.
    pub fn mean(&self) -> Option<u64> {
        self.bytes.checked_div(self.blocks)
    }

    /// Returns the median length, in bytes: the smallest length that at least half of the blocks
    /// don't exceed.
    pub fn median(&self) -> Option<u32> {
        let half = self.blocks.div_ceil(2);
        let mut counted = 0;
        self.counts.iter().find_map(|(&length, count)| {
            counted += count;
            (counted >= half).then_some(length)
        })
    }

    /// Returns pairs of an upper bound and a number of blocks. The bounds are ascending powers of
    /// two; each pair counts the blocks that exceed the previous bound but not this one. Empty
    /// pairs at both ends are left out.
    pub fn histogram(&self) -> Vec<(u32, u64)> {
        let mut steps: BTreeMap<u32, u64> = BTreeMap::new();
        for (&length, count) in &self.counts {
            *steps.entry(step(length)).or_default() += count;
        }
        let (Some((&first, _)), Some((&last, _))) =
            (steps.first_key_value(), steps.last_key_value())
        else {
            return Vec::new();
        };
        std::iter::successors(Some(first), |step| step.checked_mul(2))
            .take_while(|&step| step <= last)
            .map(|step| (step, steps.get(&step).copied().unwrap_or_default()))
            .collect()
    }
}

/// Rounds a length up to a power of two.
fn step(length: u32) -> u32 {
    length.checked_next_power_of_two().unwrap_or(u32::MAX)
}

/// Rounds a length down to a multiple of about one part in `PRECISION`.
fn round_down(length: u32) -> u32 {
    let unit = (length / PRECISION).checked_ilog2().map_or(1, |bits| 1 << bits);
    length - length % unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_a_few_blocks_are_exact() {
        let mut lengths = LengthHistogram::default();
        assert_eq!((lengths.median(), lengths.mean(), lengths.smallest()), (None, None, None));
        assert!(lengths.histogram().is_empty());
        for length in [4096, 65536, 65536, 100, 4097] {
            lengths.add(length);
        }
        assert_eq!((lengths.blocks(), lengths.bytes()), (5, 139_365));
        assert_eq!((lengths.smallest(), lengths.largest()), (Some(100), Some(65536)));
        assert_eq!((lengths.median(), lengths.mean()), (Some(4097), Some(27873)));
        assert_eq!(
            lengths.histogram(),
            [
                (128, 1),
                (256, 0),
                (512, 0),
                (1024, 0),
                (2048, 0),
                (4096, 1),
                (8192, 1),
                (16384, 0),
                (32768, 0),
                (65536, 2)
            ]
        );
        assert!(!lengths.is_rounded());
    }

    #[test]
    fn lengths_beyond_the_limit_are_rounded() {
        let mut lengths = LengthHistogram::default();
        let many = u32::try_from(MAX_EXACT_LENGTHS).unwrap() + 10_000;
        (1..=many).for_each(|length| lengths.add(length));
        assert!(lengths.is_rounded());
        assert!(lengths.counts.len() < MAX_EXACT_LENGTHS + 1000);
        assert_eq!(lengths.blocks(), u64::from(many));
        for length in [1, 255, 256, 300, 65537, 33_554_432, u32::MAX] {
            let lost = length - round_down(length);
            assert!(u64::from(lost) * u64::from(PRECISION) <= u64::from(length), "{length}");
        }
    }
}
