//! "Option types": LIST, ABORT, STARTTLS, and whatever isn't known.

use super::{BASE, base, servers};
use crate::support::client::{
    OPT_ABORT, OPT_GO, OPT_LIST, OPT_PEEK_EXPORT, OPT_STARTTLS, REP_ERR_INVALID, REP_ERR_POLICY,
    REP_ERR_UNSUP, REP_SERVER, ack, info_data, option,
};
use crate::support::server::{Line, Server};

/// Numbers that no specification has given to anything, and a withdrawn one.
const UNKNOWN: [u32; 5] = [0, OPT_PEEK_EXPORT, 12, 99, u32::MAX];

/// `NBD_OPT_LIST`: "zero or more `NBD_REP_SERVER` replies, one for each export, followed
/// by `NBD_REP_ACK`".
#[test]
fn list_names_the_exports() {
    let two = Server::builder().archive("aux-lz4.hxz").arg("--raw").start();
    assert_eq!(two.greeted().list(), ["aux-lz4.hxz", "aux-lz4.hxz/aux"]);
    assert_eq!(base().greeted().list(), [BASE]);
}

/// `NBD_REP_SERVER`: "32 bits, length of name (unsigned); MUST be no larger than the reply
/// packet header length - 4; String: name of the export; … if length of name < (reply packet
/// header length - 4), then the rest of the data contains … details for human consumption".
#[test]
fn list_describes_the_exports() {
    let replies = base().greeted().option(OPT_LIST, b"");
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[0].kind, REP_SERVER);
    assert!(replies[0].data.starts_with(b"\0\0\0\x0dbase-zstd.hxz"));
    let description = std::str::from_utf8(&replies[0].data[17..]).unwrap();
    assert!(description.contains("main stream, 8.0 MiB"), "{description}");
}

/// `NBD_OPT_LIST`: "the server SHOULD reject a request that includes data with
/// `NBD_REP_ERR_INVALID`."
///
/// nbd-server 3.24 | data behind LIST read as the next option
#[test]
fn list_with_data_is_invalid() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        for data in [&b"x"[..], &[0; 4], &option(OPT_ABORT, b"")] {
            client.refused(OPT_LIST, data, REP_ERR_INVALID);
        }
        assert_eq!(client.list(), [BASE]);
    }
}

/// `NBD_OPT_ABORT`: "The server MUST reply with `NBD_REP_ACK`"; "a server SHOULD ignore
/// any data sent by the client".
#[test]
fn abort_is_acknowledged_and_then_the_server_closes() {
    for server in servers(BASE) {
        for data in [&b""[..], b"farewell"] {
            let mut client = server.greeted();
            assert_eq!(client.option(OPT_ABORT, data), [ack()]);
            client.expect_end();
        }
    }
}

/// `NBD_OPT_ABORT`: "the server SHOULD gracefully handle the client sending an
/// `NBD_OPT_ABORT` and closing the connection without waiting for a reply."
#[test]
fn abort_without_waiting_for_the_reply() {
    let server = base();
    for _ in 0..20 {
        let mut client = server.greeted();
        client.send(&option(OPT_ABORT, b""));
    }
    server.assert_alive();
    assert!(!server.log().iter().any(Line::is_failure), "{}", server.log_text());
}

/// "Fixed newstyle negotiation": `NBD_REP_ERR_UNSUP` marks "use of an option not known by
/// this server", whose data it skips.
#[test]
fn unknown_options_are_unsupported() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        for number in UNKNOWN {
            for data in [&b""[..], b"?", &[0xff; 4096], &option(OPT_ABORT, b"")] {
                client.refused(number, data, REP_ERR_UNSUP);
            }
        }
        client.go(BASE);
        client.read_ok(0, 1);
    }
}

/// "NOTLS mode": "If the server receives `NBD_OPT_STARTTLS` it MUST respond with
/// `NBD_REP_ERR_POLICY` (if it does not support TLS for policy reasons), or
/// `NBD_REP_ERR_UNSUP`".
#[test]
fn starttls_without_tls_is_against_the_policy() {
    let server = base();
    let mut client = server.greeted();
    client.refused(OPT_STARTTLS, b"", REP_ERR_POLICY);
    assert_eq!(client.list(), [BASE]);
}

/// "FORCEDTLS mode": "If the server receives `NBD_OPT_STARTTLS` when TLS has already been
/// negotiated, it MUST reply with `NBD_REP_ERR_INVALID`."
#[test]
fn starttls_inside_tls_is_invalid() {
    let [_, server] = servers(BASE);
    let mut client = server.greeted();
    client.refused(OPT_STARTTLS, b"", REP_ERR_INVALID);
    client.refused(OPT_STARTTLS, b"x", REP_ERR_INVALID);
    assert_eq!(client.list(), [BASE]);
}

/// A stream has no packets: where a message is cut makes no difference.
#[test]
fn options_in_single_bytes() {
    for server in servers(BASE) {
        let mut client = server.connect();
        client.expect(crate::support::client::GREETING);
        for byte in crate::support::client::FLAGS.to_be_bytes() {
            client.send(&[byte]);
        }
        let mut client = if server.has_tls() {
            for byte in option(OPT_STARTTLS, b"") {
                client.send(&[byte]);
            }
            assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
            client.handshake(server.pki().client_config()).unwrap().boxed()
        } else {
            client.boxed()
        };
        for byte in [option(OPT_LIST, b"x"), option(77, b"abc")].concat() {
            client.send(&[byte]);
        }
        assert_eq!(client.option_replies(OPT_LIST)[0].kind, REP_ERR_INVALID);
        assert_eq!(client.option_replies(77)[0].kind, REP_ERR_UNSUP);
        for byte in option(OPT_GO, &info_data(BASE.as_bytes(), &[])) {
            client.send(&[byte]);
        }
        assert_eq!(client.option_replies(OPT_GO).pop(), Some(ack()));
        client.read_ok(0, 1);
    }
}

/// Between options either end may wait for the other; several options in one segment are
/// answered one after another, also where the last of them begins transmission.
#[test]
fn options_and_requests_in_one_segment() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        let go = option(OPT_GO, &info_data(b"", &[]));
        let read = crate::support::client::Request::read(1, 0, 100).encode();
        client.send(&[option(OPT_LIST, b""), option(99, b""), go, read].concat());
        assert_eq!(client.option_replies(OPT_LIST).len(), 2);
        assert_eq!(client.option_replies(99)[0].kind, REP_ERR_UNSUP);
        assert_eq!(client.option_replies(OPT_GO).pop(), Some(ack()));
        assert_eq!(client.simple_reply().cookie, 1);
        assert_eq!(client.receive(100), &crate::support::image()[..100]);
    }
}
