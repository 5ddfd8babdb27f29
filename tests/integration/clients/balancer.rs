//! Clients that come through a real load balancer.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{output, run};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Line, Server};
use crate::support::{IMAGE_SHA256, sha256, wait_until};

/// HAProxy, until this is dropped.
struct Haproxy {
    child: Child,
    _folder: tempfile::TempDir,
}

impl Haproxy {
    /// Starts it with that configuration behind the usual defaults.
    fn start(configuration: &str) -> Self {
        let defaults =
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 1m\n timeout server 1m\n";
        Self::with(&format!("{defaults}{configuration}"))
    }

    fn with(configuration: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("haproxy.cfg");
        std::fs::write(&file, configuration).unwrap();
        let mut command = haproxy();
        command.arg("-db").arg("-f").arg(&file);
        let child = command.spawn().expect("haproxy is needed; try `make tools`");
        Self { child, _folder: folder }
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn haproxy() -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new("haproxy");
    command.env("PATH", format!("/usr/sbin:{path}")).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

fn wait_for(port: u16) {
    wait_until("HAProxy listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
}

/// A `listen` section: its port, and its text. All that comes by it is said to come from `client`.
fn section(server: &Server, client: &str, how: &str) -> (u16, String) {
    let port = free_port();
    let text = format!(
        "listen nbd-{port}\n bind 127.0.0.1:{port}\n tcp-request connection set-src {client}\n \
         server gateway 127.0.0.1:{} {how}\n",
        server.port()
    );
    (port, text)
}

/// A gateway behind the load balancer 127.0.0.1, for clients of 192.0.2.0/24 alone.
fn behind() -> Builder {
    Server::builder().archive("base-zstd.hxz").args([
        "--proxy-from",
        "127.0.0.1",
        "--allow",
        "192.0.2.0/24,2001:db8::/32",
    ])
}

/// Whether the log has such a line about a client that the balancer forwarded.
fn has_logged(server: &Server, wanted: impl Fn(&Line) -> bool, peer: &str) -> bool {
    let is_so = |line: &Line| {
        wanted(line)
            && [&line.json, &line.json["span"]]
                .iter()
                .any(|of| of["peer"] == peer && of["via"] == "127.0.0.1")
    };
    server.log().iter().any(is_so)
}

fn info(port: u16) -> super::Said {
    run("nbdinfo", &["--size", &format!("nbd://127.0.0.1:{port}")])
}

#[test]
fn clients_are_judged_by_their_own_addresses() {
    let server = behind().arg("--insecure-no-tls").start();
    let all = "send-proxy-v2 proxy-v2-options crc32c,unique-id,authority,ssl";
    let (allowed, first) = section(&server, "ipv4(192.0.2.7)", "send-proxy-v2");
    let (v6, second) = section(&server, "ipv6(2001:db8::7)", all);
    let (mapped, third) = section(&server, "ipv6(::ffff:192.0.2.9)", all);
    let (refused, fourth) = section(&server, "ipv4(198.51.100.7)", all);
    let (claims, fifth) = section(&server, "ipv4(127.0.0.1)", all);
    let _haproxy = Haproxy::start(&[first, second, third, fourth, fifth].concat());
    wait_for(claims);
    for (port, address) in [(allowed, "192.0.2.7"), (v6, "2001:db8::7"), (mapped, "192.0.2.9")] {
        assert_eq!(info(port).ok(), "8388608\n");
        wait_until("it has been read", || has_logged(&server, Line::is_reading, address));
    }
    info(refused).failed();
    let is_refused = |line: &Line| line.json["cause"] == "no_rule_for_address";
    wait_until("it was refused", || has_logged(&server, is_refused, "198.51.100.7"));
    info(claims).failed();
    server.wait_for_reason("proxy_address");
}

#[test]
fn a_copy_over_tls() {
    let server = behind().tls(Pki::new()).start();
    let (port, section) = section(&server, "ipv4(192.0.2.7)", "send-proxy-v2");
    let _haproxy = Haproxy::start(&section);
    wait_for(port);
    let (_folder, file) = output();
    let uri =
        format!("nbds://localhost:{port}/?tls-certificates={}", server.pki().folder().display());
    assert!(run("nbdinfo", &[&uri]).ok().contains("with TLS"));
    run("nbdcopy", &["--connections=4", &uri, file.to_str().unwrap()]).ok();
    assert_eq!(sha256(&std::fs::read(&file).unwrap()), IMAGE_SHA256);
    assert!(has_logged(&server, Line::is_reading, "192.0.2.7"));
}

#[test]
fn what_to_set_is_said() {
    let server = behind().args(["--insecure-no-tls", "--handshake-timeout", "1s"]).start();
    let (old, first) = section(&server, "ipv4(192.0.2.7)", "send-proxy");
    let (none, second) = section(&server, "ipv4(192.0.2.7)", "");
    let _haproxy = Haproxy::start(&[first, second].concat());
    wait_for(none);
    info(old).failed();
    let line = server.wait_for_cause("version_1");
    assert!(line.message().contains("send-proxy-v2"), "{}", line.text);
    info(none).failed();
    server.wait_for_cause("nothing_sent");
}

/// Checks by connecting, and by what a gateway says first.
#[test]
fn health_checks() {
    let server = behind().args(["--insecure-no-tls", "-v"]).start();
    let checks = "send-proxy-v2 check inter 100ms";
    let (port, first) = section(&server, "ipv4(192.0.2.7)", checks);
    let (bare, second) =
        section(&server, "ipv4(192.0.2.7)", &format!("{checks} no-check-send-proxy"));
    let mut haproxy = Haproxy::start(&[first, second].concat());
    let looks = |server: &Server| {
        let is_look = |line: &&Line| line.json["health_check"] == true;
        server.log().iter().filter(is_look).count()
    };
    wait_until("it has looked some times", || looks(&server) > 10);
    // It finds that the gateway lives.
    for port in [port, bare] {
        assert_eq!(info(port).ok(), "8388608\n");
    }
    assert!(haproxy.child.try_wait().unwrap().is_none());
    let lines = server.log();
    let noise = lines
        .iter()
        .filter(|line| line.json["level"] == "WARN" && line.json["reason"] == "proxy_header");
    assert_eq!(noise.count(), 0, "{}", server.log_text());

    // To be greeted, the balancer has to be allowed itself.
    for (allowed, is_up) in [("127.0.0.1", true), ("127.0.0.2", false)] {
        let server = behind().args(["--insecure-no-tls", "--allow", allowed]).start();
        let port = free_port();
        let _haproxy = Haproxy::start(&format!(
            "listen nbd\n bind 127.0.0.1:{port}\n tcp-request connection set-src ipv4(192.0.2.7)\n \
             option tcp-check\n tcp-check expect string NBDMAGIC\n \
             server gateway 127.0.0.1:{} {checks} fall 1\n",
            server.port()
        ));
        wait_for(port);
        wait_until("the check is over", || info(port).output().is_some() == is_up);
    }
}

/// HAProxy says LOCAL for those, as for its checks.
#[test]
fn clients_of_its_unix_socket_count_as_the_balancer() {
    for (allowed, come_in) in [("127.0.0.1", true), ("192.0.2.0/24", false)] {
        let server = Server::builder()
            .archive("base-zstd.hxz")
            .args(["--proxy-from", "127.0.0.1", "--allow", allowed, "--insecure-no-tls"])
            .start();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        let _haproxy = Haproxy::start(&format!(
            "listen nbd\n bind {}\n server gateway 127.0.0.1:{} send-proxy-v2\n",
            socket.display(),
            server.port()
        ));
        wait_until("HAProxy listens", || socket.exists());
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let said = run("nbdinfo", &["--size", &uri]);
        assert_eq!(said.output().is_some(), come_in, "{allowed}: {}", said.everything());
    }
}

#[test]
fn the_example_works() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/haproxy.cfg");
    let check = haproxy().arg("-c").arg("-f").arg(&example).status();
    assert!(check.expect("haproxy is needed; try `make tools`").success());
    let [one, two] = [(); 2].map(|()| behind().tls(Pki::new()).args(["--monitor", "0"]).start());
    let port = free_port();
    let mut text = std::fs::read_to_string(&example).unwrap();
    let source = "\n    tcp-request connection set-src ipv4(192.0.2.7)";
    let check = "send-proxy-v2 check port";
    let places = ["192.0.2.21", "192.0.2.22"].map(|at| format!("{at}:10809 {check} 10810"));
    let server = |server: &Server| {
        let line = server.wait_for_log("the monitor runs", |line| line.json["monitor"].is_string());
        let monitor: SocketAddr = line.json["monitor"].as_str().unwrap().parse().unwrap();
        format!("{} {check} {}", server.address(), monitor.port())
    };
    for (from, to) in [
        ("bind :10809", format!("bind 127.0.0.1:{port}{source}")),
        (places[0].as_str(), server(&one)),
        (places[1].as_str(), server(&two)),
    ] {
        assert_eq!(text.matches(from).count(), 1, "{from}");
        text = text.replace(from, &to);
    }
    let _haproxy = Haproxy::with(&text);
    wait_for(port);
    // Both are asked, in turn as long as none is busier.
    for server in [&one, &two] {
        let folder = server.pki().folder().display();
        let uri = format!("nbds://localhost:{port}/?tls-certificates={folder}");
        wait_until("it is this one's turn", || {
            run("nbdinfo", &["--size", &uri]).output().is_some()
        });
        wait_until("it has been read", || has_logged(server, Line::is_reading, "192.0.2.7"));
    }
}
