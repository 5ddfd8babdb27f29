//! Failures of exchanges with the server, common to all steps.

use std::fmt;
use std::io;
use std::time::Duration;

use nbd_server::client::ClientError;
use nbd_server::wire::option::{Opt, Rep};
use nbd_server::wire::reply::ErrorCode;

use super::report::escape_and_cut;

/// Reason why an exchange with the server failed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ProbeError {
    /// No answer within the timeout of a step.
    Timeout,
    /// End of the connection.
    Closed,
    /// TLS error, detected on either side.
    Tls(rustls::Error),
    /// Error reply to an option.
    OptionRefused { option: Opt, reply: Rep, message: String },
    /// Error reply to a request.
    RequestFailed { error: ErrorCode, message: String },
    /// Violation of the protocol.
    ProtocolViolation(String),
    /// Error from the operating system.
    Io(String),
}

impl ProbeError {
    pub(crate) fn from_io(error: &io::Error) -> Self {
        use io::ErrorKind::{
            BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof,
        };
        let tls = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
        match (tls, error.kind()) {
            (Some(error), _) => Self::Tls(error.clone()),
            (
                None,
                BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof,
            ) => Self::Closed,
            (None, _) => Self::Io(escape_and_cut(&error.to_string())),
        }
    }

    /// Returns true if an option was refused with this reply.
    pub(crate) fn is_refusal(&self, with: Rep) -> bool {
        matches!(self, Self::OptionRefused { reply, .. } if *reply == with)
    }

    /// Returns the stable label of the failure.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Tls(_) => "tls_error",
            Self::OptionRefused { .. } => "option_refused",
            Self::RequestFailed { .. } => "request_failed",
            Self::ProtocolViolation(_) => "protocol_violation",
            Self::Io(_) => "io_error",
        }
    }
}

impl fmt::Display for ProbeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout => f.write_str("no answer within the timeout"),
            Self::Closed => f.write_str("the server closed the connection"),
            Self::Tls(error) => write!(f, "TLS error: {}", escape_and_cut(&error.to_string())),
            Self::OptionRefused { reply, message, .. } => {
                write!(f, "{reply}{}", format_message(message))
            }
            Self::RequestFailed { error, message } => {
                write!(f, "{error}{}", format_message(message))
            }
            Self::ProtocolViolation(what) => f.write_str(what),
            Self::Io(error) => write!(f, "I/O error: {error}"),
        }
    }
}

/// Formats the server's own message, if there is one.
fn format_message(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (\"{}\")", escape_and_cut(message)) }
}

impl From<ClientError> for ProbeError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Io(error) => Self::from_io(&error),
            ClientError::Refused { option, reply, message } => {
                Self::OptionRefused { option, reply, message }
            }
            ClientError::Failed(error) => Self::RequestFailed { error, message: String::new() },
            ClientError::FailedWithMessage { error, message } => {
                Self::RequestFailed { error, message }
            }
            other => Self::ProtocolViolation(escape_and_cut(&other.to_string())),
        }
    }
}

/// Waits for an answer, at most for `timeout`.
pub(crate) async fn with_timeout<T, E: Into<ProbeError>>(
    timeout: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, ProbeError> {
    match tokio::time::timeout(timeout, answer).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(ProbeError::Timeout),
    }
}
