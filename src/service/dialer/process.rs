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

type Outcome = Result<OwnedFd, DialError>;

/// Connects to the servers of a list through the dialer process.
pub(crate) struct ProcessDialer {
    targets: Vec<DialTarget>,
    link: Arc<Link>,
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
        Self { targets, link, _process: process }
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

    async fn dial(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let is_target =
            |target: &DialTarget| target.port == port && target.host.eq_ignore_ascii_case(host);
        let target = self.targets.iter().position(is_target);
        let target = target.and_then(|index| u16::try_from(index).ok()).ok_or_else(|| {
            let text = format!("{host} port {port} isn't among the stores given at the start");
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
        Box::pin(self.dial(host, port))
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
        drop(shutdown(&self.link.socket, Shutdown::Write));
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
                "the dialer has ended ({error}): stores can't be connected to until a restart"
            );
            pending.state = LinkState::Gone;
        }
        pending.waiting.clear();
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
