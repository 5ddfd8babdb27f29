//! Long reads, readahead, and exports that return incomplete data.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    Export, Negotiated, ReadError, ReplyMode, Segment, Span, TransmitLimits, transmit,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::raw::{CMD_WRITE, Request};

const SIZE: u64 = 64 << 20;
const EIO: u32 = 5;

/// Returns the byte at `offset` of the export.
fn byte_at(offset: u64) -> u8 {
    (offset / 4096 % 251) as u8
}

/// An export that records its reads.
#[derive(Default)]
struct Recorder {
    reads: Mutex<Vec<Span>>,
    ahead: Mutex<Vec<Span>>,
    /// Number of canceled readaheads.
    canceled: Arc<Mutex<usize>>,
    /// Number of bytes by which each read is too short.
    missing: u32,
}

struct CountsWhenDropped(Arc<Mutex<usize>>);

impl Drop for CountsWhenDropped {
    fn drop(&mut self) {
        *self.0.lock().unwrap() += 1;
    }
}

impl Export for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }

    fn size(&self) -> u64 {
        SIZE
    }

    async fn read(
        &self,
        span: Span,
        mut part: impl FnMut(u64, Segment) + Send,
    ) -> Result<(), ReadError> {
        self.reads.lock().unwrap().push(span);
        tokio::task::yield_now().await;
        let end = span.end() - u64::from(self.missing);
        let bytes: Vec<u8> = (span.offset..end).map(byte_at).collect();
        part(span.offset, Segment::Data(Bytes::from(bytes)));
        Ok(())
    }

    async fn read_ahead(&self, span: Span) {
        self.ahead.lock().unwrap().push(span);
        let _counts = CountsWhenDropped(Arc::clone(&self.canceled));
        std::future::pending::<()>().await;
    }
}

fn client(export: &Arc<Recorder>) -> DuplexStream {
    let (client, server) = tokio::io::duplex(64 * 1024);
    let replies = ReplyMode::Structured;
    let chosen =
        Negotiated { export: Arc::clone(export), reply_mode: replies, contexts: Vec::new() };
    let second = Duration::from_secs(1);
    let limits = TransmitLimits {
        stall: second,
        drain: second,
        ..TransmitLimits::new(Budget::new(1 << 25, 1 << 23))
    };
    tokio::spawn(async move {
        // The client sees how it ends.
        transmit(server, chosen, &limits, std::future::pending()).await.ok();
    });
    client
}

/// Receives a chunk: its type, true if it is the last, and its payload.
async fn chunk(client: &mut DuplexStream) -> (u16, bool, Vec<u8>) {
    let mut head = [0; 20];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..4], [0x66, 0x8e, 0x33, 0xef]);
    let mut payload = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    client.read_exact(&mut payload).await.unwrap();
    (u16::from_be_bytes([head[6], head[7]]), head[5] == 1, payload)
}

/// Reads a range. Returns the number of bytes received, or the error.
async fn read(client: &mut DuplexStream, offset: u64, length: u32) -> Result<usize, u32> {
    client.write_all(&Request::read(1, offset, length).encode()).await.unwrap();
    let mut received = 0;
    loop {
        let (kind, is_last, payload) = chunk(client).await;
        match kind {
            0 => assert!(payload.is_empty()),
            1 => {
                let at = u64::from_be_bytes(payload[..8].try_into().unwrap());
                let data = &payload[8..];
                assert!(data.iter().zip(at..).all(|(byte, at)| *byte == byte_at(at)));
                received += data.len();
            }
            0x8001 | 0x8002 => {
                assert!(is_last);
                return Err(u32::from_be_bytes(payload[..4].try_into().unwrap()));
            }
            other => panic!("chunk type {other}"),
        }
        if is_last {
            return Ok(received);
        }
    }
}

#[tokio::test]
async fn long_reads_are_processed_in_pieces() {
    let export = Arc::<Recorder>::default();
    let mut client = client(&export);
    for (offset, length) in [(0, 32 << 20), (1000, 1_000_000), (4095, 262_145), (7, 1), (9, 0)] {
        assert_eq!(read(&mut client, offset, length).await, Ok(length as usize));
        let reads = std::mem::take(&mut *export.reads.lock().unwrap());
        assert!(reads.iter().all(|read| read.length <= 256 * 1024));
        assert_eq!(reads.iter().map(|read| read.length).sum::<u32>(), length);
        // Pieces start at page boundaries.
        assert!(reads.iter().skip(1).all(|read| read.offset.is_multiple_of(4096)));
    }
}

/// Data of another length than the request's would corrupt the framing of later replies.
#[tokio::test]
async fn incomplete_data_is_an_error() {
    let export = Arc::new(Recorder { missing: 1, ..Recorder::default() });
    let mut client = client(&export);
    for length in [1, 4096, 1 << 20] {
        assert_eq!(read(&mut client, 0, length).await, Err(EIO));
    }
}

#[tokio::test]
async fn sequential_reads_are_read_ahead_until_they_stop() {
    let export = Arc::<Recorder>::default();
    let mut client = client(&export);
    for number in 0..8 {
        read(&mut client, number * 65_536, 65_536).await.unwrap();
    }
    let ahead = export.ahead.lock().unwrap().clone();
    // The first readahead never ends, so there is no second.
    assert!(matches!(ahead.as_slice(), [span] if span.offset == 2 * 65_536));
    assert_eq!(*export.canceled.lock().unwrap(), 0);
    read(&mut client, SIZE / 2, 4096).await.unwrap();
    read(&mut client, 0, 4096).await.unwrap();
    assert_eq!(*export.canceled.lock().unwrap(), 1);
    assert_eq!(export.ahead.lock().unwrap().len(), 1);
}

/// Regression test: requests before a protocol violation got no reply.
#[tokio::test]
async fn requests_before_a_malformed_one_are_answered() {
    let export = Arc::<Recorder>::default();
    let too_large = Request { command: CMD_WRITE, length: u32::MAX, ..Request::default() }.encode();
    for malformed in [vec![0x55; 28], too_large] {
        let mut client = client(&export);
        let reads = (0..3).flat_map(|cookie| Request::read(cookie, 4096, 4096).encode());
        client.write_all(&reads.chain(malformed).collect::<Vec<u8>>()).await.unwrap();
        for _ in 0..3 {
            assert!(matches!(chunk(&mut client).await, (1, true, data) if data.len() == 8 + 4096));
        }
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
