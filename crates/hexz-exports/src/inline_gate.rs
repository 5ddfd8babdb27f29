//! Decides which blocks are decoded on the task that asks for them, instead of a decoder thread.
//!
//! Handing a block over to a decoder thread and back takes as long as decoding a small one. But the
//! task runs on a thread that serves all clients, at a higher priority than the decoders, so it may
//! only decode while no other client would have to wait for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::decoders::DecoderClient;

/// Maximum estimated work to decode a block on the task that asks for it, in nanoseconds.
pub(super) const MAX_INLINE_WORK: u64 = 256 * 1024;

/// Time for which a client must have been the only one to read.
const WINDOW: Duration = Duration::from_millis(10);

/// Number of blocks that others may request in that time: a few reads are not delayed noticeably,
/// and counts that are read while other threads add to them are not exact.
const TOLERANCE: u64 = 4;

/// Observes whether the client that wants to decode is the only one that reads.
#[derive(Debug, Default)]
pub(super) struct InlineGate(Mutex<Option<Observation>>);

#[derive(Debug)]
struct Observation {
    /// Address of the observed client.
    client: usize,
    began: Instant,
    /// Number of blocks that other clients had requested at the beginning.
    others: u64,
    /// Result of the observation before this one.
    was_alone: bool,
}

impl InlineGate {
    /// Returns true if no other client than `client` has recently requested a block. `requested`
    /// returns the number of blocks that all clients have requested.
    pub(super) fn is_alone(
        &self,
        client: &Arc<DecoderClient>,
        requested: impl Fn() -> u64,
    ) -> bool {
        self.is_alone_at(client, requested, Instant::now())
    }

    fn is_alone_at(
        &self,
        client: &Arc<DecoderClient>,
        requested: impl Fn() -> u64,
        now: Instant,
    ) -> bool {
        let address = Arc::as_ptr(client).addr();
        let others = || requested().saturating_sub(client.requested());
        let mut observation = self.0.lock();
        let was_alone = match observation.as_ref() {
            Some(last) if last.client != address => false,
            Some(last) if now.duration_since(last.began) < WINDOW => return last.was_alone,
            Some(last) => others() <= last.others + TOLERANCE,
            None => false,
        };
        *observation =
            Some(Observation { client: address, began: now, others: others(), was_alone });
        was_alone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_is_alone_while_no_other_requests_blocks() {
        let (gate, client, other) = (InlineGate::default(), Arc::default(), Arc::default());
        let start = Instant::now();
        let (mut at, mut requested) = (Duration::ZERO, 0);
        // Lets `client` and others request so many blocks, and returns the gate's decision.
        let mut after = |milliseconds, who: &Arc<DecoderClient>, own: u64, others: u64| {
            who.count_requested(own);
            requested += own + others;
            at += Duration::from_millis(milliseconds);
            gate.is_alone_at(who, || requested, start + at)
        };
        assert!(!after(0, &client, 1, 0), "nothing is known yet");
        assert!(!after(9, &client, 1, 0));
        assert!(after(1, &client, 1, 0));
        assert!(after(5, &client, 9, 0));
        assert!(after(1, &client, 1, 9), "noticed at the end of the window");
        assert!(!after(4, &client, 1, 0));
        assert!(!after(9, &client, 1, 0));
        assert!(after(1, &client, 1, 0));
        assert!(!after(1, &other, 1, 0), "another client decodes");
        assert!(!after(1, &client, 1, 0));
        assert!(after(10, &client, 1, 0));
        assert!(after(1000, &client, 1, 0));
        assert!(after(1000, &client, 1, 4), "a few reads");
        assert!(!after(1000, &client, 1, 5));
    }
}
