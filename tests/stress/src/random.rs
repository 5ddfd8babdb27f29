//! Numbers that look random and are the same in every run (xorshift64*).

use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.number() >> 16) % end
    }

    /// A number from 1 to `2^bits`, each order of magnitude as often as any other.
    pub(crate) fn up_to_bits(&mut self, bits: u32) -> u64 {
        let bits = self.below(u64::from(bits) + 1);
        1 + self.below(1 << bits)
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| (self.number() >> 32) as u8).collect()
    }

    pub(crate) async fn pause(&mut self, at_most: Duration) {
        tokio::time::sleep(Duration::from_micros(self.below(at_most.as_micros() as u64 + 1))).await;
    }
}
