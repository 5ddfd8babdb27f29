//! TLS versions, handshakes in pieces, and what is said of those that fail.

use std::io::{Read, Write};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ProtocolVersion, StreamOwned, version};

use super::{BASE, connect, tls};
use crate::support::client::{Client, FLAGS, OPT_STARTTLS, Plain, Request, Tls, ack, option};
use crate::support::image;
use crate::support::pki::{Pki, Recipe};
use crate::support::server::{Line, Server};

/// What a TLS client sends first.
pub(super) fn client_hello(config: Arc<ClientConfig>) -> Vec<u8> {
    let mut hello = Vec::new();
    connection(config).write_tls(&mut hello).unwrap();
    hello
}

fn connection(config: Arc<ClientConfig>) -> ClientConnection {
    ClientConnection::new(config, ServerName::try_from("localhost").unwrap()).unwrap()
}

/// A client whom the server has told to begin its TLS handshake.
fn told_to_start(server: &Server) -> Client<Plain> {
    let mut client = connect(server);
    client.send(&[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat());
    assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
    client
}

fn read_something(mut client: Client<Tls>) {
    assert_eq!(client.list(), [BASE]);
    client.go("");
    assert_eq!(client.read_ok(1024, 4096), image()[1024..5120]);
    client.disconnect();
}

#[test]
fn both_versions_are_spoken() {
    let server = tls().start();
    for (version, number) in
        [(&version::TLS12, ProtocolVersion::TLSv1_2), (&version::TLS13, ProtocolVersion::TLSv1_3)]
    {
        let config = server.pki().client_config_for(&[version]);
        let client = told_to_start(&server).handshake(config).unwrap();
        assert_eq!(client.stream.conn.protocol_version(), Some(number));
        read_something(client);
    }
    let reading =
        |tls: &str| server.wait_for_log(tls, |line| line.is_reading() && line.json["tls"] == tls);
    reading("TLS 1.2");
    reading("TLS 1.3");
}

#[test]
fn an_old_client_is_refused_where_that_is_wanted() {
    let server = tls().args(["--tls-min", "1.3"]).start();
    let old = server.pki().client_config_for(&[&version::TLS12]);
    let error = told_to_start(&server).handshake(old).unwrap_err();
    assert!(error.to_string().contains("ProtocolVersion"), "{error}");
    server.wait_for_cause("old_version");
    let new = server.pki().client_config_for(&[&version::TLS13]);
    read_something(told_to_start(&server).handshake(new).unwrap());
}

#[test]
fn a_client_that_does_not_trust_the_server_is_explained() {
    let server = tls().start();
    let stranger = Pki::made_by(&Recipe { authority: "somebody else", ..Recipe::default() });
    told_to_start(&server).handshake(stranger.client_config()).unwrap_err();
    let line = server.wait_for_cause("distrust");
    assert!(line.message().contains("UnknownCA"), "{}", line.text);
    // A CA that was made anew under its old name is known, but its signatures don't fit.
    told_to_start(&server).handshake(Pki::new().client_config()).unwrap_err();
    server.wait_for_log("another alert", |line| {
        line.json["cause"] == "distrust" && line.message().contains("DecryptError")
    });
    server.assert_alive();
}

#[test]
fn a_client_without_tls_is_explained() {
    let server = tls().start();
    let mut client = told_to_start(&server);
    client.send(b"IHAVEOPT\0\0\0\x03\0\0\0\0");
    client.rest();
    server.wait_for_cause("not_tls");
    told_to_start(&server).stream.shutdown(std::net::Shutdown::Write);
    server.wait_for_cause("left_before");
}

/// Sends what the connection has to say, in whatever pieces, until the handshake is over.
fn handshake_by(
    mut client: Client<Plain>,
    config: Arc<ClientConfig>,
    send: impl Fn(&mut Plain, &[u8]),
) -> Client<Tls> {
    let mut connection = connection(config);
    while connection.is_handshaking() {
        let mut bytes = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut bytes).unwrap();
        }
        send(&mut client.stream, &bytes);
        if connection.is_handshaking() {
            assert!(connection.read_tls(&mut client.stream).unwrap() > 0);
            connection.process_new_packets().unwrap();
        }
    }
    Client { stream: StreamOwned::new(connection, client.stream) }
}

