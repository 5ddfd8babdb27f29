//! What a scripted client speaks over: a socket, bare or with TLS.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};
use socket2::{Domain, Protocol, Socket, Type};

use super::PATIENCE;

/// A socket without TLS.
#[derive(Debug)]
pub enum Plain {
    Tcp(TcpStream),
    Unix(UnixStream),
}

pub type Tls = StreamOwned<ClientConnection, Plain>;

pub trait Duplex: Read + Write + Send {
    /// The socket below.
    fn socket(&self) -> &Plain;
}

/// Whatever the server wants to be spoken to by.
pub type Session = Box<dyn Duplex>;

/// Connects from an address of this machine, such as 127.0.0.2.
pub fn connect_from(source: IpAddr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
    socket.connect_timeout(&to.into(), PATIENCE).unwrap();
    socket.into()
}

impl Plain {
    pub fn set_read_timeout(&self, timeout: Duration) {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(timeout)),
            Self::Unix(stream) => stream.set_read_timeout(Some(timeout)),
        }
        .unwrap();
    }

    pub fn set_write_timeout(&self, timeout: Duration) {
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(Some(timeout)),
            Self::Unix(stream) => stream.set_write_timeout(Some(timeout)),
        }
        .unwrap();
    }

    pub fn shutdown(&self, how: std::net::Shutdown) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
        };
    }

    /// Makes closing send a reset instead of a FIN.
    pub fn reset_on_close(&self) {
        if let Self::Tcp(stream) = self {
            socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Plain {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Duplex for Plain {
    fn socket(&self) -> &Plain {
        self
    }
}

impl Duplex for Tls {
    fn socket(&self) -> &Plain {
        &self.sock
    }
}

impl Duplex for Session {
    fn socket(&self) -> &Plain {
        (**self).socket()
    }
}
