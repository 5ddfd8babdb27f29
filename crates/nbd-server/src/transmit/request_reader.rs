//! Reading of requests from the stream, and their validation into an [`Action`].

use std::io;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::{OUT_OF_RANGE, Refusal};
use crate::wire::reply::ErrorCode;
use crate::wire::request::{Command, CommandFlags, Request};
use crate::wire::{MAX_PAYLOAD, Malformed};
use crate::{ReplyMode, SessionError, Span};

/// Capacity of the read buffer, in bytes: about 140 requests.
const CAPACITY: usize = 4096;

/// Buffered reader of requests: those that arrived together cost a single read.
#[derive(Debug)]
pub(super) struct RequestReader<R> {
    reader: R,
    buffer: BytesMut,
    extended: bool,
    /// Bytes of unwanted payload that have not been skipped yet.
    to_skip: u32,
    /// Maximum length of a payload that is kept, in bytes: that of a block status request.
    max_payload: usize,
}

impl<R: AsyncRead + Unpin> RequestReader<R> {
    /// Creates a reader of requests with compact or, if `mode` is extended, extended headers.
    pub(super) fn new(reader: R, mode: ReplyMode, max_payload: usize) -> Self {
        let extended = mode == ReplyMode::Extended;
        let buffer = BytesMut::with_capacity(CAPACITY);
        Self { reader, buffer, extended, to_skip: 0, max_payload }
    }

