//! vsock: connections between a virtual machine and its host, without a network.
//!
//! tokio doesn't support this address family, so this wraps a stream socket of any family for async
//! I/O. The crate tokio-vsock (0.7) isn't used: its streams have no vectored writes, so each reply
//! would be copied or take several system calls.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use super::ListenAddress;

/// Wildcard for a context ID or port (`VMADDR_CID_ANY`, `VMADDR_PORT_ANY`).
pub(crate) const WILDCARD: u32 = u32::MAX;

/// Binds a port on one context ID of this machine, or on all of them; port 0 picks any free one.
pub(crate) fn bind(cid: Option<u32>, port: u32, backlog: i32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    let port = if port == 0 { WILDCARD } else { port };
    socket.bind(&SockAddr::vsock(cid.unwrap_or(WILDCARD), port))?;
    socket.listen(backlog)?;
    Ok(socket)
}

/// Returns the address that a socket is bound to.
pub(crate) fn local_address(socket: &Socket) -> io::Result<ListenAddress> {
    let (cid, port) = address(&socket.local_addr()?)?;
    Ok(ListenAddress::Vsock { cid: Some(cid).filter(|cid| *cid != WILDCARD), port })
}

/// A listening vsock socket.
#[derive(Debug)]
pub struct VsockListener(AsyncFd<Socket>);

impl VsockListener {
    /// Registers a bound socket with the current tokio runtime.
    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        Ok(Self(watch(socket, Interest::READABLE)?))
    }

    pub(crate) fn local_address(&self) -> io::Result<ListenAddress> {
        local_address(self.0.get_ref())
    }

    /// Accepts the next connection; returns it with the context ID of its peer.
    pub(crate) async fn accept(&self) -> io::Result<(SocketStream, u32)> {
        let accepted = self.0.async_io(Interest::READABLE, Socket::accept).await;
        let (socket, from) = accepted?;
        let (cid, _) = address(&from)?;
        // Not by `fcntl(F_SETFL)`, which the sandbox forbids.
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok((SocketStream::new(socket)?, cid))
    }
}

/// Registers a socket with the current tokio runtime.
#[expect(
    deprecated,
    reason = "it is unsound for what may not own the descriptor that it names; a Socket does, \
              until it is dropped with this"
)]
fn watch(socket: Socket, interest: Interest) -> io::Result<AsyncFd<Socket>> {
    AsyncFd::with_interest(socket, interest)
}

fn address(address: &SockAddr) -> io::Result<(u32, u32)> {
    address.as_vsock_address().ok_or_else(|| io::Error::other("no vsock address"))
}

/// A connection over a stream socket of any address family.
#[derive(Debug)]
pub struct SocketStream(AsyncFd<Socket>);

impl SocketStream {
    /// Takes over a connected, non-blocking socket.
    fn new(socket: Socket) -> io::Result<Self> {
        Ok(Self(watch(socket, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// Retries `write` until it succeeds or fails, or the socket has no room.
    fn poll_write_with(
        &self,
        context: &mut Context<'_>,
        mut write: impl FnMut(&mut &Socket) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(context))?;
            if let Ok(done) = ready.try_io(|socket| write(&mut socket.get_ref())) {
                return Poll::Ready(done);
            }
        }
    }
}

impl AsyncRead for SocketStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(context))?;
            let unfilled = buffer.initialize_unfilled();
            if let Ok(read) = ready.try_io(|socket| socket.get_ref().read(unfilled)) {
                return Poll::Ready(read.map(|length| buffer.advance(length)));
            }
        }
    }
}

