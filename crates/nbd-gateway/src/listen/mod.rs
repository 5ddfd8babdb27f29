//! Where connections come from: listening sockets (TCP, Unix, vsock, or inherited from a service
//! manager), and a single connection on standard input and output. Binding, accepting, and
//! classification of `accept` errors.

mod address;
mod inherited;
mod stdio;
mod unix;
mod vsock;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::Join;
use tokio::net::unix::pipe;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::access::Peer;

pub use address::{ListenAddress, NBD_PORT};
pub use inherited::{InheritError, InheritedSockets, SocketProblem};
pub use stdio::{StdioConnection, StdioError};
pub use unix::{SocketGroup, SocketMode, SocketPermissions, UnixPath};
pub use vsock::SocketStream;
use vsock::VsockListener;

/// Length of the kernel's queue of established connections that wait to be accepted.
pub(crate) const BACKLOG: i32 = 1024;

/// TCP keepalive: probing starts after [`KEEPALIVE_IDLE`] of silence and repeats every
/// [`KEEPALIVE_INTERVAL`]; the connection is dropped after [`KEEPALIVE_PROBES`] unanswered probes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// A bound socket. Connecting clients wait until it becomes a [`Listener`].
///
/// It needs no tokio runtime, so it can be created while the process has a single thread.
#[derive(Debug)]
pub enum BoundSocket {
    /// A TCP socket.
    Tcp(std::net::TcpListener),
    /// A Unix socket and its path.
    Unix(UnixPath, std::os::unix::net::UnixListener),
    /// A vsock socket.
    Vsock(Socket),
}

/// A listening socket that is registered with the tokio runtime.
#[derive(Debug)]
pub enum Listener {
    /// A TCP socket.
    Tcp(TcpListener),
    /// A Unix socket and its path. The path is removed before the socket is closed, so that it
    /// never leads to a dead socket.
    Unix(UnixPath, UnixListener),
    /// A vsock socket.
    Vsock(VsockListener),
}

/// An accepted connection.
#[derive(Debug)]
pub enum IncomingConnection {
    /// A TCP connection and the address of its peer.
    Tcp(TcpStream, SocketAddr),
    /// A connection to a Unix socket.
    Unix(UnixStream),
    /// A pair of pipes: the first is read, the second written.
    Pipes(Join<pipe::Receiver, pipe::Sender>),
    /// A vsock connection and the context ID of its peer.
    Vsock(SocketStream, u32),
}

impl IncomingConnection {
    /// Returns the peer of the connection.
    pub fn peer(&self) -> Peer {
        match self {
            Self::Tcp(_, address) => Peer::ip(address.ip()),
            Self::Unix(_) | Self::Pipes(_) => Peer::Unix,
            Self::Vsock(_, cid) => Peer::Vsock(*cid),
        }
    }
}

/// Failure to bind a socket.
#[derive(Debug, thiserror::Error)]
#[error("can't listen on {address}: {error}{}", bind_hint(.address, .error))]
pub struct BindError {
    /// Address that could not be bound.
    pub address: ListenAddress,
    /// Error of the system call.
    #[source]
    pub error: io::Error,
}

impl BindError {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self.error.kind() {
            io::ErrorKind::AddrInUse => "address_in_use",
            io::ErrorKind::AddrNotAvailable => "address_not_available",
            io::ErrorKind::PermissionDenied => "address_not_permitted",
            _ => "bind_failed",
        }
    }
}

/// Returns a hint on the likely cause and how to investigate it.
fn bind_hint(address: &ListenAddress, error: &io::Error) -> &'static str {
    match (address, error.kind()) {
        (ListenAddress::Tcp(_), io::ErrorKind::AddrInUse) => {
            "; another process uses the port (ss -ltnp shows which)"
        }
        (ListenAddress::Tcp(_), io::ErrorKind::AddrNotAvailable) => {
            "; this machine doesn't have the address (ip address lists those it has)"
        }
        (ListenAddress::Tcp(address), io::ErrorKind::PermissionDenied) if address.port() < 1024 => {
            "; ports below 1024 need root or CAP_NET_BIND_SERVICE"
        }
        (ListenAddress::Tcp(SocketAddr::V6(address)), io::ErrorKind::InvalidInput)
            if address.ip().is_unicast_link_local() && address.scope_id() == 0 =>
        {
            "; a link-local address needs its interface, as in [fe80::1%eth0]:10809"
        }
        (ListenAddress::Vsock { .. }, _)
            if Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT) =>
        {
            "; this kernel has no vsock, or the systemd unit forbids it: RestrictAddressFamilies= \
             needs AF_VSOCK"
        }
        _ => "",
    }
}

