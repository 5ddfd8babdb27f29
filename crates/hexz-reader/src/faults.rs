//! Faults found by verification, grouped by cause.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::StreamKind;
use super::error::{Error, ErrorKind};
use super::verify::VerifyStats;

/// A cause that makes parts of a stream unreadable.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Affected stream of the verified snapshot.
    pub stream: StreamKind,
    /// Error, with the file of the chain. Some errors differ only in their offset in the stream,
    /// such as those of blocks that no parent has, and of ranges that no block covers. They are
    /// grouped, and this is one of them.
    pub error: Arc<Error>,
    /// Number of affected blocks.
    pub blocks: u64,
    /// Affected ranges of the stream, in ascending order; adjacent ranges are merged.
    pub ranges: Vec<Range<u64>>,
}

impl Fault {
    /// Returns the number of affected bytes of the stream.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// Faults found so far, and the totals of the verification.
#[derive(Default)]
pub(super) struct FaultCollector {
    pub(super) summary: VerifyStats,
    by_cause: HashMap<(StreamKind, String), Fault>,
    /// Number of ranges of all faults together.
    pub(super) ranges: usize,
}

impl FaultCollector {
    pub(super) fn add(
        &mut self,
        stream: StreamKind,
        range: Range<u64>,
        blocks: u64,
        error: Arc<Error>,
    ) {
        self.summary.unreadable += range.end - range.start;
        let cause = match &error.kind {
            // These errors contain the offset in the stream, but have the same cause.
            ErrorKind::Unresolvable { .. } => "unresolvable".to_owned(),
            ErrorKind::Uncovered { .. } => "uncovered".to_owned(),
            ErrorKind::NoParentToRead { .. } => "no parent to read".to_owned(),
            ErrorKind::Ambiguous(_) => "ambiguous".to_owned(),
            _ => error.to_string(),
        };
        let fault = self.by_cause.entry((stream, cause)).or_insert_with(|| Fault {
            stream,
            error,
            blocks: 0,
            ranges: Vec::new(),
        });
        fault.blocks += blocks;
        match fault.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => {
                fault.ranges.push(range);
                self.ranges += 1;
            }
        }
    }

    /// Takes the faults, sorted by stream and start offset. Threads add ranges in any order, so
    /// these are sorted and merged, too.
    pub(super) fn take(&mut self) -> Vec<Fault> {
        self.ranges = 0;
        let mut faults: Vec<Fault> = self.by_cause.drain().map(|(_, fault)| fault).collect();
        for fault in &mut faults {
            fault.ranges.sort_unstable_by_key(|range| range.start);
            fault.ranges.dedup_by(|next, range| {
                let are_neighbours = range.end == next.start;
                if are_neighbours {
                    range.end = next.end;
                }
                are_neighbours
            });
        }
        let start = |fault: &Fault| fault.ranges.first().map(|range| range.start);
        faults.sort_by_key(|fault| (fault.stream, start(fault)));
        self.summary.faults += faults.len() as u64;
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn one(range: Range<u64>) -> Vec<Range<u64>> {
        std::iter::once(range).collect()
    }

    #[test]
    fn ranges_are_grouped_by_cause_and_sorted() {
        let path: Arc<Path> = Arc::from(Path::new("a.hxz"));
        let error = |offset| {
            let kind = ErrorKind::Invalid("it");
            Arc::new(Error { path: Arc::clone(&path), offset: Some(offset), kind })
        };
        let mut found = FaultCollector::default();
        let (main, auxiliary) = (StreamKind::Main, StreamKind::Auxiliary);
        for (stream, range, offset) in [
            (auxiliary, 0..1, 1),
            (main, 70..80, 1),
            (main, 30..40, 2),
            (main, 40..50, 2),
            (main, 80..90, 1),
            (main, 10..20, 1),
            (main, 20..30, 2),
            (main, 60..70, 1),
        ] {
            found.add(stream, range, 1, error(offset));
        }
        assert_eq!(found.ranges, 6);
        let faults: Vec<_> = found
            .take()
            .into_iter()
            .map(|fault| (fault.stream, fault.error.offset, fault.blocks, fault.ranges))
            .collect();
        assert_eq!(
            faults,
            [
                (main, Some(1), 4, vec![10..20, 60..90]),
                (main, Some(2), 3, one(20..50)),
                (auxiliary, Some(1), 1, one(0..1)),
            ]
        );
        assert_eq!((found.summary.faults, found.summary.unreadable), (3, 71));
        assert!(found.take().is_empty());
    }
}
