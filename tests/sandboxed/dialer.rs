//! The dialer: what a gateway that is taken over can have it do, and what one that is taken over
//! itself can do.

use std::fs;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::sync::Arc;

use nbd_sandbox::{DialerPlan, Mode};
use object_reader::Dial;
use rustix::net::{RecvFlags, SendFlags};
use socket2::{Domain, Protocol, Socket, Type};

use super::End::{Done, Killed, Refused};
use super::sockets::{fast_open, pass, receive};
use super::{
    Attempt, EACCES, ENOSYS, Place, SIGSYS, any_port, become_a_user, is_read, send_signal,
};
use program::ProcessDialer;
use program::messages::{DialRequest, DialResponse, DialTarget, DialerStart};

#[path = "../../src/service/dialer/mod.rs"]
#[allow(unused, reason = "part of the program; its unit tests are run with the program's")]
mod program;

/// Runs this program as the dialer.
pub(super) fn run() -> ExitCode {
    program::run()
}

/// Dialers of a gateway. Their list has the listener of the test only.
pub(super) struct Dialers {
    dialer: Arc<ProcessDialer>,
    /// Socket of another one, for messages that the program doesn't send.
    raw: OwnedFd,
    _process: Child,
}

impl Dialers {
    pub(super) fn start(port: u16) -> io::Result<Self> {
        let host = "127.0.0.1".to_owned();
        let dialer = program::start(&[(host.clone(), port)], Mode::Require, None)?;
        let (raw, process, ready) = program::spawn(&DialerStart {
            parent: std::process::id(),
            mode: Mode::Require,
            user: None,
            targets: vec![DialTarget { host, port }],
        })?;
        assert!(ready.missing.is_empty(), "{ready:?}");
        // Its memory can be read by root only, if at all.
        if let Ok(environment) = fs::read(format!("/proc/{}/environ", process.id())) {
            assert!(environment.is_empty());
        }
        Ok(Self { dialer, raw, _process: process })
    }

    /// Returns the descriptor on which the gateway receives others.
    pub(super) fn descriptor(&self) -> i32 {
        self.dialer.as_raw_fd()
    }
}

/// What a gateway with a dialer can do: the same as without, and connect to the stores of the list.
pub(super) const WITH_DIALER: &[Attempt] = &[
    ("connect by the dialer", |place| dial(place, "127.0.0.1"), Done),
    ("dial a host outside the list", |place| dial(place, "127.0.0.2"), Refused(EACCES)),
    ("request a host outside the list", request_another_host, Refused(EACCES)),
    ("make a socket", |_| Socket::new(Domain::IPV4, Type::STREAM, None).map(drop), Refused(ENOSYS)),
    ("connect", |place| place.socket.connect(&place.listener), Refused(ENOSYS)),
    ("receive from others", |place| receive(&place.held.unix[1]).map(drop), Refused(ENOSYS)),
    ("receive from another dialer", receive_from_another_dialer, Refused(ENOSYS)),
    ("pass a descriptor", |place| pass(&place.dialers().raw, &place.socket), Refused(ENOSYS)),
    (
        "close the dialer's socket",
        |place| Ok(nix::unistd::close(place.dialers().descriptor())?),
        Refused(ENOSYS),
    ),
    ("close another socket", |place| Ok(nix::unistd::close(place.socket.try_clone()?)?), Done),
];

