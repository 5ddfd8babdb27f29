//! Resolves the server's name, and connects to one of its addresses.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nbd_gateway::zone;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::advice;
use super::report::Step;
use crate::cli::server_target::ServerEndpoint;
use crate::commands::output::format_seconds;

/// Maximum number of addresses of a name that are tried.
const MAX_ADDRESSES: usize = 16;

/// A bidirectional byte stream, with or without TLS.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Duplex for S {}
pub(crate) type BoxedStream = Box<dyn Duplex>;

/// Resolved address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// Returns true if connections don't leave this machine: loopback or a Unix socket.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }

    pub(crate) async fn connect(&self) -> io::Result<BoxedStream> {
        Ok(match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            Self::Unix(path) => Box::new(UnixStream::connect(path).await?),
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", nbd_telemetry::escape::name(path)),
        }
    }
}

/// Reason why a connection attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectFailure {
    /// No answer within the timeout.
    Timeout,
    /// Error from the operating system.
    Io(io::ErrorKind),
}

/// A failed connection attempt: address, reason and error message.
pub(crate) type FailedAttempt = (Address, ConnectFailure, String);

/// Resolves a target to its addresses. A name that was looked up also gets a step with the result.
pub(super) async fn resolve(
    endpoint: &ServerEndpoint,
    timeout: Duration,
) -> (Option<Step>, Result<Vec<Address>, Step>) {
    let (host, port) = match endpoint {
        ServerEndpoint::Unix(path) => return (None, Ok(vec![Address::Unix(path.clone())])),
        ServerEndpoint::Tcp { host, port } => (host, *port),
    };
    if let Ok(ip) = host.parse::<IpAddr>() {
        return (None, Ok(vec![Address::Tcp(SocketAddr::new(ip, port))]));
    }
    if host.contains('%') {
        let address = match zone::parse(host) {
            Ok((ip, interface)) => SocketAddrV6::new(ip, port, 0, interface),
            Err(error) => return (None, Err(advice::unresolved(host, &error.to_string()))),
        };
        return (None, Ok(vec![Address::Tcp(address.into())]));
    }
    let began = Instant::now();
    let looked = tokio::time::timeout(timeout, tokio::net::lookup_host((host.as_str(), port)));
    let addresses: Vec<SocketAddr> = match looked.await {
        Err(_) => return (None, Err(advice::unresolved(host, "no answer within the timeout"))),
        Ok(Err(error)) => return (None, Err(advice::unresolved(host, &error.to_string()))),
        Ok(Ok(addresses)) => {
            let mut distinct = Vec::new();
            for address in addresses.take(MAX_ADDRESSES) {
                // In the order of the resolver, which is the order of preference.
                if !distinct.contains(&address) {
                    distinct.push(address);
                }
            }
            distinct
        }
    };
    if addresses.is_empty() {
        return (None, Err(advice::unresolved(host, "the name has no address")));
    }
    let ips: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
    let step = Step::good("name", format!("{host} resolves to {}", ips.join(", ")))
        .detail("addresses", ips)
        .took(began.elapsed());
    (Some(step), Ok(addresses.into_iter().map(Address::Tcp).collect()))
}

/// Connects to the first address that accepts, trying one after another as clients do. The error
/// lists all attempts.
pub(super) async fn connect(
    addresses: Vec<Address>,
    timeout: Duration,
) -> Result<(BoxedStream, Address, Step), Vec<FailedAttempt>> {
    let mut failed: Vec<FailedAttempt> = Vec::new();
    for address in addresses {
        let began = Instant::now();
        let unreached = match tokio::time::timeout(timeout, address.connect()).await {
            Ok(Ok(stream)) => {
                let step = advice::connected(&address, &failed).took(began.elapsed());
                return Ok((stream, address, step));
            }
            Ok(Err(error)) => (ConnectFailure::Io(error.kind()), error.to_string()),
            Err(_) => (
                ConnectFailure::Timeout,
                format!("no answer within {}", format_seconds(timeout.as_secs_f64())),
            ),
        };
        failed.push((address, unreached.0, unreached.1));
    }
    Err(failed)
}
