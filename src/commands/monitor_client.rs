//! Requests to a server's monitor.

use std::io;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, HOST, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use nbd_telemetry::escape;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use crate::cli::MonitorEndpoint;
use crate::exit_status::{self, ExitStatus};

/// Reason why there is no answer: its label and its description.
#[derive(Debug, thiserror::Error)]
#[error("{endpoint}: {problem}")]
pub(crate) struct MonitorError {
    pub(super) endpoint: MonitorEndpoint,
    pub(super) reason: &'static str,
    pub(super) problem: String,
}

impl ExitStatus for MonitorError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }

    fn label(&self) -> &'static str {
        self.reason
    }
}

/// A label and a description.
pub(super) type Problem = (&'static str, String);

/// A response whose body has yet to be read.
pub(super) struct MonitorResponse {
    pub(super) body: Incoming,
    /// The connection. It ends when it is dropped.
    _driver: JoinSet<hyper::Result<()>>,
}

/// Requests the resource at `path`, which may have a query. Any status but 200 is an error.
pub(super) async fn get(
    endpoint: &MonitorEndpoint,
    path: Uri,
    accept: &'static str,
) -> Result<MonitorResponse, Problem> {
    let unreachable = |error: io::Error| {
        ("connect_failed", format!("can't connect: {error}; start the server with --monitor"))
    };
    match endpoint {
        MonitorEndpoint::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            get_from(endpoint, stream.map_err(unreachable)?, path, accept).await
        }
        MonitorEndpoint::Unix(socket) => {
            let stream = UnixStream::connect(socket).await.map_err(unreachable)?;
            get_from(endpoint, stream, path, accept).await
        }
    }
}

async fn get_from(
    endpoint: &MonitorEndpoint,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    path: Uri,
    accept: &'static str,
) -> Result<MonitorResponse, Problem> {
    let failed = |error: hyper::Error| {
        ("not_http", format!("not HTTP: {error}; check the address of the server's --monitor"))
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Aborts the connection's task when the response is dropped.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let resource = path.path().to_owned();
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = path;
    if let Ok(host) = endpoint.host_header().parse() {
        request.headers_mut().insert(HOST, host);
    }
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static(accept));
    let response: Response<Incoming> = sender.send_request(request).await.map_err(failed)?;
    match response.status() {
        StatusCode::OK => Ok(MonitorResponse { body: response.into_body(), _driver: driver }),
        StatusCode::SERVICE_UNAVAILABLE => {
            Err(("unavailable", explanation(response.into_body()).await))
        }
        StatusCode::MISDIRECTED_REQUEST => {
            let problem = "unknown host name: use the address, or give the server --monitor-name";
            Err(("unknown_host", problem.to_owned()))
        }
        other => {
            let problem = format!("{resource}: HTTP status {other}; check that it is hexz-nbd");
            Err(("http_status", problem))
        }
    }
}

/// Returns the first line of a response that says why the server can't do what was requested.
async fn explanation(body: Incoming) -> String {
    /// More than the server's explanations have.
    const MAX_BYTES: usize = 1024;
    let text = match Limited::new(body, MAX_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => Bytes::new(),
    };
    match String::from_utf8_lossy(&text).lines().next() {
        Some(line) if !line.is_empty() => escape::text(line).into_owned(),
        _ => "unavailable, for an unknown reason".to_owned(),
    }
}
