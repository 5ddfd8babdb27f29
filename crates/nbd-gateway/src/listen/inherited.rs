//! Socket activation (`sd_listen_fds(3)`): takes over sockets that were bound by systemd, or by a
//! client that starts its own server.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::cmsg_space;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use socket2::{Domain, MsgHdr, Protocol, Socket, Type};

use super::BoundSocket;
use super::unix::UnixPath;
use nbd_telemetry::escape;

/// Number of the first inherited descriptor (`SD_LISTEN_FDS_START`); the others follow it.
const FIRST_DESCRIPTOR: RawFd = 3;

/// Maximum number of sockets to take over: more than any service has. Each one costs a task for as
/// long as the program runs.
const MAX_SOCKETS: u32 = 256;

/// Name (`FileDescriptorName=`) that marks the socket of the status listener.
const MONITOR_NAME: &str = "monitor";

/// Sockets inherited from the service manager.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    /// Sockets that serve NBD.
    pub nbd: Vec<BoundSocket>,
    /// Socket of the status listener.
    pub monitor: Option<BoundSocket>,
}

/// Reason why inherited sockets can't be used.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// An environment variable is malformed.
    #[error("invalid {variable} {:?}: expected {expected}", escape::name(.value))]
    Variable {
        /// Name of the environment variable.
        variable: &'static str,
        /// Value of the variable.
        value: String,
        /// Description of the values that are accepted.
        expected: String,
    },
    /// A descriptor isn't a socket that accepts stream connections.
    #[error("inherited descriptor {number} ({:?}) can't be used: {problem}", escape::name(.name))]
    Unusable {
        /// Number of the descriptor.
        number: RawFd,
        /// Name of the descriptor, from `LISTEN_FDNAMES`.
        name: String,
        /// Problem with the descriptor.
        problem: SocketProblem,
    },
    /// A system call failed.
    #[error("can't take over inherited sockets: {0}")]
    System(#[from] io::Error),
    /// Two sockets are named for the status listener, which has only one.
    #[error("two inherited sockets are named \"monitor\", but there is only one status listener")]
    DuplicateMonitor,
}

/// Reason why a descriptor isn't a usable socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketProblem {
    /// The descriptor isn't open, or isn't a socket.
    #[error("not a socket: {0}")]
    NotASocket(io::Error),
    /// The socket isn't a stream socket.
    #[error("the socket type is {0:?}, expected a stream socket (ListenStream=)")]
    NotAStream(Type),
    /// The socket is connected, or doesn't listen.
    #[error(
        "not listening; a service that is started for each connection (Accept=yes) takes it as \
         standard input (StandardInput=socket)"
    )]
    NotListening,
    /// The socket is a stream socket of another protocol than TCP.
    #[error("the protocol is {0:?}, expected TCP")]
    NotTcp(Option<Protocol>),
    /// The address family isn't supported.
    #[error("the address family is {0:?}, expected TCP, Unix or vsock")]
    UnsupportedFamily(Domain),
    /// A system call failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

impl InheritError {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Variable { .. } => "invalid_variable",
            Self::Unusable { .. } => "unusable_socket",
            Self::System(_) => "inheriting_failed",
            Self::DuplicateMonitor => "duplicate_monitor_socket",
        }
    }
}

impl InheritedSockets {
    /// Takes over the sockets that were passed to this process, if any. `variable` looks up an
    /// environment variable.
    ///
    /// The original descriptors are closed afterwards, so this can be called only once.
    ///
    /// # Errors
    /// See [`InheritError`].
    pub fn take(variable: impl Fn(&str) -> Option<String>) -> Result<Self, InheritError> {
        let announced = announced_descriptors(std::process::id(), variable)?;
        let duplicator = FdDuplicator::new()?;
        let mut handed = Self::default();
        for (number, name) in &announced {
            let socket = duplicator.duplicate(*number).map_err(SocketProblem::NotASocket);
            let bound = socket.and_then(check_socket).map_err(|problem| {
                InheritError::Unusable { number: *number, name: name.clone(), problem }
            })?;
            if name != MONITOR_NAME {
                handed.nbd.push(bound);
            } else if handed.monitor.replace(bound).is_some() {
                return Err(InheritError::DuplicateMonitor);
            }
        }
        // An original left open would keep the socket listening after our duplicate is closed. They
        // are closed only once all of them are known to be what was announced: a free number may be
        // reused for anything a moment later.
        for (number, _) in announced {
            nix::unistd::close(number).map_err(io::Error::from)?;
        }
        Ok(handed)
    }
}

