//! Requests as they come out of the stream.

use std::io;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::nbd::wire::Malformed;
use crate::nbd::wire::request::{Command, CommandFlags, Request};
use crate::nbd::{ReplyMode, SessionError};

/// How much is read at once, in bytes: some 140 requests.
const CAPACITY: usize = 4096;

/// Reads requests through a buffer, so that those that came together cost one read.
#[derive(Debug)]
pub(super) struct Inbox<R> {
    reader: R,
    buffer: BytesMut,
    extended: bool,
    /// Bytes of payload that nobody wants and that are still to come.
    to_skip: u32,
    /// The longest payload that is wanted, in bytes: that of a block status request.
    most_kept: usize,
}

impl<R: AsyncRead + Unpin> Inbox<R> {
    /// Requests have compact headers, or extended ones if those were negotiated.
    pub(super) fn new(reader: R, mode: ReplyMode, most_kept: usize) -> Self {
        let extended = mode == ReplyMode::Extended;
        let buffer = BytesMut::with_capacity(CAPACITY);
        Self { reader, buffer, extended, to_skip: 0, most_kept }
    }

    /// The next request, or `None` where the client closed between two requests.
    ///
    /// Cancel safe: what has arrived stays in the buffer.
    pub(super) async fn request(&mut self) -> Result<Option<Request>, SessionError> {
        loop {
            if let Some(request) = self.request_here()? {
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

    /// The next request, if it is in the buffer; with its payload, if that is wanted.
    pub(super) fn request_here(&mut self) -> Result<Option<Request>, Malformed> {
        let now = self.buffer.len().min(self.to_skip as usize);
        self.buffer.advance(now);
        self.to_skip -= u32::try_from(now).unwrap_or(self.to_skip);
        let (decoded, size) = if self.extended {
            (self.buffer.first_chunk().map(Request::decode_extended), Request::EXTENDED_SIZE)
        } else {
            (self.buffer.first_chunk().map(Request::decode), Request::SIZE)
        };
        let Some(request) = decoded.transpose()? else { return Ok(None) };
        if self.buffer.len() < size + self.kept_payload(&request) {
            return Ok(None);
        }
        self.buffer.advance(size);
        Ok(Some(request))
    }

    /// How long the payload is that comes together with its request, in bytes.
    fn kept_payload(&self, request: &Request) -> usize {
        let has_payload = self.extended
            && request.command == Command::BLOCK_STATUS
            && request.flags.contains(CommandFlags::PAYLOAD_LEN);
        match usize::try_from(request.length) {
            Ok(length) if has_payload && length <= self.most_kept => length,
            _ => 0,
        }
    }

    /// The payload of the request that came last, `length` bytes; `None` if it is too long to
    /// be wanted, and will be skipped.
    pub(super) fn payload(&mut self, length: u32) -> Option<BytesMut> {
        if length as usize > self.most_kept || length as usize > self.buffer.len() {
            self.skip(length);
            return None;
        }
        Some(self.buffer.split_to(length as usize))
    }

    /// Passes over `length` bytes of payload, as they come.
    pub(super) fn skip(&mut self, length: u32) {
        self.to_skip = length;
    }

    /// Reads over whatever comes until the client closes. To close while something is
    /// unread would reset the connection, and replies on their way would be lost.
    pub(super) async fn discard(&mut self) {
        self.buffer.clear();
        while matches!(self.fill().await, Ok(true)) {
            self.buffer.clear();
        }
    }

    async fn fill(&mut self) -> io::Result<bool> {
        // Makes room for a whole read without growing: consumed bytes are reclaimed.
        let wanted = CAPACITY.max(Request::EXTENDED_SIZE + self.most_kept);
        self.buffer.reserve(wanted - self.buffer.len().min(wanted - 1));
        match self.reader.read_buf(&mut self.buffer).await {
            Ok(count) => Ok(count > 0),
            // Many clients close TCP without closing TLS first. Requests carry their own
            // lengths, so an end that was forged can't make one request into another.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::request::Cookie;

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
    async fn requests_and_payloads_in_pieces() {
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
            let mut inbox = Inbox::new(server, ReplyMode::Simple, 0);
            for cookie in 0..500 {
                assert_eq!(inbox.request().await.unwrap(), Some(request(cookie)));
                inbox.skip(100);
            }
            assert_eq!(inbox.request().await.unwrap(), None);
            assert!(inbox.buffer.capacity() <= 2 * CAPACITY);
            sender.await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_end_in_the_middle_is_an_error() {
        let whole = request(1).encode();
        for cut in 1..whole.len() {
            let mut inbox = Inbox::new(&whole[..cut], ReplyMode::Simple, 0);
            assert!(inbox.request().await.is_err());
        }
        let mut inbox = Inbox::new(&whole[..], ReplyMode::Simple, 0);
        inbox.request().await.unwrap();
        inbox.skip(1);
        assert!(inbox.request().await.is_err());
    }
}
