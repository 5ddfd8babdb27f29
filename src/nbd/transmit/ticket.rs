//! The duty to answer a request, and the answer.

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::assembly::Assembly;
use super::chunks::{self, Chunk};
use crate::nbd::budget::Hold;
use crate::nbd::error::Refusal;
use crate::nbd::wire::reply::{
    ChunkHeader, ErrorCode, ExtendedChunkHeader, Extent, ReplyFlags, ReplyType, SimpleReply,
    block_status_ext_payload, block_status_payload, error_payload,
};
use crate::nbd::wire::request::{Cookie, Request};
use crate::nbd::{ReadError, ReplyMode, Segment, Span};

/// A message, or what of it can't be told apart from one: a head, then an export's bytes.
#[derive(Debug)]
pub(super) struct Frame {
    head: Vec<u8>,
    segments: Vec<Segment>,
}

impl Frame {
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

/// An answer, or a part of one. The last part keeps the request's slot and memory until
/// it is sent.
#[derive(Debug)]
pub(super) struct Reply {
    frames: Vec<Frame>,
    _slot: Option<OwnedSemaphorePermit>,
    _hold: Option<Hold>,
}

impl Reply {
    pub(super) fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// One that is so many bytes long.
    #[cfg(test)]
    pub(super) fn of(length: usize) -> Self {
        let frames = vec![Frame { head: vec![0; length], segments: Vec::new() }];
        Self { frames, _slot: None, _hold: None }
    }

