//! The dialer process: the program's own subcommand, which connects to stores for the gateway. The
//! test has the part of the gateway.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::cmsg_space;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags,
    SocketType, recvmsg, send, socketpair,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{is_root, wait_until};

const BINARY: &str = env!("CARGO_BIN_EXE_hexz-nbd");
const CONNECTED: u8 = 0;
const NOT_ALLOWED: u8 = 1;
const UNRESOLVED: u8 = 2;
const ADDRESS_REFUSED: u8 = 3;
const CONNECT_FAILED: u8 = 4;

struct Dialer {
    gateway: OwnedFd,
    process: Child,
}

/// Response with its id, code, message and socket.
struct Response {
    id: u32,
    code: u8,
    message: String,
    socket: Option<TcpStream>,
}

impl Dialer {
    /// Starts the program as the dialer of this process, with `targets` as pairs of host and port.
    fn start(targets: Value) -> Self {
        Self::start_with(Command::new(BINARY).arg("dialer"), targets)
    }

    fn start_with(command: &mut Command, targets: Value) -> Self {
        let (gateway, other) = pair();
        let process = command.stdin(other).stdout(Stdio::null()).spawn().unwrap();
        // Drops the other end.
        command.stdin(Stdio::null());
        let dialer = Self { gateway, process };
        let ready = dialer.introduce(std::process::id(), targets);
        assert_eq!(ready["Ok"]["missing"], json!([]), "{ready}");
        assert!(ready["Ok"]["enforced"].to_string().contains("seccomp"), "{ready}");
        dialer
    }

    fn introduce(&self, parent: u32, targets: Value) -> Value {
        let targets: Vec<Value> = targets.as_array().unwrap().iter().map(target).collect();
        let start = json!({ "parent": parent, "mode": "Require", "targets": targets });
        self.send(start.to_string().as_bytes());
        let (bytes, _) = receive(&self.gateway);
        serde_json::from_slice(&bytes).unwrap()
    }

    fn send(&self, bytes: &[u8]) {
        send(&self.gateway, bytes, SendFlags::NOSIGNAL).unwrap();
    }

    fn request(&self, id: u32, target: u16) {
        self.send(&[id.to_be_bytes().as_slice(), &target.to_be_bytes()].concat());
    }

    fn response(&self) -> Response {
        let (bytes, socket) = receive(&self.gateway);
        let (id, rest) = bytes.split_first_chunk().unwrap();
        Response {
            id: u32::from_be_bytes(*id),
            code: rest[0],
            message: String::from_utf8(rest[1..].to_vec()).unwrap(),
            socket: socket.map(TcpStream::from),
        }
    }

    fn dial(&self, target: u16) -> Response {
        self.request(7, target);
        let response = self.response();
        assert_eq!(response.id, 7);
        response
    }

