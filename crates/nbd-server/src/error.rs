//! Errors of a session, and their mapping to the protocol's error codes.

use std::io;

use super::wire::option::Opt;
use super::wire::reply::ErrorCode;
use super::wire::{MAX_PAYLOAD, Malformed};

/// Reason why a session ended abnormally. Other sessions are not affected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The stream failed, or ended in the middle of a message.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client sent bytes that are not NBD, or lost message framing.
    #[error("the client violated the protocol: {0}")]
    Malformed(#[from] Malformed),
    /// The client set flags that the server did not offer. "The server MUST drop the TCP connection
    /// if the client sets an unknown flag."
    #[error("unknown client flags {0:#x}")]
    InvalidClientFlags(u32),
    /// An option announced more data than any valid option needs.
    #[error("{option} announced {length} bytes of data, more than any valid option has")]
    OptionTooLarge {
        /// The option.
        option: Opt,
        /// The announced length, in bytes.
        length: u32,
    },
    /// The client sent more options than the limit, which the field holds.
    #[error("limit of {0} options per negotiation exceeded")]
    TooManyOptions(u32),
    /// The client's options carried more bytes of data than the limit, which the field holds.
    #[error("limit of {0} bytes of option data per negotiation exceeded")]
    TooManyOptionBytes(u64),
    /// The client did not choose an export in time ([`SessionOptions::negotiation_timeout`]).
    ///
    /// [`SessionOptions::negotiation_timeout`]: super::SessionOptions::negotiation_timeout
    #[error("negotiation timed out: the client did not choose an export")]
    NegotiationTimeout,
    /// The client asked for an unknown export by `NBD_OPT_EXPORT_NAME`. That option has no error
    /// reply, so the connection is closed.
    #[error("no export named {0}, which NBD_OPT_EXPORT_NAME asked for")]
    UnknownExport(String),
    /// TLS is required, but the client tried to continue without it or is unable to negotiate it.
    #[error("the client did not start TLS, which is required")]
    TlsRequired,
    /// A request announced a payload too long to be drained; the field is its length in bytes.
    #[error("request payload of {0} bytes exceeds the limit of {MAX_PAYLOAD} bytes")]
    PayloadTooLarge(u64),
    /// The client stopped reading while it held memory that other connections were waiting for.
    #[error("the client stopped reading replies while other connections waited for memory")]
    Stalled,
    /// The client disconnected, then did not read its last replies before the drain timeout.
    #[error("the client did not read its last replies before the drain timeout")]
    DrainTimeout,
}

impl SessionError {
    /// Returns the stable label for counters and log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(_) => "connection_failed",
            Self::Malformed(_) => "malformed_message",
            Self::InvalidClientFlags(_) => "unknown_client_flags",
            Self::OptionTooLarge { .. } => "option_too_large",
            Self::TooManyOptions(_) => "too_many_options",
            Self::TooManyOptionBytes(_) => "too_many_option_bytes",
            Self::NegotiationTimeout => "negotiation_timeout",
            Self::UnknownExport(_) => "unknown_export",
            Self::TlsRequired => "tls_required",
            Self::PayloadTooLarge(_) => "payload_too_large",
            Self::Stalled => "stalled",
            Self::DrainTimeout => "drain_timeout",
        }
    }
}

/// Reason why an export could not be read. Details go to the server's log, not to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The data at this byte offset of the export is unavailable or failed verification.
    #[error("data at offset {0} can't be read or failed verification")]
    Unreadable(u64),
    /// The range reaches beyond the end of the export.
    #[error("the range exceeds the size of the export")]
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

pub(super) const OUT_OF_RANGE: Refusal =
    Refusal::new(ErrorCode::INVAL, "the range exceeds the size of the export");

/// Maps an export's errors to the protocol's. This is the only such mapping.
impl From<ReadError> for Refusal {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unreadable(offset) => Self {
                code: ErrorCode::IO,
                message: "data can't be read or failed verification; see the server's log",
                offset: Some(offset),
            },
            ReadError::OutOfRange => OUT_OF_RANGE,
            ReadError::ShuttingDown => {
                Self::new(ErrorCode::SHUTDOWN, "the server is shutting down")
            }
        }
    }
}
