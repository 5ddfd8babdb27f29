//! Sockets.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::process::Command;

use super::{BASE, plain, tls};
use crate::support::server::{Address, run_to_failure};
use crate::support::{archive, nbd_port};

#[test]
fn a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    for server in [plain(), tls()] {
        let mut server = server.listen_unix(&path).start();
        assert_eq!(server.addresses(), [Address::Unix(path.clone())]);
        server.assert_alive();
        assert_eq!(server.terminate().code(), Some(0));
        assert!(!path.exists(), "the socket is left behind");
    }
}

/// Whoever may open the socket's file may come in, whatever the lists say of addresses.
#[test]
fn lists_of_addresses_do_not_concern_unix_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    plain().listen_unix(&path).args(["--deny", "0.0.0.0/0,::/0"]).start().assert_alive();
}

#[test]
fn several_sockets_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let server = plain().listen_unix(&path).listen("127.0.0.1:0").listen("127.0.0.2:0").start();
    assert_eq!(server.addresses().len(), 3);
    server.assert_alive();
    for address in &server.addresses()[1..] {
        let Address::Tcp(address) = address else { panic!("{address:?}") };
        assert_ne!(address.port(), 0);
        let stream = std::net::TcpStream::connect(address).unwrap();
        let mut client =
            crate::support::client::Client::new(crate::support::client::Plain::Tcp(stream));
        client.greet(3);
        client.go("");
    }
}

/// Runs `script` as root of new network, mount and user namespaces, where nothing has an address
/// yet. `serve ARGUMENTS` starts a server there, and waits until it is ready.
fn in_namespaces(script: &str) -> String {
    const PRELUDE: &str = r#"
        set -eu
        mount -t tmpfs tmpfs /run
        cd /run
        ip link set lo up
        serve() {
            : > log
            "$BINARY" --log-format json "$@" "$ARCHIVE" 2> log &
            server=$!
            trap 'kill $server 2> /dev/null || true' EXIT
            tries=0
            until grep -q '"message":"ready: .*"listen":' log; do
                tries=$((tries + 1))
                [ $tries -lt 200 ] || { cat log; exit 1; }
                sleep 0.1
            done
        }
        listening() {
            sed -n 's/.*"listen":"\([^"]*\)".*/\1/p' log
        }
    "#;
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "--mount", "sh", "-c"])
        .arg(format!("{PRELUDE}\n{script}"))
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("BINARY", env!("CARGO_BIN_EXE_hexz-nbd"))
        .env("ARCHIVE", archive(BASE))
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap()
}

/// A link-local address means something on one interface alone.
#[test]
fn link_local_addresses_have_an_interface() {
    let said = in_namespaces(
        r#"
        ip link add v0 type veth peer name v1
        ip addr add fe80::1/64 dev v0 nodad
        ip link set v0 up
        ip link set v1 up
        serve --listen '[fe80::1%v0]:1234' --monitor '[fe80::1%v0]:1235' \
            --allow fe80::/10 --insecure-no-tls
        number=$(ip -o link show v0 | cut -d: -f1)
        [ "$(listening)" = "[fe80::1%$number]:1234" ] && echo listens
        for where in '[fe80::1%v0]:1234' "nbd://[fe80::1%25$number]:1234"; do
            "$BINARY" doctor --no-speed --json "$where" | grep '"outcome": "bad"' || echo reached
        done
        "$BINARY" top --once --interval 200ms '[fe80::1%v0]:1235' > /dev/null && echo shown
        # A reload takes the interface as it is, though it can't be looked up in the sandbox.
        kill -HUP $server
        until grep -q '"reloaded' log; do sleep 0.1; done
        grep -c 'reload_failed\|needs_restart' log || true
        kill $server; wait $server; trap - EXIT
        code=0
        "$BINARY" --listen 'fe80::1' --insecure-no-tls --allow fe80::/10 "$ARCHIVE" 2> log || code=$?
        grep -q 'fe80::1%eth0' log && echo "without: $code"
        code=0
        "$BINARY" --listen 'fe80::1%none' "$ARCHIVE" 2> log || code=$?
        grep -q 'interface named "none"' log && echo "unknown: $code"
        "#,
    );
    assert_eq!(said, "listens\nreached\nreached\nshown\n0\nwithout: 5\nunknown: 2\n");
}

