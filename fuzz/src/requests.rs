//! Transmission: every request has one answer with its cookie, whatever came before it, and
//! what is in it is the export's.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use nbd_server::budget::Budget;
use nbd_server::{
    CloseReason, Negotiated, ReplyMode, SelectedContext, SessionError, SessionStats,
    TransmitLimits, transmit,
};

use crate::export::{Cell, Pattern, byte_at};
use crate::replies::{Bytes, Chunk, Content, chunk, simple_reply};
use crate::script::{Script, run};

const MAX_PAYLOAD: u64 = 32 << 20;
/// What the reads of one input may ask for together: more would only be slow.
const MOST_READ: u64 = 40 << 20;

const DF: u16 = 1 << 2;
const REQ_ONE: u16 = 1 << 3;
const PAYLOAD_LEN: u16 = 1 << 5;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const EOVERFLOW: u32 = 75;

#[derive(Debug, Arbitrary)]
enum Size {
    Usual(u32),
    Any(u64),
}

/// What a client sends: mostly requests that make sense, or nearly.
#[derive(Debug, Arbitrary)]
enum Said<'a> {
    /// Of a range within the export, if it isn't too long.
    Read {
        at: u32,
        length: u32,
        flags: Flags,
    },
    Short {
        at: u32,
        length: u16,
    },
    Status {
        at: u32,
        length: u32,
        one: bool,
    },
    /// With a payload that says of which contexts.
    StatusOf {
        at: u32,
        length: u32,
        ids: Vec<u8>,
        behind: &'a [u8],
    },
    Any {
        command: u8,
        flags: Flags,
        offset: u64,
        length: u64,
        payload: &'a [u8],
    },
    /// With the payload that its length promises.
    Write {
        at: u32,
        payload: &'a [u8],
    },
    Raw(&'a [u8]),
}

#[derive(Debug, Arbitrary)]
enum Flags {
    None,
    Some(u8),
    Any(u16),
}

impl Flags {
    fn number(&self) -> u16 {
        match self {
            Self::None => 0,
            Self::Some(flags) => 1 << (flags % 8),
            Self::Any(flags) => *flags,
        }
    }
}

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    mode: u8,
    contexts: u8,
    size: Size,
    layout: &'a [u8],
    pieces: &'a [u8],
    /// After how many looks the server shuts down, if at all.
    shutdown: Option<u8>,
    said: Vec<Said<'a>>,
}

/// What was agreed on.
struct Session {
    mode: ReplyMode,
    contexts: Vec<SelectedContext>,
    size: u64,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mode = match input.mode % 3 {
        0 => ReplyMode::Simple,
        1 => ReplyMode::Structured,
        _ => ReplyMode::Extended,
    };
    let selected = [(1, 0), (2, 1)].into_iter().enumerate();
    let selected =
        selected.filter(|(n, _)| mode != ReplyMode::Simple && input.contexts >> n & 1 == 0);
    let contexts = selected.map(|(_, (id, position))| SelectedContext { id, position }).collect();
    let size = match input.size {
        Size::Usual(size) => u64::from(size) % 2_000_000,
        Size::Any(size) => size >> 1,
    };
    let session = Session { mode, contexts, size };
    let bytes = session.encode(&input.said);
    let Some((asked, ending)) = session.asked(&bytes) else { return };

    let export = Arc::new(Pattern::new(size, input.layout));
    let chosen = Negotiated {
        export: Arc::clone(&export),
        reply_mode: mode,
        contexts: session.contexts.clone(),
    };
    let minute = Duration::from_secs(60);
    let budget = Budget::new(0, u32::MAX);
    let limits = TransmitLimits { stall: minute, drain: minute, ..TransmitLimits::new(budget) };
    let mut looks = input.shutdown;
    let shutdown = poll_fn(|_| match &mut looks {
        Some(0) => Poll::Ready(()),
        Some(left) => {
            *left -= 1;
            Poll::Pending
        }
        None => Poll::Pending,
    });
    let mut script = Script::new(&bytes, input.pieces);
    let outcome = run(transmit(&mut script, chosen, &limits, shutdown));
    let has_shut_down =
        matches!(&outcome, Ok(SessionStats { close_reason: CloseReason::ShutDown, .. }));

    let answers = Answers { session: &session, export: &export, asked: &asked };
    let count = answers.judge(&script.output);
    if let Ok(SessionStats { requests, .. }) = &outcome {
        assert_eq!(*requests, count as u64);
    }
    if !has_shut_down {
        ending.judge(&outcome, count, &asked);
    }
}

/// One request as it was sent.
#[derive(Debug)]
struct Asked {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u64,
    /// What is right: nothing but success, or this error.
    refusal: Option<u32>,
    /// For block status: the numbers of the contexts, and how far.
    status: Option<(Vec<u32>, u64)>,
    /// Whether its payload was cut short; then nobody has to answer it.
    is_cut: bool,
}

