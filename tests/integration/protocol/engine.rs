//! The engine over exports of our own: long reads, and what is read ahead.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nbd_server::budget::Budget;
use nbd_server::{
    Export, Negotiated, ReadError, ReplyMode, Segment, Span, TransmitLimits, transmit,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use crate::support::client::Request;

const SIZE: u64 = 64 << 20;
const EIO: u32 = 5;

/// Bytes that tell where they are from.
fn byte_at(offset: u64) -> u8 {
    (offset / 4096 % 251) as u8
}

/// An export that writes down what it is asked for.
#[derive(Default)]
struct Recorder {
    reads: Mutex<Vec<Span>>,
    ahead: Mutex<Vec<Span>>,
    /// How often reading ahead was given up.
    given_up: Arc<Mutex<usize>>,
    /// How many bytes each read is short of.
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

    fn description(&self) -> &'static str {
        ""
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
        let _counts = CountsWhenDropped(Arc::clone(&self.given_up));
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
        // How it ends is for the client to see.
        transmit(server, chosen, &limits, std::future::pending()).await.ok();
    });
    client
}

/// A chunk: its type, whether it is the last, and its payload.
async fn chunk(client: &mut DuplexStream) -> (u16, bool, Vec<u8>) {
    let mut head = [0; 20];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..4], [0x66, 0x8e, 0x33, 0xef]);
    let mut payload = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    client.read_exact(&mut payload).await.unwrap();
    (u16::from_be_bytes([head[6], head[7]]), head[5] == 1, payload)
}

/// All content of one answer, or its error.
async fn answer(client: &mut DuplexStream, offset: u64, length: u32) -> Result<usize, u32> {
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
async fn a_long_read_is_worked_on_in_pieces() {
    let export = Arc::<Recorder>::default();
    let mut client = client(&export);
    for (offset, length) in [(0, 32 << 20), (1000, 1_000_000), (4095, 262_145), (7, 1), (9, 0)] {
        assert_eq!(answer(&mut client, offset, length).await, Ok(length as usize));
        let reads = std::mem::take(&mut *export.reads.lock().unwrap());
        assert!(reads.iter().all(|read| read.length <= 256 * 1024));
        assert_eq!(reads.iter().map(|read| read.length).sum::<u32>(), length);
        // Borders of pieces are those of pages.
        assert!(reads.iter().skip(1).all(|read| read.offset.is_multiple_of(4096)));
    }
}

/// What isn't as long as the question would shift everything behind it.
#[tokio::test]
async fn an_export_that_returns_too_little_is_an_error() {
    let export = Arc::new(Recorder { missing: 1, ..Recorder::default() });
    let mut client = client(&export);
    for length in [1, 4096, 1 << 20] {
        assert_eq!(answer(&mut client, 0, length).await, Err(EIO));
    }
}

#[tokio::test]
async fn who_reads_in_order_is_read_ahead_of_until_it_stops() {
    let export = Arc::<Recorder>::default();
    let mut client = client(&export);
    for number in 0..8 {
        answer(&mut client, number * 65_536, 65_536).await.unwrap();
    }
    let ahead = export.ahead.lock().unwrap().clone();
    // The first doesn't end, so there is no second.
    assert!(matches!(ahead.as_slice(), [span] if span.offset == 2 * 65_536));
    assert_eq!(*export.given_up.lock().unwrap(), 0);
    answer(&mut client, SIZE / 2, 4096).await.unwrap();
    answer(&mut client, 0, 4096).await.unwrap();
    assert_eq!(*export.given_up.lock().unwrap(), 1);
    assert_eq!(export.ahead.lock().unwrap().len(), 1);
}

/// What was asked before a client broke the protocol got no answer.
#[tokio::test]
async fn requests_before_a_broken_one_are_answered() {
    const WRITE: u16 = 1;
    let export = Arc::<Recorder>::default();
    let too_large = Request { command: WRITE, length: u32::MAX, ..Request::default() }.encode();
    for broken in [vec![0x55; 28], too_large] {
        let mut client = client(&export);
        let reads = (0..3).flat_map(|cookie| Request::read(cookie, 4096, 4096).encode());
        client.write_all(&reads.chain(broken).collect::<Vec<u8>>()).await.unwrap();
        for _ in 0..3 {
            assert!(matches!(chunk(&mut client).await, (1, true, data) if data.len() == 8 + 4096));
        }
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
