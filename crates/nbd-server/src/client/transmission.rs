//! The transmission phase of the client: reads and disconnection.

use std::io;
use std::ops::Range;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{ClientError, ExportInfo};
use crate::ReplyMode;
use crate::wire::FieldReader;
use crate::wire::reply::{
    ChunkHeader, ErrorCode, ExtendedChunkHeader, ReplyFlags, ReplyType, SimpleReply,
};
use crate::wire::request::{Command, CommandFlags, Cookie, Request};

/// Maximum number of chunks in the reply to one read: more than one for each 512 bytes of 32 MiB.
const MAX_CHUNKS: usize = 1 << 17;
/// Length of the offset field in front of the data in a data chunk, in bytes.
const OFFSET_FIELD_SIZE: u32 = 8;
/// Longest accepted payload of a chunk without data, in bytes: enough for an error with the longest
/// message.
const MAX_OTHER_PAYLOAD: u32 = 8192;

/// A session in its transmission phase.
#[derive(Debug)]
pub struct Transmission<S> {
    stream: S,
    export: ExportInfo,
    reply_mode: ReplyMode,
    cookie: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Transmission<S> {
    /// Creates a session on a stream on which `export` has been chosen.
    pub fn new(stream: S, export: ExportInfo, reply_mode: ReplyMode) -> Self {
        Self { stream, export, reply_mode, cookie: 0 }
    }

    /// Returns the information that the server gave about the export.
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// Returns the underlying stream, for example to query the negotiated TLS parameters.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Reads `length` bytes at `offset`.
    ///
    /// # Errors
    /// [`ClientError::Failed`] and [`ClientError::FailedWithMessage`] leave the session usable; the
    /// others don't.
    pub async fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, ClientError> {
        self.cookie += 1;
        let cookie = Cookie(self.cookie);
        self.send(Command::READ, cookie, offset, length).await?;
        match self.reply_mode {
            ReplyMode::Simple => self.simple_reply(cookie, length).await,
            ReplyMode::Structured | ReplyMode::Extended => {
                self.chunks(cookie, offset, length).await
            }
        }
    }

    /// Sends `NBD_CMD_DISC` and closes the stream.
    ///
    /// # Errors
    /// The stream failed.
    pub async fn disconnect(mut self) -> Result<(), ClientError> {
        self.send_disconnect().await
    }

    /// Sends `NBD_CMD_DISC`, closes the stream and waits until the server has closed it, too.
    ///
    /// # Errors
    /// The stream failed, or the server sent data instead of closing it.
    pub async fn disconnect_and_wait(mut self) -> Result<(), ClientError> {
        self.send_disconnect().await?;
        match self.stream.read(&mut [0; 1]).await? {
            0 => Ok(()),
            _ => Err(ClientError::UnexpectedReply("DISC")),
        }
    }

    async fn send_disconnect(&mut self) -> Result<(), ClientError> {
        self.send(Command::DISC, Cookie(0), 0, 0).await?;
        self.stream.shutdown().await?;
        Ok(())
    }

    async fn send(
        &mut self,
        command: Command,
        cookie: Cookie,
        offset: u64,
        length: u32,
    ) -> io::Result<()> {
        let flags = CommandFlags::default();
        let request = Request { flags, command, cookie, offset, length: length.into() };
        match self.reply_mode {
            ReplyMode::Extended => self.stream.write_all(&request.encode_extended()).await?,
            _ => self.stream.write_all(&request.encode()).await?,
        }
        self.stream.flush().await
    }

    async fn simple_reply(&mut self, cookie: Cookie, length: u32) -> Result<Vec<u8>, ClientError> {
        let mut head = [0; SimpleReply::SIZE];
        self.stream.read_exact(&mut head).await?;
        let reply = SimpleReply::decode(&head)?;
        if reply.cookie != cookie {
            return Err(ClientError::UnexpectedReply("READ"));
        }
        if reply.error != ErrorCode::OK {
            return Err(ClientError::Failed(reply.error));
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).await?;
        Ok(data)
    }

    /// Reassembles the data of a read from chunks, which may arrive in any order. Together they
    /// must cover each byte exactly once.
    async fn chunks(
        &mut self,
        cookie: Cookie,
        offset: u64,
        length: u32,
    ) -> Result<Vec<u8>, ClientError> {
        let mut data = vec![0; length as usize];
        let mut filled: Vec<Range<usize>> = Vec::new();
        let mut failed = None;
        for _ in 0..MAX_CHUNKS {
            let chunk = self.chunk_header().await?;
            if chunk.cookie != cookie {
                return Err(ClientError::UnexpectedReply("READ"));
            }
            match chunk.kind {
                ReplyType::OFFSET_DATA => {
                    let count = chunk.length.checked_sub(OFFSET_FIELD_SIZE);
                    let at = self.stream.read_u64().await?;
                    let range = count.and_then(|count| buffer_range(at, count, offset, length));
                    let range = range.ok_or(ClientError::UnexpectedReply("READ"))?;
                    let part = data.get_mut(range.clone());
                    self.stream
                        .read_exact(part.ok_or(ClientError::UnexpectedReply("READ"))?)
                        .await?;
                    filled.push(range);
                }
                ReplyType::OFFSET_HOLE => {
                    let payload = self.payload(chunk.length).await?;
                    let mut reader = FieldReader::new(&payload);
                    let at = reader.u64("a hole's offset")?;
                    let count = reader.u32("a hole's length")?;
                    reader.finish()?;
                    // The buffer is zeroed already.
                    let range = buffer_range(at, count, offset, length);
                    filled.push(range.ok_or(ClientError::UnexpectedReply("READ"))?);
                }
                ReplyType::NONE if chunk.length == 0 => {}
                ReplyType::ERROR | ReplyType::ERROR_OFFSET => {
                    let payload = self.payload(chunk.length).await?;
                    failed.get_or_insert(decode_error(&payload)?);
                }
                _ => return Err(ClientError::UnexpectedReply("READ")),
            }
            if chunk.flags.contains(ReplyFlags::DONE) {
                return match failed {
                    Some(error) => Err(error),
                    None if cover_exactly(&mut filled, length as usize) => Ok(data),
                    None => Err(ClientError::UnexpectedReply("READ")),
                };
            }
        }
        Err(ClientError::UnexpectedReply("READ"))
    }

    async fn chunk_header(&mut self) -> Result<ChunkHeader, ClientError> {
        if self.reply_mode == ReplyMode::Extended {
            let mut head = [0; ExtendedChunkHeader::SIZE];
            self.stream.read_exact(&mut head).await?;
            return Ok(ExtendedChunkHeader::decode(&head)?.chunk);
        }
        let mut head = [0; ChunkHeader::SIZE];
        self.stream.read_exact(&mut head).await?;
        Ok(ChunkHeader::decode(&head)?)
    }

    async fn payload(&mut self, length: u32) -> Result<Vec<u8>, ClientError> {
        if length > MAX_OTHER_PAYLOAD {
            return Err(ClientError::UnexpectedReply("READ"));
        }
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await?;
        Ok(payload)
    }
}

/// Returns the index range of `count` bytes at offset `at` in a buffer that holds `length` bytes
/// from `offset` on. Returns `None` if it is empty or out of bounds.
fn buffer_range(at: u64, count: u32, offset: u64, length: u32) -> Option<Range<usize>> {
    let start = u32::try_from(at.checked_sub(offset)?).ok()?;
    let end = start.checked_add(count).filter(|&end| end <= length && count > 0)?;
    Some(start as usize..end as usize)
}

/// Returns true if the ranges cover each of the first `length` bytes exactly once.
fn cover_exactly(ranges: &mut [Range<usize>], length: usize) -> bool {
    ranges.sort_unstable_by_key(|range| range.start);
    let end = ranges.iter().try_fold(0, |end, range| (range.start == end).then_some(range.end));
    end == Some(length)
}

fn decode_error(payload: &[u8]) -> Result<ClientError, ClientError> {
    let mut reader = FieldReader::new(payload);
    let error = ErrorCode(reader.u32("an error")?);
    let length = reader.u16("an error's message")?;
    let message = reader.bytes(length.into(), "an error's message")?;
    if message.is_empty() {
        return Ok(ClientError::Failed(error));
    }
    let message = String::from_utf8_lossy(message).into_owned();
    Ok(ClientError::FailedWithMessage { error, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_must_cover_the_read_exactly_once() {
        let covered = |ranges: &[(usize, usize)]| {
            let mut ranges: Vec<_> = ranges.iter().map(|&(start, end)| start..end).collect();
            cover_exactly(&mut ranges, 10)
        };
        assert!(covered(&[(5, 10), (0, 5)]));
        assert!(covered(&[(0, 10)]));
        for bad in [&[][..], &[(0, 5)], &[(0, 5), (6, 10)], &[(0, 6), (5, 10)], &[(0, 10), (0, 10)]]
        {
            assert!(!covered(bad), "{bad:?}");
        }
        assert_eq!(buffer_range(100, 10, 95, 20), Some(5..15));
        for (at, count) in [(94, 1), (95, 21), (115, 1), (95, 0), (u64::MAX, 1), (100, u32::MAX)] {
            assert_eq!(buffer_range(at, count, 95, 20), None, "{at} {count}");
        }
    }
}
