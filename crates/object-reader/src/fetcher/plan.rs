//! Decides which requests fetch missing chunks.

use std::ops::Range;

/// Unit of caching, in bytes. Chunks are aligned to their size; the last one of an object may be
/// shorter.
pub const CHUNK_SIZE: u64 = 256 * 1024;

/// Whereabouts of a chunk's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunkState {
    /// They have to be fetched.
    Missing,
    /// They are in memory.
    Cached,
    /// A request for them is queued or has been sent.
    InFlight,
}

/// Returns the numbers of the chunks that contain `bytes`.
pub(crate) fn chunks_of(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / CHUNK_SIZE..bytes.end.div_ceil(CHUNK_SIZE)
}

/// Plans the requests for those `wanted` chunks that are missing; each is a range of chunks.
///
/// A request lies within a block of `size` chunks, aligned to its size, and within `bounds`. It
/// takes along the other missing chunks of the block, and over a cached chunk between two missing
/// ones, since that costs less than a second request. It never contains a chunk in flight.
pub(crate) fn plan(
    wanted: &Range<u64>,
    bounds: &Range<u64>,
    size: u64,
    state: impl Fn(u64) -> ChunkState,
) -> Vec<Range<u64>> {
    let size = size.max(1);
    let is_wanted = |chunk| wanted.contains(&chunk) && state(chunk) == ChunkState::Missing;
    let mut requests = Vec::new();
    for block in wanted.start / size..wanted.end.div_ceil(size) {
        let start = (block * size).max(bounds.start);
        let end = ((block + 1) * size).min(bounds.end);
        let mut runs: Vec<Range<u64>> = Vec::new();
        for chunk in (start..end).filter(|chunk| state(*chunk) == ChunkState::Missing) {
            match runs.last_mut() {
                Some(run)
                    if chunk == run.end
                        || (chunk == run.end + 1 && state(run.end) == ChunkState::Cached) =>
                {
                    run.end = chunk + 1;
                }
                _ => runs.push(chunk..chunk + 1),
            }
        }
        requests.extend(runs.into_iter().filter(|run| run.clone().any(is_wanted)));
    }
    requests
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "these are lists of ranges")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns the plan for chunks given as letters: `m`issing, `c`ached, in `f`light.
    fn plan_of(chunks: &str, wanted: Range<u64>, size: u64) -> Vec<Range<u64>> {
        plan(&wanted, &(0..chunks.len() as u64), size, |chunk| state(chunks.as_bytes(), chunk))
    }

    fn state(chunks: &[u8], chunk: u64) -> ChunkState {
        match chunks[usize::try_from(chunk).unwrap()] {
            b'm' => ChunkState::Missing,
            b'c' => ChunkState::Cached,
            _ => ChunkState::InFlight,
        }
    }

    #[test]
    fn a_request_covers_the_missing_chunks_of_the_aligned_block() {
        assert_eq!(plan_of("mmmmmmmm", 5..6, 4), [4..8]);
        assert_eq!(plan_of("mmmmmmmm", 3..5, 4), [0..4, 4..8]);
        assert_eq!(plan_of("mmmmmm", 5..6, 4), [4..6]);
        assert_eq!(plan_of("ccmm", 3..4, 4), [2..4]);
    }

    #[test]
    fn nothing_is_requested_twice_except_short_cached_holes() {
        assert_eq!(plan_of("mcmm", 0..1, 4), [0..4]);
        assert_eq!(plan_of("mccm", 0..1, 4), [0..1]);
        assert_eq!(plan_of("mccm", 0..4, 4), [0..1, 3..4]);
        assert_eq!(plan_of("mfmm", 0..4, 4), [0..1, 2..4]);
        assert!(plan_of("cfmm", 0..2, 4).is_empty());
    }

    #[test]
    fn requests_stay_within_their_bounds() {
        let requests = plan(&(5..18), &(5..18), 8, |_| ChunkState::Missing);
        assert_eq!(requests, [5..8, 8..16, 16..18]);
    }

    proptest! {
        /// Compares with a model that looks at each chunk on its own.
        #[test]
        fn each_missing_chunk_is_requested_once(
            chunks in "[mmmcf]{1,40}",
            start in 0_u64..40,
            length in 0_u64..40,
            size in 1_u64..9,
        ) {
            let count = chunks.len() as u64;
            let wanted = start.min(count)..(start + length).min(count);
            let requests = plan_of(&chunks, wanted.clone(), size);
            let state = |chunk| state(chunks.as_bytes(), chunk);
            for chunk in 0..count {
                let covering = requests.iter().filter(|r| r.contains(&chunk)).count();
                prop_assert!(covering <= 1);
                match state(chunk) {
                    ChunkState::Missing => {
                        prop_assert!(covering == 1 || !wanted.contains(&chunk));
                    }
                    ChunkState::Cached => {
                        let is_hole = chunk > 0 && chunk + 1 < count
                            && state(chunk - 1) == ChunkState::Missing
                            && state(chunk + 1) == ChunkState::Missing;
                        prop_assert!(covering == 0 || is_hole);
                    }
                    ChunkState::InFlight => prop_assert_eq!(covering, 0),
                }
            }
            for request in requests {
                prop_assert_eq!(request.start / size, (request.end - 1) / size);
                prop_assert_eq!(state(request.start), ChunkState::Missing);
                prop_assert_eq!(state(request.end - 1), ChunkState::Missing);
            }
        }
    }
}
