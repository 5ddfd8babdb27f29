//! Each event, as the built binary tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;

use serde_json::Value;

use super::{BASE, CHILD, Record, assert_no_gaps, read};
use crate::support::archive;
use crate::support::authority::{Authority, Recipe};
use crate::support::client::{Client, FLAGS, OPT_GO, OPT_STARTTLS, REP_ERR_UNKNOWN, info_data};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

const RULES: &str = r#"
    [[rule]]
    name = "backups"
    action = "allow"
    network = "127.0.0.0/29"
    identity = "uri:spiffe://example.org/backup/*"
    export = "base-*"
"#;

fn recipe() -> Recipe {
    Recipe {
        uri: Some("spiffe://example.org/backup/7"),
        dns: Some("backup.example.org"),
        name: "Ünlü \"backup\"",
        ..Recipe::default()
    }
}

fn by_rules(authority: &Authority, record: &Record) -> Builder {
    fs::write(record.at("rules.toml"), RULES).unwrap();
    let archives = [archive(BASE), archive(CHILD)];
    let server = Server::builder().args(archives).tls(Pki::new()).clients_of(authority);
    server.arg("--rules").arg(record.at("rules.toml")).arg("--audit").arg(record.path())
}

#[test]
fn who_reads_what_is_told_with_all_that_is_known() {
    let (authority, record) = (Authority::new(), Record::new());
    let mut server = by_rules(&authority, &record).start();
    let certified = authority.certify(&recipe());
    let mut client = server.connect();
    client.greet(FLAGS);
    let mut client = client.starttls(certified.config(server.pki())).boxed();
    client.go(BASE);
    let reading = record.wait_for_any("reading");
    assert_eq!(reading["peer"], "127.0.0.1");
    assert_eq!(reading["identity"], "uri:spiffe://example.org/backup/7");
    assert_eq!(reading["sha256"], certified.sha256().as_str());
    assert_eq!(reading["export"], BASE);
    assert_eq!((&reading["tls"], &reading["policy"]), (&"TLS 1.3".into(), &0.into()));
    assert!(reading["cipher"].as_str().unwrap().starts_with("TLS13_"), "{reading}");
    let rule = reading["rule"].as_str().unwrap();
    assert!(rule.starts_with("allowed by rule 1, line 2 of /") && rule.ends_with("(backups)"));
    let certificate = &reading["certificate"];
    let names = ["uri:spiffe://example.org/backup/7", "dns:backup.example.org"];
    assert_eq!(certificate["names"][0], names[0]);
    assert_eq!(certificate["names"][1], names[1]);
    assert_eq!(certificate["names"][2], "cn:Ünlü \"backup\"");
    assert!(certificate["subject"].as_str().unwrap().starts_with("CN=Ünlü"), "{certificate}");
    assert_eq!(certificate["issuer"], "CN=hexz-nbd test client CA");
    let serial = certificate["serial"].as_str().unwrap();
    assert!(serial.len() >= 8 && serial.bytes().all(|digit| digit.is_ascii_hexdigit()));
    assert!(certificate["not_after"].as_str().unwrap().ends_with("00Z") || certificate.is_object());

    client.read_ok(0, 4096);
    client.read_ok(8192, 512);
    client.read(1 << 40, 512).unwrap_err();
    client.disconnect();
    let ended = record.wait_for_any("ended");
    assert_eq!(ended["id"], reading["id"]);
    assert_eq!((&ended["how"], &ended["export"]), (&"left".into(), &BASE.into()));
    assert_eq!((&ended["requests"], &ended["bytes"]), (&3.into(), &4608.into()));
    assert_eq!(ended["errors"], 1);
    assert!((0.0..30.0).contains(&ended["duration"].as_f64().unwrap()));
    // The log speaks of the same connection, flat.
    let line = server.wait_for_log("it left", |line| line.json["how"] == "left");
    assert_eq!(line.json["id"], reading["id"]);
    assert_eq!(line.json["identity"], reading["identity"]);
    assert_eq!(line.json["export"], BASE);

    assert_eq!(server.terminate().code(), Some(0));
    let events = record.events();
    assert_eq!(assert_no_gaps(&events), 0);
    assert_eq!(events[0]["event"], "start");
    assert_eq!(events[0]["pid"], server.pid());
    assert_eq!(events[0]["listen"][0], server.address().to_string());
    assert_eq!(events.last().unwrap()["event"], "stop");
    assert_eq!(events.last().unwrap()["how"], "told");
}

