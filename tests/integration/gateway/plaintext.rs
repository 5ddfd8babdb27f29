//! The leg in clear of a server that requires TLS.

use super::{BASE, connect, tls};
use crate::support::client::{
    FLAGS, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_SET_META_CONTEXT,
    OPT_STARTTLS, OPT_STRUCTURED_REPLY, REP_ERR_INVALID, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN,
    Request, ack, info_data, option,
};
use crate::support::server::Line;
use crate::support::{IMAGE_SIZE, image};

/// man in the middle before STARTTLS | options injected in clear
#[test]
fn every_option_but_starttls_and_abort_requires_tls() {
    let server = tls().start();
    let mut client = server.connect();
    client.greet(FLAGS);
    let numbers = (0..200).chain([0xffff, 0x8000_0000, 0x4e42_444d, u32::MAX]);
    let refused = |number: &u32| ![OPT_EXPORT_NAME, OPT_ABORT, OPT_STARTTLS].contains(number);
    for number in numbers.filter(refused) {
        for data in [&b""[..], &info_data(BASE.as_bytes(), &[3]), &[0xff; 100]] {
            client.refused(number, data, REP_ERR_TLS_REQD);
        }
    }
    // And none of it was in vain: the client can still begin TLS.
    let mut client = client.starttls(server.pki().client_config());
    client.go("");
    client.read_ok(0, 1);
}

/// `NBD_OPT_EXPORT_NAME` can't be answered with an error.
#[test]
fn export_name_in_clear_closes() {
    let server = tls().start();
    for name in ["", BASE, "nothing"] {
        let mut client = server.connect();
        client.greet(FLAGS);
        client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
        client.expect_closed();
    }
    server.wait_for_cause("tls_required");
}

/// "TLS requires fixed newstyle negotiation to have completed": others can't be talked to.
#[test]
fn a_client_that_is_not_fixed_newstyle_is_closed() {
    let server = tls().start();
    for flags in [0, 2] {
        let mut client = server.connect();
        client.greet(flags);
        client.expect_closed();
    }
}

#[test]
fn abort_in_clear_is_acknowledged() {
    let server = tls().start();
    let mut client = server.connect();
    client.greet(FLAGS);
    assert_eq!(client.option(OPT_ABORT, b"x"), [ack()]);
    client.expect_end();
}

/// nbd-server 3.24 | STARTTLS with data hangs
#[test]
fn starttls_with_data_is_invalid_and_in_step() {
    let server = tls().start();
    let mut client = server.connect();
    client.greet(FLAGS);
    for data in [&b"x"[..], &option(OPT_ABORT, b""), &[0; 4096]] {
        client.refused(OPT_STARTTLS, data, REP_ERR_INVALID);
        client.refused(OPT_LIST, b"", REP_ERR_TLS_REQD);
    }
    let mut client = client.starttls(server.pki().client_config());
    assert_eq!(client.list(), [BASE]);
}

/// STARTTLS injection (many protocols) | buffered plaintext taken as encrypted
///
/// What an attacker put behind STARTTLS in clear is taken as the TLS handshake, which it
/// isn't: nothing of it is ever run.
#[test]
fn starttls_and_go_in_one_segment_never_runs_go() {
    let server = tls().start();
    let go = option(OPT_GO, &info_data(b"", &[]));
    let read = Request::read(1, 0, 512).encode();
    for injected in [option(OPT_LIST, b""), go.clone(), [go, read].concat()] {
        let mut client = connect(&server);
        let segment = [&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b""), &injected].concat();
        client.send(&segment);
        assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
        // A TLS alert may come, but no reply to an option, encrypted or not.
        let (rest, _) = client.rest();
        assert!(rest.is_empty() || rest.starts_with(&[21, 3]), "{}", rest.escape_ascii());
        assert!(rest.len() < 20, "{}", rest.escape_ascii());
    }
    server.wait_for_cause("not_tls");
    assert!(!server.log().iter().any(Line::is_reading));
}

/// The same, with a client that goes on with its handshake all the same, as the victim of
/// an injection would.
#[test]
fn what_was_injected_does_not_precede_the_client_inside_tls() {
    let server = tls().start();
    let mut client = connect(&server);
    client.send(
        &[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b""), &option(OPT_ABORT, b"")].concat(),
    );
    assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
    assert!(client.handshake(server.pki().client_config()).is_err());
}

/// nbdkit CVE-2021-3716 | structured replies negotiated in plaintext survive STARTTLS
/// NBD specification, 2021-08 | meta context set before TLS is used after it
///
/// In clear none of it is even accepted; inside TLS the client gets what one gets that
/// asked for nothing: simple replies, and no block status.
#[test]
fn nothing_asked_for_in_clear_counts_inside_tls() {
    let server = tls().start();
    let mut client = server.connect();
    client.greet(FLAGS);
    client.refused(OPT_STRUCTURED_REPLY, b"", REP_ERR_TLS_REQD);
    let contexts = [
        &(BASE.len() as u32).to_be_bytes()[..],
        BASE.as_bytes(),
        &1_u32.to_be_bytes(),
        &15_u32.to_be_bytes(),
        b"base:allocation",
    ]
    .concat();
    client.refused(OPT_SET_META_CONTEXT, &contexts, REP_ERR_TLS_REQD);
    client.refused(OPT_INFO, &info_data(BASE.as_bytes(), &[]), REP_ERR_TLS_REQD);
    let mut client = client.starttls(server.pki().client_config());
    client.go("");
    // A structured reply has another magic number than this expects.
    assert_eq!(client.read_ok(0, 4096), image()[..4096]);
    let block_status = Request { command: 7, length: 4096, ..Request::default() };
    assert_ne!(client.request(block_status), 0);
    client.disconnect();
}

/// nbdkit CVE-2019-14850 | storage opened before the client is authenticated
#[test]
fn no_archive_read_for_a_client_that_is_not_admitted() {
    let server = tls().args(["--allow", "127.0.0.1"]).start();
    // A client that is served: whatever is read for the start has been read when it has left.
    server.go("").disconnect();
    server.wait_for_log("the session has ended", |line| !line.json["how"].is_null());
    let before = server.file_bytes_read();

    server.connect_from([127, 0, 0, 2]).expect_closed();
    for name in ["", BASE, "nothing"] {
        let mut client = connect(&server);
        client.send(&FLAGS.to_be_bytes());
        client.refused(OPT_GO, &info_data(name.as_bytes(), &[0, 1, 2, 3]), REP_ERR_TLS_REQD);
        client.refused(OPT_LIST, b"", REP_ERR_TLS_REQD);
        client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
        client.expect_closed();
    }
    let mut client = connect(&server);
    client.send(&[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat());
    assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
    client.send(b"GET / HTTP/1.1\r\n\r\n");
    client.rest();
    let mut client = server.greeted();
    client.refused(OPT_GO, &info_data(b"nothing", &[]), REP_ERR_UNKNOWN);
    client.send(&option(OPT_EXPORT_NAME, b"nothing"));
    client.expect_closed();

    // Sockets don't count, but the runtime's own wake-ups do, with 8 bytes each.
    let read = server.file_bytes_read() - before;
    assert!(read < 1000, "{read} bytes were read");

    // The other way round: for one that is admitted, reads are seen.
    server.go("").read_ok(0, IMAGE_SIZE as u32);
    let read = server.file_bytes_read() - before;
    assert!(read > 100_000, "only {read} bytes were read");
}
