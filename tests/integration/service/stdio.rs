//! One connection on standard input and output.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use super::{BASE, plain, reads_all, socket_path, text};
use crate::clients::{Said, run, run_command};
use crate::support::client::{Client, FLAGS, GREETING, Plain};
use crate::support::pki::Pki;
use crate::support::server::{Address, Builder};
use crate::support::{IMAGE_SHA256, IMAGE_SIZE, archive, image};

const BINARY: &str = env!("CARGO_BIN_EXE_hexz-nbd");

fn one() -> Builder {
    plain().without_listening().arg("--stdio")
}

/// A server with that socket, as inetd starts it.
fn inetd(socket: impl Into<OwnedFd>) -> Builder {
    let socket = socket.into();
    let output = socket.try_clone().unwrap();
    one().stdio(socket, output)
}

/// Both ends of a connection by TCP; the server's is the second.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

#[test]
fn a_socket_pair() {
    let (client, server) = UnixStream::pair().unwrap();
    let mut server = inetd(server).start();
    assert_eq!(server.addresses(), [Address::Stdio]);
    reads_all(Plain::Unix(client));
    assert_eq!(server.wait().code(), Some(0));
    let line = server.wait_for_log("it left", |line| line.json["how"] == "left");
    assert_eq!(line.json["peer"], "unix", "{}", line.text);
}

#[test]
fn a_connection_by_tcp_with_tls() {
    let (client, server) = tcp();
    let pki = Pki::new();
    let config = pki.client_config();
    let mut server = inetd(server).tls(pki).start();
    let mut client = Client::new(Plain::Tcp(client));
    client.greet(FLAGS);
    let mut client = client.starttls(config);
    client.go("");
    assert!(client.read_ok(0, IMAGE_SIZE as u32) == image());
    client.disconnect();
    assert_eq!(server.wait().code(), Some(0));
    let line = server.wait_for_log("it reads", |line| line.json["tls"] == "TLS 1.3");
    assert_eq!(line.json["peer"], "127.0.0.1", "{}", line.text);
}

/// Copies until one end is gone. The standard library does it by splice(2), which keeps a pipe
/// locked for as long as nothing comes, so that nobody can read what is in it.
fn carry(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = [0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Two threads carry between the client's socket and the server's pipes.
#[test]
fn two_pipes() {
    let mut command = Command::new(BINARY);
    command.args(["-v", "--stdio"]).arg(archive(BASE));
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = command.spawn().unwrap();
    let (client, carrier) = UnixStream::pair().unwrap();
    let mut input = server.stdin.take().unwrap();
    let mut output = server.stdout.take().unwrap();
    let mut from_client = carrier.try_clone().unwrap();
    let mut to_client = carrier;
    let there = std::thread::spawn(move || carry(&mut from_client, &mut input));
    let back = std::thread::spawn(move || {
        carry(&mut output, &mut to_client);
        to_client.shutdown(std::net::Shutdown::Both)
    });
    reads_all(Plain::Unix(client));
    assert_eq!(server.wait().unwrap().code(), Some(0));
    there.join().unwrap();
    back.join().unwrap().unwrap_or_default();
    let mut log = String::new();
    server.stderr.unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("two pipes"), "{log}");
}

#[test]
fn libnbd_starts_the_server_by_a_command() {
    let archive = archive(BASE);
    let mut script = String::from("import hashlib\n");
    script += &format!("h.connect_command(['{BINARY}', '--stdio', '{}'])\n", text(&archive));
    script += "print(hashlib.sha256(h.pread(h.get_size(), 0)).hexdigest())\nh.shutdown()";
    assert_eq!(run("nbdsh", &["-c", &script]).ok().trim(), IMAGE_SHA256);
}

/// Returns what a client and the server that it starts print, on both streams.
fn printed(client: &str, before: &[&str], server: &[&str], after: &[&str]) -> Said {
    let bracketed = [&["[", BINARY][..], server, &["]"]].concat();
    let mut command = Command::new(client);
    command.args([before, &bracketed, after].concat());
    for variable in ["RUST_LOG", "NOTIFY_SOCKET", "JOURNAL_STREAM", "SYSTEMD_EXEC_PID"] {
        command.env_remove(variable);
    }
    run_command(command)
}

/// The server's log would be among the client's output.
#[test]
fn clients_that_start_the_server_print_only_their_own_output() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("copy");
    let archive = archive(BASE);
    let (archive, copy) = (text(&archive), text(&copy));
    let said = printed("nbdinfo", &["--size", "--"], &[archive], &[]);
    assert_eq!(said.everything(), format!("{IMAGE_SIZE}\n"));
    let said = printed("nbdcopy", &["--"], &[archive], &[copy]);
    assert_eq!(said.everything(), "");
    assert!(std::fs::read(copy).unwrap() == image());
    // Problems are printed.
    let said = printed("nbdinfo", &["--size", "--"], &["/nowhere/x.hxz"], &[]).failed();
    assert!(said.contains("/nowhere/x.hxz"), "{said}");
    // Those who want more get it.
    for options in [&["-v"][..], &["--log-format", "json"]] {
        let said = printed("nbdinfo", &["--size", "--"], &[options, &[archive]].concat(), &[]);
        assert!(said.everything().contains("ready: "), "{}", said.everything());
    }
}

