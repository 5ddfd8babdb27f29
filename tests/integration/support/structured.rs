//! Requests and replies in each of the protocol's three forms, replies put together again
//! as the specification says.

use std::collections::HashMap;

use super::client::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_READ, Client, Duplex, Export, OPT_EXTENDED_HEADERS,
    OPT_STRUCTURED_REPLY, REQUEST_MAGIC, Request, SIMPLE_REPLY_MAGIC, Session, ack,
};
use super::server::Server;

pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

pub const CMD_FLAG_DF: u16 = 1 << 2;
pub const CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub const CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`.
pub const HOLE: u64 = 1 | 1 << 1;

const FLAG_DONE: u16 = 1;
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const BLOCK_STATUS: u16 = 5;
const BLOCK_STATUS_EXT: u16 = 6;
const ERROR: u16 = (1 << 15) + 1;
const ERROR_OFFSET: u16 = (1 << 15) + 2;

/// "Servers SHOULD NOT send more than 2^20 extents in a single reply chunk."
const MAX_EXTENTS: usize = 1 << 20;

/// How requests and replies look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Simple, Self::Structured, Self::Extended];
    /// Those whose replies come in chunks.
    pub const CHUNKED: [Self; 2] = [Self::Structured, Self::Extended];

    /// Asks for it.
    pub fn negotiate<S: Duplex>(self, client: &mut Client<S>) {
        let option = match self {
            Self::Simple => return,
            Self::Structured => OPT_STRUCTURED_REPLY,
            Self::Extended => OPT_EXTENDED_HEADERS,
        };
        assert_eq!(client.option(option, b""), [ack()]);
    }
}

/// A request in any mode; what isn't set is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Question {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
}

impl Question {
    pub fn new(command: u16, offset: u64, length: u64) -> Self {
        Self { command, cookie: offset ^ 0x5151_5151_5151_5151, offset, length, flags: 0 }
    }

    pub fn read(offset: u64, length: u64) -> Self {
        Self::new(CMD_READ, offset, length)
    }

    pub fn status(offset: u64, length: u64) -> Self {
        Self::new(CMD_BLOCK_STATUS, offset, length)
    }

    pub fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }

    pub fn cookie(self, cookie: u64) -> Self {
        Self { cookie, ..self }
    }

    pub fn encode(self, mode: Mode) -> Vec<u8> {
        let magic = if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        match mode {
            Mode::Extended => bytes.extend(self.length.to_be_bytes()),
            _ => bytes.extend(u32::try_from(self.length).unwrap().to_be_bytes()),
        }
        bytes
    }
}

impl From<Request> for Question {
    fn from(request: Request) -> Self {
        let Request { flags, command, cookie, offset, length } = request;
        Self { flags, command, cookie, offset, length: length.into() }
    }
}

/// A content chunk's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    pub offset: u64,
    pub length: u64,
    pub is_hole: bool,
}

/// An extent of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub length: u64,
    pub flags: u64,
}

/// All that came in reply to one request.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What was read; meaningful unless there was an error.
    pub data: Vec<u8>,
    pub contents: Vec<Content>,
    /// What each metadata context said, by its number, in the order in which they came.
    pub status: Vec<(u32, Vec<Extent>)>,
    pub error: Option<(u32, String)>,
    /// Where the error is, if it says so.
    pub error_at: Option<u64>,
    done: bool,
}

impl Outcome {
    /// The bytes of a read that succeeded.
    pub fn ok(self) -> Vec<u8> {
        assert_eq!(self.error, None);
        self.data
    }

    /// The error number of a request that failed, which has words with it.
    pub fn failed(self) -> u32 {
        let (number, message) = self.error.expect("it should have failed");
        assert!(!message.is_empty());
        number
    }

    /// The error number, in whatever mode; zero for success.
    pub fn number(&self) -> u32 {
        self.error.as_ref().map_or(0, |(number, _)| *number)
    }

    /// What one context said.
    pub fn extents(&self, id: u32) -> &[Extent] {
        assert_eq!(self.error, None);
        let of = |(other, _): &&(u32, Vec<Extent>)| *other == id;
        &self.status.iter().find(of).unwrap_or_else(|| panic!("nothing of context {id}")).1
    }

    /// One chunk of the reply to `request`, checked by itself and against those before it.
    fn take(&mut self, request: &Question, flags: u16, kind: u16, payload: &[u8]) {
        assert!(!self.done, "a chunk behind the last");
        assert_eq!(flags & !FLAG_DONE, 0, "unknown flags");
        self.done = flags & FLAG_DONE != 0;
        match kind {
            NONE => assert!(self.done && payload.is_empty()),
            OFFSET_DATA => {
                let (offset, data) = split_offset(payload);
                assert!(!data.is_empty());
                self.content(request, offset, data.len() as u64, Some(data));
            }
            OFFSET_HOLE => {
                let (offset, length) = split_offset(payload);
                let length = u32::from_be_bytes(length.try_into().unwrap());
                assert_ne!(length, 0);
                self.content(request, offset, length.into(), None);
            }
            BLOCK_STATUS => {
                let (id, extents) = payload.split_first_chunk().unwrap();
                let (extents, []) = extents.as_chunks::<8>() else { panic!("odd extents") };
                let field = |bytes: &[u8]| u64::from(u32::from_be_bytes(bytes.try_into().unwrap()));
                let extent = |bytes: &[u8; 8]| (field(&bytes[..4]), field(&bytes[4..]));
                self.extents_of(request, *id, extents.iter().map(extent));
            }
            BLOCK_STATUS_EXT => {
                let (id, rest) = payload.split_first_chunk().unwrap();
                let (count, extents) = rest.split_first_chunk().unwrap();
                let (extents, []) = extents.as_chunks::<16>() else { panic!("odd extents") };
                assert_eq!(u32::from_be_bytes(*count) as usize, extents.len());
                let field = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
                let extent = |bytes: &[u8; 16]| (field(&bytes[..8]), field(&bytes[8..]));
                self.extents_of(request, *id, extents.iter().map(extent));
            }
            ERROR | ERROR_OFFSET => {
                // "This type SHOULD NOT be used more than once in a structured reply."
                assert_eq!(self.error, None, "a second error");
                let number = u32::from_be_bytes(payload[..4].try_into().unwrap());
                let length = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                let offset = if kind == ERROR_OFFSET { 8 } else { 0 };
                assert_eq!(payload.len(), 6 + length + offset);
                assert_ne!(number, 0);
                assert!(length <= 4096);
                let message = String::from_utf8(payload[6..6 + length].to_vec()).unwrap();
                self.error = Some((number, message));
                if kind == ERROR_OFFSET {
                    self.error_offset(request, split_offset(&payload[6 + length..]).0);
                }
            }
            other => panic!("an unknown type of reply: {other}"),
        }
        let covered: u64 = self.contents.iter().map(|content| content.length).sum();
        if self.done && self.error.is_none() && request.command == CMD_READ {
            // "the server MUST send enough data chunks to cover the entire region"
            assert_eq!(covered, request.length);
        }
        if request.flags & CMD_FLAG_DF != 0 {
            // "the server MUST send at most one content chunk"
            assert!(self.contents.len() <= 1);
        }
    }

    fn content(&mut self, request: &Question, offset: u64, length: u64, data: Option<&[u8]>) {
        assert_eq!(request.command, CMD_READ);
        let end = offset + length;
        let within = request.offset <= offset && end <= request.offset + request.length;
        assert!(within, "{length} at {offset} in reply to {request:?}");
        let apart = |other: &Content| end <= other.offset || other.offset + other.length <= offset;
        assert!(self.contents.iter().all(apart), "chunks overlap");
        self.contents.push(Content { offset, length, is_hole: data.is_none() });
        if let Some(data) = data {
            self.data.resize(request.length as usize, 0);
            let from = (offset - request.offset) as usize;
            self.data[from..from + data.len()].copy_from_slice(data);
        }
    }

    /// "at a given offset, which MUST lie within the original offset and length of the
    /// request"; nothing was sent for it before.
    fn error_offset(&mut self, request: &Question, at: u64) {
        let commands = [CMD_READ, CMD_CACHE, CMD_BLOCK_STATUS];
        assert!(commands.contains(&request.command), "no offset belongs to {request:?}");
        assert!(request.offset <= at && at - request.offset < request.length, "{at}: {request:?}");
        let covers =
            |content: &Content| (content.offset..content.offset + content.length).contains(&at);
        assert!(!self.contents.iter().any(covers), "the bytes at {at} were sent, and then failed");
        self.error_at = Some(at);
    }

    /// `NBD_REPLY_TYPE_BLOCK_STATUS` and `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`.
    fn extents_of(
        &mut self,
        request: &Question,
        id: [u8; 4],
        extents: impl Iterator<Item = (u64, u64)>,
    ) {
        assert_eq!(request.command, CMD_BLOCK_STATUS);
        let id = u32::from_be_bytes(id);
        // "exactly one status chunk per negotiated metadata context ID"
        assert!(self.status.iter().all(|(other, _)| *other != id), "context {id} twice");
        let extents: Vec<_> = extents.map(|(length, flags)| Extent { length, flags }).collect();
        assert!((1..=MAX_EXTENTS).contains(&extents.len()), "{} extents", extents.len());
        let mut at = request.offset;
        for extent in &extents {
            // "unsigned, MUST be nonzero"; "the most-significant 32 bits of status MUST be
            // all zeroes"
            assert_ne!(extent.length, 0);
            assert_eq!(extent.flags >> 32, 0);
            at += extent.length;
        }
        if request.flags & CMD_FLAG_REQ_ONE != 0 {
            // "every reply chunk MUST contain exactly one descriptor"
            assert_eq!(extents.len(), 1);
        }
        self.status.push((id, extents));
        // The payload of a request may say how far it reaches; else its length does, and
        // this server never says more than it was asked.
        if request.flags & CMD_FLAG_PAYLOAD_LEN == 0 {
            assert!(at <= request.offset + request.length, "beyond {request:?}");
        }
    }
}

fn split_offset(payload: &[u8]) -> (u64, &[u8]) {
    let (offset, rest) = payload.split_first_chunk().unwrap();
    (u64::from_be_bytes(*offset), rest)
}

impl<S: Duplex> Client<S> {
    /// Sends one request and takes its structured reply.
    pub fn ask(&mut self, request: Request) -> Outcome {
        self.send_request(request);
        self.outcomes(&[request]).remove(&request.cookie).unwrap()
    }

    /// The structured replies to all of `requests`, whose chunks may come in any order.
    pub fn outcomes(&mut self, requests: &[Request]) -> HashMap<u64, Outcome> {
        let questions: Vec<Question> = requests.iter().map(|&request| request.into()).collect();
        self.outcomes_in(Mode::Structured, &questions)
    }

    /// The replies to all of `questions`, in whatever order they come.
    pub fn outcomes_in(&mut self, mode: Mode, questions: &[Question]) -> HashMap<u64, Outcome> {
        let by_cookie: HashMap<u64, &Question> =
            questions.iter().map(|question| (question.cookie, question)).collect();
        assert_eq!(by_cookie.len(), questions.len());
        let mut outcomes: HashMap<u64, Outcome> = HashMap::new();
        let mut done = 0;
        while done < questions.len() {
            let cookie = match mode {
                Mode::Simple => self.take_simple(&by_cookie, &mut outcomes),
                _ => self.take_chunk(mode, &by_cookie, &mut outcomes),
            };
            let outcome = outcomes.get_mut(&cookie).unwrap();
            if outcome.done {
                let question = by_cookie[&cookie];
                if question.command == CMD_READ && outcome.error.is_none() {
                    outcome.data.resize(question.length as usize, 0);
                }
                done += 1;
            }
        }
        outcomes
    }

    fn take_simple(
        &mut self,
        questions: &HashMap<u64, &Question>,
        outcomes: &mut HashMap<u64, Outcome>,
    ) -> u64 {
        let reply = self.simple_reply();
        let question = questions.get(&reply.cookie).expect("a reply that nobody waits for");
        let mut outcome = Outcome { done: true, ..Outcome::default() };
        if reply.error != 0 {
            outcome.error = Some((reply.error, String::new()));
        } else if question.command == CMD_READ {
            outcome.data = self.receive(question.length as usize);
        }
        assert!(outcomes.insert(reply.cookie, outcome).is_none(), "answered twice");
        reply.cookie
    }

    fn take_chunk(
        &mut self,
        mode: Mode,
        questions: &HashMap<u64, &Question>,
        outcomes: &mut HashMap<u64, Outcome>,
    ) -> u64 {
        let magic = u32::from_be_bytes(self.receive(4).try_into().unwrap());
        assert_ne!(magic, SIMPLE_REPLY_MAGIC, "a simple reply");
        let extended = mode == Mode::Extended;
        assert_eq!(magic, if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC });
        let head = self.receive(12);
        let flags = u16::from_be_bytes([head[0], head[1]]);
        let kind = u16::from_be_bytes([head[2], head[3]]);
        let cookie = u64::from_be_bytes(head[4..12].try_into().unwrap());
        let question = questions.get(&cookie).expect("a reply that nobody waits for");
        let length = if extended {
            // "the server MUST set … offset … to the value that was sent by the client"
            let tail = self.receive(16);
            assert_eq!(u64::from_be_bytes(tail[..8].try_into().unwrap()), question.offset);
            u64::from_be_bytes(tail[8..].try_into().unwrap())
        } else {
            u32::from_be_bytes(self.receive(4).try_into().unwrap()).into()
        };
        assert!(length <= (32 << 20) + 8, "a chunk of {length} bytes");
        assert!(kind != if extended { BLOCK_STATUS } else { BLOCK_STATUS_EXT });
        let payload = self.receive(length as usize);
        outcomes.entry(cookie).or_default().take(question, flags, kind, &payload);
        cookie
    }
}

/// A client in the transmission phase, in whatever mode.
pub struct Peer {
    pub client: Client<Session>,
    pub mode: Mode,
    pub export: Export,
    /// The numbers of the contexts that it selected, in the order of its queries.
    pub ids: Vec<u32>,
}

impl Server {
    /// A client that has negotiated `mode`, selected `contexts` and chosen the export.
    pub fn peer(&self, mode: Mode, name: &str, contexts: &[&str]) -> Peer {
        let mut client = self.greeted();
        mode.negotiate(&mut client);
        let mut ids = Vec::new();
        if !contexts.is_empty() {
            let selected = client.set_contexts(name, contexts);
            assert_eq!(selected.len(), contexts.len(), "{selected:?}");
            let id = |query: &&str| selected.iter().find(|(_, name)| name == query).unwrap().0;
            ids.extend(contexts.iter().map(id));
        }
        let export = client.go(name);
        Peer { client, mode, export, ids }
    }
}

impl Peer {
    pub fn send(&mut self, question: Question) {
        self.client.send(&question.encode(self.mode));
    }

    pub fn ask(&mut self, question: Question) -> Outcome {
        self.ask_with(question, b"")
    }

    /// Asks with a payload behind the request.
    pub fn ask_with(&mut self, question: Question, payload: &[u8]) -> Outcome {
        self.client.send(&[&question.encode(self.mode), payload].concat());
        self.client.outcomes_in(self.mode, &[question]).remove(&question.cookie).unwrap()
    }

    /// Asks all at once.
    pub fn ask_all(&mut self, questions: &[Question]) -> HashMap<u64, Outcome> {
        let encode = |question: &Question| question.encode(self.mode);
        self.client.send(&questions.iter().flat_map(encode).collect::<Vec<u8>>());
        self.client.outcomes_in(self.mode, questions)
    }

    /// Bytes that can be read.
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        self.ask(Question::read(offset, length)).ok()
    }

    /// What the first selected context says of a range, asked for until the range is
    /// covered; neighbours of a kind are one.
    pub fn map(&mut self, offset: u64, length: u64) -> Vec<Extent> {
        let (mut at, end) = (offset, offset + length);
        let mut map: Vec<Extent> = Vec::new();
        while at < end {
            let outcome = self.ask(Question::status(at, (end - at).min(u32::MAX.into())));
            for extent in outcome.extents(self.ids[0]) {
                at += extent.length;
                match map.last_mut() {
                    Some(last) if last.flags == extent.flags => last.length += extent.length,
                    _ => map.push(*extent),
                }
            }
        }
        map
    }

    /// Leaves; the server closes.
    pub fn disconnect(mut self) {
        self.send(Question { command: super::client::CMD_DISC, ..Question::default() });
        self.client.expect_end();
    }
}
