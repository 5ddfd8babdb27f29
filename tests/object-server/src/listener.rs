//! A listening socket that can be closed and opened again, with the connections it accepted.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

/// Congestion control that every Linux has. BBR, the default of some, paces bursts over loopback at
/// a few MB/s, as if that were the rate of the path; here, [`DelayProxy`](crate::DelayProxy) alone
/// shall decide that.
const CONGESTION_CONTROL: &str = "reno";

/// Listens on an address, with a congestion control that doesn't slow down loopback connections.
///
/// # Errors
/// The system refused the socket.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpListener::bind(address)?;
    // Accepted connections inherit it.
    rustix::net::sockopt::set_tcp_congestion(&socket, CONGESTION_CONTROL)?;
    Ok(socket)
}

/// Serves one connection.
pub(crate) type Handler = Arc<dyn Fn(TcpStream) -> BoxFuture<'static, ()> + Send + Sync>;

/// A listener on a loopback port, on a runtime of its own.
pub(crate) struct Listener {
    /// `None` only while this is being dropped.
    runtime: Option<Runtime>,
    address: SocketAddr,
    handler: Handler,
    accepting: Mutex<Option<JoinHandle<()>>>,
    disconnect: Arc<Notify>,
}

impl Listener {
    /// Listens on a free port of 127.0.0.1.
    pub(crate) fn start(handler: Handler) -> io::Result<Self> {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), handler)
    }

    /// Listens on an address, of which port 0 stands for a free port.
    pub(crate) fn start_at(address: SocketAddr, handler: Handler) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("object-server")
            .enable_all()
            .build()?;
        let socket = listen(address)?;
        let listener = Self {
            address: socket.local_addr()?,
            runtime: Some(runtime),
            handler,
            accepting: Mutex::new(None),
            disconnect: Arc::new(Notify::new()),
        };
        listener.accept_from(socket)?;
        Ok(listener)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the socket and all connections; new ones are refused. Returns once that is done.
    pub(crate) fn close(&self) {
        let Some(accepting) = self.accepting.lock().take() else { return };
        accepting.abort();
        while !accepting.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Listens again on the same port.
    pub(crate) fn reopen(&self) -> io::Result<()> {
        self.close();
        self.accept_from(listen(self.address)?)
    }

    /// Closes all connections; new ones are accepted.
    pub(crate) fn disconnect_all(&self) {
        self.disconnect.notify_one();
    }

    fn accept_from(&self, socket: TcpListener) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let Some(runtime) = &self.runtime else { return Ok(()) };
        let (handler, disconnect) = (Arc::clone(&self.handler), Arc::clone(&self.disconnect));
        let accepting = runtime.spawn(async move {
            let Ok(socket) = tokio::net::TcpListener::from_std(socket) else { return };
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = socket.accept() => {
                        let Ok((stream, _)) = accepted else { continue };
                        if stream.set_nodelay(true).is_ok() {
                            connections.spawn(handler(stream));
                        }
                    }
                    () = disconnect.notified() => connections.shutdown().await,
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        *self.accepting.lock() = Some(accepting);
        Ok(())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Waiting for its threads would panic in asynchronous code.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