impl AsyncWrite for SocketStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_with(context, |socket| socket.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // Not `Socket::write_vectored`, which calls `sendmsg`: the sandbox refuses that.
        self.poll_write_with(context, |socket| Ok(rustix::io::writev(*socket, slices)?))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing, since nothing is buffered.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.get_ref().shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    /// Returns both ends of a connection over Unix sockets instead of vsock.
    fn pair() -> (SocketStream, SocketStream) {
        let ends = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        let stream = |socket: Socket| {
            socket.set_nonblocking(true).unwrap();
            SocketStream::new(socket).unwrap()
        };
        (stream(ends.0), stream(ends.1))
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| ((at * 7 + at / 251) % 256).to_le_bytes()[0]).collect()
    }

    /// Sends more than the kernel buffers, so that both ends have to wait for each other.
    #[tokio::test]
    async fn written_bytes_are_read_back() {
        let (mut one, mut other) = pair();
        let sent = pattern(4 << 20);
        let writing = tokio::spawn({
            let sent = sent.clone();
            async move {
                let (head, body) = sent.split_at(1000);
                one.write_all(head).await.unwrap();
                let mut left = body;
                while !left.is_empty() {
                    let (first, second) = left.split_at(left.len().min(3000));
                    let slices = [IoSlice::new(first), IoSlice::new(second)];
                    left = &left[one.write_vectored(&slices).await.unwrap()..];
                }
                one.flush().await.unwrap();
                one.shutdown().await.unwrap();
                one
            }
        });
        let mut received = Vec::new();
        other.read_to_end(&mut received).await.unwrap();
        assert!(received == sent);
        // The other direction is still open.
        let mut one = writing.await.unwrap();
        other.write_all(b"answer").await.unwrap();
        drop(other);
        let mut answer = Vec::new();
        one.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
        assert_eq!(one.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    /// Reading, writing and closing use only system calls that the sandbox allows.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    #[test]
    fn streams_work_inside_the_sandbox() {
        let ends = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        // A seccomp filter stays with its thread.
        let restricted = std::thread::spawn(move || {
            nbd_sandbox::restrict_this_thread().unwrap();
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().build().unwrap().block_on(async {
                let stream = |socket: Socket| {
                    rustix::io::ioctl_fionbio(&socket, true).unwrap();
                    SocketStream::new(socket).unwrap()
                };
                let (mut one, mut other) = (stream(ends.0), stream(ends.1));
                let slices = [IoSlice::new(b"vec"), IoSlice::new(b"tored")];
                assert_eq!(one.write_vectored(&slices).await.unwrap(), 8);
                one.write_all(b", plain").await.unwrap();
                one.shutdown().await.unwrap();
                let mut received = Vec::new();
                other.read_to_end(&mut received).await.unwrap();
                received
            })
        });
        assert_eq!(restricted.join().unwrap(), b"vectored, plain");
    }

    #[tokio::test]
    async fn reads_and_writes_wait_without_blocking() {
        let (mut one, mut other) = pair();
        let soon = Duration::from_millis(50);
        assert!(timeout(soon, other.read_u8()).await.is_err());
        let room = async { while one.write(&[0; 65536]).await.is_ok() {} };
        assert!(timeout(soon, room).await.is_err());
        let mut buffer = vec![0; 65536];
        assert!(other.read(&mut buffer).await.unwrap() > 0);
    }

    #[tokio::test]
    async fn free_and_taken_ports_are_handled() {
        if let Err(error) = Socket::new(Domain::VSOCK, Type::STREAM, None) {
            // The kernel lacks vsock, or this container may not use it.
            let refused = bind(None, 0, 1).unwrap_err();
            assert_eq!(refused.raw_os_error(), error.raw_os_error());
            return;
        }
        let listener = VsockListener::new(bind(None, 0, 1).unwrap()).unwrap();
        let ListenAddress::Vsock { cid: None, port } = listener.local_address().unwrap() else {
            panic!("{listener:?}");
        };
        assert!(port != 0 && port != WILDCARD);
        let taken = bind(None, port, 1).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        let soon = Duration::from_millis(50);
        assert!(timeout(soon, listener.accept()).await.is_err());
        // A context ID that this machine doesn't have.
        assert!(bind(Some(4_000_000_000), 0, 1).is_err());
    }
}
