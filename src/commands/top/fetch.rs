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

use super::status::Status;
use crate::cli::Place;

/// Timeout of a request. A healthy server answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Maximum size of an answer, in bytes. A thousand exports and a thousand connections take half a
/// MiB, or a few MiB if names are long.
const MOST_BYTES: usize = 8 << 20;

/// Reason why there is no status.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    #[error("can't connect to {0}: {1}; was the server started with --monitor?")]
    Connect(Place, io::Error),
    #[error("{0} didn't answer within {limit} s", limit = PATIENCE.as_secs())]
    Silent(Place),
    #[error("{0} doesn't speak HTTP as expected: {1}; is it what --monitor says?")]
    Http(Place, hyper::Error),
    #[error("{0} answers to no such name: it takes --monitor-name, or ask for its address")]
    Name(Place),
    #[error("{0} answered {1} where its status was asked for; is it a hexz-nbd?")]
    Refused(Place, StatusCode),
    #[error("{0} answered with more than {limit} MiB", limit = MOST_BYTES >> 20)]
    TooLong(Place),
    #[error("the answer of {0} broke off: {1}")]
    BrokeOff(Place, String),
    #[error("{0} answered with something else than the status of a hexz-nbd: {1}")]
    NotAStatus(Place, String),
}

/// Fetches the status.
pub(super) async fn ask(place: &Place) -> Result<Status, AskError> {
    tokio::time::timeout(PATIENCE, ask_at_leisure(place))
        .await
        .unwrap_or_else(|_| Err(AskError::Silent(place.clone())))
}

async fn ask_at_leisure(place: &Place) -> Result<Status, AskError> {
    let unreachable = |error| AskError::Connect(place.clone(), error);
    let answer = match place {
        Place::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            fetch(place, stream.map_err(unreachable)?).await?
        }
        Place::Unix(path) => {
            fetch(place, UnixStream::connect(path).await.map_err(unreachable)?).await?
        }
    };
    Status::parse(&answer).map_err(|why| AskError::NotAStatus(place.clone(), why))
}

async fn fetch(
    place: &Place,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Bytes, AskError> {
    let failed = |error| AskError::Http(place.clone(), error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Aborts the connection's task when this request ends, however it ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut question = Request::new(Empty::<Bytes>::new());
    *question.uri_mut() = hyper::Uri::from_static("/status.json");
    if let Ok(host) = place.authority().parse() {
        question.headers_mut().insert(HOST, host);
    }
    question
        .headers_mut()
        .insert(ACCEPT, hyper::header::HeaderValue::from_static("application/json"));
    let answer = sender.send_request(question).await.map_err(failed)?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::MISDIRECTED_REQUEST => return Err(AskError::Name(place.clone())),
        other => return Err(AskError::Refused(place.clone(), other)),
    }
    match Limited::new(answer.into_body(), MOST_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(AskError::TooLong(place.clone())),
        Err(error) => Err(AskError::BrokeOff(place.clone(), error.to_string())),
    }
}
