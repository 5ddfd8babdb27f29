//! Limits on the options that a client may send before it chooses an export.

use super::{BASE, servers};
use crate::support::client::{
    Client, Duplex, FLAGS, OPT_GO, OPT_LIST, OPT_STARTTLS, REP_ERR_TLS_REQD, REP_ERR_UNSUP,
    info_data, option, option_head,
};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

/// With TLS each client is in clear first, and asks for TLS by one of its options.
fn limited(args: &[&str]) -> [Server; 2] {
    let with = |server: Builder| server.archive(BASE).args(args.iter().copied()).start();
    [with(Server::builder()), with(Server::builder().tls(Pki::new()))]
}

fn send_unknown<S: Duplex>(client: &mut Client<S>, number: u32) {
    for _ in 0..number {
        client.refused(99, b"", REP_ERR_UNSUP);
    }
}

#[test]
fn who_haggles_for_ever_is_closed() {
    for server in limited(&["--max-options", "10"]) {
        let all = if server.has_tls() { 9 } else { 10 };
        let mut client = server.greeted();
        send_unknown(&mut client, all);
        client.send(&option(OPT_LIST, b""));
        client.expect_closed();
        server.wait_for_cause("too_many_options");
        // One that stops in time is served, and so is the next one.
        let mut client = server.greeted();
        send_unknown(&mut client, all - 1);
        client.go("");
        client.read_ok(0, 1);
        server.assert_alive();
    }
    for server in limited(&["--max-option-bytes", "10KiB"]) {
        let mut client = server.greeted();
        client.refused(99, &[0; 10_000], REP_ERR_UNSUP);
        assert_eq!(client.list(), [BASE]);
        client.send(&option_head(99, 241));
        client.expect_closed();
        server.wait_for_cause("too_many_option_bytes");
        server.assert_alive();
    }
    // In clear, before TLS.
    let [_, server] = limited(&["--max-options", "10"]);
    let mut client = server.connect();
    client.greet(FLAGS);
    for _ in 0..10 {
        client.refused(OPT_GO, &info_data(b"", &[]), REP_ERR_TLS_REQD);
    }
    client.send(&option(OPT_STARTTLS, b""));
    client.expect_closed();
}

/// Clients that ask about one export after the other have enough of it.
#[test]
fn hundreds_of_exports_can_be_asked_about() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        for _ in 0..2000 {
            client.send(&option(6, &info_data(BASE.as_bytes(), &[])));
            client.option_replies(6);
            client.refused(99, &[b'x'; 300], REP_ERR_UNSUP);
        }
        client.go(BASE);
        client.read_ok(0, 1);
    }
}