    /// Returns the next request, or `None` if the client closed the stream between two requests.
    ///
    /// Cancel safe: data that has arrived stays in the buffer.
    pub(super) async fn next_request(&mut self) -> Result<Option<Request>, SessionError> {
        loop {
            if let Some(request) = self.buffered_request()? {
                return Ok(Some(request));
            }
            if !self.fill().await? {
                if self.buffer.is_empty() && self.to_skip == 0 {
                    return Ok(None);
                }
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    /// Returns the next request if it is in the buffer, along with its payload if that is to be
    /// kept.
    pub(super) fn buffered_request(&mut self) -> Result<Option<Request>, Malformed> {
        let now = self.buffer.len().min(self.to_skip as usize);
        self.buffer.advance(now);
        self.to_skip -= u32::try_from(now).unwrap_or(self.to_skip);
        let (decoded, size) = if self.extended {
            (self.buffer.first_chunk().map(Request::decode_extended), Request::EXTENDED_SIZE)
        } else {
            (self.buffer.first_chunk().map(Request::decode), Request::SIZE)
        };
        let Some(request) = decoded.transpose()? else { return Ok(None) };
        if self.buffer.len() < size + self.buffered_payload_len(&request) {
            return Ok(None);
        }
        self.buffer.advance(size);
        Ok(Some(request))
    }

    /// Returns the length of the payload that is buffered along with its request, in bytes.
    fn buffered_payload_len(&self, request: &Request) -> usize {
        let has_payload = self.extended
            && request.command == Command::BLOCK_STATUS
            && request.flags.contains(CommandFlags::PAYLOAD_LEN);
        match usize::try_from(request.length) {
            Ok(length) if has_payload && length <= self.max_payload => length,
            _ => 0,
        }
    }

    /// Takes the payload of the request that was returned last, `length` bytes. Returns `None` if
    /// it is too long to be kept, and skips it.
    pub(super) fn take_payload(&mut self, length: u32) -> Option<BytesMut> {
        if length as usize > self.max_payload || length as usize > self.buffer.len() {
            self.skip_payload(length);
            return None;
        }
        Some(self.buffer.split_to(length as usize))
    }

    /// Skips the next `length` bytes of payload as they arrive.
    pub(super) fn skip_payload(&mut self, length: u32) {
        self.to_skip = length;
    }

    /// Reads and discards data until the client closes the stream. Closing a socket with unread
    /// data would reset the connection and lose replies that are still in transit.
    pub(super) async fn discard(&mut self) {
        self.buffer.clear();
        while matches!(self.fill().await, Ok(true)) {
            self.buffer.clear();
        }
    }

    async fn fill(&mut self) -> io::Result<bool> {
        // Makes room for a full read without growing the buffer: consumed bytes are reclaimed.
        let wanted = CAPACITY.max(Request::EXTENDED_SIZE + self.max_payload);
        self.buffer.reserve(wanted - self.buffer.len().min(wanted - 1));
        match self.reader.read_buf(&mut self.buffer).await {
            Ok(count) => Ok(count > 0),
            // Many clients close TCP without closing TLS first. Requests carry their own lengths,
            // so a forged end of stream cannot turn one request into another.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Parameters negotiated before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NegotiatedParams {
    /// Size of the export, in bytes.
    pub(super) size: u64,
    /// Format of requests and replies.
    pub(super) mode: ReplyMode,
    /// True if metadata contexts were selected.
    pub(super) has_contexts: bool,
}

/// Action that a request results in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Read of this range; if `whole`, the reply has at most one content chunk.
    Read { span: Span, whole: bool },
    /// Preparation for reads of this range.
    Cache { offset: u64, length: u64 },
    /// Status of this range in all selected contexts; if `single_extent`, at most one extent each.
    Status { offset: u64, length: u64, single_extent: bool },
    /// Status of a range that starts at `offset`. Its length and the contexts are specified by a
    /// payload of `payload` bytes.
    StatusWithPayload { offset: u64, payload: u32, single_extent: bool },
    /// Success reply; there is no work to do.
    Succeed,
    /// Error reply, and `payload` bytes of payload to skip.
    Refuse { refusal: Refusal, payload: u32 },
    /// Close, once the requests in flight have been answered.
    Disconnect,
    /// Close with an error: the payload, whose length is given, is too long to be skipped.
    PayloadTooLarge(u64),
}

/// Validates a request and returns the action to take.
pub(super) fn validate(request: &Request, params: NegotiatedParams) -> Action {
    // "a server SHOULD initiate hard disconnect if a client sets the
    // NBD_CMD_FLAG_PAYLOAD_LEN flag and uses a length larger than a server's … maximum
    // payload length; in all other cases, … gracefully consume length bytes of payload"
    let payload = match payload_len(request, params.mode) {
        length if length > u64::from(MAX_PAYLOAD) => return Action::PayloadTooLarge(length),
        length => u32::try_from(length).unwrap_or(MAX_PAYLOAD),
    };
    let refuse = |refusal| Action::Refuse { refusal, payload };
    let unknown_flags = request.flags.without(valid_flags(request.command, params));
    let single_extent = request.flags.contains(CommandFlags::REQ_ONE);
    let Request { offset, length, .. } = *request;

    match request.command {
        // "A client MUST NOT send anything to the server after sending an NBD_CMD_DISC", and there
        // is no reply to it, so invalid flags cannot be reported.
        Command::DISC => Action::Disconnect,
        Command::WRITE if params.mode == ReplyMode::Extended && payload == 0 => {
            refuse(WRITE_WITHOUT_PAYLOAD)
        }
        // "If this flag [READ_ONLY] is set, the server MUST error subsequent write
        // operations"; "it SHOULD return NBD_EPERM".
        Command::WRITE | Command::TRIM | Command::WRITE_ZEROES => refuse(READ_ONLY),
        // "The server SHOULD return NBD_EINVAL if it receives an unknown command flag",
        // or one that doesn't apply.
        _ if !unknown_flags.is_empty() => refuse(UNKNOWN_FLAG),
        Command::READ => match validate_span(offset, length, params) {
            Ok(span) => Action::Read { span, whole: request.flags.contains(CommandFlags::DF) },
            Err(refusal) => refuse(refusal),
        },
        Command::CACHE if is_within(offset, length, params.size) => {
            Action::Cache { offset, length }
        }
        Command::CACHE => refuse(OUT_OF_RANGE),
        // "Servers SHOULD reply with NBD_EINVAL to clients sending NBD_CMD_BLOCK_STATUS
        // without selecting at least one metadata context."
        Command::BLOCK_STATUS if !params.has_contexts => refuse(NO_CONTEXT),
        Command::BLOCK_STATUS if payload > 0 => {
            Action::StatusWithPayload { offset, payload, single_extent }
        }
        Command::BLOCK_STATUS => match validate_status_range(offset, length, params.size) {
            Ok(()) => Action::Status { offset, length, single_extent },
            Err(refusal) => refuse(refusal),
        },
        // "length and offset are reserved, and MUST be set to all-zero"
        Command::FLUSH if offset == 0 && length == 0 => Action::Succeed,
        Command::FLUSH => refuse(FLUSH_WITH_RANGE),
        // "NBD_EINVAL if it receives an unknown command"
        _ => refuse(UNKNOWN_COMMAND),
    }
}

const READ_ONLY: Refusal = Refusal::new(ErrorCode::PERM, "the export is read-only");
const WRITE_WITHOUT_PAYLOAD: Refusal =
    Refusal::new(ErrorCode::INVAL, "a write needs NBD_CMD_FLAG_PAYLOAD_LEN and a payload");
const UNKNOWN_FLAG: Refusal = Refusal::new(ErrorCode::INVAL, "unsupported flag for this command");
const UNKNOWN_COMMAND: Refusal = Refusal::new(ErrorCode::INVAL, "unknown command");
const FLUSH_WITH_RANGE: Refusal =
    Refusal::new(ErrorCode::INVAL, "offset and length of a flush must be zero");
const NO_CONTEXT: Refusal =
    Refusal::new(ErrorCode::INVAL, "block status needs a selected metadata context");
const EMPTY_STATUS: Refusal =
    Refusal::new(ErrorCode::INVAL, "block status needs a non-zero length");
pub(super) const BAD_STATUS_PAYLOAD: Refusal = Refusal::new(
    ErrorCode::INVAL,
    "the payload must contain a length and ids of selected metadata contexts, each at most once",
);
const TOO_LONG: &str = "read length exceeds the maximum of 32 MiB";

/// Returns the number of payload bytes that follow the request's header.
fn payload_len(request: &Request, mode: ReplyMode) -> u64 {
    match mode {
        ReplyMode::Extended if request.flags.contains(CommandFlags::PAYLOAD_LEN) => request.length,
        ReplyMode::Extended => 0,
        // "the only command where length represents payload length instead of effect length
        // is NBD_CMD_WRITE"
        _ if request.command == Command::WRITE => request.length,
        _ => 0,
    }
}

/// Returns the flags that are valid for a command.
fn valid_flags(command: Command, params: NegotiatedParams) -> CommandFlags {
    let none = CommandFlags::default();
    match (command, params.mode) {
        (_, ReplyMode::Simple) => none,
        // "MUST NOT be set unless the transmission flags include NBD_FLAG_SEND_DF", which are sent
        // with structured replies.
        (Command::READ, _) => CommandFlags::DF,
        (Command::BLOCK_STATUS, ReplyMode::Extended) if params.has_contexts => {
            CommandFlags::REQ_ONE.with(CommandFlags::PAYLOAD_LEN)
        }
        (Command::BLOCK_STATUS, _) => CommandFlags::REQ_ONE,
        _ => none,
    }
}

fn is_within(offset: u64, length: u64, size: u64) -> bool {
    offset.checked_add(length).is_some_and(|end| end <= size)
}

fn validate_span(offset: u64, length: u64, params: NegotiatedParams) -> Result<Span, Refusal> {
    if !is_within(offset, length, params.size) {
        return Err(OUT_OF_RANGE);
    }
    match u32::try_from(length) {
        Ok(length) if length <= MAX_PAYLOAD => Ok(Span { offset, length }),
        // "the server is also permitted to reject large read requests up front with NBD_EOVERFLOW";
        // without structured replies clients do not expect that error.
        _ if params.mode == ReplyMode::Simple => Err(Refusal::new(ErrorCode::INVAL, TOO_LONG)),
        _ => Err(Refusal::new(ErrorCode::OVERFLOW, TOO_LONG)),
    }
}

/// Validates the range of a block status request.
pub(super) fn validate_status_range(offset: u64, length: u64, size: u64) -> Result<(), Refusal> {
    if length == 0 {
        Err(EMPTY_STATUS)
    } else if is_within(offset, length, size) {
        Ok(())
    } else {
        Err(OUT_OF_RANGE)
    }
}

#[cfg(test)]
mod reader_tests {
    use super::*;
    use crate::wire::request::Cookie;

    fn request(cookie: u64) -> Request {
        Request {
            flags: CommandFlags::default(),
            command: Command::READ,
            cookie: Cookie(cookie),
            offset: cookie,
            length: 1,
        }
    }

    #[tokio::test]
    async fn fragmented_requests_and_payloads_are_read() {
        let mut bytes = Vec::new();
        for cookie in 0..500 {
            bytes.extend(request(cookie).encode());
            bytes.extend([0xff; 100]);
        }
        for piece in [1, 27, 28, 29, 1000, 100_000] {
            let (mut client, server) = tokio::io::duplex(piece);
            let sent = bytes.clone();
            let sender = tokio::spawn(async move {
                tokio::io::AsyncWriteExt::write_all(&mut client, &sent).await.unwrap();
            });
            let mut reader = RequestReader::new(server, ReplyMode::Simple, 0);
            for cookie in 0..500 {
                assert_eq!(reader.next_request().await.unwrap(), Some(request(cookie)));
                reader.skip_payload(100);
            }
            assert_eq!(reader.next_request().await.unwrap(), None);
            assert!(reader.buffer.capacity() <= 2 * CAPACITY);
            sender.await.unwrap();
        }
    }

    #[tokio::test]
    async fn end_of_stream_within_a_request_is_an_error() {
        let whole = request(1).encode();
        for cut in 1..whole.len() {
            let mut reader = RequestReader::new(&whole[..cut], ReplyMode::Simple, 0);
            assert!(reader.next_request().await.is_err());
        }
        let mut reader = RequestReader::new(&whole[..], ReplyMode::Simple, 0);
        reader.next_request().await.unwrap();
        reader.skip_payload(1);
        assert!(reader.next_request().await.is_err());
    }
}

#[cfg(test)]
mod validation_tests {
    use super::*;
    use crate::wire::request::Cookie;

    const SIMPLE: NegotiatedParams =
        NegotiatedParams { size: 1000, mode: ReplyMode::Simple, has_contexts: false };
    const STRUCTURED: NegotiatedParams =
        NegotiatedParams { mode: ReplyMode::Structured, has_contexts: true, ..SIMPLE };
    const EXTENDED: NegotiatedParams = NegotiatedParams { mode: ReplyMode::Extended, ..STRUCTURED };

    fn request(command: Command, offset: u64, length: u64) -> Request {
        Request { flags: CommandFlags::default(), command, cookie: Cookie(1), offset, length }
    }

    fn flagged(flags: CommandFlags, request: Request) -> Request {
        Request { flags, ..request }
    }

    fn action(command: Command, offset: u64, length: u64) -> Action {
        validate(&request(command, offset, length), SIMPLE)
    }

    fn refused(refusal: Refusal) -> Action {
        Action::Refuse { refusal, payload: 0 }
    }

    #[test]
    fn reads_beyond_the_end_are_refused() {
        for (offset, length) in [(0, 1000), (999, 1), (1000, 0)] {
            let read = Action::Read { span: Span { offset, length }, whole: false };
            assert_eq!(action(Command::READ, offset, length.into()), read);
        }
        for (offset, length) in [(0, 1001), (999, 2), (1001, 0), (u64::MAX, 1), (u64::MAX, 0)] {
            assert_eq!(action(Command::READ, offset, length), refused(OUT_OF_RANGE));
        }
    }

    #[test]
    fn reads_longer_than_the_maximum_payload_are_refused() {
        for (params, code) in [(SIMPLE, ErrorCode::INVAL), (EXTENDED, ErrorCode::OVERFLOW)] {
            let large = NegotiatedParams { size: u64::MAX >> 1, ..params };
            let read = |length| validate(&request(Command::READ, 0, length), large);
            assert!(matches!(read(MAX_PAYLOAD.into()), Action::Read { .. }));
            let too_long = refused(Refusal::new(code, TOO_LONG));
            assert_eq!(read(u64::from(MAX_PAYLOAD) + 1), too_long);
            assert_eq!(read(u64::MAX >> 1), too_long);
        }
    }

    #[test]
    fn writes_are_refused() {
        let written = Action::Refuse { refusal: READ_ONLY, payload: 10 };
        assert_eq!(action(Command::WRITE, 0, 10), written);
        let long = u64::from(MAX_PAYLOAD) + 1;
        assert_eq!(action(Command::WRITE, 0, long), Action::PayloadTooLarge(long));
        assert_eq!(action(Command::TRIM, 0, u64::MAX), refused(READ_ONLY));
        assert_eq!(action(Command::WRITE_ZEROES, 0, u64::MAX), refused(READ_ONLY));
        let write = request(Command::WRITE, 0, 10);
        assert_eq!(validate(&write, EXTENDED), refused(WRITE_WITHOUT_PAYLOAD));
        assert_eq!(validate(&flagged(CommandFlags::PAYLOAD_LEN, write), EXTENDED), written);
    }

    #[test]
    fn unknown_commands_are_refused() {
        assert_eq!(action(Command::FLUSH, 0, 0), Action::Succeed);
        assert_eq!(action(Command::FLUSH, 1, 0), refused(FLUSH_WITH_RANGE));
        assert_eq!(action(Command::RESIZE, 0, 1), refused(UNKNOWN_COMMAND));
        assert_eq!(action(Command(99), 0, 0), refused(UNKNOWN_COMMAND));
    }

    #[test]
    fn inapplicable_flags_are_refused() {
        let with = |flags, params| validate(&flagged(flags, request(Command::READ, 0, 1)), params);
        assert_eq!(with(CommandFlags::FUA, STRUCTURED), refused(UNKNOWN_FLAG));
        assert_eq!(with(CommandFlags::DF, SIMPLE), refused(UNKNOWN_FLAG));
        assert_eq!(with(CommandFlags::PAYLOAD_LEN, STRUCTURED), refused(UNKNOWN_FLAG));
        // An unexpected payload is skipped nevertheless.
        let skipped = Action::Refuse { refusal: UNKNOWN_FLAG, payload: 1 };
        assert_eq!(with(CommandFlags::PAYLOAD_LEN, EXTENDED), skipped);
        assert!(matches!(with(CommandFlags::DF, EXTENDED), Action::Read { whole: true, .. }));
    }

    // nbdkit CVE-2025-47711, -47712 | block status of the largest length
    // qemu-nbd 10.0 | BLOCK_STATUS with a payload and no context selected
    #[test]
    fn block_status_requires_a_context_and_a_range() {
        let status = |offset, length, params| {
            validate(&request(Command::BLOCK_STATUS, offset, length), params)
        };
        assert_eq!(status(0, 10, SIMPLE), refused(NO_CONTEXT));
        let no_context = NegotiatedParams { has_contexts: false, ..EXTENDED };
        let payload = flagged(CommandFlags::PAYLOAD_LEN, request(Command::BLOCK_STATUS, 0, 12));
        let skipped = Action::Refuse { refusal: UNKNOWN_FLAG, payload: 12 };
        assert_eq!(validate(&payload, no_context), skipped);
        assert_eq!(
            validate(&payload, EXTENDED),
            Action::StatusWithPayload { offset: 0, payload: 12, single_extent: false }
        );
        let range = Action::Status { offset: 990, length: 10, single_extent: false };
        assert_eq!(status(990, 10, STRUCTURED), range);
        assert_eq!(status(0, 0, STRUCTURED), refused(EMPTY_STATUS));
        for length in [11, 0xffff_ffff, 0xffff_f000, u64::MAX] {
            assert_eq!(status(990, length, STRUCTURED), refused(OUT_OF_RANGE));
        }
    }
}
