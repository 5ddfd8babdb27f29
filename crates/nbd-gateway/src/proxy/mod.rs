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
    #[error("the connection was closed before any byte arrived")]
    ClosedAtOnce,
    /// The peer closed the connection after this many bytes of the header.
    #[error("the connection was closed after {0} bytes of it")]
    ClosedEarly(usize),
    /// The peer sent nothing before the timeout.
    #[error(
        "nothing arrived within {} (a load balancer must send it before the client sends anything)",
        format_duration(*.0)
    )]
    NothingSent(Duration),
    /// The peer sent an incomplete header before the timeout.
    #[error("only {bytes} bytes of it arrived within {}", format_duration(*.within))]
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

impl ReadHeaderError {
    /// Returns the stable label for log fields and audit events.
    pub fn label(&self) -> &'static str {
        match self {
            Self::ClosedAtOnce => "closed_at_once",
            Self::ClosedEarly(_) => "closed_early",
            Self::NothingSent(_) => "nothing_sent",
            Self::TimedOut { .. } => "timed_out",
            Self::Invalid(error) => error.label(),
        }
    }
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
