//! Bodies of responses, which can stall and break off.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::Sleep;

use crate::log::InProgress;
use crate::object::Object;
use crate::script::Behavior;

/// Maximum size of a frame, in bytes.
const FRAME: u64 = 256 * 1024;

/// Time between the last byte and a deliberate failure, in which the connection sends what it has.
const FLUSH: Duration = Duration::from_millis(20);

/// Where the bytes of a body come from.
#[derive(Debug)]
pub(crate) enum Bytestream {
    Fixed(Bytes),
    /// An object, from this offset on.
    Object(Object, u64),
}

/// A body that is sent as a [`Behavior`] demands.
#[derive(Debug)]
pub(crate) struct ScriptedBody {
    source: Bytestream,
    length: u64,
    sent: u64,
    behavior: Behavior,
    sleep: Option<Pin<Box<Sleep>>>,
    has_stalled: bool,
    is_failing: bool,
    entry: InProgress,
}

impl ScriptedBody {
    pub(crate) fn new(
        source: Bytestream,
        length: u64,
        behavior: Behavior,
        entry: InProgress,
    ) -> Self {
        let (sent, sleep) = (0, None);
        let (has_stalled, is_failing) = (false, false);
        Self { source, length, sent, behavior, sleep, has_stalled, is_failing, entry }
    }

    /// Returns the position up to which bytes can be sent before something else happens.
    fn next_stop(&self) -> u64 {
        let stall = self.behavior.stall.filter(|_| !self.has_stalled).map(|(after, _)| after);
        [stall, self.behavior.truncate_after, Some(self.length), Some(self.sent + FRAME)]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.length)
            .max(self.sent)
    }

    /// Reads up to `end`. Beyond the source there are zeros.
    fn read(&self, end: u64) -> io::Result<Bytes> {
        let length = usize::try_from(end - self.sent).map_err(io::Error::other)?;
        let bytes = match &self.source {
            Bytestream::Fixed(bytes) => {
                let start = usize::try_from(self.sent).map_err(io::Error::other)?.min(bytes.len());
                bytes.slice(start..(start + length).min(bytes.len()))
            }
            Bytestream::Object(object, start) => {
                let offset = start + self.sent;
                let available = object.length.saturating_sub(offset);
                let available = usize::try_from(available).unwrap_or(usize::MAX).min(length);
                self.behavior.apply_forgeries(offset, object.read(offset, available)?)
            }
        };
        if bytes.len() == length {
            return Ok(bytes);
        }
        let mut padded = bytes.to_vec();
        padded.resize(length, 0);
        Ok(padded.into())
    }
}

impl Body for ScriptedBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        loop {
            if let Some(sleep) = &mut self.sleep {
                ready!(sleep.as_mut().poll(context));
                self.sleep = None;
            }
            if self.is_failing {
                return Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into())));
            }
            match self.behavior.stall {
                Some((after, pause)) if after <= self.sent && !self.has_stalled => {
                    self.has_stalled = true;
                    self.sleep = Some(Box::pin(tokio::time::sleep(pause)));
                    continue;
                }
                _ => {}
            }
            if self.behavior.truncate_after.is_some_and(|after| after <= self.sent) {
                self.is_failing = true;
                self.sleep = Some(Box::pin(tokio::time::sleep(FLUSH)));
                continue;
            }
            if self.sent == self.length {
                return Poll::Ready(None);
            }
            let end = self.next_stop();
            let bytes = match self.read(end) {
                Ok(bytes) => bytes,
                Err(error) => return Poll::Ready(Some(Err(error))),
            };
            self.sent = end;
            self.entry.update(|entry| entry.bytes_sent = end);
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.length == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length - self.sent)
    }
}

/// Compresses a body into the gzip format (RFC 1952) with stored blocks (RFC 1951, section 3.2.4).
pub(crate) fn gzip(bytes: &[u8]) -> Bytes {
    const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let mut output = HEADER.to_vec();
    for block in bytes.chunks(usize::from(u16::MAX)) {
        let length = u16::try_from(block.len()).unwrap_or(u16::MAX);
        output.push(0);
        output.extend(length.to_le_bytes());
        output.extend((!length).to_le_bytes());
        output.extend(block);
    }
    // An empty final block.
    output.extend([1, 0, 0, 0xff, 0xff]);
    output.extend(crc32fast::hash(bytes).to_le_bytes());
    let length = u32::try_from(bytes.len() & 0xffff_ffff).unwrap_or_default();
    output.extend(length.to_le_bytes());
    output.into()
}
