//! The duty to answer a request, and the answer.

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::chunks::{self, Chunk};
use crate::nbd::budget::Hold;
use crate::nbd::error::Refusal;
use crate::nbd::wire::reply::{
    ChunkHeader, ErrorCode, ReplyFlags, ReplyType, SimpleReply, error_payload,
};
use crate::nbd::wire::request::Cookie;
use crate::nbd::{ReplyMode, Segment, Span};

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

/// A finished answer. It keeps its slot and its memory until it is sent.
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
}

/// The duty to answer one request. If it is dropped, the answer is an I/O error: no
/// client waits for ever because a task panicked.
#[derive(Debug)]
pub(super) struct Ticket {
    cookie: Cookie,
    mode: ReplyMode,
    replies: Option<mpsc::UnboundedSender<Reply>>,
    slot: Option<OwnedSemaphorePermit>,
    hold: Option<Hold>,
}

const ABANDONED: Refusal =
    Refusal::new(ErrorCode::IO, "the server failed; its log says how, and it is its fault");

impl Ticket {
    pub(super) fn new(
        cookie: Cookie,
        mode: ReplyMode,
        replies: mpsc::UnboundedSender<Reply>,
        slot: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self { cookie, mode, replies: Some(replies), slot, hold: None }
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
            ReplyMode::Structured if whole => self.content(chunks::whole(span, segments)),
            ReplyMode::Structured => self.content(chunks::cut(span, segments)),
        };
        self.answer(frames);
    }

    /// Answers that there was nothing to do, or that it is done.
    pub(super) fn done(mut self) {
        let frame = match self.mode {
            ReplyMode::Simple => self.simple(ErrorCode::OK, Vec::new()),
            ReplyMode::Structured => self.chunk(ReplyType::NONE, true, &[], Vec::new()),
        };
        self.answer(vec![frame]);
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

    /// The whole answer is here, so nothing can fail any more and the last content chunk
    /// can say that it is the last.
    fn content(&self, chunks: Vec<Chunk>) -> Vec<Frame> {
        let Some(last) = chunks.len().checked_sub(1) else {
            return vec![self.chunk(ReplyType::NONE, true, &[], Vec::new())];
        };
        chunks
            .into_iter()
            .enumerate()
            .map(|(position, chunk)| match chunk {
                Chunk::Hole { offset, length } => {
                    let mut payload = offset.to_be_bytes().to_vec();
                    payload.extend(length.to_be_bytes());
                    self.chunk(ReplyType::OFFSET_HOLE, position == last, &payload, Vec::new())
                }
                Chunk::Data { offset, segments } => {
                    let payload = offset.to_be_bytes();
                    self.chunk(ReplyType::OFFSET_DATA, position == last, &payload, segments)
                }
            })
            .collect()
    }

    fn refusal(&self, refusal: &Refusal) -> Frame {
        match self.mode {
            ReplyMode::Simple => self.simple(refusal.code, Vec::new()),
            // "MUST NOT use a simple reply for NBD_CMD_READ", and "SHOULD prefer sending
            // errors via a structured reply" for the others.
            ReplyMode::Structured => {
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
        let head = [header.encode().as_slice(), payload].concat();
        Frame { head, segments }
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
