//! Who was in, and may not stay: dropped within a second, in the middle of the session.

use std::time::{Duration, Instant};

use super::{asking, come_in_as, reads, reload, replace, rules_file};
use crate::support::authority::{Authority, Recipe};
use crate::support::server::Server;

/// Waits until a client has been dropped for that cause.
fn assert_dismissed(server: &Server, cause: &str) {
    server.wait_for_log(cause, |line| {
        line.json["reason"] == "dismissed" && line.json["cause"] == cause
    });
}

#[test]
fn who_has_been_revoked_is_dropped() {
    let authority = Authority::new();
    let server = asking(&authority).start();
    let (alice, bob) =
        (authority.alice(), authority.certify(&Recipe { name: "bob", ..Recipe::default() }));
    let mut revoked = come_in_as(&server, &alice);
    revoked.go("");
    revoked.read_ok(0, 512);
    // One that hasn't chosen yet as well.
    let mut undecided = come_in_as(&server, &alice);
    assert_eq!(undecided.list(), [super::BASE]);
    let mut other = come_in_as(&server, &bob);
    other.go("");

    authority.revoke(&[&alice]);
    reload(&server, 1);
    server.wait_for_log("two are dropped", |line| line.json["dropped"] == 2);
    revoked.expect_closed();
    undecided.expect_closed();
    assert_dismissed(&server, "revoked");
    other.read_ok(0, 512);
    assert!(!reads(&server, alice.config(server.pki())));
}

#[test]
fn who_is_no_longer_allowed_is_dropped() {
    let (_folder, rules) = rules_file("[[rule]]\naction = \"allow\"\nnetwork = \"127.0.0.0/8\"");
    let server = Server::builder().archive(super::BASE).arg("--rules").arg(&rules).start();
    let mut dropped = server.go("");
    dropped.read_ok(0, 512);
    // In the middle of an answer that it doesn't read, too.
    let mut stalled = server.go("");
    stalled.send_request(crate::support::client::Request::read(7, 0, 8 << 20));
    let mut stays = server.connect_from([127, 0, 0, 9]);
    stays.greet(3);
    stays.go("");
    replace(&rules, "[[rule]]\naction = \"allow\"\nnetwork = \"127.0.0.9\"");
    reload(&server, 1);
    dropped.expect_closed();
    stalled.rest();
    stays.read_ok(0, 512);
    assert_dismissed(&server, "no_rule_for_export");
}

/// Another export may still be open to it; that one isn't.
#[test]
fn who_may_not_open_its_export_any_more_is_dropped() {
    let rule = |export: &str| format!("[[rule]]\naction = \"allow\"\nexport = \"{export}\"");
    let (_folder, rules) = rules_file(&rule("*"));
    let server = Server::builder()
        .args(super::served())
        .args(["--insecure-no-tls", "--rules"])
        .arg(&rules)
        .start();
    let (mut base, mut child) = (server.go(super::BASE), server.go(super::CHILD));
    base.read_ok(0, 1);
    child.read_ok(0, 1);
    replace(&rules, &rule("base-*"));
    reload(&server, 1);
    child.expect_closed();
    base.read_ok(0, 1);
    assert_dismissed(&server, "no_rule_for_export");
}

#[test]
fn whose_certificate_runs_out_is_dropped_by_itself() {
    let authority = Authority::new();
    let server = asking(&authority).start();
    let started = Instant::now();
    let short = authority.certify(&Recipe { seconds: (-60, 4), ..Recipe::default() });
    let mut client = come_in_as(&server, &short);
    client.go("");
    client.read_ok(0, 512);
    client.expect_closed();
    let after = started.elapsed();
    assert!(after >= Duration::from_secs(3), "too early: {after:?}");
    assert_dismissed(&server, "expired");
    assert!(!reads(&server, short.config(server.pki())));
}

/// A CA that runs out takes those with it for whom it vouched, and nobody else.
#[test]
fn whose_ca_runs_out_is_dropped_as_well() {
    let (short, long) = (Authority::until(4), Authority::new());
    let both = [short.certificate(), long.certificate()].map(|path| std::fs::read(path).unwrap());
    let file = short.folder().join("both.pem");
    std::fs::write(&file, both.concat()).unwrap();
    let server = Server::builder()
        .archive(super::BASE)
        .tls(crate::support::pki::Pki::new())
        .arg("--tls-client-ca")
        .arg(file)
        .start();
    let (mut dropped, mut stays) =
        (come_in_as(&server, &short.alice()), come_in_as(&server, &long.alice()));
    dropped.go("");
    stays.go("");
    dropped.read_ok(0, 512);
    dropped.expect_closed();
    assert_dismissed(&server, "expired");
    stays.read_ok(0, 512);
    assert!(!reads(&server, short.alice().config(server.pki())));
    assert!(reads(&server, long.alice().config(server.pki())));
}

#[test]
fn when_its_hour_is_over_it_is_dropped_by_itself() {
    let at = |seconds: u64| {
        let time = std::time::SystemTime::now() + Duration::from_secs(seconds);
        humantime::format_rfc3339_seconds(time).to_string()
    };
    let rule = format!("[[rule]]\naction = \"allow\"\nuntil = {}", at(4));
    let (_folder, rules) = rules_file(&rule);
    let server = Server::builder()
        .archive(super::BASE)
        .args(["--insecure-no-tls", "--rules"])
        .arg(&rules)
        .start();
    let mut client = server.go("");
    client.read_ok(0, 512);
    client.expect_closed();
    assert_dismissed(&server, "no_rule_for_export");
    server.connect().expect_closed();
}
