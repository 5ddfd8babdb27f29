//! A client that has said everything in advance: what it sends comes in pieces, what it is
//! sent is kept.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::{Builder, Runtime};

/// So much is sent in pieces, in bytes; then it goes as fast as it can.
const IN_PIECES: usize = 32 * 1024;

/// The stream of such a client. It ends where the client has nothing more to say.
#[derive(Debug)]
pub struct Script<'a> {
    input: &'a [u8],
    read: usize,
    /// How much is taken or given at a time: so many bytes, or nothing yet if zero. Used again
    /// and again; if there are none, all that there is.
    pieces: &'a [u8],
    next: usize,
    /// Whether the last one said "not yet", so that there is always an end to waiting.
    has_waited: bool,
    pub output: Vec<u8>,
    is_shut_down: bool,
}

impl<'a> Script<'a> {
    pub fn new(input: &'a [u8], pieces: &'a [u8]) -> Self {
        let output = Vec::new();
        Self { input, read: 0, pieces, next: 0, has_waited: false, output, is_shut_down: false }
    }

    /// How many of the client's bytes have been read.
    pub fn consumed(&self) -> usize {
        self.read
    }

    fn piece(&mut self, context: &Context<'_>) -> Poll<usize> {
        // Megabytes in small pieces would only be slow.
        if self.output.len() > IN_PIECES {
            return Poll::Ready(usize::MAX);
        }
        let Some(&piece) = self.pieces.get(self.next % self.pieces.len().max(1)) else {
            return Poll::Ready(usize::MAX);
        };
        self.next += 1;
        if piece == 0 && !self.has_waited {
            self.has_waited = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.has_waited = false;
        // The larger ones are large enough for requests and replies in one go.
        let piece = usize::from(piece);
        Poll::Ready(if piece < 128 { piece.max(1) } else { piece * 256 })
    }

    fn take(&mut self, bytes: &[u8], most: usize) -> usize {
        assert!(!self.is_shut_down, "written behind the end");
        let now = bytes.get(..most).unwrap_or(bytes);
        self.output.extend(now);
        now.len()
    }
}

impl AsyncRead for Script<'_> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let Poll::Ready(piece) = this.piece(context) else { return Poll::Pending };
        let left = &this.input[this.read..];
        let count = left.len().min(piece).min(buffer.remaining());
        buffer.put_slice(&left[..count]);
        this.read += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Script<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.piece(context).map(|piece| Ok(this.take(bytes, piece)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.piece(context).map(|piece| {
            let mut left = piece;
            for slice in slices {
                left -= this.take(slice, left);
            }
            Ok(piece - left)
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().is_shut_down = true;
        Poll::Ready(Ok(()))
    }
}

thread_local! {
    static RUNTIME: Runtime =
        Builder::new_current_thread().enable_time().build().expect("a runtime");
}

/// Runs one connection to its end.
pub fn run<T>(connection: impl Future<Output = T>) -> T {
    RUNTIME.with(|runtime| runtime.block_on(connection))
}
