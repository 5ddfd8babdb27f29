//! Division of a read's data into the content chunks of a structured reply.

use crate::{Segment, Span};

/// Alignment of the start and end of chunks where possible, in bytes ("the server SHOULD use chunks
/// with lengths and offsets as an integer multiple of 512 bytes").
pub(super) const ALIGNMENT: u64 = 512;

/// A content chunk of a structured reply.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// A run of zeros that is not transferred.
    Hole { offset: u64, length: u32 },
    /// Literal data: consecutive segments.
    Data { offset: u64, segments: Vec<Segment> },
}

/// Divides `segments`, which fill `span`, into as few chunks as their zeros allow.
pub(super) fn split_into_chunks(span: Span, segments: Vec<Segment>) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut offset = span.offset;
    for segment in merge_zeros(segments) {
        let end = offset + segment.len() as u64;
        match segment {
            Segment::Zeros(_) => push_zeros(&mut chunks, span, offset, end),
            data => push_data(&mut chunks, offset, data),
        }
        offset = end;
    }
    chunks
}

/// Merges adjacent zero segments. A hole that spans several blocks then needs no alignment at the
/// block boundaries.
fn merge_zeros(segments: Vec<Segment>) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::with_capacity(segments.len());
    for segment in segments {
        match (joined.last_mut(), segment) {
            (_, segment) if segment.is_empty() => {}
            // Cannot overflow: together they are within a request, whose length fits in 32 bits.
            (Some(Segment::Zeros(length)), Segment::Zeros(more)) => *length += more,
            (_, segment) => joined.push(segment),
        }
    }
    joined
}

/// Adds zeros: as a hole between boundaries that are aligned or the request's own, and as data for
/// the remainders.
fn push_zeros(chunks: &mut Vec<Chunk>, span: Span, start: u64, end: u64) {
    let hole_start = match start {
        start if start == span.offset => start,
        start => start.next_multiple_of(ALIGNMENT).min(end),
    };
    let hole_end = match end {
        end if end == span.end() => end,
        end => (end - end % ALIGNMENT).max(hole_start),
    };
    push_data(chunks, start, zeros(hole_start - start));
    if let (Segment::Zeros(length @ 1..), offset) = (zeros(hole_end - hole_start), hole_start) {
        chunks.push(Chunk::Hole { offset, length });
    }
    push_data(chunks, hole_end, zeros(end - hole_end));
}

fn push_data(chunks: &mut Vec<Chunk>, offset: u64, data: Segment) {
    if data.is_empty() {
        return;
    }
    match chunks.last_mut() {
        Some(Chunk::Data { segments, .. }) => segments.push(data),
        _ => chunks.push(Chunk::Data { offset, segments: vec![data] }),
    }
}

/// Returns a zero segment; a length within a request fits in 32 bits.
fn zeros(length: u64) -> Segment {
    Segment::Zeros(u32::try_from(length).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn data(length: usize) -> Segment {
        Segment::Data(Bytes::from(vec![1; length]))
    }

    fn hole(offset: u64, length: u32) -> Chunk {
        Chunk::Hole { offset, length }
    }

    fn filled(offset: u64, segments: Vec<Segment>) -> Chunk {
        Chunk::Data { offset, segments }
    }

    #[test]
    fn adjacent_segments_of_a_kind_form_one_chunk() {
        let span = Span { offset: 1024, length: 4096 };
        let segments = vec![data(512), data(512), zeros(1024), zeros(1024), data(1024)];
        assert_eq!(
            split_into_chunks(span, segments),
            [
                filled(1024, vec![data(512), data(512)]),
                hole(2048, 2048),
                filled(4096, vec![data(1024)]),
            ]
        );
    }

    #[test]
    fn holes_shrink_to_aligned_boundaries() {
        let span = Span { offset: 0, length: 3000 };
        assert_eq!(
            split_into_chunks(span, vec![data(100), zeros(1500), data(1400)]),
            [
                filled(0, vec![data(100), zeros(412)]),
                hole(512, 1024),
                filled(1536, vec![zeros(64), data(1400)]),
            ]
        );
        // A run of zeros that contains no two aligned boundaries becomes data.
        assert_eq!(
            split_into_chunks(span, vec![data(100), zeros(500), data(2400)]),
            [filled(0, vec![data(100), zeros(412), zeros(88), data(2400)])]
        );
    }

    #[test]
    fn holes_span_block_boundaries() {
        let span = Span { offset: 0, length: 3000 };
        assert_eq!(
            split_into_chunks(span, vec![zeros(700), zeros(0), zeros(700), zeros(1600)]),
            [hole(0, 3000)]
        );
        assert_eq!(
            split_into_chunks(span, vec![data(100), zeros(900), zeros(1000), data(1000)]),
            [
                filled(0, vec![data(100), zeros(412)]),
                hole(512, 1024),
                filled(1536, vec![zeros(464), data(1000)]),
            ]
        );
    }

    #[test]
    fn ends_of_the_request_need_no_alignment() {
        let span = Span { offset: 7, length: 100 };
        assert_eq!(split_into_chunks(span, vec![zeros(100)]), [hole(7, 100)]);
        assert_eq!(split_into_chunks(Span { length: 0, ..span }, vec![]), []);
    }
}
