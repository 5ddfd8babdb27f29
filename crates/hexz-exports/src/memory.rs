//! Distribution of a memory budget.

use std::fmt;

use bytesize::ByteSize;
use hexz_reader::limits::DEFAULT_INDEX_BUDGET;

/// Distribution of memory, in bytes. Connection buffers, and a few bytes for each block of a thin
/// archive's parents, come on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Memory for decoded blocks.
    pub blocks: u64,
    /// Memory for index pages.
    pub index: u64,
    /// Memory for parts of remote archives.
    pub fetched: u64,
    /// Memory for replies in flight; see `Limits::in_flight` of `nbd-gateway`.
    pub in_flight: u32,
}

impl MemoryPlan {
    /// Distributes `bytes`, of which `in_flight` are for replies in flight. Blocks get at least
    /// half of it, and of larger amounts all of the rest but 16 MiB.
    pub fn distribute(bytes: u64, in_flight: u32) -> Self {
        let index = (bytes / 16).min(DEFAULT_INDEX_BUDGET);
        let rest = bytes.saturating_sub(index + u64::from(in_flight));
        Self { blocks: rest.max(bytes / 2), index, fetched: 0, in_flight }
    }

    /// Takes a third of the memory for blocks for parts of remote archives.
    #[must_use]
    pub fn with_fetched(self) -> Self {
        let fetched = self.blocks / 3;
        Self { blocks: self.blocks - fetched, fetched, ..self }
    }

    /// Returns the sum.
    pub fn total(&self) -> u64 {
        self.blocks + self.index + self.fetched + u64::from(self.in_flight)
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes: u64| ByteSize(bytes).display().iec();
        let Self { blocks, index, fetched, in_flight } = *self;
        write!(f, "{} for decoded blocks, {} for index pages, ", size(blocks), size(index))?;
        if fetched > 0 {
            write!(f, "{} for parts of remote archives, ", size(fetched))?;
        }
        write!(f, "{} for replies in flight", size(in_flight.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_distributed() {
        const MIB: u64 = 1 << 20;
        let blocks = |mib: u64| MemoryPlan::distribute(mib * MIB, 32 << 20).blocks / MIB;
        assert_eq!([0, 16, 256, 4096].map(blocks), [0, 8, 208, 4048]);
        for in_flight in [32 << 20, 100 << 20] {
            let all = MemoryPlan::distribute(256 * MIB, in_flight);
            assert_eq!(all.in_flight, in_flight);
            assert_eq!(all.total(), 256 * MIB);
            assert_eq!(all.with_fetched().total(), 256 * MIB);
        }
    }
}