/// How a client's bytes end.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    HungUp,
    Disconnected,
    /// In the middle of a message, out of step, or with too much.
    Broken,
}

impl Ending {
    fn judge(&self, outcome: &Result<SessionStats, SessionError>, count: usize, asked: &[Asked]) {
        match (self, outcome) {
            (Self::HungUp, Ok(SessionStats { close_reason: CloseReason::StreamClosed, .. }))
            | (
                Self::Disconnected,
                Ok(SessionStats { close_reason: CloseReason::Disconnected, .. }),
            ) => {
                assert_eq!(count, asked.len());
            }
            (Self::Broken, Err(_)) => {
                let needed = asked.iter().filter(|request| !request.is_cut).count();
                assert!(count >= needed, "{count} answers to {needed} of {asked:?}: {outcome:?}");
            }
            other => panic!("ended as {other:?}"),
        }
    }
}

impl Session {
    fn is_extended(&self) -> bool {
        self.mode == ReplyMode::Extended
    }

    fn encode(&self, said: &[Said<'_>]) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, said) in said.iter().enumerate() {
            // Cookies are never the same, and look like anything.
            let cookie = (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut push = |command: u16, flags: u16, offset: u64, length: u64, payload: &[u8]| {
                let magic: u32 = if self.is_extended() { 0x21e4_1c71 } else { 0x2560_9513 };
                out.extend(magic.to_be_bytes());
                out.extend(flags.to_be_bytes());
                out.extend(command.to_be_bytes());
                out.extend(cookie.to_be_bytes());
                out.extend(offset.to_be_bytes());
                match self.is_extended() {
                    true => out.extend(length.to_be_bytes()),
                    false => out.extend((length as u32).to_be_bytes()),
                }
                out.extend(payload);
            };
            // A range within the export.
            let range = |at: u32, length: u32, most: u64| {
                let at = u64::from(at).wrapping_mul(0x1_0001) % self.size.max(1);
                (at, u64::from(length) % most.min(self.size - at.min(self.size)).saturating_add(1))
            };
            match said {
                Said::Read { at, length, flags } => {
                    let (at, length) = range(*at, *length, 700_000);
                    push(0, flags.number(), at, length, &[]);
                }
                Said::Short { at, length } => {
                    let (at, length) = range(*at, (*length).into(), 5000);
                    push(0, 0, at, length, &[]);
                }
                Said::Status { at, length, one } => {
                    let (at, length) = range(*at, *length, u64::MAX);
                    push(7, if *one { REQ_ONE } else { 0 }, at, length, &[]);
                }
                Said::StatusOf { at, length, ids, behind } => {
                    let (at, length) = range(*at, *length, u64::MAX);
                    let mut payload = length.to_be_bytes().to_vec();
                    ids.iter().for_each(|id| payload.extend(u32::from(id % 4).to_be_bytes()));
                    payload.extend(*behind);
                    push(7, PAYLOAD_LEN, at, payload.len() as u64, &payload);
                }
                Said::Any { command, flags, offset, length, payload } => {
                    push((command % 10).into(), flags.number(), *offset, *length, payload);
                }
                Said::Write { at, payload } => {
                    let flags = if self.is_extended() { PAYLOAD_LEN } else { 0 };
                    push(1, flags, (*at).into(), payload.len() as u64, payload);
                }
                Said::Raw(bytes) => out.extend(*bytes),
            }
        }
        out
    }

    /// The requests in a client's bytes, and how these end. `None` if that would only be slow,
    /// or if two requests have the same cookie.
    fn asked(&self, bytes: &[u8]) -> Option<(Vec<Asked>, Ending)> {
        let mut left = Bytes(bytes);
        let mut asked: Vec<Asked> = Vec::new();
        let mut to_read = 0;
        let head = if self.is_extended() { 32 } else { 28 };
        let magic = if self.is_extended() { 0x21e4_1c71 } else { 0x2560_9513 };
        let ending = loop {
            if left.is_empty() {
                break Ending::HungUp;
            }
            if left.0.len() < head || left.u32() != magic {
                break Ending::Broken;
            }
            let (flags, command, cookie) = (left.u16(), left.u16(), left.u64());
            let offset = left.u64();
            let length = if self.is_extended() { left.u64() } else { left.u32().into() };
            if command == 2 {
                // A payload of its own is nothing that anybody waits for, unless it is too long.
                let is_long =
                    self.is_extended() && flags & PAYLOAD_LEN != 0 && length > MAX_PAYLOAD;
                break if is_long { Ending::Broken } else { Ending::Disconnected };
            }
            let has_payload = match self.is_extended() {
                true => flags & PAYLOAD_LEN != 0,
                false => command == 1,
            };
            let payload = if has_payload { length } else { 0 };
            if payload > MAX_PAYLOAD {
                break Ending::Broken;
            }
            let is_cut = payload > left.0.len() as u64;
            let payload = left.take(left.0.len().min(payload as usize));
            let mut request = Asked {
                flags,
                command,
                cookie,
                offset,
                length,
                refusal: None,
                status: None,
                is_cut,
            };
            request.refusal = self.refusal(&mut request, payload);
            if request.command == 0 && request.refusal.is_none() {
                to_read += length;
            }
            if to_read > MOST_READ || asked.iter().any(|other| other.cookie == cookie) {
                return None;
            }
            asked.push(request);
            if is_cut {
                break Ending::Broken;
            }
        };
        Some((asked, ending))
    }

    /// Why a request has to be refused, as far as that doesn't depend on the data.
    fn refusal(&self, request: &mut Asked, payload: &[u8]) -> Option<u32> {
        let has_contexts = !self.contexts.is_empty();
        let is_simple = self.mode == ReplyMode::Simple;
        let known = match request.command {
            0 if !is_simple => DF,
            7 if self.is_extended() && has_contexts => REQ_ONE | PAYLOAD_LEN,
            7 if !is_simple => REQ_ONE,
            _ => 0,
        };
        let fits =
            |length: u64| request.offset.checked_add(length).is_some_and(|end| end <= self.size);
        match request.command {
            1 if self.is_extended() && payload.is_empty() && !request.is_cut => Some(EINVAL),
            1 | 4 | 6 => Some(EPERM),
            _ if request.flags & !known != 0 => Some(EINVAL),
            0 if !fits(request.length) => Some(EINVAL),
            0 if request.length > MAX_PAYLOAD => Some(if is_simple { EINVAL } else { EOVERFLOW }),
            0 => None,
            3 => (request.offset != 0 || request.length != 0).then_some(EINVAL),
            5 => (!fits(request.length)).then_some(EINVAL),
            7 if !has_contexts || request.is_cut => Some(EINVAL),
            7 => {
                let all: Vec<u32> = self.contexts.iter().map(|context| context.id).collect();
                let asked = match request.flags & PAYLOAD_LEN {
                    0 => Some((all, request.length)),
                    _ => status_payload(payload, &all),
                };
                let asked = asked.filter(|(_, length)| *length > 0 && fits(*length));
                request.status = asked;
                request.status.is_none().then_some(EINVAL)
            }
            _ => Some(EINVAL),
        }
    }
}

/// A length, then numbers of contexts, each once.
fn status_payload(payload: &[u8], known: &[u32]) -> Option<(Vec<u32>, u64)> {
    if payload.len() < 12 || !payload.len().is_multiple_of(4) {
        return None;
    }
    let mut payload = Bytes(payload);
    let length = payload.u64();
    let mut ids = Vec::new();
    while !payload.is_empty() {
        let id = payload.u32();
        if ids.contains(&id) || !known.contains(&id) {
            return None;
        }
        ids.push(id);
    }
    Some((ids, length))
}

/// Judges what the server has answered.
struct Answers<'a> {
    session: &'a Session,
    export: &'a Pattern,
    asked: &'a [Asked],
}

