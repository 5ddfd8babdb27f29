//! Replies on their way into the stream.

use std::future::Future;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::ticket::Reply;
use crate::nbd::budget::Share;
use crate::nbd::{Segment, SessionError};

/// Replies that are gathered for one write, at most.
const MAX_BATCH: usize = 64;

/// Slices that are handed to the stream at once, at most.
const MAX_SLICES: usize = 64;

/// What zeros are sent from.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Sends replies as they become ready.
pub(super) struct Outbox<W> {
    writer: W,
    ready: mpsc::UnboundedReceiver<Reply>,
    share: Arc<Share>,
    stall: Duration,
}

impl<W: AsyncWrite + Unpin> Outbox<W> {
    pub(super) fn new(
        writer: W,
        ready: mpsc::UnboundedReceiver<Reply>,
        share: Arc<Share>,
        stall: Duration,
    ) -> Self {
        Self { writer, ready, share, stall }
    }

    /// Sends until no request is left that could still be answered, then closes.
    pub(super) async fn run(mut self) -> Result<(), SessionError> {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        while self.ready.recv_many(&mut batch, MAX_BATCH).await > 0 {
            self.write(&batch).await?;
            batch.clear();
            if self.ready.is_empty() {
                unless_in_the_way(&self.share, self.stall, self.writer.flush()).await?;
            }
        }
        // The client may be gone already, which is its right by now.
        self.writer.shutdown().await.unwrap_or_default();
        Ok(())
    }

    async fn write(&mut self, batch: &[Reply]) -> Result<(), SessionError> {
        let mut slices: Vec<IoSlice<'_>> = Vec::with_capacity(2 * batch.len());
        for frame in batch.iter().flat_map(Reply::frames) {
            slices.push(IoSlice::new(frame.head()));
            frame.segments().iter().for_each(|segment| push_slices(&mut slices, segment));
        }
        let mut left = slices.as_mut_slice();
        while !left.is_empty() {
            let now = left.get(..MAX_SLICES).unwrap_or(left);
            let write = self.writer.write_vectored(now);
            let written = unless_in_the_way(&self.share, self.stall, write).await?;
            if written == 0 {
                return Err(io::Error::from(io::ErrorKind::WriteZero).into());
            }
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }
}

fn push_slices<'a>(slices: &mut Vec<IoSlice<'a>>, segment: &'a Segment) {
    match segment {
        Segment::Data(bytes) if bytes.is_empty() => {}
        Segment::Data(bytes) => slices.push(IoSlice::new(bytes)),
        Segment::Zeros(length) => {
            let mut left = *length as usize;
            while left > 0 {
                let piece = ZEROS.get(..left).unwrap_or(&ZEROS);
                slices.push(IoSlice::new(piece));
                left -= piece.len();
            }
        }
    }
}

/// Waits for progress on the stream: for ever while nobody is hurt by it, but no longer
/// than `stall` at a time once this connection's replies keep memory from others.
async fn unless_in_the_way<T>(
    share: &Share,
    stall: Duration,
    progress: impl Future<Output = io::Result<T>>,
) -> Result<T, SessionError> {
    let mut progress = std::pin::pin!(progress);
    loop {
        match tokio::time::timeout(stall, &mut progress).await {
            Ok(done) => return Ok(done?),
            Err(_) if share.is_in_the_way() => return Err(SessionError::Stalled),
            Err(_) => {}
        }
    }
}
