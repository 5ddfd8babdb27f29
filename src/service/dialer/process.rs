//! The gateway's end of the socket to the dialer.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::TcpStream as StdTcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Child;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nbd_telemetry::RateLimit;
use object_reader::Dial;
use parking_lot::Mutex;
use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown, recvmsg, send,
    shutdown,
};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::messages::{
    DialError, DialErrorKind, DialRequest, DialResponse, DialTarget, MAX_RESPONSE_LENGTH,
};

/// Time that the dialer has for a response: longer than its own deadlines together.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// Interval in which one failure is logged.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(10);

type Outcome = Result<OwnedFd, DialError>;

/// Connects to the servers of a list through the dialer process.
pub(crate) struct ProcessDialer {
    targets: Vec<DialTarget>,
    link: Arc<Link>,
    failures: RateLimit,
    /// Kept so that it is clear who is responsible for the process. It ends when `link` is closed.
    _process: Child,
}

/// The socket, and what is expected from it.
struct Link {
    socket: OwnedFd,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    state: LinkState,
    next_id: u32,
    waiting: HashMap<u32, oneshot::Sender<Outcome>>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum LinkState {
    /// Nothing was requested yet, so that no thread receives. The first one must not be started
    /// before the sandbox is entered.
    #[default]
    Unused,
    Open,
    /// The gateway has closed the socket.
    Closed,
    /// The dialer has ended.
    Gone,
}

impl ProcessDialer {
    pub(super) fn new(targets: Vec<DialTarget>, socket: OwnedFd, process: Child) -> Self {
        let link = Arc::new(Link { socket, pending: Mutex::default() });
        Self { targets, link, failures: RateLimit::new(1, FAILURE_LOG_INTERVAL), _process: process }
    }

    /// Returns true if the process has ended, or is of no use any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.link.pending.lock().state == LinkState::Gone
    }

    /// Requests a connection. The receiver gets it.
    fn request(&self, target: u16) -> Result<PendingDial<'_>, DialError> {
        let (sender, outcome) = oneshot::channel();
        let mut pending = self.link.pending.lock();
        match pending.state {
            LinkState::Open => {}
            LinkState::Unused => {
                let link = Arc::clone(&self.link);
                let receiver = thread::Builder::new().name("dialer".to_owned());
                receiver.spawn(move || link.receive_all()).map_err(|error| {
                    let text = format!("can't start a thread: {error}");
                    DialError::new(DialErrorKind::DialerGone, text)
                })?;
                pending.state = LinkState::Open;
            }
            LinkState::Closed | LinkState::Gone => return Err(gone()),
        }
        let id = pending.next_id;
        pending.next_id = id.wrapping_add(1);
        pending.waiting.insert(id, sender);
        let request = DialRequest { id, target }.encode();
        drop(pending);

        let dial = PendingDial { link: &self.link, id, outcome };
        match send(&self.link.socket, &request, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => Ok(dial),
            // The dialer doesn't read its requests.
            Err(Errno::AGAIN) => Err(silent()),
            Err(_) => Err(gone()),
        }
    }

    /// Logs a failure. Retries repeat it, so there is a limit.
    fn log(&self, host: &str, port: u16, error: &io::Error) {
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        if let Some(reason) = inner.map(DialError::label)
            && let Some(held_back) = self.failures.allow()
        {
            let held_back = held_back.field();
            tracing::warn!(reason, held_back, store = %format_args!("{host}:{port}"), "{error}");
        }
    }

    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let is_target =
            |target: &DialTarget| target.port == port && target.host.eq_ignore_ascii_case(host);
        let target = self.targets.iter().position(is_target);
        let target = target.and_then(|index| u16::try_from(index).ok()).ok_or_else(|| {
            let text =
                format!("{host} port {port} isn't among the stores given at the start: restart");
            DialError::new(DialErrorKind::NotAllowed, text)
        })?;
        let mut dial = self.request(target)?;
        let received = timeout(RESPONSE_TIMEOUT, &mut dial.outcome).await;
        let socket = received.map_err(|_| silent())?.map_err(|_| gone())??;
        let stream = check(socket, port).map_err(|error| {
            let text = format!("the dialer passed no connection to {host} port {port}: {error}");
            DialError::new(DialErrorKind::UnusableSocket, text)
        })?;
        TcpStream::from_std(stream)
    }
}

