//! Rules: who sees what, and what nobody learns of the rest.

use std::time::Instant;

use super::{BASE, CHILD, asking, come_in_as, rules_file, served};
use crate::support::authority::{Authority, Recipe};
use crate::support::client::{
    OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST_META_CONTEXT, REP_ERR_UNKNOWN, info_data,
    meta_data, option,
};
use crate::support::server::Server;

const RULES: &str = r#"
    [[rule]]
    name = "nobody reads secrets from there"
    action = "deny"
    network = "127.0.0.6"

    [[rule]]
    name = "alice"
    action = "allow"
    network = ["127.0.0.0/8", "::1"]
    identity = "cn:alice"
    export = "base-*"

    [[rule]]
    name = "the operator"
    action = "allow"
    identity = "cn:operator"
"#;

fn by_rules(authority: &Authority, rules: &std::path::Path) -> Server {
    asking(authority).args(&served()[1..]).arg("--rules").arg(rules).start()
}

#[test]
fn each_client_sees_its_own_exports() {
    let authority = Authority::new();
    let (_folder, rules) = rules_file(RULES);
    let server = by_rules(&authority, &rules);
    let operator_certificate = authority.certify(&Recipe { name: "operator", ..Recipe::default() });
    assert_eq!(come_in_as(&server, &authority.alice()).list(), [BASE]);
    assert_eq!(come_in_as(&server, &operator_certificate).list(), [BASE, CHILD]);

    let mut alice = come_in_as(&server, &authority.alice());
    // An export that it may not open looks like one that isn't there.
    let kinds = [OPT_INFO, OPT_GO];
    for number in kinds {
        let hidden = alice.refused(number, &info_data(CHILD.as_bytes(), &[]), REP_ERR_UNKNOWN);
        let missing = alice.refused(number, &info_data(b"child-zstd.hxy", &[]), REP_ERR_UNKNOWN);
        assert_eq!(hidden.replace(".hxz", ""), missing.replace(".hxy", ""));
    }
    alice.refused(OPT_LIST_META_CONTEXT, &meta_data(CHILD.as_bytes(), &[]), REP_ERR_UNKNOWN);
    // Nor does what it may open tell of it.
    alice.option(crate::support::client::OPT_STRUCTURED_REPLY, b"");
    assert_eq!(alice.list_contexts(BASE, &[]), ["base:allocation"]);
    let mut alice = come_in_as(&server, &authority.alice());
    alice.go(BASE);
    alice.read_ok(0, 512);
    let mut alice = come_in_as(&server, &authority.alice());
    alice.send(&option(OPT_EXPORT_NAME, CHILD.as_bytes()));
    alice.expect_closed();

    let mut operator = come_in_as(&server, &operator_certificate);
    operator.option(crate::support::client::OPT_STRUCTURED_REPLY, b"");
    let all = operator.list_contexts(CHILD, &[]);
    assert!(all.iter().any(|name| name == "hexz:changed:base-zstd.hxz"), "{all:?}");
    let mut operator = come_in_as(&server, &operator_certificate);
    operator.go(CHILD);
    operator.read_ok(0, 512);
}

#[test]
fn an_address_that_no_rule_can_let_in_is_closed_at_once() {
    let authority = Authority::new();
    let (_folder, rules) = rules_file(RULES);
    let server = by_rules(&authority, &rules);
    let mut refused = server.connect_from([127, 0, 0, 6]);
    refused.expect_closed();
    let line = server.wait_for_cause("denied_by_rule");
    assert_eq!(line.json["reason"], "address");
    for part in ["rule 1, line 2 of", "nobody reads secrets from there"] {
        assert!(line.message().contains(part), "{}", line.text);
    }
}

#[test]
fn the_default_export_has_its_rule_as_well() {
    let (_folder, rules) = rules_file("[[rule]]\naction = \"allow\"\nexport = \"other\"");
    let server =
        Server::builder().archive(BASE).arg("--insecure-no-tls").arg("--rules").arg(&rules).start();
    let mut client = server.greeted();
    assert_eq!(client.list(), [""; 0]);
    client.refused(OPT_GO, &info_data(b"", &[]), REP_ERR_UNKNOWN);
}

#[test]
fn an_auxiliary_stream_is_an_export_of_its_own() {
    let rule = |export: &str| format!("[[rule]]\naction = \"allow\"\nexport = \"{export}\"");
    for (export, seen) in [
        ("aux-lz4.hxz", &["aux-lz4.hxz"][..]),
        ("*/aux", &["aux-lz4.hxz/aux"]),
        ("aux-*", &["aux-lz4.hxz", "aux-lz4.hxz/aux"]),
    ] {
        let (_folder, rules) = rules_file(&rule(export));
        let server = Server::builder()
            .archive("aux-lz4.hxz")
            .args(["--raw", "--insecure-no-tls", "--rules"])
            .arg(&rules)
            .start();
        assert_eq!(server.greeted().list(), seen, "{export}");
    }
}

#[test]
fn those_who_come_by_the_unix_socket_can_be_meant() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    for (network, may) in [("unix", true), ("127.0.0.0/8", false)] {
        let rule = format!("[[rule]]\naction = \"allow\"\nnetwork = \"{network}\"");
        let (_folder, rules) = rules_file(&rule);
        let server =
            Server::builder().archive(BASE).listen_unix(&socket).arg("--rules").arg(&rules).start();
        if may {
            server.assert_alive();
        } else {
            server.connect().expect_closed();
        }
    }
}

/// What can't be read, or means nothing, refuses to start.
// nbd-server | missing access file means everyone
#[test]
fn bad_rules_refuse_to_start() {
    let missing = std::path::PathBuf::from("/nonexistent/rules.toml");
    let fails = |rules: &std::path::Path, reason: &str| {
        Server::builder().archive(BASE).arg("--rules").arg(rules).fails_with(2, reason)
    };
    fails(&missing, "rules_unreadable");
    for (content, reason, part) in [
        ("", "rules_empty", "[[rule]]"),
        (
            "[[rule]]\naction = \"allow\"\nnetwork = \"10.0.0.0/33\"",
            "invalid_rule",
            "rule 1, line 1: network",
        ),
        ("[[rule]]\nactoin = \"allow\"", "rules_malformed", "`actoin`"),
    ] {
        let (_folder, rules) = rules_file(content);
        let error = fails(&rules, reason);
        assert!(error.contains(part), "{error}");
    }
    // Rules that let in others need TLS.
    let (_folder, rules) = rules_file("[[rule]]\naction = \"allow\"");
    fails(&rules, "remote_clients_without_tls");
}

/// Whether there is an export that one may not open can't be told from how long it takes:
/// nothing is looked for.
#[test]
fn nothing_is_opened_for_who_may_not_open_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hidden.hxz");
    std::fs::copy(crate::support::archive(BASE), &path).unwrap();
    let (_rules_folder, rules) = rules_file("[[rule]]\naction = \"allow\"\nexport = \"x\"");
    let server = Server::builder()
        .arg("--export-dir")
        .arg(folder.path())
        .args(["--insecure-no-tls", "--rules"])
        .arg(&rules)
        .start();
    let started = Instant::now();
    let before = server.file_bytes_read();
    let mut client = server.greeted();
    for _ in 0..10 {
        client.refused(OPT_GO, &info_data(b"hidden.hxz", &[]), REP_ERR_UNKNOWN);
    }
    // Accounting itself reads a little, and so does what the runtime does by the clock.
    let read = server.file_bytes_read() - before;
    assert!(read < 4096, "{read} bytes in {:?}", started.elapsed());
}
