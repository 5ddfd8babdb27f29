//! The PROXY protocol, version 2: a load balancer says, in front of what a client sends, which
//! client it forwards. Sections are those of its specification,
//! <https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt>.

mod header;

use std::io;
use std::time::Duration;

use humantime::format_duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::{Instant, timeout_at};

pub use header::{Header, HeaderError, MAX_LENGTH, SIGNATURE, Start, Step, parse};

/// How long a header may take, from accepting the connection on. Balancers send it at once;
/// there is time for a segment to be sent twice again ("at least 3 seconds to cover a TCP
/// retransmit").
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoHeader {
    /// It has gone without a word, as one that only looks whether somebody listens.
    #[error("it has gone without a word")]
    Gone,
    /// It has gone in the middle of it.
    #[error("it has gone after {0} bytes of it")]
    Cut(usize),
    /// It says nothing.
    #[error(
        "it sent nothing within {} (a load balancer has to send it before the client has sent \
         anything; if it is no load balancer, don't name it)",
        format_duration(*.0)
    )]
    Silent(Duration),
    /// It says too little.
    #[error("it sent {bytes} bytes of it within {}", format_duration(*.within))]
    Slow {
        /// How many bytes came.
        bytes: usize,
        /// How long that took.
        within: Duration,
    },
    /// It says something else.
    #[error(transparent)]
    Wrong(#[from] HeaderError),
}

/// Reads the header in front of what the client sends, and not a byte more, within `patience`.
///
/// # Errors
/// See [`NoHeader`].
pub async fn read_header<S>(stream: &mut S, patience: Duration) -> Result<Header, NoHeader>
where
    S: AsyncRead + Unpin,
{
    let mut bytes = Vec::new();
    let ends = Instant::now() + patience;
    match timeout_at(ends, read(stream, &mut bytes)).await {
        Ok(Ok(read)) => read.map_err(NoHeader::Wrong),
        // A reset is how balancers end a connection with which they only looked.
        Ok(Err(_)) if bytes.is_empty() => Err(NoHeader::Gone),
        Ok(Err(_)) => Err(NoHeader::Cut(bytes.len())),
        Err(_) if bytes.is_empty() => Err(NoHeader::Silent(patience)),
        Err(_) => Err(NoHeader::Slow { bytes: bytes.len(), within: patience }),
    }
}

async fn read<S>(stream: &mut S, bytes: &mut Vec<u8>) -> io::Result<Result<Header, HeaderError>>
where
    S: AsyncRead + Unpin,
{
    loop {
        match parse(bytes) {
            Ok(Step::Done(header)) => return Ok(Ok(header)),
            Err(error) => return Ok(Err(error)),
            Ok(Step::More(missing)) => {
                let missing = missing as u64;
                if (&mut *stream).take(missing).read_buf(bytes).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }
}
