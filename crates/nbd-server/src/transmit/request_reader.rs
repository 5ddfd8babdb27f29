//! Reading of requests from the stream.

use std::io;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::wire::Malformed;
use crate::wire::request::{Command, CommandFlags, Request};
use crate::{ReplyMode, SessionError};

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

#[cfg(test)]
mod tests {
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
