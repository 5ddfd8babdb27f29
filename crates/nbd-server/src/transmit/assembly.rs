//! Assembly of a read's data from parts that arrive in any order.

use std::collections::BTreeMap;

use super::reply_encoder::ALIGNMENT;
use crate::{Segment, Span};

/// Parts of one read that have arrived and have not been sent yet.
#[derive(Debug)]
pub(super) struct Assembly {
    span: Span,
    /// Unsent segments, by offset in the export.
    unsent: BTreeMap<u64, Segment>,
    /// All ranges received so far: end by start.
    received: BTreeMap<u64, u64>,
    /// Total length of the received ranges, in bytes.
    received_bytes: u64,
}

/// Consecutive segments that fill a span.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SegmentRun {
    pub(super) span: Span,
    pub(super) segments: Vec<Segment>,
}

impl Assembly {
    pub(super) fn new(span: Span) -> Self {
        Self { span, unsent: BTreeMap::new(), received: BTreeMap::new(), received_bytes: 0 }
    }

    /// Adds a part. Returns `false` if it is not within the read, or overlaps an earlier part.
    #[must_use]
    pub(super) fn add(&mut self, offset: u64, segment: Segment) -> bool {
        if segment.is_empty() {
            return true;
        }
        let end = offset + segment.len() as u64;
        let before = self.received.range(..end).next_back();
        let overlaps = before.is_some_and(|(_, &before_ends)| before_ends > offset);
        if offset < self.span.offset || end > self.span.end() || overlaps {
            return false;
        }
        self.received.insert(offset, end);
        self.received_bytes += end - offset;
        self.unsent.insert(offset, segment);
        true
    }

    /// Returns true if every byte has been received.
    pub(super) fn is_complete(&self) -> bool {
        self.received_bytes == u64::from(self.span.length)
    }

    /// Takes the longest run around offset `at` whose ends are aligned or coincide with the read's
    /// own. The remainders at its ends stay until their neighbors arrive.
    pub(super) fn take_around(&mut self, at: u64) -> Option<SegmentRun> {
        let (mut start, mut end) = (at, at);
        for (&offset, segment) in self.unsent.range(..=at).rev() {
            let segment_end = offset + segment.len() as u64;
            if segment_end < start {
                break;
            }
            start = offset;
            end = end.max(segment_end);
        }
        for (&offset, segment) in self.unsent.range(at..) {
            if offset > end {
                break;
            }
            end = end.max(offset + segment.len() as u64);
        }
        if start != self.span.offset {
            start = start.next_multiple_of(ALIGNMENT);
        }
        if end != self.span.end() {
            end -= end % ALIGNMENT;
        }
        self.take(start, end)
    }

    /// Takes all unsent segments, as runs without gaps. If the read is complete, this is everything
    /// that has not been sent.
    pub(super) fn take_all(&mut self) -> Vec<SegmentRun> {
        let mut runs = Vec::new();
        while let Some((&start, _)) = self.unsent.first_key_value() {
            let mut end = start;
            for (&offset, segment) in &self.unsent {
                if offset != end {
                    break;
                }
                end += segment.len() as u64;
            }
            runs.extend(self.take(start, end));
        }
        runs
    }

    /// Takes the unsent bytes from `start` to `end`, splitting segments at both ends.
    fn take(&mut self, start: u64, end: u64) -> Option<SegmentRun> {
        let length = end.checked_sub(start).filter(|&length| length > 0)?;
        self.split_segment_at(start);
        self.split_segment_at(end);
        let mut taken = self.unsent.split_off(&start);
        self.unsent.append(&mut taken.split_off(&end));
        Some(SegmentRun {
            // Cannot overflow: part of a read, whose length fits in 32 bits.
            span: Span { offset: start, length: u32::try_from(length).unwrap_or(u32::MAX) },
            segments: taken.into_values().collect(),
        })
    }

    fn split_segment_at(&mut self, boundary: u64) {
        let across = self.unsent.range(..boundary).next_back().map(|(&offset, _)| offset);
        if let Some(offset) = across
            && let Some(segment) = self.unsent.remove(&offset)
        {
            let (first, rest) = segment.split_at(boundary - offset);
            self.unsent.insert(offset, first);
            if !rest.is_empty() {
                self.unsent.insert(boundary, rest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn data(length: usize) -> Segment {
        Segment::Data(Bytes::from(vec![1; length]))
    }

    fn boundaries(run: Option<SegmentRun>) -> Option<(u64, u64)> {
        run.map(|run| {
            let length: usize = run.segments.iter().map(Segment::len).sum();
            assert_eq!(length, run.span.length as usize);
            (run.span.offset, run.span.end())
        })
    }

    #[test]
    fn runs_end_at_aligned_boundaries() {
        let mut assembly = Assembly::new(Span { offset: 100, length: 3000 });
        assert!(assembly.add(700, data(1000)));
        assert_eq!(boundaries(assembly.take_around(700)), Some((1024, 1536)));
        assert!(assembly.add(100, data(600)));
        assert_eq!(boundaries(assembly.take_around(100)), Some((100, 1024)));
        assert!(!assembly.is_complete());
        assert!(assembly.add(1700, Segment::Zeros(1400)));
        assert!(assembly.is_complete());
        assert_eq!(boundaries(assembly.take_around(1700)), Some((1536, 3100)));
        assert!(assembly.take_all().is_empty());
    }

    #[test]
    fn small_parts_wait_for_their_neighbors() {
        let mut assembly = Assembly::new(Span { offset: 0, length: 1024 });
        assert!(assembly.add(200, data(200)));
        assert_eq!(assembly.take_around(200), None);
        assert!(assembly.add(400, data(624)));
        assert_eq!(boundaries(assembly.take_around(400)), Some((512, 1024)));
        assert!(assembly.add(0, data(200)));
        assert!(assembly.is_complete());
        assert_eq!(boundaries(assembly.take_around(0)), Some((0, 512)));
    }

    #[test]
    fn overlapping_and_out_of_range_parts_are_rejected() {
        let mut assembly = Assembly::new(Span { offset: 100, length: 100 });
        assert!(assembly.add(120, data(10)));
        for (offset, length) in
            [(99, 1), (199, 2), (120, 10), (110, 11), (129, 1), (125, 2), (110, 40)]
        {
            assert!(!assembly.add(offset, data(length)), "{offset} {length}");
        }
        assert!(assembly.add(110, data(10)) && assembly.add(130, data(1)));
    }
}
