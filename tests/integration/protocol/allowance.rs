//! How much a client may haggle before it chooses an export.

use std::sync::Arc;

use nbd_server::wire::handshake::ClientFlags;
use nbd_server::{
    Export, Exports, ListEntry, NegotiationLimits, NegotiationQuota, PlaintextOutcome, ReadError,
    Security, Segment, SessionError, Span, negotiate, plaintext_leg,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::Sender;

use super::{BASE, servers};
use crate::support::client::{
    Client, Duplex, FLAGS, OPT_GO, OPT_LIST, OPT_STARTTLS, REP_ERR_TLS_REQD, REP_ERR_UNSUP,
    info_data, option, option_head,
};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

struct Nothing;

impl Export for Nothing {
    fn name(&self) -> &'static str {
        "nothing"
    }

    fn description(&self) -> &'static str {
        ""
    }

    fn size(&self) -> u64 {
        0
    }

    async fn read(&self, _: Span, _: impl FnMut(u64, Segment) + Send) -> Result<(), ReadError> {
        Ok(())
    }
}

impl Exports for Nothing {
    type Export = Self;

    async fn find(&self, _: &[u8]) -> Option<Arc<Self>> {
        Some(Arc::new(Self))
    }

    async fn list(&self, _: Sender<ListEntry>) {}
}

fn quota(options: u32, option_bytes: u64) -> NegotiationQuota {
    NegotiationLimits { options, option_bytes }.quota()
}

/// What comes of a conversation on either leg; how many bytes the server left unread.
async fn haggled(
    clear: bool,
    said: &[u8],
    quota: &mut NegotiationQuota,
) -> (Result<bool, String>, usize) {
    let (mut client, mut server) = tokio::io::duplex(1 << 20);
    client.write_all(said).await.unwrap();
    let flags = ClientFlags(FLAGS);
    let ended = if clear {
        let left = plaintext_leg(&mut server, flags, quota).await;
        left.map(|outcome| outcome == PlaintextOutcome::StartTls)
    } else {
        let chosen = negotiate(&mut server, flags, Security::Tls, &Nothing, quota).await;
        chosen.map(|chosen| chosen.is_some())
    };
    drop(client);
    let mut unread = Vec::new();
    server.read_to_end(&mut unread).await.unwrap();
    (ended.map_err(|error: SessionError| error.to_string()), unread.len())
}

#[tokio::test]
async fn the_last_option_is_answered_and_the_next_is_not_read() {
    let data = [7; 50];
    for (clear, last) in [(true, option(OPT_STARTTLS, b"")), (false, option(OPT_GO, &[0; 6]))] {
        let used = last.len() as u64 - 16;
        let three = option(99, &data).repeat(3);
        let said = [&three[..], &last].concat();
        // All of it is just allowed.
        let mut enough = quota(4, 150 + used);
        assert_eq!(haggled(clear, &said, &mut enough).await, (Ok(true), 0));
        // An option less: its head is read, nothing else.
        let (ended, unread) = haggled(clear, &said, &mut quota(3, 1 << 20)).await;
        assert_eq!(ended.unwrap_err(), "the client sent more than 3 options (--max-options)");
        assert_eq!(unread as u64, used);
        // A byte less: the data isn't waited for, let alone kept.
        let (ended, unread) = haggled(clear, &three, &mut quota(9, 149)).await;
        let message = "the client sent more than 149 bytes of options (--max-option-bytes)";
        assert_eq!(ended.unwrap_err(), message);
        assert_eq!(unread, data.len());
    }
}

/// Otherwise there would be twice as much for those who begin in clear.
#[tokio::test]
async fn both_legs_share_what_is_allowed() {
    let mut shared = quota(5, 1000);
    let in_clear = [option(99, &[1; 300]), option(OPT_STARTTLS, b"")].concat();
    assert_eq!(haggled(true, &in_clear, &mut shared).await.0, Ok(true));
    let mut other = shared.clone();
    let (ended, _) = haggled(false, &option(OPT_LIST, b"").repeat(4), &mut shared).await;
    assert!(ended.unwrap_err().contains("more than 5 options"));
    let (ended, _) = haggled(false, &option(99, &[1; 701]), &mut other).await;
    assert!(ended.unwrap_err().contains("more than 1000 bytes"));
}

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
        server.wait_for_message("the client sent more than 10 options (--max-options)");
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
        server.wait_for_message("more than 10240 bytes of options (--max-option-bytes)");
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
