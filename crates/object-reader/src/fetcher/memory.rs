//! Memory for responses.

use tokio::sync::{Semaphore, SemaphorePermit};

use super::call::Call;
use super::plan::CHUNK_SIZE;
use crate::object::Priority;

/// Maximum memory for responses, in bytes.
const MAX_IN_FLIGHT: u64 = 64 << 20;

/// Limits the bytes in flight, of which a quarter is reserved for demand.
///
/// A request takes its share after its store has admitted it, so that requests to a store that is
/// down take nothing from the others.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    all: Semaphore,
    low: Semaphore,
    chunks: u64,
}

/// Share of a request in the memory for responses.
#[derive(Debug)]
pub(crate) struct MemoryShare<'a> {
    _low: Option<SemaphorePermit<'a>>,
    _all: SemaphorePermit<'a>,
}

impl MemoryBudget {
    /// Takes up to a quarter of `memory` bytes, at least four chunks.
    pub(crate) fn new(memory: u64) -> Self {
        let chunks = (memory / 4).min(MAX_IN_FLIGHT) / CHUNK_SIZE;
        let chunks = chunks.max(4);
        let semaphore = |chunks| Semaphore::new(usize::try_from(chunks).unwrap_or(4));
        Self { all: semaphore(chunks), low: semaphore(chunks - chunks / 4), chunks }
    }

    /// Returns the budget, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.chunks * CHUNK_SIZE
    }

    /// Returns the maximum size of a request, in bytes: several fit.
    pub(crate) fn max_request(&self) -> u64 {
        self.chunks / 4 * CHUNK_SIZE
    }

    /// Waits for the memory for the `size` bytes of a request, whose priority may be raised
    /// meanwhile.
    pub(crate) async fn acquire_for(&self, call: &Call, size: u64) -> MemoryShare<'_> {
        loop {
            tokio::select! {
                biased;
                share = self.acquire(size, call.priority()) => return share,
                () = call.raised() => {}
            }
        }
    }

    /// Waits for the memory for `size` bytes.
    async fn acquire(&self, size: u64, priority: Priority) -> MemoryShare<'_> {
        let chunks = self.chunks_for(size);
        let low = match priority {
            Priority::Demand => None,
            Priority::Ahead | Priority::Background => self.low.acquire_many(chunks).await.ok(),
        };
        match self.all.acquire_many(chunks).await {
            Ok(all) => MemoryShare { _low: low, _all: all },
            // The semaphores are never closed.
            Err(_) => std::future::pending().await,
        }
    }

    /// Takes the memory for `size` bytes for a hedged request if it is free.
    pub(crate) fn try_acquire(&self, size: u64) -> Option<MemoryShare<'_>> {
        let all = self.all.try_acquire_many(self.chunks_for(size)).ok()?;
        Some(MemoryShare { _low: None, _all: all })
    }

    fn chunks_for(&self, size: u64) -> u32 {
        // What is larger than the reserve for demand would wait forever.
        let chunks = size.div_ceil(CHUNK_SIZE).min(self.chunks - self.chunks / 4);
        u32::try_from(chunks).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn a_request_whose_priority_is_raised_takes_from_the_reserve() {
        let budget = MemoryBudget::new(64 << 20);
        let low = budget.acquire(budget.bytes() / 4 * 3, Priority::Ahead).await;
        let call = Arc::new(Call::new(Priority::Ahead));
        let waiting = budget.acquire_for(&call, CHUNK_SIZE);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        call.set_priority(Priority::Demand);
        let share = waiting.await;
        assert!(share._low.is_none());
        drop(low);
    }
}
