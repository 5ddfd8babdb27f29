//! A connection to an NBD server that costs its client little: it blocks, reads and
//! decrypts much at once, and copies nothing that it needn't.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nbd_server::client::{self, ClientError};
use nbd_server::wire::request::Command;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::reader::request;

/// Where a server is and how to talk to it.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) tls: Option<Arc<ClientConfig>>,
    pub(crate) export: String,
}

/// A connection in its transmission phase.
pub(crate) struct Connection {
    socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
    /// What the socket gave, before decryption.
    wire: Vec<u8>,
    /// What the server said and nobody has taken yet.
    plain: Vec<u8>,
    taken: usize,
    /// Whether replies are structured.
    pub(crate) structured: bool,
}

/// No server takes longer than that for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// How much is read from the socket at once, in bytes.
const WIRE: usize = 256 * 1024;

impl Connection {
    /// Connects, upgrades to TLS if there is a configuration for it, and chooses the export.
    pub(crate) fn open(target: &Target) -> Result<Self> {
        let mut socket = TcpStream::connect(target.address).context("connect")?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        wait(client::greet(&mut Blocking(&mut socket)))?;
        let Some(config) = &target.tls else {
            let structured = choose(&mut socket, &target.export)?;
            return Ok(Self::new(socket, None, structured));
        };
        wait(client::start_tls(&mut Blocking(&mut socket)))?;
        let name = ServerName::try_from("localhost")?;
        let tls = ClientConnection::new(Arc::clone(config), name)?;
        let mut stream = StreamOwned::new(tls, socket);
        let structured = choose(&mut stream, &target.export)?;
        let StreamOwned { conn, sock } = stream;
        Ok(Self::new(sock, Some(conn), structured))
    }

    fn new(socket: TcpStream, tls: Option<ClientConnection>, structured: bool) -> Self {
        let tls = tls.map(Box::new);
        Self { socket, tls, wire: Vec::new(), plain: Vec::new(), taken: 0, structured }
    }

    /// Sends requests.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.tls {
            None => self.socket.write_all(bytes),
            Some(tls) => {
                tls.writer().write_all(bytes)?;
                while tls.wants_write() {
                    tls.write_tls(&mut self.socket)?;
                }
                Ok(())
            }
        }
    }

    /// Waits for more of what the server says.
    pub(crate) fn receive(&mut self) -> Result<()> {
        self.plain.drain(..self.taken);
        self.taken = 0;
        let Some(tls) = &mut self.tls else {
            let before = self.plain.len();
            self.plain.resize(before + WIRE, 0);
            let count = self.socket.read(&mut self.plain[before..]).context("no answer")?;
            self.plain.truncate(before + count);
            anyhow::ensure!(count > 0, "the server closed the connection");
            return Ok(());
        };
        // A connection that only idles needs no buffer.
        self.wire.resize(WIRE, 0);
        let count = self.socket.read(&mut self.wire).context("no answer")?;
        anyhow::ensure!(count > 0, "the server closed the connection");
        let mut wire = &self.wire[..count];
        while !wire.is_empty() {
            tls.read_tls(&mut wire)?;
            let there = tls.process_new_packets()?.plaintext_bytes_to_read();
            let before = self.plain.len();
            self.plain.resize(before + there, 0);
            tls.reader().read_exact(&mut self.plain[before..])?;
        }
        Ok(())
    }

    /// What the server said and nobody has taken yet.
    pub(crate) fn here(&self) -> &[u8] {
        &self.plain[self.taken..]
    }

    /// Takes so many bytes of it.
    pub(crate) fn take(&mut self, count: usize) {
        self.taken += count;
    }

    /// Says goodbye; a server that has gone already doesn't mind.
    pub(crate) fn leave(&mut self) {
        let _ = self.send(&request(Command::DISC, 0, 0, 0));
    }

    /// For waiting with a time limit.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether the handshake was an abbreviated one.
    pub(crate) fn was_resumed(&self) -> bool {
        self.tls
            .as_ref()
            .is_some_and(|tls| tls.handshake_kind() == Some(rustls::HandshakeKind::Resumed))
    }
}

/// Chooses an export, with structured replies if the server has them: whether it has.
fn choose(stream: &mut (impl Read + Write), export: &str) -> Result<bool> {
    let structured = match wait(client::negotiate_structured_replies(&mut Blocking(stream))) {
        Ok(()) => true,
        Err(ClientError::Refused { .. }) => false,
        Err(error) => return Err(error.into()),
    };
    wait(client::go(Blocking(stream), export))?;
    Ok(structured)
}

/// Runs what never waits, since everything below it blocks.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut context = Context::from_waker(Waker::noop());
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return done;
        }
    }
}

/// A blocking stream for code that expects one that doesn't block.
struct Blocking<'a, S>(&'a mut S);

impl<S: Read> AsyncRead for Blocking<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let count = self.0.read(buffer.initialize_unfilled())?;
        buffer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl<S: Write> AsyncWrite for Blocking<'_, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(self.0.write(bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.flush())
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}