/// Binds all of `addresses`. Without any, binds the NBD port on every address of this machine, or
/// on loopback if `loopback_only`. Unix sockets get the permissions in `rights`.
///
/// # Errors
/// One of the addresses can't be bound, for example because it is in use.
pub fn bind_all(
    addresses: &[ListenAddress],
    loopback_only: bool,
    rights: &SocketPermissions,
) -> Result<Vec<BoundSocket>, BindError> {
    let bind = |address: &ListenAddress| {
        let failed = |error| BindError { address: address.clone(), error };
        BoundSocket::bind(address, rights).map_err(failed)
    };
    let at = |address: IpAddr| ListenAddress::Tcp(SocketAddr::new(address, NBD_PORT));
    if !addresses.is_empty() {
        addresses.iter().map(bind).collect()
    } else if loopback_only {
        // Either address family may be missing, but not both.
        let v4 = bind(&at(Ipv4Addr::LOCALHOST.into()));
        let v6 = bind(&at(Ipv6Addr::LOCALHOST.into()));
        match (v4, v6) {
            (Err(error), Err(other)) if is_missing(&other) || !is_missing(&error) => Err(error),
            (Err(error), v6) if is_missing(&error) => Ok(vec![v6?]),
            (v4, Err(error)) if is_missing(&error) => Ok(vec![v4?]),
            (v4, v6) => Ok(vec![v4?, v6?]),
        }
    } else {
        // [::] accepts IPv4 clients as well, if the machine has IPv6 at all.
        match bind(&at(Ipv6Addr::UNSPECIFIED.into())) {
            Err(error) if is_missing(&error) => Ok(vec![bind(&at(Ipv4Addr::UNSPECIFIED.into()))?]),
            both => Ok(vec![both?]),
        }
    }
}

/// Binds a loopback port: on 127.0.0.1, or on ::1 where the machine doesn't have that.
///
/// # Errors
/// The port can't be bound, for example because it is in use.
pub fn bind_loopback(port: u16) -> Result<BoundSocket, BindError> {
    let bind = |address: IpAddr| {
        let address = ListenAddress::Tcp(SocketAddr::new(address, port));
        let bound = BoundSocket::bind(&address, &SocketPermissions::default());
        bound.map_err(|error| BindError { address, error })
    };
    match bind(Ipv4Addr::LOCALHOST.into()) {
        // With neither address available, the error for the usual one is reported.
        Err(error) if is_missing(&error) => bind(Ipv6Addr::LOCALHOST.into()).map_err(|_| error),
        bound => bound,
    }
}

/// Returns true if this machine lacks the address or its whole address family.
fn is_missing(BindError { error, .. }: &BindError) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
        || Errno::from_io_error(error) == Some(Errno::AFNOSUPPORT)
}

impl BoundSocket {
    /// Binds `address`. If `rights` has a mode, call this before another thread creates files: it
    /// changes the umask of the whole process for a moment.
    ///
    /// # Errors
    /// The address can't be bound, for example because it is in use.
    pub fn bind(address: &ListenAddress, rights: &SocketPermissions) -> io::Result<Self> {
        match address {
            ListenAddress::Tcp(address) => bind_tcp(*address).map(Self::Tcp),
            ListenAddress::Unix(path) => {
                unix::bind(path, rights).map(|(path, socket)| Self::Unix(path, socket))
            }
            ListenAddress::Vsock { cid, port } => {
                vsock::bind(*cid, *port, BACKLOG).map(Self::Vsock)
            }
        }
    }

