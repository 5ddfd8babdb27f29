//! The dialer process: resolves the names of the stores, connects, and passes the connections to
//! the gateway. It ends when the gateway does.

use std::fs::{self, File};
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nbd_sandbox::{DialerPlan, SandboxReport, enter_dialer};
use nix::sys::signal::{SigSet, Signal};
use rustix::cmsg_space;
use rustix::net::sockopt::socket_type;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType, recv, send,
    sendmsg,
};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::addresses;
use super::messages::{
    DialError, DialErrorKind, DialRequest, DialResponse, DialTarget, DialerReady, DialerStart,
    MAX_JSON_LENGTH,
};

/// Number of dials at a time. Further requests wait in the socket.
const MAX_DIALS: usize = 128;
/// Number of names that are resolved at a time: each takes a thread.
const MAX_LOOKUPS: usize = 16;
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Time that one address has to accept the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time after which the next address is tried as well (RFC 8305, section 5).
const NEXT_ADDRESS_DELAY: Duration = Duration::from_millis(250);
/// Number of addresses of a name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Runs the dialer on standard input, the socket to the gateway, until the gateway closes it.
pub(crate) fn run() -> ExitCode {
    match run_to_end() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If this fails too, nobody can be told.
            drop(writeln!(io::stderr(), "dialer: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run_to_end() -> io::Result<()> {
    if !socket_type(io::stdin()).is_ok_and(|kind| kind == SocketType::SEQPACKET) {
        return Err(io::Error::other("this command is for hexz-nbd's own use"));
    }
    // They are sent to all processes of a terminal or a service. The gateway drains its requests
    // then, and needs connections for that.
    SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM]).thread_block()?;
    close_inherited_descriptors();
    // Before the sandbox, which doesn't permit the socket pair that signals would need. Its threads
    // are started later.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().max_blocking_threads(MAX_LOOKUPS).build()?;
    let (gateway, targets) = prepare()?;
    let ended = runtime.block_on(serve(gateway, targets));
    // A resolver that hangs must not keep the process alive.
    runtime.shutdown_background();
    ended
}

/// Enters the sandbox, and reports to the gateway. Returns the socket to it, and the servers to
/// connect to.
fn prepare() -> io::Result<(StdUnixStream, Vec<DialTarget>)> {
    // It isn't a stream, but the calls that matter are the same.
    let gateway = StdUnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);

    let mut bytes = vec![0; MAX_JSON_LENGTH];
    let (length, _) = recv(&gateway, bytes.as_mut_slice(), RecvFlags::empty())?;
    let start: DialerStart = serde_json::from_slice(bytes.get(..length).unwrap_or_default())?;
    let ready = enter_sandbox(&start, gateway.as_raw_fd());
    send(&gateway, &serde_json::to_vec(&ready)?, SendFlags::NOSIGNAL)?;
    ready.map_err(io::Error::other)?;
    gateway.set_nonblocking(true)?;
    Ok((gateway, start.targets))
}

/// Closes all descriptors but the standard ones: some that the gateway's parent left open may have
/// come here.
fn close_inherited_descriptors() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let descriptors: Vec<RawFd> = names.filter_map(|name| name.parse().ok()).collect();
    for descriptor in descriptors.into_iter().filter(|descriptor| *descriptor > 2) {
        // The one of the folder itself is closed already.
        nix::unistd::close(descriptor).ok();
    }
}

fn enter_sandbox(start: &DialerStart, socket: RawFd) -> Result<DialerReady, String> {
    let user = start.user.as_deref().map(str::parse).transpose();
    let plan = DialerPlan {
        mode: start.mode,
        user: user.map_err(|error: nbd_sandbox::UserError| error.to_string())?,
        ports: start.targets.iter().map(|target| target.port).collect(),
        socket,
    };
    let report = enter_dialer(&plan).map_err(|error| error.to_string())?;
    // Otherwise the signal that announces the parent's end came before it was asked for.
    let parent = rustix::process::getppid().map(|parent| parent.as_raw_nonzero().get());
    if parent.map(i32::cast_unsigned) != Some(start.parent) {
        return Err("the gateway has ended".to_owned());
    }
    let SandboxReport { enforced, missing, notes, .. } = report;
    let notes = notes.iter().map(|note| (note.reason.to_owned(), note.to_string())).collect();
    Ok(DialerReady { enforced, missing, notes })
}

/// Responds to requests until the gateway closes the socket.
async fn serve(gateway: StdUnixStream, targets: Vec<DialTarget>) -> io::Result<()> {
    let gateway = UnixStream::from_std(gateway)?;
    let targets: Arc<[DialTarget]> = targets.into();
    let mut dials = JoinSet::new();
    loop {
        tokio::select! {
            request = receive(&gateway), if dials.len() < MAX_DIALS => {
                let Some(request) = request? else { return Ok(()) };
                let targets = Arc::clone(&targets);
                dials.spawn(async move {
                    (request.id, dial(targets.get(usize::from(request.target))).await)
                });
            }
            Some(done) = dials.join_next() => {
                if let Ok((id, outcome)) = done {
                    respond(&gateway, id, outcome).await?;
                }
            }
        }
    }
}

/// Receives a request; `None` at the end of the gateway. Cancellation loses none.
async fn receive(gateway: &UnixStream) -> io::Result<Option<DialRequest>> {
    // A byte more, to detect longer messages.
    let mut bytes = [0; DialRequest::LENGTH + 1];
    let received = gateway.async_io(Interest::READABLE, || {
        Ok(recv(gateway, bytes.as_mut_slice(), RecvFlags::empty())?.0)
    });
    match received.await? {
        0 => Ok(None),
        length => match bytes.get(..length).and_then(DialRequest::decode) {
            Some(request) => Ok(Some(request)),
            None => Err(io::Error::new(io::ErrorKind::InvalidData, "invalid request")),
        },
    }
}

