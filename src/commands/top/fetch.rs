//! Fetches the status from a status listener.

use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use crate::cli::MonitorEndpoint;
use crate::exit_status::{self, ExitStatus};
use crate::monitor::Status;

/// Timeout of a request. A healthy server answers within milliseconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum size of an answer, in bytes. A thousand exports and a thousand connections take half a
/// MiB, or a few MiB if names are long.
const MAX_RESPONSE_BYTES: usize = 8 << 20;

/// Reason why there is no status: its label and its description.
#[derive(Debug, thiserror::Error)]
#[error("{endpoint}: {problem}")]
pub(crate) struct StatusError {
    pub(super) endpoint: MonitorEndpoint,
    pub(super) reason: &'static str,
    pub(super) problem: String,
}

impl ExitStatus for StatusError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }

    fn label(&self) -> &'static str {
        self.reason
    }
}

/// Fetches the status.
pub(super) async fn fetch_status(endpoint: &MonitorEndpoint) -> Result<Status, StatusError> {
    let result = tokio::time::timeout(REQUEST_TIMEOUT, connect_and_fetch(endpoint)).await;
    let no_response = format!("no response within {} s", REQUEST_TIMEOUT.as_secs());
    result.unwrap_or(Err(("timeout", no_response))).map_err(|(reason, problem)| StatusError {
        endpoint: endpoint.clone(),
        reason,
        problem,
    })
}

/// A label and a description.
type Problem = (&'static str, String);

async fn connect_and_fetch(endpoint: &MonitorEndpoint) -> Result<Status, Problem> {
    let unreachable = |error: io::Error| {
        ("connect_failed", format!("can't connect: {error}; start the server with --monitor"))
    };
    let response = match endpoint {
        MonitorEndpoint::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            fetch(endpoint, stream.map_err(unreachable)?).await?
        }
        MonitorEndpoint::Unix(path) => {
            fetch(endpoint, UnixStream::connect(path).await.map_err(unreachable)?).await?
        }
    };
    let problem = |error| ("not_a_status", format!("not a status of hexz-nbd: {error}"));
    Status::parse(&response).map_err(problem)
}

async fn fetch(
    endpoint: &MonitorEndpoint,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Bytes, Problem> {
    let failed = |error: hyper::Error| {
        ("not_http", format!("not HTTP: {error}; check the address of the server's --monitor"))
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Aborts the connection's task when this request ends, however it ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = Uri::from_static("/status.json");
    if let Ok(host) = endpoint.host_header().parse() {
        request.headers_mut().insert(HOST, host);
    }
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
    let response = sender.send_request(request).await.map_err(failed)?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::MISDIRECTED_REQUEST => {
            let problem = "unknown host name: use the address, or give the server --monitor-name";
            return Err(("unknown_host", problem.to_owned()));
        }
        other => {
            let problem = format!("/status.json: HTTP status {other}; check that it is hexz-nbd");
            return Err(("http_status", problem));
        }
    }
    match Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let problem = format!("the response is longer than {} MiB", MAX_RESPONSE_BYTES >> 20);
            Err(("too_long", problem))
        }
        Err(error) => Err(("truncated", format!("the response was cut off: {error}"))),
    }
}