    /// Returns the bound address, with the actual port where port 0 was requested.
    ///
    /// # Errors
    /// The address can't be queried.
    pub fn address(&self) -> io::Result<ListenAddress> {
        Ok(match self {
            Self::Tcp(socket) => ListenAddress::Tcp(socket.local_addr()?),
            Self::Unix(socket, _) => ListenAddress::Unix(socket.path.clone()),
            Self::Vsock(socket) => vsock::local_address(socket)?,
        })
    }
}

impl Listener {
    /// Registers a bound socket with the current tokio runtime.
    ///
    /// # Errors
    /// The runtime can't watch the socket.
    pub fn new(socket: BoundSocket) -> io::Result<Self> {
        Ok(match socket {
            BoundSocket::Tcp(socket) => Self::Tcp(TcpListener::from_std(socket)?),
            BoundSocket::Unix(path, socket) => Self::Unix(path, UnixListener::from_std(socket)?),
            BoundSocket::Vsock(socket) => Self::Vsock(VsockListener::new(socket)?),
        })
    }

    /// Returns the bound address, with the actual port where port 0 was requested.
    ///
    /// # Errors
    /// The address can't be queried.
    pub fn local_address(&self) -> io::Result<ListenAddress> {
        Ok(match self {
            Self::Tcp(listener) => ListenAddress::Tcp(listener.local_addr()?),
            Self::Unix(socket, _) => ListenAddress::Unix(socket.path.clone()),
            Self::Vsock(listener) => listener.local_address()?,
        })
    }

    /// Accepts the next connection.
    ///
    /// # Errors
    /// See [`AcceptFault`] for how to handle them.
    pub async fn accept(&self) -> io::Result<IncomingConnection> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                Ok(IncomingConnection::Tcp(stream, address))
            }
            Self::Unix(_, listener) => Ok(IncomingConnection::Unix(listener.accept().await?.0)),
            Self::Vsock(listener) => {
                let (stream, cid) = listener.accept().await?;
                Ok(IncomingConnection::Vsock(stream, cid))
            }
        }
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    // An IPv4-mapped address is bound as IPv4: an IPv6-only socket can't be bound to it.
    let address = match address.ip().to_canonical() {
        IpAddr::V4(v4) => SocketAddr::new(v4.into(), address.port()),
        IpAddr::V6(_) => address,
    };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // [::] also accepts IPv4 clients, as mapped addresses, whatever the system's default.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Configures an accepted TCP connection: no delay for small replies, and keepalive so that
/// connections to dead peers end.
pub(crate) fn configure_tcp_stream(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Reaction that a failed `accept` calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceptFault {
    /// One connection was lost before it was accepted: continue.
    Connection,
    /// The machine is short of descriptors or memory: pause until clients leave.
    Shortage,
    /// Any other error: pause as well, which does no harm.
    Listener,
}

impl AcceptFault {
    /// Returns the stable label for log fields.
    pub fn label(self) -> &'static str {
        match self {
            Self::Connection => "connection_lost",
            Self::Shortage => "resource_shortage",
            Self::Listener => "listener_failed",
        }
    }

    /// Classifies an error of `accept`.
    pub fn classify(error: &io::Error) -> Self {
        match (error.kind(), Errno::from_io_error(error)) {
            (
                io::ErrorKind::ConnectionAborted
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::Interrupted
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::TimedOut
                | io::ErrorKind::NetworkUnreachable
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkDown,
                _,
            ) => Self::Connection,
            (_, Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => Self::Shortage,
            _ => Self::Listener,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_errors_are_classified() {
        let aborted = io::Error::from(io::ErrorKind::ConnectionAborted);
        assert_eq!(AcceptFault::classify(&aborted), AcceptFault::Connection);
        assert_eq!(AcceptFault::classify(&io::Error::from_raw_os_error(24)), AcceptFault::Shortage);
        assert_eq!(AcceptFault::classify(&io::Error::from_raw_os_error(9)), AcceptFault::Listener);
    }
}
