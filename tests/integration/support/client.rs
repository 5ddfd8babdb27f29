//! A scripted client: it sends exactly what a test says, expects exactly what the
//! specification says, and never waits for ever.
//!
//! All numbers here are from the specification, not from the program under test, so that
//! a number that is wrong there is found.

use std::io;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::PATIENCE;
pub use super::stream::{Duplex, Plain, Session, Tls, connect_from};

pub const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";
pub const OPTION_MAGIC: &[u8] = b"IHAVEOPT";
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Fixed newstyle and no zeroes.
pub const FLAGS: u32 = 3;

pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_PEEK_EXPORT: u32 = 4;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;
pub const OPT_EXTENDED_HEADERS: u32 = 11;

pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
pub const REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub const REP_ERR_POLICY: u32 = (1 << 31) + 2;
pub const REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub const REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
pub const REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
pub const REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
pub const REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN, SEND_CACHE: what the server can do for
/// a client that negotiated nothing, and nothing else.
pub const TRANSMISSION_FLAGS: u16 = 1 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 10;
/// `NBD_FLAG_SEND_DF`.
pub const SEND_DF: u16 = 1 << 7;
/// `NBD_FLAG_BLOCK_STATUS_PAYLOAD`.
pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

pub const EPERM: u32 = 1;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const EOVERFLOW: u32 = 75;

/// A client somewhere in its conversation.
#[derive(Debug)]
pub struct Client<S> {
    pub stream: S,
}

/// One reply to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionReply {
    pub kind: u32,
    pub data: Vec<u8>,
}

/// What GO said of the export.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Export {
    pub size: u64,
    pub flags: u16,
}

/// The head of a simple reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    pub error: u32,
    pub cookie: u64,
}

/// A request of the transmission phase; what isn't set is zero.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    pub fn read(cookie: u64, offset: u64, length: u32) -> Self {
        Self { command: CMD_READ, cookie, offset, length, ..Self::default() }
    }

    pub fn disc() -> Self {
        Self { command: CMD_DISC, ..Self::default() }
    }

    pub fn encode(self) -> Vec<u8> {
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes
    }
}

/// An option as bytes.
pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&option_head(number, data.len() as u32), data].concat()
}

