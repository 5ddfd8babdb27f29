//! Encoding of replies: a simple reply, or the chunks of a structured one.

use super::send_queue::SendQueue;
use crate::error::Refusal;
use crate::wire::reply::{
    ChunkHeader, ErrorCode, ExtendedChunkHeader, Extent, ReplyFlags, ReplyType, SimpleReply,
    encode_block_status, encode_block_status_ext, encode_error,
};
use crate::wire::request::{Cookie, Request};
use crate::{ReplyMode, Segment, Span};

/// Encoder of the reply to one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct ReplyEncoder {
    cookie: Cookie,
    offset: u64,
    mode: ReplyMode,
}

impl ReplyEncoder {
    /// Creates the encoder of the reply to `request`.
    pub(super) fn new(request: &Request, mode: ReplyMode) -> Self {
        Self { cookie: request.cookie, offset: request.offset, mode }
    }

    /// Returns true if replies are simple. The data of a read must then be written at once, after
    /// all of it has been read successfully: a simple reply cannot report an error after its
    /// header.
    pub(super) fn is_simple(self) -> bool {
        self.mode == ReplyMode::Simple
    }

    /// Writes data of a read: `segments`, which fill `span`. Uses at most one content chunk if
    /// `whole`, and ends the reply if `last`.
    pub(super) fn data(
        self,
        out: &mut SendQueue,
        span: Span,
        whole: bool,
        last: bool,
        segments: &mut Vec<Segment>,
    ) {
        let is_zeros = |segment: &Segment| matches!(segment, Segment::Zeros(_));
        let offset = span.offset;
        if self.mode == ReplyMode::Simple {
            self.simple(out, ErrorCode::OK);
            segments.drain(..).for_each(|segment| out.push_segment(segment));
        } else if span.length == 0 {
            self.done(out);
        } else if segments.iter().all(is_zeros) {
            segments.clear();
            self.content_chunk(out, Chunk::Hole { offset, length: span.length }, last);
        } else if whole || !segments.iter().any(is_zeros) {
            // "If the area being read contains both data and a hole, the server MUST use
            // NBD_REPLY_TYPE_OFFSET_DATA with the zeroes explicitly present."
            self.data_chunk_header(out, offset, span.length, last);
            segments.drain(..).for_each(|segment| out.push_segment(segment));
        } else {
            let chunks = split_into_chunks(span, std::mem::take(segments));
            let mut left = chunks.len();
            for chunk in chunks {
                left -= 1;
                self.content_chunk(out, chunk, last && left == 0);
            }
        }
    }

    /// Ends a successful reply without further content.
    pub(super) fn done(self, out: &mut SendQueue) {
        match self.mode {
            ReplyMode::Simple => self.simple(out, ErrorCode::OK),
            _ => self.chunk(out, ReplyType::NONE, true, 0, &[]),
        }
    }

    /// Writes the extents of each metadata context, given with the context's ID, and ends the
    /// reply.
    pub(super) fn status(self, out: &mut SendQueue, contexts: &[(u32, Vec<Extent>)]) {
        let mut left = contexts.len();
        for (id, extents) in contexts {
            left -= 1;
            let (kind, payload) = match self.mode {
                ReplyMode::Extended => {
                    (ReplyType::BLOCK_STATUS_EXT, encode_block_status_ext(*id, extents))
                }
                _ => (ReplyType::BLOCK_STATUS, encode_block_status(*id, extents)),
            };
            // There may be millions of extents, so the payload is not copied into the buffer of
            // headers.
            let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
            self.chunk(out, kind, left == 0, length, &[]);
            out.push_segment(Segment::Data(payload.into()));
        }
    }

    /// Writes an error reply.
    pub(super) fn refuse(self, out: &mut SendQueue, refusal: &Refusal) {
        match self.mode {
            ReplyMode::Simple => self.simple(out, refusal.code),
            // "MUST NOT use a simple reply for NBD_CMD_READ", and "SHOULD prefer sending
            // errors via a structured reply" for the others.
            ReplyMode::Structured | ReplyMode::Extended => {
                let kind = match refusal.offset {
                    Some(_) => ReplyType::ERROR_OFFSET,
                    None => ReplyType::ERROR,
                };
                let payload = encode_error(refusal.code, refusal.message, refusal.offset);
                self.chunk(out, kind, true, 0, &payload);
            }
        }
    }

    fn simple(self, out: &mut SendQueue, error: ErrorCode) {
        out.push(&SimpleReply { error, cookie: self.cookie }.encode());
    }

    fn content_chunk(self, out: &mut SendQueue, chunk: Chunk, last: bool) {
        match chunk {
            Chunk::Hole { offset, length } => {
                let mut payload = [0; 12];
                let (offset_field, length_field) = payload.split_at_mut(8);
                offset_field.copy_from_slice(&offset.to_be_bytes());
                length_field.copy_from_slice(&length.to_be_bytes());
                self.chunk(out, ReplyType::OFFSET_HOLE, last, 0, &payload);
            }
            Chunk::Data { offset, segments } => {
                let length: usize = segments.iter().map(Segment::len).sum();
                self.data_chunk_header(
                    out,
                    offset,
                    u32::try_from(length).unwrap_or(u32::MAX),
                    last,
                );
                segments.into_iter().for_each(|segment| out.push_segment(segment));
            }
        }
    }

    /// Writes the header of a data chunk, up to and including its offset; `length` bytes of data
    /// must follow.
    fn data_chunk_header(self, out: &mut SendQueue, offset: u64, length: u32, last: bool) {
        self.chunk(out, ReplyType::OFFSET_DATA, last, length, &offset.to_be_bytes());
    }

    /// Writes a chunk's header and `payload`; the caller appends `follows` more bytes of payload.
    fn chunk(self, out: &mut SendQueue, kind: ReplyType, last: bool, follows: u32, payload: &[u8]) {
        // Cannot overflow: at most the maximum payload and an offset.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).saturating_add(follows);
        let flags = if last { ReplyFlags::DONE } else { ReplyFlags::default() };
        let chunk = ChunkHeader { flags, kind, cookie: self.cookie, length };
        match self.mode {
            ReplyMode::Extended => {
                out.push(&ExtendedChunkHeader { chunk, offset: self.offset }.encode());
            }
            _ => out.push(&chunk.encode()),
        }
        out.push(payload);
    }
}

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
