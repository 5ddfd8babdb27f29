//! Who a client is, by each kind of name that a certificate gives.

use super::{asking, come_in, come_in_as, reads};
use crate::support::authority::{Authority, Recipe};
use crate::support::pki::Pki;
use crate::support::server::Server;

fn recipe() -> Recipe {
    Recipe {
        uri: Some("spiffe://corp/backup/7"),
        dns: Some("laptop.example.org"),
        email: Some("alice@example.org"),
        name: "Alice",
        ..Recipe::default()
    }
}

#[test]
fn each_kind_of_name_identifies() {
    let authority = Authority::new();
    let who = authority.certify(&recipe());
    let hash = format!("sha256:{}", who.sha256());
    for (pattern, is_it) in [
        ("spiffe://corp/backup/*", true),
        ("uri:spiffe://corp/*", true),
        ("laptop.EXAMPLE.org", true),
        ("dns:*.example.org", true),
        ("email:alice@example.org", true),
        ("cn:Alice", true),
        (&hash, true),
        ("*", true),
        // There are better names.
        ("Alice", false),
        ("cn:alice", false),
        ("spiffe://corp/restore/*", false),
        ("cn:spiffe://*", false),
        ("example.org", false),
        (&format!("sha256:{}", "0".repeat(64)), false),
    ] {
        let server = asking(&authority).args(["--allow-identity", pattern]).start();
        assert_eq!(reads(&server, who.config(server.pki())), is_it, "{pattern}");
        if !is_it {
            let line = server.wait_for_reason("not_allowed");
            assert_eq!(line.json["cause"], "no_rule_for_client");
        }
    }
}

#[test]
fn the_log_says_who_it_is() {
    let authority = Authority::new();
    let server = asking(&authority).start();
    let mut client = come_in_as(&server, &authority.certify(&recipe()));
    client.go("");
    let line = server.wait_for_reading();
    assert_eq!(line.json["identity"], "uri:spiffe://corp/backup/7", "{}", line.text);
}

#[test]
fn certificates_can_be_optional() {
    let authority = Authority::new();
    let stranger = Authority::named("somebody else's CA").alice();
    let server = asking(&authority)
        .args(["--tls-client-auth", "optional", "--allow", "127.0.0.0/8"])
        .start();
    assert!(reads(&server, server.pki().client_config()));
    assert!(reads(&server, authority.alice().config(server.pki())));
    // One that is shown has to be good all the same.
    assert!(!reads(&server, stranger.config(server.pki())));

    let server = asking(&authority)
        .args(["--tls-client-auth", "optional", "--allow-identity", "cn:alice"])
        .start();
    assert!(!reads(&server, server.pki().client_config()));
    server.wait_for_reason("not_allowed");
    assert!(reads(&server, authority.alice().config(server.pki())));
}

/// Sessions that are resumed wouldn't show their certificate, so there are none.
#[test]
fn no_session_is_resumed() {
    let authority = Authority::new();
    let server = asking(&authority).start();
    let who = authority.alice();
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        // The same configuration, and with it the same store of tickets, twice.
        let config = who.config_for(server.pki(), &[version]);
        for _ in 0..2 {
            let mut client = server.connect();
            client.greet(3);
            let mut client = client.starttls(config.clone());
            client.go("");
            client.read_ok(0, 1);
            let kind = client.stream.conn.handshake_kind();
            assert_eq!(kind, Some(rustls::HandshakeKind::Full));
        }
    }
    // Without client certificates they are, which spares both ends work.
    let server = Server::builder().archive(super::BASE).tls(Pki::new()).start();
    let config = server.pki().client_config();
    let kinds = [(); 2].map(|()| {
        let mut client = server.connect();
        client.greet(3);
        let mut client = client.starttls(config.clone());
        client.go("");
        client.read_ok(0, 1);
        client.stream.conn.handshake_kind()
    });
    assert_eq!(kinds[1], Some(rustls::HandshakeKind::Resumed));
}

#[test]
fn one_identity_has_so_many_connections() {
    let authority = Authority::new();
    let server = asking(&authority).args(["--max-connections-per-identity", "2"]).start();
    let (alice, bob) =
        (authority.alice(), authority.certify(&Recipe { name: "bob", ..Recipe::default() }));
    let served = |config| {
        let mut client = come_in(&server, config);
        client.go("");
        client.read_ok(0, 1);
        client
    };
    let _both = [(); 2].map(|()| served(alice.config(server.pki())));
    // Another certificate of the same name is the same identity.
    let mut third = come_in(&server, authority.alice().config(server.pki()));
    third.go("");
    third.expect_closed();
    server.wait_for_reason("connections_per_identity");
    served(bob.config(server.pki()));
}

#[test]
fn what_does_not_fit_refuses_to_start() {
    let authority = Authority::new();
    Server::builder()
        .archive(super::BASE)
        .tls(Pki::new())
        .args(["--allow-identity", "alice"])
        .fails_with(2, "identity_without_ca");
    let (code, error) = Server::builder()
        .archive(super::BASE)
        .arg("--tls-client-ca")
        .arg(authority.certificate())
        .fail();
    assert_eq!(code, 2, "{error}");
    assert!(error.contains("--tls-cert"), "{error}");
}