#[test]
fn who_is_kept_out_is_told_with_the_reason() {
    let (authority, record) = (Authority::new(), Record::new());
    let server = by_rules(&authority, &record).start();

    server.connect_from([127, 0, 0, 66]).expect_closed();
    let refused = record.wait_for_any("refused");
    assert_eq!((&refused["peer"], &refused["reason"]), (&"127.0.0.66".into(), &"address".into()));
    assert_eq!(refused["cause"], "no_rule_for_address");

    let mut client = server.connect();
    client.greet(FLAGS);
    assert_eq!(client.option(OPT_STARTTLS, b"").len(), 1);
    client.send(b"GET / HTTP/1.1\r\n\r\n");
    let failed = record.wait_for_any("handshake_failed");
    assert_eq!((&failed["cause"], &failed["peer"]), (&"not_tls".into(), &"127.0.0.1".into()));

    let stranger = authority.alice();
    let mut client = server.connect();
    client.greet(FLAGS);
    let mut client = client.starttls(stranger.config(server.pki())).boxed();
    client.rest();
    let not_allowed = record.wait_for_any("not_allowed");
    assert_eq!(not_allowed["identity"], "cn:alice");
    assert_eq!(not_allowed["sha256"], stranger.sha256().as_str());
    assert_eq!(not_allowed["cause"], "no_rule_for_client");

    let mut client = server.connect();
    client.greet(FLAGS);
    let known = authority.certify(&recipe());
    let mut client = client.starttls(known.config(server.pki())).boxed();
    // Nobody asked for what a list leaves out.
    assert_eq!(client.list(), [BASE]);
    client.refused(OPT_GO, &info_data(CHILD.as_bytes(), &[]), REP_ERR_UNKNOWN);
    // One that isn't there isn't kept from anybody.
    client.refused(OPT_GO, &info_data(b"base-nothing", &[]), REP_ERR_UNKNOWN);
    client.go(BASE);
    let denied = record.wait_for_any("export_denied");
    assert_eq!(
        (&denied["export"], &denied["identity"]),
        (&CHILD.into(), &"uri:spiffe://example.org/backup/7".into())
    );
    assert_eq!(denied["cause"], "no_rule_for_export");
    let events = record.events();
    assert_eq!(events.iter().filter(|event| event["event"] == "export_denied").count(), 1);

    // Then it is no longer allowed at all.
    record.wait_for_any("reading");
    authority.revoke(&[&known]);
    server.signal("HUP");
    let dismissed = record.wait_for_any("dismissed");
    assert_eq!((&dismissed["id"], &dismissed["export"]), (&denied["id"], &BASE.into()));
    assert_eq!(dismissed["why"], "the client's certificate has been revoked");
    let reload = record.wait_for_any("reload");
    assert_eq!((&reload["policy"], &reload["dropped"]), (&1.into(), &1.into()));

    fs::write(record.at("rules.toml"), "nonsense").unwrap();
    server.signal("HUP");
    let failed = record.wait_for_any("reload_failed");
    assert!(failed["why"].as_str().unwrap().contains("rules.toml"), "{failed}");
    assert_eq!(assert_no_gaps(&record.events()), 0);
}

/// Asking costs a client less than it costs to write down each time what it asked for.
#[test]
fn who_goes_on_asking_fills_no_disk() {
    let record = Record::new();
    let rule = "[[rule]]\naction = 'allow'\nnetwork = '127.0.0.1'\nexport = 'other'";
    fs::write(record.at("rules.toml"), rule).unwrap();
    let server = Server::builder().archive(BASE).arg("--rules").arg(record.at("rules.toml"));
    let server = server.arg("--audit").arg(record.path()).start();
    let mut client = server.greeted();
    let name = "\u{1}".repeat(200);
    for _ in 0..1000 {
        client.refused(OPT_GO, &info_data(name.as_bytes(), &[]), REP_ERR_UNKNOWN);
    }
    drop(client);
    let ended = record.wait_for_any("ended");
    assert_eq!(ended["denied"], 1000);
    let events = record.events();
    assert_eq!(events.iter().filter(|event| event["event"] == "export_denied").count(), 16);
    assert_eq!(assert_no_gaps(&events), 0);
}