async fn respond(
    gateway: &UnixStream,
    id: u32,
    outcome: Result<TcpStream, DialError>,
) -> io::Result<()> {
    let (socket, outcome) = match outcome {
        Ok(socket) => (Some(socket), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let response = DialResponse { id, outcome }.encode();
    let sent = gateway.async_io(Interest::WRITABLE, || {
        let descriptors: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        Ok(sendmsg(gateway, &[IoSlice::new(&response)], &mut control, SendFlags::NOSIGNAL)?)
    });
    sent.await.map(drop)
}

/// Resolves the target's name, and connects to one of its addresses.
async fn dial(target: Option<&DialTarget>) -> Result<TcpStream, DialError> {
    let Some(DialTarget { host, port }) = target else {
        return Err(DialError::new(DialErrorKind::NotAllowed, "the store isn't in the list"));
    };
    let addresses = resolve(host, *port).await?;
    let refusal = |address: &SocketAddr| addresses::refusal(host, address.ip());
    let permitted: Vec<_> = addresses.iter().copied().filter(|it| refusal(it).is_none()).collect();
    if let ([], Some(address)) = (permitted.as_slice(), addresses.first()) {
        let what = refusal(address).unwrap_or_default();
        let text = format!(
            "{host} resolves to {}, {what}: to connect there, use the address instead of the name",
            address.ip()
        );
        return Err(DialError::new(DialErrorKind::AddressRefused, text));
    }
    let stream = connect(alternate_families(permitted)).await.map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::TimedOut => DialErrorKind::ConnectTimedOut,
            _ => DialErrorKind::ConnectFailed,
        };
        DialError::new(kind, format!("can't connect to {host} port {port}: {error}"))
    })?;
    // Without it, requests are sent with delays; they arrive nevertheless.
    drop(stream.set_nodelay(true));
    Ok(stream)
}

/// Returns the addresses of a name.
async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, DialError> {
    let error = match timeout(LOOKUP_TIMEOUT, lookup_host((host, port))).await {
        Ok(Ok(addresses)) => {
            let addresses: Vec<_> = addresses.take(MAX_ADDRESSES).collect();
            if !addresses.is_empty() {
                return Ok(addresses);
            }
            "it has no address".to_owned()
        }
        Ok(Err(error)) => error.to_string(),
        Err(elapsed) => elapsed.to_string(),
    };
    let config = File::open("/etc/resolv.conf");
    if config.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        let text = "/etc/resolv.conf was replaced and can't be read in the sandbox: restart \
                    hexz-nbd";
        return Err(DialError::new(DialErrorKind::ResolverReplaced, text));
    }
    Err(DialError::new(DialErrorKind::Unresolved, format!("can't resolve {host}: {error}")))
}

/// Reorders addresses so that IPv6 and IPv4 take turns, beginning with the kind of the first one.
fn alternate_families(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let starts_with_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == starts_with_ipv6);
    let mut second = second.into_iter();
    let mut ordered = Vec::new();
    for address in first {
        ordered.push(address);
        ordered.extend(second.next());
    }
    ordered.extend(second);
    ordered
}

/// Connects to the first address that accepts. The next one is tried as soon as one fails or is
/// slow; those before it go on.
async fn connect(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut addresses = addresses.into_iter();
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    loop {
        if let Some(address) = addresses.next() {
            attempts.spawn(timeout(CONNECT_TIMEOUT, TcpStream::connect(address)));
        }
        match timeout(NEXT_ADDRESS_DELAY, attempts.join_next()).await {
            Ok(Some(Ok(Ok(Ok(stream))))) => return Ok(stream),
            Ok(Some(Ok(Ok(Err(error))))) => failure = error,
            Ok(Some(Ok(Err(elapsed)))) => failure = elapsed.into(),
            Ok(Some(Err(error))) => failure = error.into(),
            // All attempts have failed, and there are no more addresses.
            Ok(None) => return Err(failure),
            // The attempts go on, besides the next one.
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_alternate() {
        let addresses = |text: &str| -> Vec<SocketAddr> {
            text.split(' ').map(|address| address.parse().unwrap()).collect()
        };
        for (given, ordered) in [
            ("[::1]:1 [::2]:1 1.0.0.1:1 [::3]:1", "[::1]:1 1.0.0.1:1 [::2]:1 [::3]:1"),
            ("1.0.0.1:1 1.0.0.2:1 [::1]:1", "1.0.0.1:1 [::1]:1 1.0.0.2:1"),
            ("1.0.0.1:1 [::1]:1 [::2]:1", "1.0.0.1:1 [::1]:1 [::2]:1"),
        ] {
            assert_eq!(alternate_families(addresses(given)), addresses(ordered), "{given}");
        }
    }

    #[tokio::test]
    async fn next_address_is_tried_when_one_refuses_or_is_silent() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let refusing = {
            let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            unused.local_addr().unwrap()
        };
        // A listener whose queue is full drops the SYN.
        let full =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        full.listen(0).unwrap();
        let silent = full.local_addr().unwrap().as_socket().unwrap();
        let _occupants = [(); 4].map(|()| {
            let occupant = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
            let occupant = occupant.unwrap();
            occupant.set_nonblocking(true).unwrap();
            drop(occupant.connect(&silent.into()));
            occupant
        });

        let stream = connect(vec![refusing, silent, address]).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), address);
        let error = connect(vec![refusing]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let error = connect(vec![silent]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
