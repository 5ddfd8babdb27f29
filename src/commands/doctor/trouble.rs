//! Failures of exchanges with the server, common to all steps.

use std::io;
use std::time::Duration;

use nbd_server::client::ClientError;
use nbd_server::wire::option::{Opt, Rep};
use nbd_server::wire::reply::ErrorCode;

use super::report::shown;

/// Reason why an exchange with the server failed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Trouble {
    /// No answer within the timeout of a step.
    Silence,
    /// End of the connection.
    Closed,
    /// TLS error, detected on either side.
    Tls(rustls::Error),
    /// Error reply to an option.
    Refused { option: Opt, reply: Rep, message: String },
    /// Error reply to a request.
    Failed { error: ErrorCode, message: String },
    /// Violation of the protocol.
    Broken(String),
    /// Error from the operating system.
    System(String),
}

impl Trouble {
    pub(crate) fn of_io(error: &io::Error) -> Self {
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
            (None, _) => Self::System(shown(&error.to_string())),
        }
    }

    /// Returns true if an option was refused with this reply.
    pub(crate) fn is_refusal(&self, with: Rep) -> bool {
        matches!(self, Self::Refused { reply, .. } if *reply == with)
    }

    /// Describes the failure as a clause about the server, to be put into a sentence.
    pub(crate) fn words(&self) -> String {
        match self {
            Self::Silence => "it doesn't answer in time".to_owned(),
            Self::Closed => "it closes the connection".to_owned(),
            Self::Tls(error) => format!("TLS fails: {}", shown(&error.to_string())),
            Self::Refused { reply, message, .. } => {
                format!("it answers with {reply}{}", said(message))
            }
            Self::Failed { error, message } => format!("it answers with {error}{}", said(message)),
            Self::Broken(what) => what.clone(),
            Self::System(error) => format!("the system refuses: {error}"),
        }
    }
}

/// Formats the server's own message, if there is one.
fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (\"{}\")", shown(message)) }
}

impl From<ClientError> for Trouble {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Io(error) => Self::of_io(&error),
            ClientError::Refused { option, reply, message } => {
                Self::Refused { option, reply, message }
            }
            ClientError::Failed(error) => Self::Failed { error, message: String::new() },
            ClientError::FailedWithMessage { error, message } => Self::Failed { error, message },
            other => Self::Broken(shown(&other.to_string())),
        }
    }
}

/// Waits for an answer, at most for `timeout`.
pub(crate) async fn within<T, E: Into<Trouble>>(
    timeout: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, Trouble> {
    match tokio::time::timeout(timeout, answer).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(Trouble::Silence),
    }
}