/// Exports that aren't there, whatever the reason.
#[test]
fn exports_that_are_not_there_are_told_and_then_counted() {
    let record = Record::new();
    let server = Server::builder().archive(BASE).arg("--audit").arg(record.path()).start();
    let mut client = server.greeted();
    client.refused(OPT_GO, &info_data(b"odd-\xff\n", &[]), REP_ERR_UNKNOWN);
    for _ in 0..99 {
        client.refused(OPT_GO, &info_data(b"none", &[]), REP_ERR_UNKNOWN);
    }
    client.go(BASE);
    client.disconnect();
    let ended = record.wait_for_any("ended");
    assert_eq!((&ended["missing"], &ended["export"]), (&100.into(), &BASE.into()));
    assert!(ended.get("denied").is_none());
    let events = record.events();
    let missing: Vec<&Value> =
        events.iter().filter(|event| event["event"] == "export_missing").collect();
    assert_eq!(missing.len(), 16);
    assert_eq!(
        (&missing[0]["reason"], &missing[0]["export"]),
        (&"not_utf8".into(), &r"odd-\xff\n".into())
    );
    assert_eq!(
        (&missing[1]["reason"], &missing[1]["export"]),
        (&"unknown_name".into(), &"none".into())
    );
    assert_eq!((&missing[1]["peer"], &missing[1]["id"]), (&"127.0.0.1".into(), &ended["id"]));
    assert_eq!(assert_no_gaps(&events), 0);
}

/// Whatever becomes of a connection, its end is told, and once.
#[test]
fn every_connection_ends_once() {
    const LAST: [&str; 5] = ["refused", "handshake_failed", "not_allowed", "dismissed", "ended"];
    let record = Record::new();
    let server = Server::builder().archive(BASE).args(["--allow", "127.0.0.1"]);
    let server = server.args(["--max-connections-per-address", "2", "--shutdown-timeout", "1s"]);
    let mut server = server.arg("--audit").arg(record.path()).start();
    // Left before and behind the greeting; nonsense; read; too many; reset.
    drop(server.connect());
    server.greeted().send(b"nonsense, and more of it");
    server.greeted().list();
    server.assert_alive();
    // Until then it has a place.
    record.wait_for("ended", |event| event["how"] == "left");
    drop(server.connect_from([127, 0, 0, 2]));
    let staying = [server.go(""), server.go("")];
    // Its replies don't fit into the socket: it is still busy at the deadline.
    let mut busy = staying;
    for cookie in 0..8 {
        busy[0].send_request(crate::support::client::Request::read(cookie, 0, 8 << 20));
    }
    let mut full = server.greeted();
    full.send(&crate::support::client::option(OPT_GO, &info_data(b"", &[])));
    full.rest();
    server.connect().reset();
    crate::support::wait_until("all but two have ended", || {
        record
            .events()
            .iter()
            .filter(|event| LAST.contains(&event["event"].as_str().unwrap()))
            .count()
            >= 7
    });
    assert_eq!(server.terminate().code(), Some(0));
    let events = record.events();
    assert_eq!(assert_no_gaps(&events), 0);
    let mut ends: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for event in &events {
        if let Some(id) = event["id"].as_u64() {
            let of = ends.entry(id).or_default();
            let name = event["event"].as_str().unwrap();
            assert!(!of.iter().any(|name| LAST.contains(name)), "{event} comes behind the end");
            of.push(name);
        }
    }
    assert!(ends.len() >= 9, "{ends:?}");
    for (id, events) in &ends {
        assert!(LAST.contains(events.last().unwrap()), "{id}: {events:?}");
    }
    let how: BTreeSet<&str> = events.iter().filter_map(|event| event["how"].as_str()).collect();
    for expected in ["left", "left_early", "session", "connections_per_address", "told", "dropped"]
    {
        assert!(how.contains(expected), "{expected}: {how:?}");
    }
}

/// What is documented, by event: those of "who" and of all events are added.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let mut members: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut heading = String::new();
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/audit.md")).unwrap();
    for line in page.lines() {
        if let Some(text) = line.strip_prefix('#') {
            heading = text.trim_matches(['#', ' ', '`']).to_owned();
        } else if let Some(row) = line.strip_prefix("| `") {
            let member = row.split(['`', '.']).next().unwrap().to_owned();
            members.entry(heading.clone()).or_default().insert(member);
        }
    }
    members
}

