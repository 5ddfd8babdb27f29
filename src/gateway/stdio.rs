//! The one connection that a program is started with, on standard input and output: by inetd,
//! by `ssh`, or by a client that runs its server itself.

use std::fmt;
use std::io::{self, stdin, stdout};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, fstat};
use rustix::io::ioctl_fionbio;
use socket2::{Domain, Socket, Type};
use tokio::net::unix::pipe;
use tokio::net::{TcpStream, UnixStream};

use super::listen::Incoming;

/// A connection that was there before this program.
#[derive(Debug)]
pub enum Stdio {
    /// Standard input is a TCP connection.
    Tcp(std::net::TcpStream, SocketAddr),
    /// Standard input is a Unix socket, with or without a name.
    Unix(std::os::unix::net::UnixStream),
    /// Standard input and output are pipes, in this order.
    Pipes(OwnedFd, OwnedFd),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// It is a terminal, a file, or closed.
    #[error(
        "standard input and output are no connection ({0}): --stdio is for a program that runs \
         this one with a socket as standard input, or with pipes"
    )]
    NoConnection(&'static str),
    /// It is a socket, but not of a kind that clients come by.
    #[error("standard input is {0}")]
    Unusable(String),
    /// The system refuses.
    #[error("standard input or output can't be used: {0}")]
    System(#[from] io::Error),
}

impl Stdio {
    /// Takes the connection over. A socket is written to as well, so standard output doesn't
    /// matter then.
    ///
    /// # Errors
    /// See [`StdioError`].
    pub fn take() -> Result<Self, StdioError> {
        let kind = |file: &dyn AsFd| {
            let file = fstat(file.as_fd()).map_err(io::Error::from)?;
            Ok::<_, StdioError>(FileType::from_raw_mode(file.st_mode))
        };
        match kind(&stdin())? {
            FileType::Socket => Self::of_socket(stdin().as_fd().try_clone_to_owned()?.into()),
            FileType::Fifo if kind(&stdout())? == FileType::Fifo => {
                let (input, output) =
                    (stdin().as_fd().try_clone_to_owned()?, stdout().as_fd().try_clone_to_owned()?);
                // Here, since the sandbox doesn't let the runtime do it.
                for pipe in [&input, &output] {
                    ioctl_fionbio(pipe, true).map_err(io::Error::from)?;
                }
                Ok(Self::Pipes(input, output))
            }
            FileType::Fifo => Err(StdioError::NoConnection("standard output is no pipe")),
            _ => Err(StdioError::NoConnection("standard input is neither a socket nor a pipe")),
        }
    }

    fn of_socket(socket: Socket) -> Result<Self, StdioError> {
        let unusable = |what: &str| Err(StdioError::Unusable(what.to_owned()));
        if socket.r#type()? != Type::STREAM {
            return unusable("a socket, but none for streams");
        }
        if socket.is_listener()? {
            return unusable(
                "a socket that listens: the program that starts this one has to accept \
                 connections (nowait in inetd.conf, Accept=yes in a socket unit)",
            );
        }
        let peer = socket.peer_addr();
        match socket.domain()? {
            Domain::IPV4 | Domain::IPV6 => match peer?.as_socket() {
                Some(address) => Ok(Self::Tcp(socket.into(), address)),
                None => unusable("a socket without an address at the other end"),
            },
            Domain::UNIX => peer.map(|_| Self::Unix(socket.into())).map_err(StdioError::System),
            other => {
                unusable(&format!("a socket of the address family {other:?}: expected TCP or Unix"))
            }
        }
    }

    /// As a connection that has come in. Call it within a tokio runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub(super) fn incoming(self) -> io::Result<Incoming> {
        Ok(match self {
            Self::Tcp(stream, address) => {
                stream.set_nonblocking(true)?;
                Incoming::Tcp(TcpStream::from_std(stream)?, address)
            }
            Self::Unix(stream) => {
                stream.set_nonblocking(true)?;
                Incoming::Unix(UnixStream::from_std(stream)?)
            }
            Self::Pipes(input, output) => Incoming::Pipes(tokio::io::join(
                pipe::Receiver::from_owned_fd(input)?,
                pipe::Sender::from_owned_fd(output)?,
            )),
        })
    }
}

impl fmt::Display for Stdio {
    /// What it is, and who is at the other end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(_, peer) => write!(f, "standard input, a connection from {peer}"),
            Self::Unix(_) => f.write_str("standard input, a Unix socket"),
            Self::Pipes(..) => f.write_str("standard input and output, two pipes"),
        }
    }
}