/// Returns the numbers and names of the descriptors that the environment announces for `process`.
fn announced_descriptors(
    process: u32,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Vec<(RawFd, String)>, InheritError> {
    let number = |name, expected: &str| match variable(name) {
        None => Ok(None),
        Some(value) => value.parse::<u32>().map(Some).map_err(|_| InheritError::Variable {
            variable: name,
            value,
            expected: expected.to_owned(),
        }),
    };
    // Variables meant for another process were inherited from a parent.
    if number("LISTEN_PID", "a process ID")? != Some(process) {
        return Ok(Vec::new());
    }
    let expected = format!("a number of sockets, at most {MAX_SOCKETS}");
    let count = match number("LISTEN_FDS", &expected)?.unwrap_or(0) {
        count @ ..=MAX_SOCKETS => count,
        more => {
            let value = more.to_string();
            return Err(InheritError::Variable { variable: "LISTEN_FDS", value, expected });
        }
    };
    let numbers = (FIRST_DESCRIPTOR..).zip(0..count).map(|(number, _)| number);
    match variable("LISTEN_FDNAMES") {
        None => Ok(numbers.map(|number| (number, "unknown".to_owned())).collect()),
        // An empty list splits into one name, so it is accepted here when there are no sockets.
        Some(names) if names.is_empty() && count == 0 => Ok(Vec::new()),
        Some(value) => {
            let names: Vec<String> = value.split(':').map(str::to_owned).collect();
            if u32::try_from(names.len()) != Ok(count) {
                let expected = format!("{count} names separated by colons, as LISTEN_FDS says");
                return Err(InheritError::Variable { variable: "LISTEN_FDNAMES", value, expected });
            }
            Ok(numbers.zip(names).collect())
        }
    }
}

/// Duplicates descriptors that are known only by their number. The duplicates are owned and closed
/// on exec.
///
/// Turning a bare number into an owned descriptor would take `unsafe`. So the number is sent
/// through a socket pair (`SCM_RIGHTS`), and the kernel installs a duplicate that belongs to the
/// receiver.
struct FdDuplicator {
    sender: Socket,
    receiver: Socket,
}

impl FdDuplicator {
    fn new() -> io::Result<Self> {
        let (sender, receiver) = Socket::pair(Domain::UNIX, Type::DGRAM, None)?;
        Ok(Self { sender, receiver })
    }

    fn duplicate(&self, number: RawFd) -> io::Result<Socket> {
        // The number was free until this pair got it, so nothing was passed under it.
        if [&self.sender, &self.receiver].iter().any(|socket| socket.as_raw_fd() == number) {
            return Err(rustix::io::Errno::BADF.into());
        }
        let (byte, control) = ([IoSlice::new(&[0])], scm_rights_message(number));
        self.sender.sendmsg(&MsgHdr::new().with_buffers(&byte).with_control(&control), 0)?;

        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let bytes = &mut [IoSliceMut::new(&mut byte)];
        recvmsg(&self.receiver, bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        let received = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let descriptor: OwnedFd = received.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(descriptor.into())
    }
}

/// Builds a control message that carries one descriptor. The layout is that of `cmsg(3)` and the
/// kernel: length, level, type, descriptor, and padding to a multiple of 8.
fn scm_rights_message(number: RawFd) -> Vec<u8> {
    let length = size_of::<usize>() + 2 * size_of::<libc::c_int>() + size_of::<RawFd>();
    let mut message = length.to_ne_bytes().to_vec();
    for part in [libc::SOL_SOCKET, libc::SCM_RIGHTS, number] {
        message.extend(part.to_ne_bytes());
    }
    message.resize(length.next_multiple_of(size_of::<usize>()), 0);
    message
}

/// Checks that a socket accepts stream connections of a supported family.
fn check_socket(socket: Socket) -> Result<BoundSocket, SocketProblem> {
    let domain = socket.domain().map_err(SocketProblem::NotASocket)?;
    match socket.r#type()? {
        Type::STREAM => {}
        other => return Err(SocketProblem::NotAStream(other)),
    }
    if !socket.is_listener()? {
        return Err(SocketProblem::NotListening);
    }
    socket.set_nonblocking(true)?;
    match domain {
        Domain::IPV4 | Domain::IPV6 => match socket.protocol()? {
            Some(Protocol::TCP | Protocol::MPTCP) => Ok(BoundSocket::Tcp(socket.into())),
            protocol => Err(SocketProblem::NotTcp(protocol)),
        },
        Domain::UNIX => {
            let address = socket.local_addr()?;
            let path = match (address.as_pathname(), address.as_abstract_namespace()) {
                (Some(path), _) => path.to_owned(),
                (None, Some(name)) => {
                    let mut path = OsString::from("@");
                    path.push(OsStr::from_bytes(name));
                    path.into()
                }
                (None, None) => PathBuf::from("(no name)"),
            };
            Ok(BoundSocket::Unix(UnixPath::not_owned(path), socket.into()))
        }
        Domain::VSOCK => Ok(BoundSocket::Vsock(socket)),
        other => Err(SocketProblem::UnsupportedFamily(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN_PID: u32 = 77;

    /// Returns the announced descriptors, or the name of the invalid variable.
    fn announced(
        variables: &[(&str, &str)],
    ) -> Result<Vec<(RawFd, String)>, (&'static str, String)> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        super::announced_descriptors(OWN_PID, variable).map_err(|error| match error {
            InheritError::Variable { variable, value, .. } => (variable, value),
            other => panic!("{other}"),
        })
    }

    #[test]
    fn only_descriptors_for_this_process_are_announced() {
        let none = Ok(vec![]);
        assert_eq!(announced(&[]), none);
        assert_eq!(announced(&[("LISTEN_FDS", "1")]), none);
        assert_eq!(announced(&[("LISTEN_PID", "78"), ("LISTEN_FDS", "1")]), none);
        assert_eq!(announced(&[("LISTEN_PID", "77")]), none);
        let zero = [("LISTEN_PID", "77"), ("LISTEN_FDS", "0"), ("LISTEN_FDNAMES", "")];
        assert_eq!(announced(&zero), none);
        let two = [("LISTEN_PID", "77"), ("LISTEN_FDS", "2")];
        let named = |names: [&str; 2]| Ok(vec![(3, names[0].into()), (4, names[1].into())]);
        assert_eq!(announced(&two), named(["unknown"; 2]));
        let with = |names| announced(&[two[0], two[1], ("LISTEN_FDNAMES", names)]);
        assert_eq!(with("nbd:monitor"), named(["nbd", "monitor"]));
        assert_eq!(with(":"), named(["", ""]));
        for names in ["", "one", "a:b:c"] {
            assert_eq!(with(names).unwrap_err(), ("LISTEN_FDNAMES", names.to_owned()));
        }
    }

    #[test]
    fn malformed_and_excessive_counts_are_rejected() {
        for count in ["", "x", "-1", "257", "4294967295", "4294967296"] {
            let error = announced(&[("LISTEN_PID", "77"), ("LISTEN_FDS", count)]).unwrap_err();
            assert_eq!(error, ("LISTEN_FDS", count.to_owned()));
        }
        assert_eq!(announced(&[("LISTEN_PID", "me")]), Err(("LISTEN_PID", "me".to_owned())));
    }

    #[test]
    fn duplicated_descriptor_is_owned_and_close_on_exec() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let duplicator = FdDuplicator::new().unwrap();
        let socket = duplicator.duplicate(listener.as_raw_fd()).unwrap();
        assert_ne!(socket.as_raw_fd(), listener.as_raw_fd());
        let flags = rustix::io::fcntl_getfd(&socket).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let address = check_socket(socket).unwrap().address().unwrap();
        assert_eq!(address.to_string(), listener.local_addr().unwrap().to_string());
        for nobodys in [1_000_000, duplicator.sender.as_raw_fd(), duplicator.receiver.as_raw_fd()] {
            assert!(duplicator.duplicate(nobodys).is_err(), "{nobodys}");
        }
    }

    #[test]
    fn only_listening_stream_sockets_are_accepted() {
        let problem = |socket: Socket| check_socket(socket).map(drop).unwrap_err();
        let unix = |kind| Socket::new(Domain::UNIX, kind, None).unwrap();
        for other in [Type::DGRAM, Type::SEQPACKET] {
            let found = problem(unix(other));
            assert!(matches!(found, SocketProblem::NotAStream(kind) if kind == other), "{found}");
        }
        assert!(matches!(problem(unix(Type::STREAM)), SocketProblem::NotListening));
        let (connected, _other) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        assert!(matches!(problem(connected), SocketProblem::NotListening));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(problem(OwnedFd::from(file).into()), SocketProblem::NotASocket(_)));
        let abstract_one = unix(Type::STREAM);
        let name = format!("\0nbd-gateway-test-{}\n", std::process::id());
        abstract_one.bind(&socket2::SockAddr::unix(&name).unwrap()).unwrap();
        abstract_one.listen(1).unwrap();
        let address = check_socket(abstract_one).unwrap().address().unwrap();
        let expected = format!("unix:@nbd-gateway-test-{}\\n", std::process::id());
        assert_eq!(address.to_string(), expected);
    }
}
