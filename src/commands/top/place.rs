//! Address of a status listener, and fetching its status.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::monitor::MONITOR_PORT;
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use nbd_gateway::zone;
use nbd_telemetry::escape;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;

use super::status::Status;

/// Timeout of a request. A healthy server answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Maximum size of an answer, in bytes. A thousand exports and a thousand connections take half a
/// MiB, or a few MiB if names are long.
const MOST_BYTES: usize = 8 << 20;

/// Address of a status listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Host name or address without brackets, and port.
    Tcp(String, u16),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

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

impl Place {
    /// Fetches the status.
    pub(super) async fn ask(&self) -> Result<Status, AskError> {
        tokio::time::timeout(PATIENCE, self.ask_at_leisure())
            .await
            .unwrap_or_else(|_| Err(AskError::Silent(self.clone())))
    }

    async fn ask_at_leisure(&self) -> Result<Status, AskError> {
        let unreachable = |error| AskError::Connect(self.clone(), error);
        let answer = match self {
            Self::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await;
                self.fetch(stream.map_err(unreachable)?).await?
            }
            Self::Unix(path) => {
                self.fetch(UnixStream::connect(path).await.map_err(unreachable)?).await?
            }
        };
        Status::parse(&answer).map_err(|why| AskError::NotAStatus(self.clone(), why))
    }

    async fn fetch(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Bytes, AskError> {
        let failed = |error| AskError::Http(self.clone(), error);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        // Aborts the connection's task when this request ends, however it ends.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let mut question = Request::new(Empty::<Bytes>::new());
        *question.uri_mut() = hyper::Uri::from_static("/status.json");
        if let Ok(host) = self.authority().parse() {
            question.headers_mut().insert(HOST, host);
        }
        question
            .headers_mut()
            .insert(ACCEPT, hyper::header::HeaderValue::from_static("application/json"));
        let answer = sender.send_request(question).await.map_err(failed)?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::MISDIRECTED_REQUEST => return Err(AskError::Name(self.clone())),
            other => return Err(AskError::Refused(self.clone(), other)),
        }
        match Limited::new(answer.into_body(), MOST_BYTES).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(AskError::TooLong(self.clone())),
            Err(error) => Err(AskError::BrokeOff(self.clone(), error.to_string())),
        }
    }

    /// Returns the value for the `Host` header.
    fn authority(&self) -> String {
        match self {
            // The zone of a link-local address means nothing to another machine.
            Self::Tcp(host, port) if host.contains(':') => {
                format!("[{}]:{port}", host.split('%').next().unwrap_or(host))
            }
            Self::Tcp(host, port) => format!("{host}:{port}"),
            Self::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::Tcp(Ipv4Addr::LOCALHOST.to_string(), MONITOR_PORT)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(..) => f.write_str(&self.authority()),
            Self::Unix(path) => write!(f, "unix:{}", escape::name(path)),
        }
    }
}

/// Returns true for an IP address, with or without a zone: `fe80::1%eth0`.
fn is_address(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok() || zone::parse(text).is_ok()
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("a path has to follow unix:".to_owned()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        if text.starts_with("https://") {
            return Err("the status listener has no TLS: expected http://".to_owned());
        }
        let place = text.strip_prefix("http://").unwrap_or(text);
        let place = place.strip_suffix('/').unwrap_or(place);
        if let Ok(port) = place.parse::<u16>() {
            return Ok(Self::Tcp(Ipv4Addr::LOCALHOST.to_string(), port));
        }
        let (host, port) = match is_address(place) {
            true => (place, MONITOR_PORT),
            false => match place.rsplit_once(':') {
                Some((host, port)) => {
                    let wrong = |_| format!("{:?} is no port", escape::name(port));
                    (host, port.parse().map_err(wrong)?)
                }
                None => (place, MONITOR_PORT),
            },
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let is_name = |host: &str| {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        };
        if is_address(host) || is_name(host) {
            Ok(Self::Tcp(host.to_owned(), port))
        } else {
            Err(format!(
                "{:?} is no status listener: expected ADDRESS:PORT such as {}, PORT, \
                 unix:PATH, or http://ADDRESS:PORT",
                escape::name(text),
                Self::default()
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_named_in_many_ways() {
        let tcp = |host: &str, port| Place::Tcp(host.to_owned(), port);
        for (text, place) in [
            ("9000", tcp("127.0.0.1", 9000)),
            ("192.0.2.7:9000", tcp("192.0.2.7", 9000)),
            ("192.0.2.7", tcp("192.0.2.7", MONITOR_PORT)),
            ("http://localhost:9000/", tcp("localhost", 9000)),
            ("http://nbd.example.org", tcp("nbd.example.org", MONITOR_PORT)),
            ("[::1]:9000", tcp("::1", 9000)),
            ("http://[::1]:9000", tcp("::1", 9000)),
            ("::1", tcp("::1", MONITOR_PORT)),
            ("[fe80::1%lo]:99", Place::Tcp("fe80::1%lo".into(), 99)),
            ("unix:/run/monitor.sock", Place::Unix("/run/monitor.sock".into())),
        ] {
            assert_eq!(text.parse(), Ok(place.clone()), "{text}");
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        for junk in ["", "unix:", "https://localhost", "http://a/b", "a b:1", "localhost:x", ":1"] {
            assert!(junk.parse::<Place>().is_err(), "{junk}");
        }
    }
}
