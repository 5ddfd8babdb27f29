//! Detection of sequential reads, for readahead.

use crate::Span;

/// Maximum distance between the end of the last read and the start of the next one in a sequence,
/// in bytes. Clients with many requests in flight send them slightly out of order.
const SLACK: u64 = 1024 * 1024;

/// Number of bytes that must be read in sequence before readahead starts: a client that looks at a
/// few blocks of a file will not read all of it.
const ENOUGH: u64 = 16 * 1024;

/// Minimum and maximum size of the readahead window, in bytes.
const LEAST: u64 = 128 * 1024;
const MOST: u64 = 2 * 1024 * 1024;

/// Readahead state of one client.
#[derive(Debug, Default)]
pub(super) struct Sequence {
    /// Offset at which the next sequential read would start.
    next: u64,
    /// Number of bytes read in sequence.
    run: u64,
    /// Offset up to which data has been read ahead.
    ahead: u64,
}

/// Readahead decision after a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outlook {
    /// Range to read ahead.
    Ahead(Span),
    /// No change.
    Unchanged,
    /// End of the sequence: a running readahead is of no use any more.
    Elsewhere,
}

impl Sequence {
    /// Records a read of an export of `size` bytes, and returns the readahead decision.
    pub(super) fn note(&mut self, span: Span, size: u64) -> Outlook {
        let end = span.end();
        if span.offset.abs_diff(self.next) > SLACK {
            let was_reading_ahead = self.ahead > self.next;
            *self = Self { next: end, run: u64::from(span.length), ahead: end };
            return if was_reading_ahead { Outlook::Elsewhere } else { Outlook::Unchanged };
        }
        self.next = self.next.max(end);
        self.run = self.run.saturating_add(span.length.into());
        // Requires at least two reads: a single one is not a sequence.
        if self.run < ENOUGH.max(2 * u64::from(span.length)) {
            return Outlook::Unchanged;
        }
        let window = self.run.clamp(LEAST, MOST);
        self.ahead = self.ahead.max(self.next);
        let until = self.next.saturating_add(window).min(size);
        // Advances in steps of at least half a window, to avoid tiny ranges for every read.
        if until < self.ahead.saturating_add(window / 2) && until < size || until <= self.ahead {
            return Outlook::Unchanged;
        }
        let length = u32::try_from(until - self.ahead).unwrap_or(u32::MAX);
        let ahead = Span { offset: self.ahead, length };
        self.ahead = until;
        Outlook::Ahead(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    fn read(sequence: &mut Sequence, offset: u64, length: u32) -> Outlook {
        sequence.note(Span { offset, length }, SIZE)
    }

    /// Returns the total number of bytes read ahead, and the number of ranges, for `reads`
    /// sequential reads of `length` bytes.
    fn ahead(start: u64, length: u32, reads: u64) -> (u64, u64) {
        let mut sequence = Sequence::default();
        let (mut bytes, mut times, mut reached) = (0, 0, 0);
        for number in 0..reads {
            let outlook = read(&mut sequence, start + number * u64::from(length), length);
            if let Outlook::Ahead(span) = outlook {
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
    fn who_reads_in_order_is_read_ahead_of() {
        let (bytes, times) = ahead(5 << 20, 4096, 10_000);
        assert!((36 << 20..42 << 20).contains(&bytes), "{bytes}");
        assert!((30..60).contains(&times), "{times}");
        let (bytes, _) = ahead(0, 256 * 1024, 100);
        assert!((20 << 20..28 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn it_ends_with_the_export() {
        let (bytes, times) = ahead(SIZE - (1 << 20), 64 * 1024, 16);
        assert!(bytes <= 1 << 20 && times > 0, "{bytes} {times}");
    }

    #[test]
    fn a_few_reads_at_one_place_are_no_sequence() {
        assert_eq!(ahead(1 << 20, 4096, 3), (0, 0));
        assert_eq!(ahead(1 << 25, 32 << 20, 1), (0, 0));
    }

    #[test]
    fn random_reads_are_no_sequence() {
        let mut sequence = Sequence::default();
        for number in 0_u64..1000 {
            let offset = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % SIZE / 4096 * 4096;
            assert!(!matches!(read(&mut sequence, offset, 4096), Outlook::Ahead(_)));
        }
    }

    #[test]
    fn it_stops_at_once() {
        let mut sequence = Sequence::default();
        let outlooks: Vec<_> =
            (0..40).map(|number| read(&mut sequence, number * 65_536, 65_536)).collect();
        assert!(outlooks.iter().any(|outlook| matches!(outlook, Outlook::Ahead(_))));
        assert_eq!(read(&mut sequence, 500 << 20, 4096), Outlook::Elsewhere);
        assert_eq!(read(&mut sequence, 700 << 20, 4096), Outlook::Unchanged);
    }

    #[test]
    fn order_need_not_be_strict() {
        let mut sequence = Sequence::default();
        let mut bytes = 0;
        for pair in 0..50 {
            for number in [2 * pair + 1, 2 * pair] {
                if let Outlook::Ahead(span) = read(&mut sequence, number * 65_536, 65_536) {
                    bytes += u64::from(span.length);
                }
            }
        }
        assert!(bytes > 4 << 20, "{bytes}");
    }
}
