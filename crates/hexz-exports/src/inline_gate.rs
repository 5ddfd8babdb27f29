//! Decides which blocks are decoded on the task that requests them, instead of a decoder thread.
//!
//! Handing a block over to a decoder thread and back takes as long as decoding a small one. But the
//! task runs on a thread that serves all clients, at a higher priority than the decoders, so it may
//! only decode while no other client would have to wait for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::decoders::DecoderClient;

/// Maximum estimated work to decode a block on the task that requests it, in nanoseconds.
pub(super) const MAX_INLINE_WORK: u64 = 384 * 1024;

/// Time for which a client must have been the only one to read.
const WINDOW: Duration = Duration::from_millis(10);

/// Number of blocks that others may request in that time: a few reads are not delayed noticeably,
/// and counts that are read while other threads add to them are not exact.
const TOLERANCE: u64 = 4;

/// Number of slow blocks, by which fast ones have not made up, after which the gate closes: an
/// archive may be made to decode slowly. A single slow block may be the system's doing, since the
/// thread may have been preempted.
const MAX_SLOW: u32 = 3;

/// Number of fast blocks that make up for a slow one.
const FAST_PER_SLOW: u32 = 4;

/// Time for which the gate stays closed.
const CLOSED: Duration = Duration::from_secs(1);

/// Observes whether the client that wants to decode is the only one that reads, and whether blocks
/// take longer than estimated.
#[derive(Debug, Default)]
pub(super) struct InlineGate(Mutex<GateState>);

#[derive(Debug, Default)]
struct GateState {
    observation: Option<Observation>,
    /// [`FAST_PER_SLOW`] for each slow block, less one for each fast one.
    slowness: u32,
    closed_until: Option<Instant>,
}

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
    /// Returns true if no other client than `client` has recently requested a block, and blocks
    /// have not been slow to decode. `requested` returns the number of blocks that all clients have
    /// requested.
    pub(super) fn admits(
        &self,
        client: &Arc<DecoderClient>,
        requested: impl Fn() -> u64,
        now: Instant,
    ) -> bool {
        let address = Arc::as_ptr(client).addr();
        let others = || requested().saturating_sub(client.requested());
        let mut state = self.0.lock();
        let is_closed = state.closed_until.is_some_and(|until| now < until);
        let was_alone = match state.observation.as_ref() {
            Some(last) if last.client != address => false,
            Some(last) if now.duration_since(last.began) < WINDOW => {
                return last.was_alone && !is_closed;
            }
            Some(last) => others() <= last.others + TOLERANCE,
            None => false,
        };
        state.observation =
            Some(Observation { client: address, began: now, others: others(), was_alone });
        was_alone && !is_closed
    }

    /// Records the time that an admitted block took, compared with its estimated work in
    /// nanoseconds.
    pub(super) fn record(&self, took: Duration, estimate: u64, now: Instant) {
        /// Time that no block exceeds without a reason.
        const FIXED: Duration = Duration::from_millis(1);
        let is_slow = took > 4 * Duration::from_nanos(estimate) + FIXED;
        let mut state = self.0.lock();
        state.slowness = match is_slow {
            true => state.slowness + FAST_PER_SLOW,
            false => state.slowness.saturating_sub(1),
        };
        if state.slowness > MAX_SLOW * FAST_PER_SLOW {
            state.slowness = 0;
            state.closed_until = Some(now + CLOSED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_is_admitted_while_no_other_requests_blocks() {
        let (gate, client, other) = (InlineGate::default(), Arc::default(), Arc::default());
        let start = Instant::now();
        let (mut at, mut requested) = (Duration::ZERO, 0);
        // Lets a client and others request so many blocks, and returns the gate's decision.
        let mut after = |milliseconds, who: &Arc<DecoderClient>, own: u64, others: u64| {
            who.count_requested(own);
            requested += own + others;
            at += Duration::from_millis(milliseconds);
            gate.admits(who, || requested, start + at)
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

    #[test]
    fn slow_blocks_close_the_gate_for_a_while() {
        const ESTIMATE: u64 = 100_000;
        let (gate, client) = (InlineGate::default(), Arc::default());
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        let is_open = |now| gate.admits(&client, || 0, now);
        let decode = |microseconds| {
            gate.record(Duration::from_micros(microseconds), ESTIMATE, after(20));
            is_open(after(20))
        };
        is_open(start);
        assert!(is_open(after(20)));
        // A thread that is preempted now and then.
        for number in 0..100 {
            assert!(decode(if number % 5 == 0 { 4000 } else { 1400 }), "{number}");
        }
        assert!(decode(1401) && decode(1401) && decode(1401));
        assert!(!decode(1401));
        assert!(!is_open(after(1019)));
        assert!(is_open(after(1020)));
    }
}
