//! Sockets that are handed over.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use socket2::{Domain, SockAddr, Socket, Type};

use super::{BASE, first_client, free_port, handed, plain, reads_all, socket_path, text};
use crate::clients::run;
use crate::support::client::Plain;
use crate::support::pki::Pki;
use crate::support::server::Address;
use crate::support::{IMAGE_SHA256, archive, sha256};

const BINARY: &str = env!("CARGO_BIN_EXE_hexz-nbd");

#[test]
fn systemd_hands_over_several_sockets() {
    let (_folder, path) = socket_path();
    let port = free_port();
    let client = first_client(&path);
    let tcp = format!("127.0.0.1:{port}");
    let mut server = plain()
        .without_listening()
        .within(["systemd-socket-activate", "-l", text(&path), "-l", &tcp, "--fdname=a:b"])
        .start();
    let expected = [Address::Unix(path.clone()), Address::Tcp(tcp.parse().unwrap())];
    assert_eq!(server.addresses(), expected);
    // It waited until there was a server.
    reads_all(Plain::Unix(client.join().unwrap()));
    reads_all(Plain::Unix(UnixStream::connect(&path).unwrap()));
    reads_all(Plain::Tcp(std::net::TcpStream::connect(&tcp).unwrap()));
    assert_eq!(server.terminate().code(), Some(0));
    assert!(path.exists(), "it was systemd's");
    // What had been handed over is closed: the number would keep the port.
    assert!(UnixStream::connect(&path).is_err());
}

#[test]
fn an_abstract_socket() {
    let name = format!("hexz-nbd-test-activation-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let server = handed(UnixListener::bind_addr(&address).unwrap(), "").start();
    assert_eq!(server.addresses(), [Address::Unix(format!("@{name}").into())]);
    reads_all(Plain::Unix(UnixStream::connect_addr(&address).unwrap()));
}

/// The descriptor has gone to the number that the program has for it, and nowhere else.
#[test]
fn no_second_descriptor_stays_open() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let count = |server: &crate::support::server::Server| {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
        let links = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        links.filter(|link| link.to_string_lossy().starts_with("socket:")).count()
    };
    let by_itself = plain().start();
    let server = handed(listener, "nbd").start();
    assert_eq!(count(&server), count(&by_itself));
}

/// What would be refused where it is bound here is refused as well.
#[test]
fn real_addresses_are_judged() {
    let everywhere = || TcpListener::bind("0.0.0.0:0").unwrap();
    let message = handed(everywhere(), "nbd").fails_with(2, "remote_listener_without_tls");
    assert!(message.contains("0.0.0.0:"), "{message}");

    let server = handed(everywhere(), "nbd").tls(Pki::new()).start();
    server.wait_for_reason("no_remote_clients");
    drop(server);
    let server = handed(everywhere(), "nbd").arg("--insecure-no-tls").start();
    server.wait_for_reason("no_tls");
}

#[test]
fn other_sockets_are_refused_by_what_they_are() {
    let unix = |kind| Socket::new(Domain::UNIX, kind, None).unwrap();
    let bound = |kind| {
        let (folder, path) = socket_path();
        let socket = unix(kind);
        socket.bind(&SockAddr::unix(path).unwrap()).unwrap();
        if kind != Type::DGRAM {
            socket.listen(1).unwrap();
        }
        (folder, OwnedFd::from(socket))
    };
    let netlink = Socket::new(Domain::from(16), Type::DGRAM, None).unwrap();
    let (connected, _other) = UnixStream::pair().unwrap();
    let others: [OwnedFd; 6] = [
        bound(Type::DGRAM).1,
        bound(Type::SEQPACKET).1,
        // Not listening.
        unix(Type::STREAM).into(),
        connected.into(),
        netlink.into(),
        std::fs::File::open(archive(BASE)).unwrap().into(),
    ];
    for socket in others {
        let message = handed(socket, "odd").fails_with(5, "unusable_socket");
        assert!(message.contains('3') && message.contains("\"odd\""), "{message}");
    }
}