impl Dial for ProcessDialer {
    fn dial<'a>(
        &'a self,
        host: &'a str,
        port: u16,
    ) -> std::pin::Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send + 'a>> {
        Box::pin(async move {
            let dialed = self.dial(host, port).await;
            dialed.inspect_err(|error| self.log(host, port, error))
        })
    }
}

impl AsRawFd for ProcessDialer {
    /// Returns the socket to the dialer, the one on which the sandbox has to permit receiving
    /// descriptors.
    fn as_raw_fd(&self) -> RawFd {
        self.link.socket.as_raw_fd()
    }
}

impl fmt::Debug for ProcessDialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessDialer").field("targets", &self.targets).finish_non_exhaustive()
    }
}

impl Drop for ProcessDialer {
    /// Ends the dialer: it reads to the end.
    fn drop(&mut self) {
        let mut pending = self.link.pending.lock();
        if pending.state != LinkState::Gone {
            pending.state = LinkState::Closed;
        }
        shutdown(&self.link.socket, Shutdown::Write).ok();
    }
}

/// A request without a response yet. Dropping it discards the response.
struct PendingDial<'a> {
    link: &'a Link,
    id: u32,
    outcome: oneshot::Receiver<Outcome>,
}

impl Drop for PendingDial<'_> {
    fn drop(&mut self) {
        self.link.pending.lock().waiting.remove(&self.id);
    }
}

impl Link {
    /// Dispatches responses until the dialer ends.
    fn receive_all(&self) {
        let error = loop {
            match self.receive() {
                Ok((response, socket)) => self.dispatch(response, socket),
                Err(error) => break error,
            }
        };
        let mut pending = self.pending.lock();
        if pending.state != LinkState::Closed {
            tracing::error!(
                reason = "dialer_gone",
                "the dialer has ended ({error}): stores can't be connected to until a restart; \
                 what is cached is served, and /healthz and the watchdog report it"
            );
            pending.state = LinkState::Gone;
        }
        pending.waiting.clear();
        // After an invalid response, it has to end.
        shutdown(&self.socket, Shutdown::Write).ok();
    }

    fn receive(&self) -> io::Result<(DialResponse, Option<OwnedFd>)> {
        let mut bytes = [0; MAX_RESPONSE_LENGTH];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let buffers = &mut [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, buffers, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                received => break received?,
            }
        };
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let socket = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let response = bytes.get(..received.bytes).and_then(DialResponse::decode);
        Ok((response.ok_or(io::ErrorKind::InvalidData)?, socket))
    }

    fn dispatch(&self, response: DialResponse, socket: Option<OwnedFd>) {
        let outcome = match (response.outcome, socket) {
            (Ok(()), Some(socket)) => Ok(socket),
            (Ok(()), None) => {
                Err(DialError::new(DialErrorKind::UnusableSocket, "the dialer passed no socket"))
            }
            (Err(error), _) => Err(error),
        };
        if let Some(waiting) = self.pending.lock().waiting.remove(&response.id) {
            // If nobody waits any more, the connection is closed.
            drop(waiting.send(outcome));
        }
    }
}

/// Ensures that a descriptor is a TCP connection to `port`, and prepares it.
fn check(socket: OwnedFd, port: u16) -> io::Result<StdTcpStream> {
    let stream = StdTcpStream::from(socket);
    // Fails for other families, and for listeners.
    if stream.peer_addr()?.port() != port {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "wrong port"));
    }
    // Fails for anything but TCP. The sandbox permits setting the option, but not asking for the
    // socket's type.
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn gone() -> DialError {
    DialError::new(DialErrorKind::DialerGone, "the dialer has ended: restart hexz-nbd")
}

