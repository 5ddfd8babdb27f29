//! Fetches the status from a status listener.

use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use super::status::ServerStatus;
use crate::cli::MonitorEndpoint;
use crate::exit_status::{self, ExitStatus};

/// Timeout of a request. A healthy server answers within milliseconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum size of an answer, in bytes. A thousand exports and a thousand connections take half a
/// MiB, or a few MiB if names are long.
const MAX_RESPONSE_BYTES: usize = 8 << 20;

/// Reason why there is no status.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error("can't connect to {0}: {1}; was the server started with --monitor?")]
    Connect(MonitorEndpoint, io::Error),
    #[error("{0} didn't answer within {limit} s", limit = REQUEST_TIMEOUT.as_secs())]
    Timeout(MonitorEndpoint),
    #[error("{0} doesn't speak HTTP as expected: {1}; is it what --monitor says?")]
    Http(MonitorEndpoint, hyper::Error),
    #[error("{0} answers to no such name: it takes --monitor-name, or ask for its address")]
    UnknownHost(MonitorEndpoint),
    #[error("{0} answered {1} where its status was asked for; is it a hexz-nbd?")]
    Refused(MonitorEndpoint, StatusCode),
    #[error("{0} answered with more than {limit} MiB", limit = MAX_RESPONSE_BYTES >> 20)]
    TooLong(MonitorEndpoint),
    #[error("the answer of {0} broke off: {1}")]
    Truncated(MonitorEndpoint, String),
    #[error("{0} answered with something else than the status of a hexz-nbd: {1}")]
    NotAStatus(MonitorEndpoint, String),
}

impl ExitStatus for StatusError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }
}

/// Fetches the status.
pub(super) async fn fetch_status(endpoint: &MonitorEndpoint) -> Result<ServerStatus, StatusError> {
    tokio::time::timeout(REQUEST_TIMEOUT, fetch_status_without_timeout(endpoint))
        .await
        .unwrap_or_else(|_| Err(StatusError::Timeout(endpoint.clone())))
}

async fn fetch_status_without_timeout(
    endpoint: &MonitorEndpoint,
) -> Result<ServerStatus, StatusError> {
    let unreachable = |error| StatusError::Connect(endpoint.clone(), error);
    let answer = match endpoint {
        MonitorEndpoint::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            fetch(endpoint, stream.map_err(unreachable)?).await?
        }
        MonitorEndpoint::Unix(path) => {
            fetch(endpoint, UnixStream::connect(path).await.map_err(unreachable)?).await?
        }
    };
    ServerStatus::parse(&answer).map_err(|why| StatusError::NotAStatus(endpoint.clone(), why))
}

async fn fetch(
    endpoint: &MonitorEndpoint,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Bytes, StatusError> {
    let failed = |error| StatusError::Http(endpoint.clone(), error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Aborts the connection's task when this request ends, however it ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut question = Request::new(Empty::<Bytes>::new());
    *question.uri_mut() = hyper::Uri::from_static("/status.json");
    if let Ok(host) = endpoint.host_header().parse() {
        question.headers_mut().insert(HOST, host);
    }
    question
        .headers_mut()
        .insert(ACCEPT, hyper::header::HeaderValue::from_static("application/json"));
    let answer = sender.send_request(question).await.map_err(failed)?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::MISDIRECTED_REQUEST => return Err(StatusError::UnknownHost(endpoint.clone())),
        other => return Err(StatusError::Refused(endpoint.clone(), other)),
    }
    match Limited::new(answer.into_body(), MAX_RESPONSE_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(StatusError::TooLong(endpoint.clone())),
        Err(error) => Err(StatusError::Truncated(endpoint.clone(), error.to_string())),
    }
}
