//! What can go wrong in a session, and what the client is told.

use std::io;

use super::wire::Malformed;
use super::wire::option::Opt;
use super::wire::reply::ErrorCode;

/// Why a session ended other than by the client's leave. It concerns this session alone.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The stream failed, or ended in the middle of a message.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client's bytes aren't NBD, or are out of step.
    #[error("the client broke the protocol: {0}")]
    Malformed(#[from] Malformed),
    /// "The server MUST drop the TCP connection if the client sets an unknown flag."
    #[error("the client set flags that were not offered: {0:#x}")]
    UnknownClientFlags(u32),
    /// An option announced more data than anyone needs.
    #[error("the client announced {length} bytes of data for {option}")]
    OptionTooLarge {
        /// The option.
        option: Opt,
        /// The announced length, in bytes.
        length: u32,
    },
    /// It haggled for too long.
    #[error("the client sent more than {0} options (--max-options)")]
    TooManyOptions(u32),
    /// The same, by the data of its options.
    #[error("the client sent more than {0} bytes of options (--max-option-bytes)")]
    TooManyOptionBytes(u64),
    /// `NBD_OPT_EXPORT_NAME` can't be answered with an error, only by closing.
    #[error("the client chose an export that isn't served: {0}")]
    UnknownExport(String),
    /// TLS is required, and the client tried to do without or can't ask for it.
    #[error("the client did not start TLS, which this server requires")]
    TlsRequired,
    /// A request announced a payload that is too long to be drained.
    #[error("the client announced a payload of {0} bytes")]
    PayloadTooLarge(u64),
    /// The client holds memory that others wait for, and reads nothing.
    #[error("the client stopped reading its replies while others waited for memory")]
    Stalled,
    /// The client left, and then did not take its last replies in time.
    #[error("the client did not read its last replies in time")]
    DrainTimeout,
}

/// Why an export couldn't read. Details are for the server's log, not for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The bytes at this offset of the export can't be had, or can't be trusted.
    #[error("the data at byte {0} is unreadable")]
    Unreadable(u64),
    /// The range isn't within the export.
    #[error("the range is beyond the end")]
    OutOfRange,
    /// The export is going away.
    #[error("the export is shutting down")]
    ShuttingDown,
}

/// Why a request fails, as the client is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: ErrorCode,
    /// For a person; only structured replies can carry it.
    pub(super) message: &'static str,
    /// The byte of the export that it concerns, within the request.
    pub(super) offset: Option<u64>,
}

impl Refusal {
    pub(super) const fn new(code: ErrorCode, message: &'static str) -> Self {
        Self { code, message, offset: None }
    }
}

/// The one mapping from an export's errors to the protocol's.
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