/// What the dialer can do.
pub(super) const DIALER: &[Attempt] = &[
    // What it takes to connect to a store.
    ("resolve a name", |_| ("localhost", 1).to_socket_addrs().map(drop), Done),
    ("resolve in a thread", resolve_in_a_thread, Done),
    ("read the list of hosts", |_| is_read(Path::new("/etc/hosts")), Done),
    (
        "connect to a store",
        |place| TcpStream::connect(place.listener.as_socket().unwrap()).map(drop),
        Done,
    ),
    ("pass a connection", |place| pass(&place.held.unix[0], &place.socket), Done),
    // Other receivers.
    ("connect to another port", connect_to_another_port, Refused(EACCES)),
    ("connect by sending", |place| fast_open(&place.socket, place), Refused(ENOSYS)),
    ("bind", |place| place.socket.bind(&any_port()), Refused(ENOSYS)),
    ("listen", |place| place.socket.listen(1), Refused(ENOSYS)),
    ("accept", |place| place.held.listener.accept().map(drop), Refused(ENOSYS)),
    (
        "make a Unix socket",
        |_| Socket::new(Domain::UNIX, Type::STREAM, None).map(drop),
        Refused(ENOSYS),
    ),
    (
        "make a multipath socket",
        |_| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)).map(drop),
        Refused(ENOSYS),
    ),
    (
        "pass a descriptor to others",
        |place| pass(&place.held.unix[1], &place.socket),
        Refused(ENOSYS),
    ),
    ("receive a descriptor", |place| receive(&place.held.unix[1]).map(drop), Refused(ENOSYS)),
    // Files and processes.
    ("read an archive", |place| is_read(&place.inside("file")), Refused(EACCES)),
    ("read the shadow file", |_| is_read(Path::new("/etc/shadow")), Refused(EACCES)),
    ("read the list of users", |_| is_read(Path::new("/etc/passwd")), Refused(EACCES)),
    ("read own memory", |_| is_read(Path::new("/proc/self/environ")), Refused(EACCES)),
    ("list a folder", |_| fs::read_dir("/etc").map(drop), Refused(EACCES)),
    ("write", |place| fs::write(place.inside("new"), "x"), Refused(ENOSYS)),
    ("remove a file", |place| fs::remove_file(place.inside("file")), Refused(ENOSYS)),
    ("send a signal", send_signal, Refused(ENOSYS)),
    ("start a program", |_| Command::new("/bin/true").status().map(drop), Refused(ENOSYS)),
    ("become a program", |_| Err(Command::new("/bin/true").exec()), Killed(SIGSYS)),
    ("become a user", become_a_user, Killed(SIGSYS)),
];

pub(super) fn enter(place: &Place) {
    let plan = DialerPlan {
        mode: Mode::Require,
        user: None,
        ports: vec![place.listener.as_socket().unwrap().port()],
        socket: place.held.unix[0].as_raw_fd(),
    };
    let report = nbd_sandbox::enter_dialer(&plan).unwrap();
    assert!(report.missing.is_empty(), "{report:?}");
}

fn dial(place: &Place, host: &str) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let port = place.listener.as_socket().unwrap().port();
    let dialed = runtime.block_on(async {
        let stream = place.dialers().dialer.dial(host, port).await?;
        assert_eq!(stream.peer_addr()?.port(), port);
        stream.writable().await?;
        stream.try_write(b"x")
    });
    match dialed {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(io::Error::from_raw_os_error(EACCES))
        }
        dialed => dialed.map(drop),
    }
}

fn request_another_host(place: &Place) -> io::Result<()> {
    let raw = &place.dialers().raw;
    rustix::net::send(raw, &DialRequest { id: 1, target: 1 }.encode(), SendFlags::empty())?;
    let mut bytes = [0; 512];
    let (length, _) = rustix::net::recv(raw, bytes.as_mut_slice(), RecvFlags::empty())?;
    let response = DialResponse::decode(&bytes[..length]).unwrap();
    match response.outcome.map_err(|error| error.label()) {
        Err("store_not_allowed") => Err(io::Error::from_raw_os_error(EACCES)),
        outcome => panic!("{outcome:?}"),
    }
}

/// A request is answered, but the connection can't be received on this socket.
fn receive_from_another_dialer(place: &Place) -> io::Result<()> {
    let raw = &place.dialers().raw;
    rustix::net::send(raw, &DialRequest { id: 1, target: 0 }.encode(), SendFlags::empty())?;
    receive(raw).map(drop)
}

fn resolve_in_a_thread(_: &Place) -> io::Result<()> {
    std::thread::spawn(|| ("localhost", 1).to_socket_addrs().map(drop)).join().unwrap()
}

fn connect_to_another_port(place: &Place) -> io::Result<()> {
    TcpStream::connect(place.held.listener.local_addr()?).map(drop)
}
