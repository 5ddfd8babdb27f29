//! Requests as they come out of the stream.

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::nbd::wire::Malformed;
use crate::nbd::wire::request::Request;
use crate::nbd::{ReplyMode, SessionError};

/// How much is read at once, in bytes: some 140 requests.
const CAPACITY: usize = 4096;

/// Reads requests through a buffer, so that those that came together cost one read.
#[derive(Debug)]
pub(super) struct Inbox<R> {
    reader: R,
    buffer: BytesMut,
    extended: bool,
}

impl<R: AsyncRead + Unpin> Inbox<R> {
    /// Requests have compact headers, or extended ones if those were negotiated.
    pub(super) fn new(reader: R, mode: ReplyMode) -> Self {
        let extended = mode == ReplyMode::Extended;
        Self { reader, buffer: BytesMut::with_capacity(CAPACITY), extended }
    }

    /// The next request, or `None` where the client closed between two requests.
    ///
    /// Cancel safe: what has arrived stays in the buffer.
    pub(super) async fn request(&mut self) -> Result<Option<Request>, SessionError> {
        loop {
            if let Some(request) = self.decode()? {
                return Ok(Some(request));
            }
            if !self.fill().await? {
                if self.buffer.is_empty() {
                    return Ok(None);
                }
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    /// The next request, if it has arrived whole.
    pub(super) async fn request_now(&mut self) -> Result<Option<Request>, SessionError> {
        loop {
            if let Some(request) = self.decode()? {
                return Ok(Some(request));
            }
            let filled = tokio::time::timeout(Duration::ZERO, self.fill()).await;
            if !filled.unwrap_or(Ok(false))? {
                return Ok(None);
            }
        }
    }

    /// A request that is in the buffer.
    fn decode(&mut self) -> Result<Option<Request>, Malformed> {
        let (decoded, size) = if self.extended {
            (self.buffer.first_chunk().map(Request::decode_extended), Request::EXTENDED_SIZE)
        } else {
            (self.buffer.first_chunk().map(Request::decode), Request::SIZE)
        };
        let request = decoded.transpose()?;
        if request.is_some() {
            self.buffer.advance(size);
        }
        Ok(request)
    }

    /// Reads over `length` bytes of payload, in a constant amount of memory.
    pub(super) async fn skip(&mut self, length: u32) -> Result<(), SessionError> {
        let mut left = length as usize;
        loop {
            let here = left.min(self.buffer.len());
            self.buffer.advance(here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            if !self.fill().await? {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }

    /// A payload of `length` bytes. The caller has capped the length.
    pub(super) async fn payload(&mut self, length: u32) -> Result<Vec<u8>, SessionError> {
        let mut payload = Vec::with_capacity(length as usize);
        loop {
            let here = (length as usize - payload.len()).min(self.buffer.len());
            payload.extend(self.buffer.split_to(here));
            if payload.len() == length as usize {
                return Ok(payload);
            }
            if !self.fill().await? {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
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
        self.buffer.reserve(CAPACITY - self.buffer.len().min(CAPACITY - 1));
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
    use crate::nbd::wire::request::{Command, CommandFlags, Cookie};

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
            let mut inbox = Inbox::new(server, ReplyMode::Simple);
            for cookie in 0..500 {
                assert_eq!(inbox.request().await.unwrap(), Some(request(cookie)));
                inbox.skip(100).await.unwrap();
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
            let mut inbox = Inbox::new(&whole[..cut], ReplyMode::Simple);
            assert!(inbox.request().await.is_err());
        }
        let mut inbox = Inbox::new(&whole[..], ReplyMode::Simple);
        inbox.request().await.unwrap();
        assert!(inbox.skip(1).await.is_err());
    }
}
