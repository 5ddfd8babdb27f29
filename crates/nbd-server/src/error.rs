//! Errors of a session, and their mapping to the protocol's error codes.

use std::io;

use super::wire::Malformed;
use super::wire::option::Opt;
use super::wire::reply::ErrorCode;

/// Reason why a session ended abnormally. Other sessions are not affected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The stream failed, or ended in the middle of a message.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client sent bytes that are not NBD, or lost message framing.
    #[error("the client broke the protocol: {0}")]
    Malformed(#[from] Malformed),
    /// The client set flags that the server did not offer. "The server MUST drop the TCP connection
    /// if the client sets an unknown flag."
    #[error("the client set flags that were not offered: {0:#x}")]
    InvalidClientFlags(u32),
    /// An option announced more data than any valid option needs.
    #[error("the client announced {length} bytes of data for {option}")]
    OptionTooLarge {
        /// The option.
        option: Opt,
        /// The announced length, in bytes.
        length: u32,
    },
    /// The client sent more options than the limit, which the field holds.
    #[error("the client sent more than {0} options (--max-options)")]
    TooManyOptions(u32),
    /// The client's options carried more bytes of data than the limit, which the field holds.
    #[error("the client sent more than {0} bytes of options (--max-option-bytes)")]
    TooManyOptionBytes(u64),
    /// The client did not choose an export in time ([`SessionOptions::negotiation_timeout`]).
    ///
    /// [`SessionOptions::negotiation_timeout`]: super::SessionOptions::negotiation_timeout
    #[error("the client did not choose an export in time")]
    NegotiationTimeout,
    /// The client asked for an unknown export by `NBD_OPT_EXPORT_NAME`. That option has no error
    /// reply, so the connection is closed.
    #[error("the client chose an export that isn't served: {0}")]
    UnknownExport(String),
    /// TLS is required, but the client tried to continue without it or is unable to negotiate it.
    #[error("the client did not start TLS, which this server requires")]
    TlsRequired,
    /// A request announced a payload too long to be drained; the field is its length in bytes.
    #[error("the client announced a payload of {0} bytes")]
    PayloadTooLarge(u64),
    /// The client stopped reading while it held memory that other connections were waiting for.
    #[error("the client stopped reading its replies while others waited for memory")]
    Stalled,
    /// The client disconnected, then did not read its last replies before the drain timeout.
    #[error("the client did not read its last replies in time")]
    DrainTimeout,
}

/// Reason why an export could not be read. Details go to the server's log, not to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The data at this byte offset of the export is unavailable or failed verification.
    #[error("the data at byte {0} is unreadable")]
    Unreadable(u64),
    /// The range reaches beyond the end of the export.
    #[error("the range is beyond the end")]
    OutOfRange,
    /// The export is shutting down.
    #[error("the export is shutting down")]
    ShuttingDown,
}

/// Error reply to a request, in the protocol's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    /// Human-readable message; only structured replies can carry it.
    pub(super) message: &'static str,
    /// Byte offset in the export that the error concerns, within the request.
    pub(super) offset: Option<u64>,
}

impl Refusal {
    pub(super) const fn new(code: ErrorCode, message: &'static str) -> Self {
        Self { code, message, offset: None }
    }
}

/// Maps an export's errors to the protocol's. This is the only such mapping.
impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unreadable(offset) => Self {
                code: ErrorCode::IO,
                message: "the data can't be read or can't be trusted; the server's log says why",
                offset: Some(offset),
            },
            ReadError::OutOfRange => {
                Self::new(ErrorCode::INVAL, "the range is beyond the end of the export")
            }
            ReadError::ShuttingDown => {
                Self::new(ErrorCode::SHUTDOWN, "the server is shutting down")
            }
        }
    }
}