/// What has come so far in answer to one request.
#[derive(Debug, Default)]
struct Answer {
    is_done: bool,
    failed: bool,
    /// Where content is, in order of arrival.
    contents: Vec<(u64, u64)>,
    contexts: Vec<u32>,
}

impl Answers<'_> {
    /// Judges all of them; returns how many requests were answered.
    fn judge(&self, output: &[u8]) -> usize {
        let by_cookie: HashMap<u64, usize> =
            self.asked.iter().enumerate().map(|(number, asked)| (asked.cookie, number)).collect();
        let number = |cookie: u64| *by_cookie.get(&cookie).expect("a cookie that nobody sent");
        let length_of = |cookie| {
            let asked = &self.asked[number(cookie)];
            if asked.command == 0 { asked.length as usize } else { 0 }
        };
        let mut answers: Vec<Answer> = Vec::new();
        answers.resize_with(self.asked.len(), Answer::default);
        let mut output = Bytes(output);
        while !output.is_empty() {
            let chunk = match self.session.mode {
                ReplyMode::Simple => simple_reply(&mut output, length_of),
                mode => chunk(&mut output, mode),
            };
            let number = number(chunk.cookie);
            self.take(&self.asked[number], &mut answers[number], chunk);
        }
        // Whoever was answered was so to the end, and nobody before it was left out.
        let is_answered = |answer: &Answer| answer.is_done;
        let count = answers.iter().take_while(|answer| is_answered(answer)).count();
        for answer in &answers[count..] {
            assert!(
                !is_answered(answer) && answer.contents.is_empty() && answer.contexts.is_empty()
            );
        }
        count
    }

    fn take(&self, asked: &Asked, answer: &mut Answer, chunk: Chunk<'_>) {
        assert!(!answer.is_done, "something behind the last chunk");
        assert!(chunk.offset.is_none_or(|offset| offset == asked.offset));
        answer.is_done = chunk.is_last;
        match chunk.content {
            Content::Nothing => assert!(chunk.is_last),
            Content::Error { code, offset } => {
                assert!(chunk.is_last);
                answer.failed = true;
                self.error(asked, code, offset);
                return;
            }
            Content::Data { offset, data } => {
                let offset =
                    if self.session.mode == ReplyMode::Simple { asked.offset } else { offset };
                assert!(!data.is_empty());
                self.content(asked, answer, offset, data.len() as u64);
                self.compare(offset, Some(data), data.len() as u64);
            }
            Content::Hole { offset, length } => {
                assert_ne!(length, 0);
                self.content(asked, answer, offset, length);
                self.compare(offset, None, length);
            }
            Content::Status { context, extents } => self.status(asked, answer, context, &extents),
        }
        if chunk.is_last {
            self.success(asked, answer);
        }
    }

    /// Content has its place in what was asked for, and is sent once.
    fn content(&self, asked: &Asked, answer: &mut Answer, offset: u64, length: u64) {
        assert!(asked.command == 0 && asked.refusal.is_none());
        let end = offset + length;
        assert!(asked.offset <= offset && end <= asked.offset + asked.length);
        assert!(answer.contents.iter().all(|(start, until)| end <= *start || *until <= offset));
        answer.contents.push((offset, end));
        assert!(asked.flags & DF == 0 || answer.contents.len() == 1);
    }

    /// Compares content with the export; a hole has no data.
    fn compare(&self, offset: u64, data: Option<&[u8]>, length: u64) {
        for (range, cell) in self.export.parts(offset..offset + length) {
            let Some(data) = data else {
                assert!(cell.is_zeros(), "a hole where {cell:?} is");
                continue;
            };
            let part = &data[(range.start - offset) as usize..(range.end - offset) as usize];
            match cell.is_zeros() {
                true => assert!(part.iter().all(|byte| *byte == 0)),
                false => assert!(range.zip(part).all(|(at, byte)| byte_at(at) == *byte)),
            }
        }
    }

    fn status(&self, asked: &Asked, answer: &mut Answer, id: u32, extents: &[(u64, u64)]) {
        let (ids, length) = asked.status.as_ref().expect("nobody asked for a status");
        assert!(ids.contains(&id) && !answer.contexts.contains(&id));
        answer.contexts.push(id);
        assert!(asked.flags & REQ_ONE == 0 || extents.len() == 1);
        let context = self.session.contexts.iter().find(|context| context.id == id).unwrap();
        let mut at = asked.offset;
        for (extent, flags) in extents {
            assert_ne!(*extent, 0);
            let end = at + extent;
            assert!(end <= asked.offset + length);
            // All of a short one, and the ends of a long one.
            for at in (at..end).step_by(500).take(100).chain([end - 1]) {
                assert_eq!(*flags, u64::from(self.export.flags(context.position, at)));
            }
            at = end;
        }
    }

    fn success(&self, asked: &Asked, answer: &Answer) {
        assert_eq!(asked.refusal, None, "{asked:?} was not refused");
        let covered: u64 = answer.contents.iter().map(|(start, end)| end - start).sum();
        match asked.command {
            0 => {
                assert_eq!(covered, asked.length);
                assert!(self.is_sound(asked), "{asked:?} was answered");
            }
            5 => assert_ne!(self.export.cell(asked.offset), Cell::Unreadable),
            7 => assert_eq!(answer.contexts.len(), asked.status.as_ref().unwrap().0.len()),
            _ => {}
        }
    }

    fn error(&self, asked: &Asked, code: u32, offset: Option<u64>) {
        if let Some(offset) = offset {
            assert!(asked.offset <= offset && (offset - asked.offset) < asked.length.max(1));
        }
        if let Some(refusal) = asked.refusal {
            return assert_eq!(code, refusal, "{asked:?}");
        }
        assert_eq!(code, EIO, "{asked:?}");
        let first = self.export.cell(asked.offset);
        match asked.command {
            0 => assert!(!self.is_sound(asked), "{asked:?} failed"),
            5 => assert_eq!(first, Cell::Unreadable),
            7 => assert!(matches!(first, Cell::Unreadable | Cell::Missing)),
            _ => panic!("{asked:?} failed"),
        }
    }

    /// Whether a read can be answered.
    fn is_sound(&self, asked: &Asked) -> bool {
        let range = asked.offset..asked.offset + asked.length;
        self.export.parts(range).all(|(_, cell)| cell.is_sound())
    }
}