/// RUSTSEC-2024-0336, rustls 0.23.13-17 | loops and panics on a fragmented ClientHello
#[test]
fn a_handshake_in_single_bytes() {
    let server = tls().start();
    for version in [&version::TLS12, &version::TLS13] {
        let config = server.pki().client_config_for(&[version]);
        let client = handshake_by(told_to_start(&server), config, |stream, bytes| {
            bytes.iter().for_each(|byte| stream.write_all(&[*byte]).unwrap());
        });
        read_something(client);
    }
}

/// The same, with every byte of the ClientHello in a TLS record of its own.
#[test]
fn a_client_hello_in_records_of_one_byte() {
    const HANDSHAKE: u8 = 22;
    const HEADER: usize = 5;
    let server = tls().start();
    for version in [&version::TLS12, &version::TLS13] {
        let config = server.pki().client_config_for(&[version]);
        let client = handshake_by(told_to_start(&server), config, |stream, bytes| {
            let is_hello = bytes.first() == Some(&HANDSHAKE) && bytes.get(HEADER) == Some(&1);
            if !is_hello {
                return stream.write_all(bytes).unwrap();
            }
            let header = &bytes[..3];
            let records: Vec<u8> =
                bytes[HEADER..].iter().flat_map(|byte| [header, &[0, 1, *byte]].concat()).collect();
            stream.write_all(&records).unwrap();
        });
        read_something(client);
    }
    // Cut off in the middle of it.
    let hello = client_hello(server.pki().client_config());
    let mut client = told_to_start(&server);
    for byte in &hello[HEADER..40] {
        client.send(&[HANDSHAKE, 3, 1, 0, 1, *byte]);
    }
    client.stream.shutdown(std::net::Shutdown::Write);
    client.rest();
    server.assert_alive();
}

/// A close_notify in the middle of the handshake, which has made servers loop.
#[test]
fn a_close_notify_instead_of_a_handshake() {
    let server = tls().start();
    let hello = client_hello(server.pki().client_config());
    for before in [0, 5, 100, hello.len()] {
        let mut client = told_to_start(&server);
        client.send(&hello[..before]);
        let _ = client.try_send(&[21, 3, 3, 0, 2, 1, 0]);
        client.stream.shutdown(std::net::Shutdown::Write);
        client.rest();
    }
    server.assert_alive();
}

/// nbd-server pull request 173 | TLS end of stream loops
#[test]
fn an_end_with_and_without_close_notify() {
    let server = tls().start();
    let before = server.fd_count();
    for with_go in [false, true] {
        for with_close_notify in [false, true] {
            let mut client =
                told_to_start(&server).handshake(server.pki().client_config()).unwrap();
            if with_go {
                client.go("");
                client.read_ok(0, 1);
            }
            if with_close_notify {
                client.stream.conn.send_close_notify();
                client.stream.flush().unwrap();
            } else {
                client.stream.sock.shutdown(std::net::Shutdown::Write);
            }
            client.expect_closed();
        }
    }
    super::wait_for_descriptors(&server, before);
    // Neither is a failure; requests carry their own lengths.
    assert!(!server.log().iter().any(Line::is_failure), "{}", server.log_text());
}

/// `NBD_CMD_DISC`: "shut down the TLS session …, and close the TCP session", seen on the
/// raw socket: the last record is an alert, then there is nothing more.
#[test]
fn disc_ends_with_close_notify_and_fin() {
    let server = tls().start();
    let config = server.pki().client_config_for(&[&version::TLS12]);
    let mut client = told_to_start(&server).handshake(config).unwrap();
    client.go("");
    client.send_request(Request::disc());
    let mut raw = Vec::new();
    client.stream.sock.read_to_end(&mut raw).unwrap();
    assert_eq!(raw.first(), Some(&21), "{}", raw.escape_ascii());
}
