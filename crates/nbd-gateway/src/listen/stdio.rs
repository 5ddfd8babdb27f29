//! Serves a single connection on standard input and output, when the program is started by inetd,
//! by `ssh`, or by a client that runs its own server.

use std::fmt;
use std::io::{self, stdin, stdout};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, fstat};
use rustix::io::ioctl_fionbio;
use socket2::{Domain, Socket, Type};
use tokio::net::unix::pipe;
use tokio::net::{TcpStream, UnixStream};

use super::IncomingConnection;

/// A connection inherited as standard input and output.
#[derive(Debug)]
pub enum StdioConnection {
    /// Standard input is a TCP connection.
    Tcp(std::net::TcpStream, SocketAddr),
    /// Standard input is a Unix socket, bound to a name or not.
    Unix(std::os::unix::net::UnixStream),
    /// Standard input and output are pipes; the fields are in that order.
    Pipes(OwnedFd, OwnedFd),
}

/// Reason why standard input and output aren't a usable connection.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// Standard input or output is a terminal, a file, or closed.
    #[error(
        "standard input and output are not a connection: {0}; expected a stream socket as standard \
         input, or two pipes"
    )]
    NotAConnection(&'static str),
    /// Standard input is a socket of an unsupported kind.
    #[error("standard input can't be used: {0}")]
    Unusable(String),
    /// A system call failed.
    #[error("can't use standard input and output: {0}")]
    System(#[from] io::Error),
}

impl StdioError {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NotAConnection(_) => "stdio_not_a_connection",
            Self::Unusable(_) => "stdio_unusable",
            Self::System(_) => "stdio_failed",
        }
    }
}

impl StdioConnection {
    /// Takes over the connection. If standard input is a socket, it is written to as well, and
    /// standard output is ignored.
    ///
    /// # Errors
    /// See [`StdioError`].
    pub fn take() -> Result<Self, StdioError> {
        let kind = |file: &dyn AsFd| {
            let file = fstat(file.as_fd()).map_err(io::Error::from)?;
            Ok::<_, StdioError>(FileType::from_raw_mode(file.st_mode))
        };
        match kind(&stdin())? {
            FileType::Socket => Self::from_socket(stdin().as_fd().try_clone_to_owned()?.into()),
            FileType::Fifo if kind(&stdout())? == FileType::Fifo => {
                let (input, output) =
                    (stdin().as_fd().try_clone_to_owned()?, stdout().as_fd().try_clone_to_owned()?);
                // Set here, because the sandbox doesn't let the runtime do it later.
                for pipe in [&input, &output] {
                    ioctl_fionbio(pipe, true).map_err(io::Error::from)?;
                }
                Ok(Self::Pipes(input, output))
            }
            FileType::Fifo => Err(StdioError::NotAConnection("standard output is not a pipe")),
            _ => Err(StdioError::NotAConnection("standard input is neither a socket nor a pipe")),
        }
    }

    fn from_socket(socket: Socket) -> Result<Self, StdioError> {
        let unusable = |what: &str| Err(StdioError::Unusable(what.to_owned()));
        if socket.r#type()? != Type::STREAM {
            return unusable("not a stream socket");
        }
        if socket.is_listener()? {
            return unusable(
                "a listening socket; the parent process must accept connections (nowait in \
                 inetd.conf, Accept=yes in a socket unit)",
            );
        }
        let peer = socket.peer_addr();
        match socket.domain()? {
            Domain::IPV4 | Domain::IPV6 => match peer?.as_socket() {
                Some(address) => Ok(Self::Tcp(socket.into(), address)),
                None => unusable("a socket without a peer address"),
            },
            Domain::UNIX => peer.map(|_| Self::Unix(socket.into())).map_err(StdioError::System),
            other => {
                unusable(&format!("unsupported address family {other:?}, expected TCP or Unix"))
            }
        }
    }

    /// Converts it to an accepted connection. Call it within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub(crate) fn incoming(self) -> io::Result<IncomingConnection> {
        Ok(match self {
            Self::Tcp(stream, address) => {
                stream.set_nonblocking(true)?;
                IncomingConnection::Tcp(TcpStream::from_std(stream)?, address)
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(true)?;
                IncomingConnection::Unix(UnixStream::from_std(stream)?)
            }
            Self::Pipes(input, output) => IncomingConnection::Pipes(tokio::io::join(
                pipe::Receiver::from_owned_fd(input)?,
                pipe::Sender::from_owned_fd(output)?,
            )),
        })
    }
}

impl fmt::Display for StdioConnection {
    /// Describes the connection and its peer.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(_, peer) => write!(f, "standard input, a connection from {peer}"),
            Self::Unix(_) => f.write_str("standard input, a Unix socket"),
            Self::Pipes(..) => f.write_str("standard input and output, two pipes"),
        }
    }
}