    /// Its length in bytes.
    pub(super) fn len(&self) -> usize {
        let segments = |frame: &Frame| frame.segments.iter().map(Segment::len).sum::<usize>();
        self.frames.iter().map(|frame| frame.head.len() + segments(frame)).sum()
    }
}

/// The duty to answer one request. If it is dropped, the answer is an I/O error: no
/// client waits for ever because a task panicked.
#[derive(Debug)]
pub(super) struct Ticket {
    cookie: Cookie,
    offset: u64,
    mode: ReplyMode,
    replies: Option<mpsc::UnboundedSender<Reply>>,
    slot: Option<OwnedSemaphorePermit>,
    hold: Option<Hold>,
}

const ABANDONED: Refusal =
    Refusal::new(ErrorCode::IO, "the server failed; its log says how, and it is its fault");

impl Ticket {
    pub(super) fn new(
        request: &Request,
        mode: ReplyMode,
        replies: mpsc::UnboundedSender<Reply>,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Self {
        let Request { cookie, offset, .. } = *request;
        Self { cookie, offset, mode, replies: Some(replies), slot, hold: None }
    }

    /// With the memory that the answer will take.
    pub(super) fn holding(mut self, hold: Hold) -> Self {
        self.hold = Some(hold);
        self
    }

    /// Answers a read of `span` with `segments`, which fill it; if `whole`, in no more
    /// than one content chunk.
    pub(super) fn data(mut self, span: Span, whole: bool, segments: Vec<Segment>) {
        let frames = match self.mode {
            ReplyMode::Simple => vec![self.simple(ErrorCode::OK, segments)],
            _ if whole => self.last_content(chunks::whole(span, segments)),
            _ => self.last_content(chunks::cut(span, segments)),
        };
        self.answer(frames);
    }

    /// Answers that there was nothing to do, or that it is done.
    pub(super) fn done(mut self) {
        let frame = match self.mode {
            ReplyMode::Simple => self.simple(ErrorCode::OK, Vec::new()),
            _ => self.chunk(ReplyType::NONE, true, &[], Vec::new()),
        };
        self.answer(vec![frame]);
    }

    /// Answers with what each metadata context says: its number, and extents.
    pub(super) fn status(mut self, contexts: &[(u32, Vec<Extent>)]) {
        let frames: Vec<_> = contexts
            .iter()
            .enumerate()
            .map(|(position, (id, extents))| {
                let (kind, payload) = match self.mode {
                    ReplyMode::Extended => {
                        (ReplyType::BLOCK_STATUS_EXT, block_status_ext_payload(*id, extents))
                    }
                    _ => (ReplyType::BLOCK_STATUS, block_status_payload(*id, extents)),
                };
                self.chunk(kind, position + 1 == contexts.len(), &payload, Vec::new())
            })
            .collect();
        if let Some(hold) = &mut self.hold {
            hold.shrink_to(frames.iter().map(|frame| frame.head.len()).sum());
        }
        self.answer(frames);
    }

    /// Answers with an error.
    pub(super) fn refuse(mut self, refusal: &Refusal) {
        let frame = self.refusal(refusal);
        self.answer(vec![frame]);
    }

    /// Owes no answer: the request was one that gets none.
    pub(super) fn withdraw(mut self) {
        self.replies = None;
    }

    fn simple(&self, error: ErrorCode, segments: Vec<Segment>) -> Frame {
        let head = SimpleReply { error, cookie: self.cookie }.encode().to_vec();
        Frame { head, segments }
    }

    /// The rest of the answer is here, so nothing can fail any more and the last content
    /// chunk can say that it is the last.
    fn last_content(&self, chunks: Vec<Chunk>) -> Vec<Frame> {
        let Some(last) = chunks.len().checked_sub(1) else {
            return vec![self.chunk(ReplyType::NONE, true, &[], Vec::new())];
        };
        let number = chunks.into_iter().enumerate();
        number.map(|(position, chunk)| self.content(chunk, position == last)).collect()
    }

    fn content(&self, chunk: Chunk, last: bool) -> Frame {
        match chunk {
            Chunk::Hole { offset, length } => {
                let payload = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
                self.chunk(ReplyType::OFFSET_HOLE, last, &payload, Vec::new())
            }
            Chunk::Data { offset, segments } => {
                self.chunk(ReplyType::OFFSET_DATA, last, &offset.to_be_bytes(), segments)
            }
        }
    }

    fn refusal(&self, refusal: &Refusal) -> Frame {
        match self.mode {
            ReplyMode::Simple => self.simple(refusal.code, Vec::new()),
            // "MUST NOT use a simple reply for NBD_CMD_READ", and "SHOULD prefer sending
            // errors via a structured reply" for the others.
            ReplyMode::Structured | ReplyMode::Extended => {
                let kind = match refusal.offset {
                    Some(_) => ReplyType::ERROR_OFFSET,
                    None => ReplyType::ERROR,
                };
                let payload = error_payload(refusal.code, refusal.message, refusal.offset);
                self.chunk(kind, true, &payload, Vec::new())
            }
        }
    }

    fn chunk(&self, kind: ReplyType, last: bool, payload: &[u8], segments: Vec<Segment>) -> Frame {
        let length = payload.len() + segments.iter().map(Segment::len).sum::<usize>();
        let header = ChunkHeader {
            flags: if last { ReplyFlags::DONE } else { ReplyFlags::default() },
            kind,
            cookie: self.cookie,
            // At most the maximum payload and an offset.
            length: u32::try_from(length).unwrap_or(u32::MAX),
        };
        let head = match self.mode {
            ReplyMode::Extended => {
                let header = ExtendedChunkHeader { chunk: header, offset: self.offset };
                [header.encode().as_slice(), payload].concat()
            }
            _ => [header.encode().as_slice(), payload].concat(),
        };
        Frame { head, segments }
    }

    /// Sends a part of the answer; more will follow.
    fn send(&self, frames: Vec<Frame>) {
        if let Some(replies) = &self.replies {
            replies.send(Reply { frames, _slot: None, _hold: None }).unwrap_or_default();
        }
    }

    fn answer(&mut self, frames: Vec<Frame>) {
        if let Some(replies) = self.replies.take() {
            let reply = Reply { frames, _slot: self.slot.take(), _hold: self.hold.take() };
            // Nobody listens any more when the connection has failed; then nobody needs
            // the answer either.
            replies.send(reply).unwrap_or_default();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.replies.is_some() {
            let frame = self.refusal(&ABANDONED);
            self.answer(vec![frame]);
        }
    }
}

/// A read that is answered part by part where the protocol allows it, and else as one.
///
/// It guards the stream's step: an answer that isn't exactly as long as the question would
/// shift everything behind it.
#[derive(Debug)]
pub(super) struct ReadAnswer {
    ticket: Ticket,
    span: Span,
    /// Whether it has to be one content chunk, or is one simple reply anyway.
    whole: bool,
    assembly: Assembly,
    is_sound: bool,
}

/// What becomes of an answer that doesn't fit the question.
pub(super) const WRONG_PARTS: Refusal =
    Refusal::new(ErrorCode::IO, "the export didn't return exactly what was asked for");

impl ReadAnswer {
    pub(super) fn new(ticket: Ticket, span: Span, whole: bool) -> Self {
        let whole = whole || ticket.mode == ReplyMode::Simple;
        let assembly = Assembly::new(span);
        Self { ticket, span, whole, assembly, is_sound: true }
    }

    /// Takes a part, and sends it if that can be done now. What completes the answer waits
    /// for its end, so that it can say that it is the last.
    pub(super) fn part(&mut self, offset: u64, segment: Segment) {
        self.is_sound &= self.assembly.add(offset, segment);
        if !self.is_sound || self.whole || self.assembly.is_complete() {
            return;
        }
        if let Some(run) = self.assembly.take_around(offset) {
            let chunks = chunks::cut(run.span, run.segments);
            let frames = chunks.into_iter().map(|chunk| self.ticket.content(chunk, false));
            self.ticket.send(frames.collect());
        }
    }

    /// Ends the answer.
    pub(super) fn finish(mut self, result: Result<(), ReadError>) {
        if let Err(error) = result {
            return self.ticket.refuse(&error.into());
        }
        if !self.is_sound || !self.assembly.is_complete() {
            return self.ticket.refuse(&WRONG_PARTS);
        }
        let runs = self.assembly.take_all();
        if self.whole {
            let segments = runs.into_iter().flat_map(|run| run.segments).collect();
            return self.ticket.data(self.span, true, segments);
        }
        let chunks = runs.into_iter().flat_map(|run| chunks::cut(run.span, run.segments));
        let frames = self.ticket.last_content(chunks.collect());
        self.ticket.answer(frames);
    }
}