/// An option's head alone, with whatever length.
pub fn option_head(number: u32, length: u32) -> Vec<u8> {
    [OPTION_MAGIC, &number.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// The data of INFO and GO.
pub fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub fn meta_data(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = Vec::new();
    let mut string = |text: &[u8], count: Option<u32>| {
        data.extend((text.len() as u32).to_be_bytes());
        data.extend(text);
        data.extend(count.into_iter().flat_map(u32::to_be_bytes));
    };
    string(name, Some(queries.len() as u32));
    queries.iter().for_each(|query| string(query, None));
    data
}

impl Client<Plain> {
    /// On a socket that is connected.
    pub fn new(stream: Plain) -> Self {
        stream.set_read_timeout(PATIENCE);
        stream.set_write_timeout(PATIENCE);
        if let Plain::Tcp(stream) = &stream {
            stream.set_nodelay(true).unwrap();
        }
        Self { stream }
    }

    /// Asks for TLS and goes through its handshake.
    pub fn starttls(mut self, config: Arc<ClientConfig>) -> Client<Tls> {
        assert_eq!(self.option(OPT_STARTTLS, b""), [ack()]);
        self.handshake(config).unwrap()
    }

    /// The TLS handshake alone.
    pub fn handshake(mut self, config: Arc<ClientConfig>) -> io::Result<Client<Tls>> {
        let name = ServerName::try_from("localhost").unwrap();
        let mut connection = ClientConnection::new(config, name).unwrap();
        while connection.is_handshaking() {
            if let Err(error) = connection.complete_io(&mut self.stream) {
                // The server is told why.
                while connection.wants_write() && connection.write_tls(&mut self.stream).is_ok() {}
                return Err(error);
            }
        }
        Ok(Client { stream: StreamOwned::new(connection, self.stream) })
    }
}

impl<S: Duplex + 'static> Client<S> {
    pub fn boxed(self) -> Client<Session> {
        Client { stream: Box::new(self.stream) }
    }

    /// Vanishes with a reset.
    pub fn reset(self) {
        self.stream.socket().reset_on_close();
    }
}

impl<S: Duplex> Client<S> {
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.stream.flush().unwrap();
    }

    /// Sends what may arrive after the server has closed.
    pub fn try_send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    pub fn send_request(&mut self, request: Request) {
        self.send(&request.encode());
    }

    /// Exactly so many bytes.
    pub fn receive(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn expect(&mut self, bytes: &[u8]) {
        let received = self.receive(bytes.len());
        assert_eq!(received.escape_ascii().to_string(), bytes.escape_ascii().to_string());
    }

    fn receive_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.receive(4).try_into().unwrap())
    }

    fn receive_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.receive(8).try_into().unwrap())
    }

    /// What comes until the end, however that comes: bytes, and whether the end was in
    /// order (inside TLS: with close_notify).
    pub fn rest(&mut self) -> (Vec<u8>, bool) {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            Ok(_) => (bytes, true),
            Err(error) => {
                let waiting =
                    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                assert!(!waiting, "it isn't closed");
                (bytes, false)
            }
        }
    }

    /// Closed, be it with a reset, and not a byte before.
    pub fn expect_closed(&mut self) {
        assert_eq!(self.rest().0.escape_ascii().to_string(), "");
    }

    /// Closed in order, and not a byte before.
    pub fn expect_end(&mut self) {
        let (bytes, orderly) = self.rest();
        assert_eq!(bytes.escape_ascii().to_string(), "");
        assert!(orderly, "closed without a proper end");
    }

    /// Whether the server greets: then the client has a place.
    pub fn is_greeted(&mut self) -> bool {
        let mut greeting = [0; GREETING.len()];
        let greeted = self.stream.read_exact(&mut greeting).is_ok();
        assert!(!greeted || greeting == GREETING);
        greeted
    }

    /// Reads the greeting and answers it.
    pub fn greet(&mut self, flags: u32) {
        self.expect(GREETING);
        self.send(&flags.to_be_bytes());
    }

    /// Sends an option and collects its replies up to the last.
    pub fn option(&mut self, number: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send(&option(number, data));
        self.option_replies(number)
    }

    /// The replies to an option up to the last: ACK or an error.
    pub fn option_replies(&mut self, number: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            assert_eq!(self.receive_u64(), OPTION_REPLY_MAGIC);
            assert_eq!(self.receive_u32(), number, "a reply to another option");
            let kind = self.receive_u32();
            let length = self.receive_u32();
            assert!(length < 1024 * 1024, "{length} bytes of reply data");
            let data = self.receive(length as usize);
            if kind & (1 << 31) != 0 {
                // "string: human-readable"; no string is longer than 4096 bytes
                assert!(data.len() <= 4096);
                assert!(std::str::from_utf8(&data).is_ok());
            }
            replies.push(OptionReply { kind, data });
            if kind == REP_ACK || kind & (1 << 31) != 0 {
                return replies;
            }
        }
    }

    /// An option that must be refused with that error; the text for the user.
    pub fn refused(&mut self, number: u32, data: &[u8], kind: u32) -> String {
        let replies = self.option(number, data);
        assert_eq!(replies.len(), 1, "{replies:?}");
        assert_eq!(replies[0].kind, kind, "{replies:?}");
        String::from_utf8(replies[0].data.clone()).unwrap()
    }

    /// LIST, as names; it also shows that both ends are in step.
    pub fn list(&mut self) -> Vec<String> {
        let mut replies = self.option(OPT_LIST, b"");
        assert_eq!(replies.pop(), Some(ack()));
        let name = |reply: OptionReply| {
            assert_eq!(reply.kind, REP_SERVER);
            let (length, rest) = reply.data.split_first_chunk().unwrap();
            let name = &rest[..u32::from_be_bytes(*length) as usize];
            String::from_utf8(name.to_vec()).unwrap()
        };
        replies.into_iter().map(name).collect()
    }

    /// Chooses an export with GO; transmission begins.
    pub fn go(&mut self, name: &str) -> Export {
        let mut replies = self.option(OPT_GO, &info_data(name.as_bytes(), &[]));
        assert_eq!(replies.pop(), Some(ack()), "{name}");
        let export = replies.iter().find(|reply| reply.data.starts_with(&[0, 0])).unwrap();
        assert_eq!((export.kind, export.data.len()), (REP_INFO, 12));
        Export {
            size: u64::from_be_bytes(export.data[2..10].try_into().unwrap()),
            flags: u16::from_be_bytes(export.data[10..].try_into().unwrap()),
        }
    }

    /// SET_META_CONTEXT that works: numbers and names of the contexts now selected.
    pub fn set_contexts(&mut self, export: &str, queries: &[&str]) -> Vec<(u32, String)> {
        self.contexts(OPT_SET_META_CONTEXT, export, queries)
    }

    /// LIST_META_CONTEXT that works: names of contexts.
    pub fn list_contexts(&mut self, export: &str, queries: &[&str]) -> Vec<String> {
        let listed = self.contexts(OPT_LIST_META_CONTEXT, export, queries);
        let name = |(id, name)| {
            // "The metadata context ID in these replies is reserved and SHOULD be set to zero"
            assert_eq!(id, 0);
            name
        };
        listed.into_iter().map(name).collect()
    }

    fn contexts(&mut self, number: u32, export: &str, queries: &[&str]) -> Vec<(u32, String)> {
        let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
        let mut replies = self.option(number, &meta_data(export.as_bytes(), &queries));
        assert_eq!(replies.pop(), Some(ack()));
        let context = |reply: OptionReply| {
            assert_eq!(reply.kind, REP_META_CONTEXT);
            let (id, name) = reply.data.split_first_chunk().unwrap();
            (u32::from_be_bytes(*id), String::from_utf8(name.to_vec()).unwrap())
        };
        replies.into_iter().map(context).collect()
    }

    // Simple replies

    /// The head of a simple reply.
    pub fn simple_reply(&mut self) -> SimpleReply {
        assert_eq!(self.receive_u32(), SIMPLE_REPLY_MAGIC);
        SimpleReply { error: self.receive_u32(), cookie: self.receive_u64() }
    }

    /// One request, and its reply without data: the error number.
    pub fn request(&mut self, request: Request) -> u32 {
        self.send_request(request);
        let reply = self.simple_reply();
        assert_eq!(reply.cookie, request.cookie);
        reply.error
    }

    /// Reads with one request: data, or the error number.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.request(Request::read(offset ^ 0x5151_5151_5151_5151, offset, length)) {
            0 => Ok(self.receive(length as usize)),
            error => Err(error),
        }
    }

    pub fn read_ok(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.read(offset, length).unwrap()
    }

    /// Leaves as one should; the server closes.
    pub fn disconnect(mut self) {
        self.send_request(Request::disc());
        self.expect_end();
    }
}

/// The last reply to an option that worked.
pub fn ack() -> OptionReply {
    OptionReply { kind: REP_ACK, data: Vec::new() }
}
