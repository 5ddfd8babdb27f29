//! Limits the number of TLS records that one key may protect, by counting them in the stream.
//!
//! AES-GCM loses a little of its safety margin with every record (RFC 8446, section 5.5). TLS 1.3
//! replaces its keys in time; TLS 1.2 can't. There, rustls ends the session at the limit of the
//! cipher suite, in the middle of whatever is being sent. Counting the records makes it possible to
//! end the session earlier, between two replies, and to say why.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::SupportedCipherSuite;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

/// Divisor of the limit that gives the records reserved for replies to requests that have arrived
/// already: one sixteenth. Of 2^24 records that is 16 GiB, twice what 256 requests of 32 MiB need.
const RESERVE_DIVISOR: u64 = 16;

/// Returns the number of records that may be sent with one key of the suite; `None` if there is no
/// limit, or if the keys are replaced in time.
pub(super) fn record_limit(suite: SupportedCipherSuite) -> Option<u64> {
    match suite {
        SupportedCipherSuite::Tls12(suite) => Some(suite.common.confidentiality_limit),
        SupportedCipherSuite::Tls13(_) => None,
    }
    .filter(|limit| *limit < u64::MAX)
}

/// The stream below TLS. It counts the records sent, once a limit is set.
#[derive(Debug)]
pub(crate) struct RecordCountingStream<S> {
    stream: S,
    meter: Option<RecordCounter>,
}

impl<S> RecordCountingStream<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, meter: None }
    }

    /// Starts counting with the next record. Must be called when the handshake is complete and all
    /// of it has been sent. The token is cancelled when the session should end.
    pub(super) fn set_limit(&mut self, records: u64) -> CancellationToken {
        let meter = RecordCounter::new(records);
        let threshold_reached = meter.threshold_reached.clone();
        self.meter = Some(meter);
        threshold_reached
    }
}

/// Finds the records in a stream of bytes by the lengths in their headers (RFC 5246, section
/// 6.2.1).
#[derive(Debug)]
struct RecordCounter {
    /// Bytes of the current header processed so far.
    in_header: u8,
    /// Length stated by the current header, as far as it has been processed.
    length: usize,
    /// Remaining bytes of the current record.
    remaining: usize,
    sent: u64,
    threshold: u64,
    threshold_reached: CancellationToken,
}

impl RecordCounter {
    fn new(limit: u64) -> Self {
        let threshold = limit.saturating_sub(limit / RESERVE_DIVISOR);
        let threshold_reached = CancellationToken::new();
        // The handshake's last message was the first record with this key.
        Self { in_header: 0, length: 0, remaining: 0, sent: 1, threshold, threshold_reached }
    }

    fn count(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (body, rest) = bytes.split_at(self.remaining.min(bytes.len()));
            self.remaining -= body.len();
            bytes = rest;
            if let Some((byte, rest)) = bytes.split_first() {
                self.count_header_byte(*byte);
                bytes = rest;
            }
        }
    }

    /// Processes one byte of a header: one for the type, two for the version, two for the length.
    fn count_header_byte(&mut self, byte: u8) {
        self.in_header += 1;
        match self.in_header {
            4 => self.length = usize::from(byte) << 8,
            5 => {
                self.remaining = self.length | usize::from(byte);
                self.in_header = 0;
                self.sent += 1;
                if self.sent >= self.threshold {
                    self.threshold_reached.cancel();
                }
            }
            _ => {}
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for RecordCountingStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for RecordCountingStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        if let (Poll::Ready(Ok(written)), Some(meter)) = (&written, &mut self.meter) {
            let mut left = *written;
            for part in parts {
                let (sent, _) = part.split_at(left.min(part.len()));
                meter.count(sent);
                left -= sent.len();
            }
        }
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use rustls::crypto::aws_lc_rs::cipher_suite;

    use super::*;

    fn record(length: u16) -> Vec<u8> {
        let [high, low] = length.to_be_bytes();
        // Bytes within a record that look like headers must be ignored.
        [&[23, 3, 3, high, low][..], &[23, 3, 3, 0, 1].repeat(usize::from(length))]
            .concat()
            .into_iter()
            .take(5 + usize::from(length))
            .collect()
    }

    #[test]
    fn records_are_counted_across_write_boundaries() {
        let records = [0, 1, 16_413, 5, 300].map(record).concat();
        for piece in [1, 2, 3, 4, 5, 6, 7, 1000, 16_000, records.len()] {
            let mut meter = RecordCounter::new(1 << 24);
            records.chunks(piece).for_each(|piece| meter.count(piece));
            assert_eq!((meter.sent, meter.in_header, meter.remaining), (6, 0, 0), "{piece}");
        }
    }

    #[test]
    fn threshold_is_reached_before_the_limit() {
        let mut meter = RecordCounter::new(32);
        for _ in 2..30 {
            meter.count(&record(9));
            assert!(!meter.threshold_reached.is_cancelled());
        }
        meter.count(&record(9));
        assert_eq!(meter.sent, 30);
        assert!(meter.threshold_reached.is_cancelled());
    }

    #[test]
    fn only_tls_1_2_aes_gcm_is_limited() {
        let of = |suite| record_limit(suite);
        assert_eq!(of(cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384), Some(1 << 24));
        assert_eq!(of(cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256), None);
        assert_eq!(of(cipher_suite::TLS13_AES_128_GCM_SHA256), None);
    }
}