    fn wait(mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the dialer has ended", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

fn target(pair: &Value) -> Value {
    json!({ "host": pair[0], "port": pair[1] })
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn receive(socket: &OwnedFd) -> (Vec<u8>, Option<OwnedFd>) {
    let mut bytes = vec![0; 65536];
    let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let buffers = &mut [IoSliceMut::new(&mut bytes)];
    let received = recvmsg(socket, buffers, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let socket = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    bytes.truncate(received.bytes);
    (bytes, socket)
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

#[test]
fn connects_to_the_stores_of_the_list_only() {
    let (listener, port) = listener();
    let dialer = Dialer::start(json!([["127.0.0.1", port], ["localhost", port]]));
    for target in [0, 1] {
        let response = dialer.dial(target);
        assert_eq!(response.code, CONNECTED, "{}", response.message);
        let mut stream = response.socket.unwrap();
        assert!(stream.nodelay().unwrap());
        // The dialer uses it asynchronously, and the gateway does.
        stream.set_nonblocking(false).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        stream.write_all(b"request").unwrap();
        let mut bytes = [0; 7];
        server.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"request");
    }
    for target in [2, u16::MAX] {
        let response = dialer.dial(target);
        assert_eq!((response.code, response.socket.is_none()), (NOT_ALLOWED, true));
    }
}

#[test]
fn failures_say_what_failed() {
    let unused = listener().1;
    let dialer = Dialer::start(json!([["127.0.0.1", unused], ["a name with spaces", unused]]));
    let response = dialer.dial(0);
    assert_eq!(response.code, CONNECT_FAILED);
    assert!(response.message.contains(&format!("127.0.0.1 port {unused}")), "{}", response.message);
    let response = dialer.dial(1);
    assert_eq!(response.code, UNRESOLVED, "{}", response.message);
    assert!(response.message.contains("a name with spaces"), "{}", response.message);
}

#[test]
fn many_requests_are_answered_at_a_time() {
    let (_listener, port) = listener();
    let dialer = Dialer::start(json!([["localhost", port]]));
    for id in 0..100 {
        dialer.request(id, 0);
    }
    let mut ids: Vec<u32> = (0..100)
        .map(|_| {
            let response = dialer.response();
            assert!(response.socket.is_some(), "{}", response.message);
            response.id
        })
        .collect();
    ids.sort_unstable();
    assert!(ids.into_iter().eq(0..100));
}

/// As after a manipulation of the DNS.
#[test]
fn names_do_not_lead_to_this_machine() {
    if !is_root() {
        eprintln!("skipped: it takes root to replace /etc/hosts");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    let lines = "127.0.0.1 localhost loopback.example\n169.254.169.254 metadata.example\n\
                 127.0.0.1 both.example\n192.0.2.1 both.example\n";
    std::fs::write(&hosts, lines).unwrap();
    let (_listener, port) = listener();
    let script = "mount --bind \"$0\" /etc/hosts && exec \"$1\" dialer";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script]).arg(&hosts).arg(BINARY);
    let hosts = ["loopback.example", "metadata.example", "localhost", "127.0.0.1"];
    let targets = json!(hosts.map(|host| (host, port)));
    let dialer = Dialer::start_with(&mut command, targets);
    for (target, host) in (0..).zip(hosts) {
        let response = dialer.dial(target);
        let wanted = if target < 2 { ADDRESS_REFUSED } else { CONNECTED };
        assert_eq!(response.code, wanted, "{host}: {}", response.message);
    }
}

#[test]
fn ends_with_the_gateway_and_at_invalid_requests() {
    let Dialer { gateway, process } = Dialer::start(json!([]));
    drop(gateway);
    let dialer = Dialer { gateway: pair().0, process };
    assert_eq!(dialer.wait().code(), Some(0));

    for invalid in [&b"x"[..], b"longer than a request"] {
        let dialer = Dialer::start(json!([]));
        dialer.send(invalid);
        assert_eq!(dialer.wait().code(), Some(1));
    }
}

/// Also while the socket is still open: another process may have inherited it.
#[test]
fn dies_with_its_parent() {
    let (gateway, other) = pair();
    let script = "exec 3<&0; \"$0\" dialer <&3 3<&- & echo $!; wait";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, BINARY]).stdin(other).stdout(Stdio::piped());
    let mut process = shell.spawn().unwrap();
    // Closes this copy of the other end.
    drop(shell);
    let parent = process.id();
    let mut pid = String::new();
    let mut output = process.stdout.take().unwrap();
    while !pid.ends_with('\n') {
        let mut byte = [0];
        output.read_exact(&mut byte).unwrap();
        pid.push(char::from(byte[0]));
    }
    let dialer = Dialer { gateway, process };
    assert!(dialer.introduce(parent, json!([])).get("Ok").is_some());
    let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    kill_process(Pid::from_raw(parent.cast_signed()).unwrap(), Signal::KILL).unwrap();
    let Dialer { gateway, mut process } = dialer;
    process.wait().unwrap();
    // The dialer has another parent by now, which may not have waited for it yet.
    let (bytes, _) = receive(&gateway);
    assert!(bytes.is_empty());
    let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
    wait_until("the dialer is gone", || {
        std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
    });
}

#[test]
fn does_not_start_without_its_parent() {
    let (gateway, other) = pair();
    let process = Command::new(BINARY).arg("dialer").stdin(other).spawn().unwrap();
    let dialer = Dialer { gateway, process };
    let answer = dialer.introduce(1, json!([]));
    assert_eq!(answer["Err"], "the gateway has ended");
    assert_eq!(dialer.wait().code(), Some(1));
}

/// A terminal and a service manager send these to all processes, but the gateway still needs the
/// dialer to drain its requests.
#[test]
fn signals_that_end_the_gateway_do_not_end_the_dialer() {
    let (_listener, port) = listener();
    let dialer = Dialer::start(json!([["127.0.0.1", port]]));
    let pid = Pid::from_child(&dialer.process);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        kill_process(pid, signal).unwrap();
    }
    assert_eq!(dialer.dial(0).code, CONNECTED);
}

#[test]
fn is_not_for_users() {
    let output = Command::new(BINARY).arg("dialer").stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("own use"));
    for arguments in [&["--help"][..], &["man"], &["completions", "bash"], &["completions", "zsh"]]
    {
        let output = Command::new(BINARY).args(arguments).output().unwrap();
        assert!(output.status.success());
        assert!(!String::from_utf8(output.stdout).unwrap().contains("dialer"), "{arguments:?}");
    }
}
