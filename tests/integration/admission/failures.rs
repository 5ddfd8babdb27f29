//! Handshakes that fail: the label of the cause, and counted.

use super::asking;
use crate::support::authority::Authority;
use crate::support::client::{Client, FLAGS, OPT_STARTTLS, Plain};
use crate::support::pki::Pki;
use crate::support::server::Server;

fn told_to_start(server: &Server) -> Client<Plain> {
    let mut client = server.connect();
    client.greet(FLAGS);
    assert_eq!(client.option(OPT_STARTTLS, b"").len(), 1);
    client
}

/// A ClientHello of TLS 1.1, as such clients sent it.
fn old_hello() -> Vec<u8> {
    let mut body = vec![3, 2];
    body.extend([7; 32]); // random
    body.push(0); // no session to resume
    body.extend([0, 4, 0xc0, 0x13, 0, 0x2f]); // two cipher suites
    body.extend([1, 0]); // no compression
    // Curves and their formats, without which it would be refused for another reason.
    let extensions = [0, 10, 0, 4, 0, 2, 0, 23, 0, 11, 0, 2, 1, 0];
    body.extend([0, extensions.len() as u8]);
    body.extend(extensions);
    let mut handshake = vec![1, 0, 0, body.len() as u8];
    handshake.extend(body);
    let mut record = vec![22, 3, 1, 0, handshake.len() as u8];
    record.extend(handshake);
    record
}

#[test]
fn each_failure_has_a_label_and_is_counted() {
    let authority = Authority::new();
    let mut server = asking(&authority).args(["--tls-handshake-timeout", "2s"]).start();

    let mut plain = told_to_start(&server);
    plain.send(b"GET / HTTP/1.1\r\n\r\n");
    plain.rest();
    server.wait_for_cause("not_tls");

    let mut old = told_to_start(&server);
    old.send(&old_hello());
    old.rest();
    server.wait_for_cause("old_version");

    drop(told_to_start(&server));
    server.wait_for_cause("left_before");

    // A client that doesn't like what it sees, and says nothing.
    let config = authority.alice().config_for(server.pki(), &[&rustls::version::TLS12]);
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let mut connection = rustls::ClientConnection::new(config, name).unwrap();
    let mut client = told_to_start(&server);
    while connection.wants_write() {
        connection.write_tls(&mut client.stream).unwrap();
    }
    client.receive(100);
    drop(client);
    server.wait_for_cause("left_after");

    let stranger = Pki::new();
    told_to_start(&server).handshake(stranger.client_config()).unwrap_err();
    server.wait_for_cause("distrust");

    let mut silent = told_to_start(&server);
    silent.expect_closed();
    server.wait_for_cause("deadline");

    server.terminate();
    let line = server.wait_for_log("the counts", |line| line.message().contains("not_tls 1"));
    for count in
        ["deadline 1", "distrust 1", "left_after 1", "left_before 1", "not_tls 1", "old_version 1"]
    {
        assert!(line.message().contains(count), "{}", line.text);
    }
}

/// The client learns why: it gets the alert, and no reset in its stead.
#[test]
fn the_client_is_told_as_well() {
    let authority = Authority::new();
    let server = asking(&authority).start();
    let mut client = told_to_start(&server).handshake(server.pki().client_config()).unwrap();
    // It believes that it is in, and has asked for more already.
    let list = crate::support::client::option(crate::support::client::OPT_LIST, b"");
    client.try_send(&list).unwrap();
    let error = std::io::Read::read(&mut client.stream, &mut [0]).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
}