/// Where this machine has no 127.0.0.1, it is ::1 alone; where it has neither, that is said.
#[test]
fn loopback_without_ipv4() {
    let said = in_namespaces(
        r#"
        ip addr del 127.0.0.1/8 dev lo
        serve --monitor 10810
        listening
        "$BINARY" doctor --no-speed --json '[::1]' | grep '"outcome": "bad"' || echo reached
        grep -o '"monitor":"[^"]*"' log
        kill $server; wait $server
        ip addr add 127.0.0.1/8 dev lo
        serve
        listening
        kill $server; wait $server
        ip addr del ::1/128 dev lo
        serve
        listening
        kill $server; wait $server; trap - EXIT
        ip link set lo down
        ip addr flush dev lo
        code=0
        "$BINARY" "$ARCHIVE" 2> log || code=$?
        grep -q " 127.0.0.1:10809: " log && echo "neither: $code"
        "#,
    );
    let expected = "[::1]:10809\nreached\n\"monitor\":\"[::1]:10810\"\n\
                    127.0.0.1:10809, [::1]:10809\n127.0.0.1:10809\nneither: 5\n";
    assert_eq!(said, expected);
}

/// Nobody can connect by it here without a virtual machine. Where the kernel has no vsock, that
/// is said.
#[test]
fn a_vsock_port() {
    use socket2::{Domain, Socket, Type};
    if let Err(error) = Socket::new(Domain::VSOCK, Type::STREAM, None) {
        let (code, stderr) = plain().listen("vsock:0").fail();
        assert_eq!(code, 5, "{stderr}");
        assert!(stderr.contains(&format!(" vsock:0: {error}")), "{stderr}");
        return;
    }
    let server = plain().listen("127.0.0.1:0").listen("vsock:0").start();
    let [_, Address::Vsock(port)] = server.addresses() else { panic!("{:?}", server.addresses()) };
    assert!(port.parse::<u32>().unwrap() > 1023);
    server.assert_alive();
    server.wait_for_reason("no_vsock_clients");
    let taken = format!("vsock:{port}");
    let (code, stderr) = plain().listen(&taken).fail();
    assert!(code == 5 && stderr.contains(&taken), "{stderr}");

    // Without TLS: nothing of it passes a network.
    let server = plain().listen("vsock:0").args(["--allow", "vsock:3,vsock:4"]).start();
    let ready = server.wait_for_log("it is ready", |line| line.json["listen"].is_string());
    assert!(ready.message().ends_with("vsock:3, vsock:4"), "{}", ready.text);
    assert!(!server.has_reason("no_vsock_clients"), "{}", server.log_text());
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    // The standard library leaves the file behind, as does a server that was killed.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    plain().listen_unix(&path).start().assert_alive();
}

#[test]
fn a_live_socket_is_not_stolen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let first = plain().listen_unix(&path).start();
    let message = plain().listen_unix(&path).fails_with(5, "address_in_use");
    assert!(message.contains("nbd.sock"), "{message}");
    first.assert_alive();
}

#[test]
fn what_is_no_socket_is_not_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    for taken in [&path, &link] {
        let (code, _) = plain().listen_unix(taken).fail();
        assert_eq!(code, 5);
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"data");
    let (code, stderr) = plain().listen_unix(&folder.path().join("no/such/folder")).fail();
    assert_eq!(code, 5, "{stderr}");
}

/// 192.0.2.0/24 is for documents; no machine has it.
#[test]
fn an_address_of_another_machine() {
    let builder = plain().listen("192.0.2.77:0").args(["--insecure-no-tls"]);
    builder.fails_with(5, "address_not_available");
}

#[test]
fn two_servers_can_not_have_one_port() {
    let first = plain().start();
    let address = first.address().to_string();
    let message = plain().listen(address.clone()).fails_with(5, "address_in_use");
    assert!(message.contains(&address) && message.contains("ss -ltnp"), "{message}");
    first.assert_alive();
}

/// By default it is the port that is NBD's, of loopback alone while only this machine may
/// connect.
#[test]
fn the_default_is_the_nbd_port_of_loopback() {
    let _port = nbd_port();
    // If somebody else has it already, that is as good.
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 10809));
    let (code, stderr) = run_to_failure([archive(BASE)]);
    assert_eq!(code, 5);
    assert!(stderr.contains(" 127.0.0.1:10809: "), "{stderr}");
}

#[test]
fn junk_is_no_address_to_listen_on() {
    for junk in ["", "unix:", "127.0.0.1:", ":10809", "127.0.0.1:65536", "a b", "vsock:x"] {
        let (code, stderr) = plain().listen(junk).fail();
        assert_eq!(code, 2, "{junk}: {stderr}");
    }
}

/// The end of one server removed the socket of another.
#[test]
fn a_socket_of_another_server_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let mut first = plain().listen_unix(&path).start();
    std::fs::remove_file(&path).unwrap();
    let mut second = plain().listen_unix(&path).start();
    assert_eq!(first.terminate().code(), Some(0));
    assert!(path.exists());
    second.assert_alive();
    assert_eq!(second.terminate().code(), Some(0));
    assert!(!path.exists());
}
