//! Why a step with a server failed, whatever the step was.

use std::io;
use std::time::Duration;

use hexz_nbd::nbd::client::ClientError;
use hexz_nbd::nbd::wire::option::{Opt, Rep};
use hexz_nbd::nbd::wire::reply::ErrorCode;

use super::report::shown;

/// What came instead of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Trouble {
    /// Nothing, for as long as a step may take.
    Silence,
    /// The end of the connection.
    Closed,
    /// TLS failed, here or there.
    Tls(rustls::Error),
    /// An option was refused.
    Refused { option: Opt, reply: Rep, message: String },
    /// A request failed.
    Failed { error: ErrorCode, message: String },
    /// Something that makes no sense.
    Broken(String),
    /// The system refused.
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

    /// Whether it was answered with that error.
    pub(crate) fn is_refusal(&self, with: Rep) -> bool {
        matches!(self, Self::Refused { reply, .. } if *reply == with)
    }

    /// What happened, as the rest of a sentence about the server.
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

/// The server's own words, if it has any.
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
            ClientError::FailedBecause { error, message } => Self::Failed { error, message },
            other => Self::Broken(shown(&other.to_string())),
        }
    }
}

/// Waits for an answer, and not for ever.
pub(crate) async fn within<T, E: Into<Trouble>>(
    timeout: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, Trouble> {
    match tokio::time::timeout(timeout, answer).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(Trouble::Silence),
    }
}
