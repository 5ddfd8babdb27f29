//! Sockets.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;

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

/// Nobody can connect by it here without a virtual machine. Where the kernel has no vsock, that
/// is said.
#[test]
fn a_vsock_port() {
    use socket2::{Domain, Socket, Type};
    if let Err(error) = Socket::new(Domain::VSOCK, Type::STREAM, None) {
        let (code, stderr) = plain().listen("vsock:0").fail();
        assert_eq!(code, 5, "{stderr}");
        assert!(stderr.contains(&format!("can't listen on vsock:0: {error}")), "{stderr}");
        return;
    }
    let server = plain().listen("127.0.0.1:0").listen("vsock:0").start();
    let [_, Address::Vsock(port)] = server.addresses() else { panic!("{:?}", server.addresses()) };
    assert!(port.parse::<u32>().unwrap() > 1023);
    server.assert_alive();
    server.wait_for_message("but no virtual machine may connect: --allow vsock:CID or --rules");
    let taken = format!("vsock:{port}");
    let (code, stderr) = plain().listen(&taken).fail();
    assert!(code == 5 && stderr.contains(&format!("can't listen on {taken}")), "{stderr}");

    // Without TLS: nothing of it passes a network.
    let server = plain().listen("vsock:0").args(["--allow", "vsock:3,vsock:4"]).start();
    let ready = server.wait_for_message("ready: ");
    assert!(ready.message().ends_with(" without TLS to vsock:3, vsock:4"), "{}", ready.text);
    assert!(!server.log_text().contains("no virtual machine"), "{}", server.log_text());
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
    let (code, stderr) = plain().listen_unix(&path).fail();
    assert_eq!(code, 5);
    assert!(stderr.contains("can't listen on") && stderr.contains("nbd.sock"), "{stderr}");
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
    let (code, stderr) = plain().listen("192.0.2.77:0").args(["--insecure-no-tls"]).fail();
    assert_eq!(code, 5, "{stderr}");
    assert!(stderr.contains("it is no address of this machine"), "{stderr}");
}

#[test]
fn two_servers_can_not_have_one_port() {
    let first = plain().start();
    let address = first.address().to_string();
    let (code, stderr) = plain().listen(address.clone()).fail();
    assert_eq!(code, 5);
    assert!(stderr.contains(&format!("can't listen on {address}")), "{stderr}");
    assert!(stderr.contains("another process listens there (ss -ltnp says which)"), "{stderr}");
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
    assert!(stderr.contains("can't listen on 127.0.0.1:10809"), "{stderr}");
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
