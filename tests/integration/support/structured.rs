//! Structured replies, put together again as the specification says.

use std::collections::HashMap;

use super::client::{CMD_READ, Client, Duplex, Request, SIMPLE_REPLY_MAGIC};

pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub const CMD_FLAG_DF: u16 = 1 << 2;

const FLAG_DONE: u16 = 1;
const NONE: u16 = 0;
const OFFSET_DATA: u16 = 1;
const OFFSET_HOLE: u16 = 2;
const ERROR: u16 = (1 << 15) + 1;
const ERROR_OFFSET: u16 = (1 << 15) + 2;

/// A content chunk's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    pub offset: u64,
    pub length: u64,
    pub is_hole: bool,
}

/// All that came in reply to one request.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// What was read; meaningful unless there was an error.
    pub data: Vec<u8>,
    pub contents: Vec<Content>,
    pub error: Option<(u32, String)>,
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

    /// One chunk of the reply to `request`, checked by itself and against those before it.
    fn take(&mut self, request: &Request, flags: u16, kind: u16, payload: &[u8]) {
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
            ERROR | ERROR_OFFSET => {
                let number = u32::from_be_bytes(payload[..4].try_into().unwrap());
                let length = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                let offset = if kind == ERROR_OFFSET { 8 } else { 0 };
                assert_eq!(payload.len(), 6 + length + offset);
                assert_ne!(number, 0);
                assert!(length <= 4096);
                let message = String::from_utf8(payload[6..6 + length].to_vec()).unwrap();
                self.error = Some((number, message));
            }
            other => panic!("an unknown type of reply: {other}"),
        }
        let covered: u64 = self.contents.iter().map(|content| content.length).sum();
        if self.done && self.error.is_none() && request.command == CMD_READ {
            // "the server MUST send enough data chunks to cover the entire region"
            assert_eq!(covered, u64::from(request.length));
        }
    }

    fn content(&mut self, request: &Request, offset: u64, length: u64, data: Option<&[u8]>) {
        assert_eq!(request.command, CMD_READ);
        let end = offset + length;
        let within = request.offset <= offset && end <= request.offset + u64::from(request.length);
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
}

fn split_offset(payload: &[u8]) -> (u64, &[u8]) {
    let (offset, rest) = payload.split_first_chunk().unwrap();
    (u64::from_be_bytes(*offset), rest)
}

impl<S: Duplex> Client<S> {
    /// Sends one request and takes its reply.
    pub fn ask(&mut self, request: Request) -> Outcome {
        self.send_request(request);
        self.outcomes(&[request]).remove(&request.cookie).unwrap()
    }

    /// The replies to all of `requests`, whose chunks may come in any order.
    pub fn outcomes(&mut self, requests: &[Request]) -> HashMap<u64, Outcome> {
        let by_cookie: HashMap<u64, &Request> =
            requests.iter().map(|request| (request.cookie, request)).collect();
        assert_eq!(by_cookie.len(), requests.len());
        let mut outcomes: HashMap<u64, Outcome> = HashMap::new();
        let mut done = 0;
        while done < requests.len() {
            let magic = u32::from_be_bytes(self.receive(4).try_into().unwrap());
            assert_ne!(magic, SIMPLE_REPLY_MAGIC, "a simple reply");
            assert_eq!(magic, STRUCTURED_REPLY_MAGIC);
            let head = self.receive(16);
            let flags = u16::from_be_bytes([head[0], head[1]]);
            let kind = u16::from_be_bytes([head[2], head[3]]);
            let cookie = u64::from_be_bytes(head[4..12].try_into().unwrap());
            let length = u32::from_be_bytes(head[12..].try_into().unwrap());
            assert!(length <= (32 << 20) + 8, "a chunk of {length} bytes");
            let payload = self.receive(length as usize);
            let request = by_cookie.get(&cookie).expect("a reply that nobody waits for");
            let outcome = outcomes.entry(cookie).or_default();
            outcome.take(request, flags, kind, &payload);
            if outcome.done {
                outcome.data.resize(request.length as usize, 0);
                done += 1;
            }
        }
        outcomes
    }
}