fn silent() -> DialError {
    DialError::new(DialErrorKind::DialerSilent, "the dialer doesn't respond")
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::{AsFd, BorrowedFd};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, SocketType, recv,
        sendmsg, socketpair,
    };

    use super::*;

    /// A dialer for `localhost` and the port, and the socket of the process.
    fn dialer(port: u16) -> (ProcessDialer, OwnedFd) {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (socket, process) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        let targets = vec![DialTarget { host: "localhost".to_owned(), port }];
        // Another program stands for the process, whose part the test has.
        let child = Command::new("true").spawn().unwrap();
        (ProcessDialer::new(targets, socket, child), process)
    }

    fn request(process: &OwnedFd) -> DialRequest {
        let mut bytes = [0; 64];
        let (length, _) = recv(process, bytes.as_mut_slice(), RecvFlags::empty()).unwrap();
        DialRequest::decode(&bytes[..length]).unwrap()
    }

    fn respond(process: &OwnedFd, bytes: &[u8], socket: Option<BorrowedFd<'_>>) {
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let sockets: Vec<_> = socket.into_iter().collect();
        if !sockets.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&sockets)));
        }
        sendmsg(process, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    }

    fn connected(id: u32) -> Vec<u8> {
        DialResponse { id, outcome: Ok(()) }.encode()
    }

    fn label(error: &io::Error) -> &'static str {
        error.get_ref().unwrap().downcast_ref::<DialError>().unwrap().label()
    }

    #[tokio::test]
    async fn connections_go_to_who_requested_them() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (dialer, process) = dialer(address.port());
        let responder = thread::spawn(move || {
            let (first, second) = (request(&process), request(&process));
            assert_eq!((first.target, second.target), (0, 0));
            let stream = StdTcpStream::connect(address).unwrap();
            respond(&process, &connected(second.id), Some(stream.as_fd()));
            let error = DialError::new(DialErrorKind::Unresolved, "no such name");
            let failed = DialResponse { id: first.id, outcome: Err(error) };
            respond(&process, &failed.encode(), None);
        });
        let (first, second) = tokio::join!(
            biased;
            dialer.dial("localhost", address.port()),
            dialer.dial("LOCALHOST", address.port())
        );
        assert_eq!(label(&first.unwrap_err()), "store_unresolved");
        assert_eq!(second.unwrap().peer_addr().unwrap(), address);
        responder.join().unwrap();
    }

    #[tokio::test]
    async fn only_listed_hosts_and_ports_are_requested() {
        let (dialer, _process) = dialer(443);
        for (host, port) in [("localhost", 80), ("example.org", 443), ("localhost.", 443)] {
            let error = dialer.dial(host, port).await.unwrap_err();
            assert_eq!(label(&error), "store_not_allowed", "{host}");
        }
    }

    #[tokio::test]
    async fn other_sockets_are_rejected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect(address).unwrap();
        let (unix, _other) = UnixStream::pair().unwrap();
        let other_listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other_port = StdTcpStream::connect(other_listener.local_addr().unwrap()).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for descriptor in [
            None,
            Some(listener.as_fd()),
            Some(udp.as_fd()),
            Some(unix.as_fd()),
            Some(other_port.as_fd()),
            Some(file.as_fd()),
        ] {
            let (dialer, process) = dialer(address.port());
            let dialed = thread::scope(|scope| {
                scope.spawn(|| respond(&process, &connected(request(&process).id), descriptor));
                let runtime = tokio::runtime::Builder::new_current_thread();
                let dial = dialer.dial("localhost", address.port());
                scope.spawn(|| { runtime }.enable_all().build().unwrap().block_on(dial)).join()
            });
            assert_eq!(label(&dialed.unwrap().unwrap_err()), "dialer_socket_unusable");
        }
    }

    #[tokio::test]
    async fn end_of_the_dialer_fails_all_dials() {
        for response in [&b""[..], b"xyz", &[0, 0, 0, 0, 99]] {
            let (dialer, process) = dialer(443);
            let responder = thread::spawn(move || {
                request(&process);
                if !response.is_empty() {
                    respond(&process, response, None);
                    // A malformed response counts as the end.
                    thread::sleep(Duration::from_millis(50));
                }
            });
            assert!(!dialer.has_ended());
            for _ in 0..2 {
                let error = dialer.dial("localhost", 443).await.unwrap_err();
                assert_eq!(label(&error), "dialer_gone", "{response:?}");
            }
            assert!(dialer.has_ended());
            responder.join().unwrap();
        }
    }

    #[tokio::test]
    async fn canceled_dials_leave_nothing() {
        let (dialer, process) = dialer(443);
        let canceled = timeout(Duration::from_millis(20), dialer.dial("localhost", 443)).await;
        assert!(canceled.is_err() && dialer.link.pending.lock().waiting.is_empty());
        let id = request(&process).id;
        respond(&process, &connected(id), Some(process.as_fd()));
        drop(dialer);
        // The process reads to the end.
        let mut bytes = [0; 1];
        assert_eq!(recv(&process, bytes.as_mut_slice(), RecvFlags::empty()).unwrap().1, 0);
    }
}
