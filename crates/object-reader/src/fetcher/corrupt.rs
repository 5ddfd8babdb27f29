//! Chunks whose bytes don't match, remembered so that they aren't requested for each read.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Time for which a chunk isn't requested again. After that, the object or a cache may have been
/// repaired.
const CORRUPT_FOR: Duration = Duration::from_secs(10);
/// Number of chunks from which on those are forgotten whose time is over.
const PRUNED_AT: usize = 1024;

/// Numbers of the chunks that didn't match, also after a second request.
#[derive(Debug, Default)]
pub(super) struct CorruptChunks {
    since: Mutex<HashMap<u64, Instant>>,
}

impl CorruptChunks {
    /// Returns true if the chunk isn't to be requested.
    pub(super) fn contains(&self, number: u64) -> bool {
        self.since.lock().get(&number).is_some_and(is_recent)
    }

    /// Remembers a chunk.
    pub(super) fn insert(&self, number: u64) {
        let mut since = self.since.lock();
        if since.len() >= PRUNED_AT {
            since.retain(|_, at| is_recent(at));
        }
        since.insert(number, Instant::now());
    }
}

fn is_recent(at: &Instant) -> bool {
    at.elapsed() < CORRUPT_FOR
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn chunks_are_forgotten_after_a_while() {
        let chunks = CorruptChunks::default();
        for number in 0..2 * PRUNED_AT as u64 {
            chunks.insert(number);
        }
        assert!(chunks.contains(7) && !chunks.contains(2 * PRUNED_AT as u64));
        tokio::time::advance(CORRUPT_FOR).await;
        assert!(!chunks.contains(7));
        chunks.insert(7);
        assert!(chunks.contains(7));
        assert_eq!(chunks.since.lock().len(), 1);
    }
}
