//! Opening of TCP connections to stores.

use std::fmt::Debug;
use std::io;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::net::TcpStream;

/// Opens TCP connections. A sandboxed process that can't do so itself uses an implementation that
/// gets them from another process.
pub trait Dial: Debug + Send + Sync {
    /// Resolves `host`, a name or an IP address without brackets, and connects to `port`.
    ///
    /// # Errors
    /// The name can't be resolved, or no address accepts the connection.
    fn dial<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<TcpStream>>;
}

/// Connects from within this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct DirectDialer;

impl Dial for DirectDialer {
    fn dial<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<TcpStream>> {
        TcpStream::connect((host, port)).boxed()
    }
}
