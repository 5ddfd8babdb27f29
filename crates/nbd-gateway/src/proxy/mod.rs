//! PROXY protocol, version 2: reads the header in which a load balancer names the client that it
//! forwards, ahead of the client's own bytes. Sections are those of the specification,
//! <https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt>.

mod header;

use std::io;
use std::time::Duration;

use humantime::format_duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

pub use header::{HeaderError, ProxyHeader, UnexpectedStart};
use header::{ParseProgress, parse};

/// Timeout for the header, counted from the start of reading. Balancers send it at once; this
/// leaves time for a segment to be retransmitted twice ("at least 3 seconds to cover a TCP
/// retransmit").
pub(super) const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Reason for not getting a header.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadHeaderError {
    /// The peer closed the connection without sending anything, as a health check does.
    #[error("it has gone without a word")]
    ClosedAtOnce,
    /// The peer closed the connection after this many bytes of the header.
    #[error("it has gone after {0} bytes of it")]
    ClosedEarly(usize),
    /// The peer sent nothing before the timeout.
    #[error(
        "it sent nothing within {} (a load balancer has to send it before the client has sent \
         anything; if it is no load balancer, don't name it)",
        format_duration(*.0)
    )]
    NothingSent(Duration),
    /// The peer sent an incomplete header before the timeout.
    #[error("it sent {bytes} bytes of it within {}", format_duration(*.within))]
    TimedOut {
        /// Number of bytes received.
        bytes: usize,
        /// Timeout that expired.
        within: Duration,
    },
    /// The peer sent something that isn't an acceptable header.
    #[error(transparent)]
    Invalid(#[from] HeaderError),
}

/// Reads the header within `patience`, and not a byte beyond it.
///
/// # Errors
/// See [`ReadHeaderError`].
pub async fn read_header<S>(
    stream: &mut S,
    patience: Duration,
) -> Result<ProxyHeader, ReadHeaderError>
where
    S: AsyncRead + Unpin,
{
    let mut bytes = Vec::new();
    let ends = Instant::now() + patience;
    match timeout_at(ends, read(stream, &mut bytes)).await {
        Ok(Ok(read)) => read.map_err(ReadHeaderError::Invalid),
        // Load balancers end health checks with a reset.
        Ok(Err(_)) if bytes.is_empty() => Err(ReadHeaderError::ClosedAtOnce),
        Ok(Err(_)) => Err(ReadHeaderError::ClosedEarly(bytes.len())),
        Err(_) if bytes.is_empty() => Err(ReadHeaderError::NothingSent(patience)),
        Err(_) => Err(ReadHeaderError::TimedOut { bytes: bytes.len(), within: patience }),
    }
}

async fn read<S>(
    stream: &mut S,
    bytes: &mut Vec<u8>,
) -> io::Result<Result<ProxyHeader, HeaderError>>
where
    S: AsyncRead + Unpin,
{
    loop {
        match parse(bytes) {
            Ok(ParseProgress::Complete(header)) => return Ok(Ok(header)),
            Err(error) => return Ok(Err(error)),
            Ok(ParseProgress::Incomplete(missing)) => {
                let missing = missing as u64;
                if (&mut *stream).take(missing).read_buf(bytes).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }
}