/// The service manager collects the log.
#[test]
fn services_log_that_they_are_ready() {
    for (assignment, is_service) in [("SYSTEMD_EXEC_PID=$$", true), ("SYSTEMD_EXEC_PID=1", false)] {
        let (client, server) = UnixStream::pair().unwrap();
        let mut command = Command::new("sh");
        let script = format!("{assignment} exec \"$0\" --stdio \"$1\"");
        command.args(["-c", &script, BINARY]).arg(archive(BASE));
        for variable in ["RUST_LOG", "NOTIFY_SOCKET", "JOURNAL_STREAM"] {
            command.env_remove(variable);
        }
        command.stdin(OwnedFd::from(server.try_clone().unwrap())).stdout(OwnedFd::from(server));
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        drop(command);
        reads_all(Plain::Unix(client));
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(log.contains("ready: "), is_service, "{assignment}: {log}");
    }
}

/// It is judged by its address as it would be at the door, and not a byte is sent to it. What
/// peers do is no failure of the program.
#[test]
fn who_may_not_come_in_is_sent_away() {
    let (client, server) = tcp();
    let ended = inetd(server).args(["--deny", "127.0.0.1"]).run();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("\"denied_by_rule\""), "{}", ended.stderr);
    Client::new(Plain::Tcp(client)).expect_closed();

    let (client, server) = UnixStream::pair().unwrap();
    let mut server = inetd(server).args(["--deny", "127.0.0.1"]).start();
    reads_all(Plain::Unix(client));
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn its_end_is_the_servers() {
    // It vanishes, before and after it has chosen an export.
    for goes in [false, true] {
        let (client, server) = UnixStream::pair().unwrap();
        let mut server = inetd(server).start();
        let mut client = Client::new(Plain::Unix(client));
        client.greet(FLAGS);
        if goes {
            client.go("");
        }
        drop(client);
        assert_eq!(server.wait().code(), Some(0));
    }
    // It sends garbage.
    let (mut client, server) = UnixStream::pair().unwrap();
    let mut server = inetd(server).start();
    client.write_all(&[0xff; 100]).unwrap();
    assert_eq!(server.wait().code(), Some(0));
    // The server is told to end.
    let (client, server) = UnixStream::pair().unwrap();
    let mut server = inetd(server).start();
    let mut client = Client::new(Plain::Unix(client));
    client.greet(FLAGS);
    client.go("");
    client.read_ok(0, 1);
    assert_eq!(server.terminate().code(), Some(0));
    client.expect_end();
}

/// A long session is subject to reloads like any other.
#[test]
fn who_is_no_longer_allowed_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    let rule = |action| format!("[[rule]]\naction = \"{action}\"\nnetwork = \"127.0.0.1\"\n");
    std::fs::write(&rules, rule("allow")).unwrap();
    let (client, server) = tcp();
    let mut server = inetd(server).arg("--rules").arg(&rules).arg("--insecure-no-tls").start();
    let mut client = Client::new(Plain::Tcp(client));
    client.greet(FLAGS);
    client.go("");
    client.read_ok(0, 1);
    std::fs::write(&rules, rule("deny")).unwrap();
    server.signal("HUP");
    client.expect_closed();
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_reason("dismissed");
}

/// inetd makes standard error the client's socket, too.
#[test]
fn the_log_does_not_get_into_the_connection() {
    let (client, server) = UnixStream::pair().unwrap();
    let socket = || Stdio::from(OwnedFd::from(server.try_clone().unwrap()));
    let mut command = Command::new(BINARY);
    command.args(["-v", "--stdio"]).arg(archive(BASE));
    command.stdin(socket()).stdout(socket()).stderr(socket());
    let mut child = command.spawn().unwrap();
    drop(command);
    drop(server);
    let mut client = Client::new(Plain::Unix(client));
    client.greet(FLAGS);
    assert_eq!(client.list(), [BASE]);
    client.go("");
    assert!(client.read_ok(0, IMAGE_SIZE as u32) == image());
    client.disconnect();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_is_no_connection_is_refused() {
    let null = || Stdio::null();
    let file = std::fs::File::open(archive(BASE)).unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (_folder, path) = socket_path();
    let listener = UnixListener::bind(&path).unwrap();
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let others: [Stdio; 5] = [
        null(),
        file.into(),
        // Without a pipe as standard output.
        OwnedFd::from(pipe).into(),
        OwnedFd::from(listener).into(),
        OwnedFd::from(datagrams).into(),
    ];
    for input in others {
        let (code, stderr) = one().stdio(input, null()).fail();
        assert!(code == 5 && stderr.contains("\"reason\":\"stdio_"), "{stderr}");
    }
}

#[test]
fn it_listens_nowhere_else() {
    for option in
        [["--listen", "127.0.0.1:0"], ["--socket-mode", "0600"], ["--monitor", "127.0.0.1:0"]]
    {
        let (code, stderr) = one().args(option).fail();
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("--stdio") && stderr.contains(option[0]), "{stderr}");
    }
}

/// As a socket unit with Accept=yes does, which hands the connection over as well.
#[test]
fn systemd_starts_one_for_each_connection() {
    let (_folder, path) = socket_path();
    let mut command = Command::new("systemd-socket-activate");
    command.args(["-a", "--inetd", "-l", text(&path), BINARY, "--stdio"]).arg(archive(BASE));
    let mut manager = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for _ in 0..2 {
        let mut connected = None;
        crate::support::wait_until("somebody listens", || {
            connected = UnixStream::connect(&path).ok();
            connected.is_some()
        });
        reads_all(Plain::Unix(connected.unwrap()));
    }
    // Those who wait are served at the same time.
    let both = [(); 2].map(|()| UnixStream::connect(&path).unwrap());
    for mut client in both {
        let mut greeting = [0; GREETING.len()];
        client.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, GREETING);
    }
    manager.kill().unwrap();
    manager.wait().unwrap();
}