#[test]
fn what_is_announced_and_not_there_is_an_error() {
    let listener = || TcpListener::bind("127.0.0.1:0").unwrap();
    for (variable, value, named) in [
        ("LISTEN_FDS", "2", "LISTEN_FDNAMES"),
        ("LISTEN_FDS", "many", "LISTEN_FDS"),
        ("LISTEN_FDS", "1000000000", "256"),
        ("LISTEN_FDNAMES", "a:b", "LISTEN_FDNAMES"),
    ] {
        let given = handed(listener(), "a").env(variable, value);
        let message = given.fails_with(5, "invalid_variable");
        assert!(message.contains(named), "{message}");
    }
    // A number that nobody has yet may be the next one's that is opened.
    for count in 2..10 {
        let names = ["a"].repeat(count).join(":");
        let announced = handed(listener(), &names).env("LISTEN_FDS", count.to_string());
        let message = announced.fails_with(5, "unusable_socket");
        assert!(message.contains("descriptor 4"), "{message}");
    }
}

/// Neither is ignored in silence.
#[test]
fn where_to_listen_is_said_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    handed(listener, "nbd").listen("127.0.0.1:0").fails_with(2, "listen_given_twice");
}

/// As for the children of a service that got sockets.
#[test]
fn what_was_handed_to_another_process_is_not_taken() {
    plain().env("LISTEN_PID", "1").env("LISTEN_FDS", "1").start().assert_alive();
    plain().env("LISTEN_FDS", "1").start().assert_alive();
}

/// libnbd binds a socket, starts the server and hands it over. Its end is the server's.
#[test]
fn libnbd_starts_the_server_by_socket_activation() {
    let archive = archive(BASE);
    let said = run("nbdinfo", &["--size", "--", "[", BINARY, text(&archive), "]"]).ok();
    assert_eq!(said.trim(), "8388608");

    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    run("nbdcopy", &["--", "[", BINARY, text(&archive), "]", text(&image)]).ok();
    assert_eq!(sha256(&std::fs::read(image).unwrap()), IMAGE_SHA256);

    let start = format!("h.connect_systemd_socket_activation(['{BINARY}', '{}'])", text(&archive));
    let mut script = String::from("import hashlib, subprocess\n");
    script += &start;
    script += "\nprint(hashlib.sha256(h.pread(h.get_size(), 0)).hexdigest())\nh.shutdown()";
    let said = run("nbdsh", &["-c", &script]).ok();
    assert_eq!(said.trim(), IMAGE_SHA256);
}

/// What keeps waiting outside while the server is down is served by the next one.
#[test]
fn clients_wait_while_the_server_is_started_anew() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let again = || OwnedFd::from(listener.try_clone().unwrap());
    let mut first = handed(again(), "nbd").start();
    reads_all(Plain::Tcp(std::net::TcpStream::connect(address).unwrap()));
    assert_eq!(first.terminate().code(), Some(0));
    let mut waiting = std::net::TcpStream::connect(address).unwrap();
    let mut second = handed(again(), "nbd").start();
    waiting.read_exact(&mut [0; 18]).unwrap();
    reads_all(Plain::Tcp(std::net::TcpStream::connect(address).unwrap()));
    drop(waiting);
    assert_eq!(second.terminate().code(), Some(0));
}

/// `FileDescriptorName=monitor` is for whoever wants to see what goes on.
#[test]
fn the_monitors_socket_serves_no_nbd() {
    let (_folder, path) = socket_path();
    let port = free_port();
    let client = first_client(&path);
    let monitor = format!("127.0.0.1:{port}");
    let activate = ["systemd-socket-activate", "-l", text(&path), "-l", &monitor];
    let server = plain()
        .without_listening()
        .within(activate.into_iter().chain(["--fdname=nbd:monitor"]))
        .start();
    assert_eq!(server.addresses(), [Address::Unix(path.clone())]);
    reads_all(Plain::Unix(client.join().unwrap()));
    let mut stream = std::net::TcpStream::connect(&monitor).unwrap();
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {monitor}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// With only that one, the others are where they would be anyway.
#[test]
fn beside_the_monitors_socket_listening_goes_on() {
    let monitor = TcpListener::bind("127.0.0.1:0").unwrap();
    let again = || OwnedFd::from(monitor.try_clone().unwrap());
    handed(again(), "monitor").listen("127.0.0.1:0").start().assert_alive();
    let twice = handed(again(), "monitor").args(["--monitor", "127.0.0.1:0"]);
    twice.fails_with(2, "monitor_given_twice");
}
