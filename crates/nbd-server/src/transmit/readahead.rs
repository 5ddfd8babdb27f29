//! Detection of sequential reads, for readahead.

use crate::Span;

/// Maximum distance between the end of the last read and the start of the next one in a readahead,
/// in bytes. Clients with many requests in flight send them slightly out of order.
const SLACK: u64 = 1024 * 1024;

/// Number of bytes that must be read in sequence before readahead starts: a client that looks at a
/// few blocks of a file will not read all of it.
const MIN_SEQUENTIAL: u64 = 16 * 1024;

/// Minimum and maximum size of the readahead window, in bytes.
const MIN_WINDOW: u64 = 128 * 1024;
const MAX_WINDOW: u64 = 2 * 1024 * 1024;

/// Readahead state of one client.
#[derive(Debug, Default)]
pub(super) struct Readahead {
    /// Offset at which the next sequential read would start.
    expected_offset: u64,
    /// Number of bytes read in readahead.
    sequential_bytes: u64,
    /// Offset up to which data has been read ahead.
    prefetched_until: u64,
}

/// Readahead decision after a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadaheadHint {
    /// Range to read ahead.
    Prefetch(Span),
    /// No change.
    Unchanged,
    /// End of the sequence: a running readahead is of no use any more.
    Cancel,
}

impl Readahead {
    /// Records a read of an export of `size` bytes, and returns the readahead decision.
    pub(super) fn record(&mut self, span: Span, size: u64) -> ReadaheadHint {
        let end = span.end();
        if span.offset.abs_diff(self.expected_offset) > SLACK {
            let was_reading_ahead = self.prefetched_until > self.expected_offset;
            *self = Self {
                expected_offset: end,
                sequential_bytes: u64::from(span.length),
                prefetched_until: end,
            };
            return if was_reading_ahead {
                ReadaheadHint::Cancel
            } else {
                ReadaheadHint::Unchanged
            };
        }
        self.expected_offset = self.expected_offset.max(end);
        self.sequential_bytes = self.sequential_bytes.saturating_add(span.length.into());
        // Requires at least two reads: a single one is not a readahead.
        if self.sequential_bytes < MIN_SEQUENTIAL.max(2 * u64::from(span.length)) {
            return ReadaheadHint::Unchanged;
        }
        let window = self.sequential_bytes.clamp(MIN_WINDOW, MAX_WINDOW);
        self.prefetched_until = self.prefetched_until.max(self.expected_offset);
        let until = self.expected_offset.saturating_add(window).min(size);
        // Advances in steps of at least half a window, to avoid tiny ranges for every read.
        if until < self.prefetched_until.saturating_add(window / 2) && until < size
            || until <= self.prefetched_until
        {
            return ReadaheadHint::Unchanged;
        }
        let length = u32::try_from(until - self.prefetched_until).unwrap_or(u32::MAX);
        let ahead = Span { offset: self.prefetched_until, length };
        self.prefetched_until = until;
        ReadaheadHint::Prefetch(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    fn read(readahead: &mut Readahead, offset: u64, length: u32) -> ReadaheadHint {
        readahead.record(Span { offset, length }, SIZE)
    }

    /// Returns the total number of bytes read ahead, and the number of ranges, for `reads`
    /// sequential reads of `length` bytes.
    fn ahead(start: u64, length: u32, reads: u64) -> (u64, u64) {
        let mut readahead = Readahead::default();
        let (mut bytes, mut times, mut reached) = (0, 0, 0);
        for number in 0..reads {
            let hint = read(&mut readahead, start + number * u64::from(length), length);
            if let ReadaheadHint::Prefetch(span) = hint {
                assert!(reached <= span.offset, "nothing is read ahead twice");
                assert!(span.end() <= SIZE);
                assert!(span.offset >= start + (number + 1) * u64::from(length));
                reached = span.end();
                bytes += u64::from(span.length);
                times += 1;
            }
        }
        (bytes, times)
    }

    #[test]
    fn sequential_reads_start_readahead() {
        let (bytes, times) = ahead(5 << 20, 4096, 10_000);
        assert!((36 << 20..42 << 20).contains(&bytes), "{bytes}");
        assert!((30..60).contains(&times), "{times}");
        let (bytes, _) = ahead(0, 256 * 1024, 100);
        assert!((20 << 20..28 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn readahead_ends_at_the_end_of_the_export() {
        let (bytes, times) = ahead(SIZE - (1 << 20), 64 * 1024, 16);
        assert!(bytes <= 1 << 20 && times > 0, "{bytes} {times}");
    }

    #[test]
    fn few_reads_start_no_readahead() {
        assert_eq!(ahead(1 << 20, 4096, 3), (0, 0));
        assert_eq!(ahead(1 << 25, 32 << 20, 1), (0, 0));
    }

    #[test]
    fn random_reads_start_no_readahead() {
        let mut readahead = Readahead::default();
        for number in 0_u64..1000 {
            let offset = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % SIZE / 4096 * 4096;
            assert!(!matches!(read(&mut readahead, offset, 4096), ReadaheadHint::Prefetch(_)));
        }
    }

    #[test]
    fn seek_cancels_readahead() {
        let mut readahead = Readahead::default();
        let hints: Vec<_> =
            (0..40).map(|number| read(&mut readahead, number * 65_536, 65_536)).collect();
        assert!(hints.iter().any(|hint| matches!(hint, ReadaheadHint::Prefetch(_))));
        assert_eq!(read(&mut readahead, 500 << 20, 4096), ReadaheadHint::Cancel);
        assert_eq!(read(&mut readahead, 700 << 20, 4096), ReadaheadHint::Unchanged);
    }

    #[test]
    fn slightly_reordered_reads_count_as_sequential() {
        let mut readahead = Readahead::default();
        let mut bytes = 0;
        for pair in 0..50 {
            for number in [2 * pair + 1, 2 * pair] {
                if let ReadaheadHint::Prefetch(span) = read(&mut readahead, number * 65_536, 65_536)
                {
                    bytes += u64::from(span.length);
                }
            }
        }
        assert!(bytes > 4 << 20, "{bytes}");
    }
}