/// Nothing is in the file that the page doesn't have; that it has no more than that, and which
/// types there are, is tested beside the types.
#[test]
fn nothing_is_told_that_is_not_documented() {
    let (authority, record) = (Authority::new(), Record::new());
    let mut server = by_rules(&authority, &record).start();
    let mut client = server.connect();
    client.greet(FLAGS);
    let mut client = client.starttls(authority.certify(&recipe()).config(server.pki())).boxed();
    client.refused(OPT_GO, &info_data(CHILD.as_bytes(), &[]), REP_ERR_UNKNOWN);
    client.go(BASE);
    client.disconnect();
    server.connect_from([127, 0, 0, 66]).expect_closed();
    server.signal("HUP");
    record.wait_for_any("reload");
    record.wait_for_any("ended");
    server.terminate();
    let documented = documented();
    let of_all = &documented["Members"];
    let events = record.events();
    let names: BTreeSet<&str> =
        events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 7, "{names:?}");
    for event in &events {
        let own = &documented[event["event"].as_str().unwrap()];
        let who = event.get("id").map(|_| &documented["who"]);
        for member in event.as_object().unwrap().keys() {
            let known = of_all.contains(member)
                || own.contains(member)
                || who.is_some_and(|who| who.contains(member));
            assert!(known, "{member}: {event}");
        }
        assert!(of_all.iter().all(|member| event.get(member).is_some()), "{event}");
    }
}

/// What a CA of clients signs, and what clients ask for, is in lines that stay lines, and safe
/// to look at.
#[test]
fn what_peers_choose_can_not_forge_an_event() {
    const FORGED: &str = "x\n{\"event\":\"stop\"}\u{1b}[2J\u{85}\u{2028}\u{202e}";
    let (authority, record) = (Authority::new(), Record::new());
    let rules = "[[rule]]\naction = \"allow\"\nexport = \"base-*\"";
    let server = by_rules(&authority, &record);
    fs::write(record.at("rules.toml"), rules).unwrap();
    let mut server = server.start();
    let mallory = authority.certify(&Recipe { name: FORGED, ..Recipe::default() });
    let mut client = server.connect();
    client.greet(FLAGS);
    let mut client = client.starttls(mallory.config(server.pki())).boxed();
    let name = format!("{FORGED}{}", "y".repeat(3000));
    client.refused(OPT_GO, &info_data(name.as_bytes(), &[]), REP_ERR_UNKNOWN);
    client.go(BASE);
    client.disconnect();
    let denied = record.wait_for_any("export_denied");
    record.wait_for_any("ended");
    server.terminate();
    assert_eq!(denied["identity"], format!("cn:{FORGED}"));
    let export = denied["export"].as_str().unwrap();
    assert!(export.starts_with(FORGED) && export.ends_with("y…") && export.len() <= 1024);
    let text = fs::read_to_string(record.path()).unwrap();
    let is_unseen = |letter: char| letter.is_control() || "\u{2028}\u{202e}".contains(letter);
    assert!(!text.replace('\n', "").contains(is_unseen), "{text:?}");
    let stops = read(&record.path()).iter().filter(|event| event["event"] == "stop").count();
    assert_eq!(stops, 1);
}

#[test]
fn the_standard_output_does_too() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    command.args(["--listen", "127.0.0.1:0", "--audit", "-"]).arg("/nowhere/x.hxz");
    let output = command.env_remove("RUST_LOG").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let event: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&event["event"], &event["how"]), (&"stop".into(), &"failed".into()));
    assert!(event["why"].as_str().unwrap().contains("/nowhere/x.hxz"));
    std::io::stderr().flush().unwrap();
    let (code, stderr) = Server::builder().archive(BASE).args(["--audit", "-", "--stdio"]).fail();
    assert_eq!(code, 2, "{stderr}");
}

/// A client behind a load balancer is told with the balancer.
#[test]
fn a_load_balancer_is_told() {
    let record = Record::new();
    let server =
        Server::builder().archive(BASE).args(["--insecure-no-tls", "--allow", "10.0.0.0/8"]);
    let server = server.args(["--proxy-from", "127.0.0.1"]);
    let server = server.arg("--audit").arg(record.path()).start();
    let forwarded = |from: [u8; 4]| -> Client<_> {
        let mut client = server.connect();
        let block = [&from[..], &[192, 0, 2, 1, 0x10, 0, 0x2a, 0x39]].concat();
        let head = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c";
        client.send(&[&head[..], &block].concat());
        client
    };
    let mut client = forwarded([10, 1, 2, 3]);
    client.greet(FLAGS);
    client.go("");
    let reading = record.wait_for_any("reading");
    assert_eq!((&reading["peer"], &reading["via"]), (&"10.1.2.3".into(), &"127.0.0.1".into()));
    forwarded([192, 0, 2, 9]).expect_closed();
    let refused = record.wait_for_any("refused");
    assert_eq!((&refused["peer"], &refused["via"]), (&"192.0.2.9".into(), &"127.0.0.1".into()));
}
