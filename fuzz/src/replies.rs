//! A strict reader of what the server says: every field has its value, and nothing is left.

use nbd_server::ReplyMode;
use nbd_server::wire::option::{Opt, Rep};

/// Fields one behind the other.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at_checked(length).expect("a message cut short");
        self.0 = rest;
        taken
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One reply to an option.
#[derive(Debug)]
pub struct OptionReply<'a> {
    pub reply: Rep,
    pub data: &'a [u8],
}

/// Replies to options, in their order.
#[derive(Debug)]
pub struct OptionReplies<'a>(pub Bytes<'a>);

impl<'a> OptionReplies<'a> {
    pub fn new(output: &'a [u8]) -> Self {
        Self(Bytes(output))
    }

    /// The next reply, which has to be to that option.
    pub fn next(&mut self, option: Opt) -> OptionReply<'a> {
        assert_eq!(self.0.u64(), 0x3e889045565a9);
        assert_eq!(Opt(self.0.u32()), option, "a reply to another option");
        let reply = Rep(self.0.u32());
        let length = self.0.u32() as usize;
        let data = self.0.take(length);
        if reply.is_error() {
            let text = std::str::from_utf8(data).expect("an error's text is UTF-8");
            assert!(!text.is_empty() && text.len() <= 4096);
            assert!(!text.contains(char::is_control), "{text:?}");
        } else if reply == Rep::ACK {
            assert!(data.is_empty());
        }
        OptionReply { reply, data }
    }

    pub fn expect_end(&self) {
        assert!(self.0.is_empty(), "{} bytes that nobody asked for", self.0.0.len());
    }
}

/// A chunk of an answer to a request; a simple reply is one chunk, and the last.
#[derive(Debug)]
pub struct Chunk<'a> {
    pub cookie: u64,
    /// The request's offset, as extended replies repeat it.
    pub offset: Option<u64>,
    pub is_last: bool,
    pub content: Content<'a>,
}

#[derive(Debug)]
pub enum Content<'a> {
    Nothing,
    Data {
        offset: u64,
        data: &'a [u8],
    },
    Hole {
        offset: u64,
        length: u64,
    },
    /// A context's number, and extents with their length and flags.
    Status {
        context: u32,
        extents: Vec<(u64, u64)>,
    },
    Error {
        code: u32,
        offset: Option<u64>,
    },
}

/// Reads a simple reply; `length` says how much data a successful one to that cookie has.
pub fn simple_reply<'a>(output: &mut Bytes<'a>, length: impl Fn(u64) -> usize) -> Chunk<'a> {
    assert_eq!(output.u32(), 0x6744_6698);
    let (code, cookie) = (output.u32(), output.u64());
    let content = match (code, length(cookie)) {
        (0, 0) => Content::Nothing,
        (0, length) => Content::Data { offset: 0, data: output.take(length) },
        (code, _) => Content::Error { code, offset: None },
    };
    Chunk { cookie, offset: None, is_last: true, content }
}

/// Reads a chunk of a structured or extended reply.
pub fn chunk<'a>(output: &mut Bytes<'a>, mode: ReplyMode) -> Chunk<'a> {
    let is_extended = mode == ReplyMode::Extended;
    assert_eq!(output.u32(), if is_extended { 0x6e8a_278c } else { 0x668e_33ef });
    let (flags, kind, cookie) = (output.u16(), output.u16(), output.u64());
    assert!(flags <= 1, "unknown flags");
    let offset = is_extended.then(|| output.u64());
    let length = if is_extended { output.u64() } else { output.u32().into() };
    assert!(length <= (32 << 20) + 8, "a chunk of {length} bytes");
    let mut payload = Bytes(output.take(length as usize));
    let content = match kind {
        0 => Content::Nothing,
        1 => Content::Data { offset: payload.u64(), data: payload.take(payload.0.len()) },
        2 => Content::Hole { offset: payload.u64(), length: payload.u32().into() },
        5 | 6 => {
            assert_eq!(kind == 6, is_extended);
            status(&mut payload, is_extended)
        }
        0x8001 | 0x8002 => error(&mut payload, kind == 0x8002),
        other => panic!("an unknown type of reply: {other}"),
    };
    assert!(payload.is_empty(), "{} bytes are left over in {content:?}", payload.0.len());
    Chunk { cookie, offset, is_last: flags == 1, content }
}

fn status<'a>(payload: &mut Bytes<'_>, is_extended: bool) -> Content<'a> {
    let context = payload.u32();
    let count = is_extended.then(|| payload.u32() as usize);
    let mut extents = Vec::new();
    while !payload.is_empty() {
        extents.push(match is_extended {
            true => (payload.u64(), payload.u64()),
            false => (payload.u32().into(), payload.u32().into()),
        });
    }
    assert!(!extents.is_empty() && count.is_none_or(|count| count == extents.len()));
    Content::Status { context, extents }
}

fn error<'a>(payload: &mut Bytes<'_>, has_offset: bool) -> Content<'a> {
    let (code, length) = (payload.u32(), usize::from(payload.u16()));
    assert!(code != 0 && length <= 4096);
    std::str::from_utf8(payload.take(length)).expect("an error's text is UTF-8");
    Content::Error { code, offset: has_offset.then(|| payload.u64()) }
}
