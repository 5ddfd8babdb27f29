//! The numbers are what happened: exactly, and whoever has left by then.

use std::fs;
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};

use super::{metrics, status};
use crate::support::authority::Authority;
use crate::support::client::{
    CMD_CACHE, CMD_FLUSH, CMD_WRITE, Client, EINVAL, EIO, EPERM, FLAGS, OPT_STARTTLS, Request,
};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};
use crate::support::{IMAGE_SIZE, archive, image, wait_until};

const BASE: &str = "base-zstd.hxz";
/// Of 64 KiB each.
const BLOCKS: &str = "fixed-64k-zstd.hxz";
const BLOCK: u64 = 64 * 1024;

fn shown() -> Builder {
    Server::builder().args(["--monitor", "0"])
}

/// Waits until a number is what it should be: what a client has seen may not have been noted
/// yet.
#[track_caller]
fn wait_for(server: &Server, pointer: &str, expected: &Value) {
    let mut seen = Value::Null;
    for _ in 0..200 {
        seen = status(server);
        if seen.pointer(pointer) == Some(expected) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("{pointer} isn't {expected}: {seen:#}");
}

#[test]
fn each_request_counts_once() {
    let server = shown().archive(BASE).archive(BLOCKS).start();
    let mut client = server.go(BLOCKS);
    for block in 0..5 {
        client.read_ok(block * BLOCK, 4096);
    }
    assert_eq!(client.read(u64::MAX - 4096, 4096), Err(EINVAL));
    let of = |command| Request { command, length: 4096, ..Request::default() };
    assert_eq!(client.request(of(CMD_CACHE)), 0);
    assert_eq!(client.request(Request { length: 0, ..of(CMD_FLUSH) }), 0);
    client.send_request(Request { length: 3, ..of(CMD_WRITE) });
    client.send(b"abc");
    assert_eq!(client.simple_reply().error, EPERM);
    let requests = json!({ "read": 6, "block_status": 0, "cache": 1, "other": 2 });
    wait_for(&server, "/exports/1/requests", &requests);

    let seen = status(&server);
    let export = &seen["exports"][1];
    assert_eq!(export["name"], BLOCKS);
    assert_eq!((&export["bytes"], &export["errors"]), (&json!(5 * 4096), &json!(2)));
    assert_eq!(export["errors_by_code"], json!({ "inval": 1, "perm": 1 }));
    assert_eq!(export["readers"], 1);
    // The one that was refused took no time.
    assert_eq!(export["read_seconds"]["count"], 5);
    let sum = export["read_seconds"]["sum"].as_f64().unwrap();
    assert!(sum > 0.0 && sum < 25.0, "{sum}");
    let one = &seen["connections"][0];
    assert_eq!(one["state"], "reading");
    assert_eq!((&one["peer"], &one["export"]), (&json!("127.0.0.1"), &json!(BLOCKS)));
    assert_eq!((&one["tls"], &one["identity"]), (&Value::Null, &Value::Null));
    assert_eq!((&one["requests"], &one["bytes"]), (&json!(9), &json!(5 * 4096)));
    assert_eq!((&one["errors"], &one["in_flight"]), (&json!(2), &json!(0)));

    // What somebody did stays when it leaves; another one's comes on top.
    client.disconnect();
    wait_for(&server, "/connections_total/reading", &json!(0));
    let seen = status(&server);
    assert_eq!(seen["exports"][1]["requests"], requests);
    assert_eq!(seen["exports"][1]["readers"], 0);
    let mut again = server.go(BLOCKS);
    again.read_ok(0, 512);
    wait_for(&server, "/exports/1/requests/read", &json!(7));
    let seen = status(&server);
    assert_eq!(seen["exports"][1]["bytes"], 5 * 4096 + 512);
    assert_eq!(seen["exports"][0]["requests"]["read"], 0);
    let totals = &seen["connections_total"];
    assert_eq!((&totals["accepted"], &totals["served"]), (&json!(2), &json!(2)));

    // The same for Prometheus.
    let numbers = metrics(&server);
    let of_export =
        |name: &str, more: &str| numbers[&format!("{name}{{export=\"{BLOCKS}\"{more}}}")];
    assert_eq!(of_export("hexz_nbd_requests_total", ",command=\"read\""), 7.0);
    assert_eq!(of_export("hexz_nbd_request_errors_total", ",error=\"perm\""), 1.0);
    assert_eq!(of_export("hexz_nbd_read_bytes_total", ""), f64::from(5 * 4096 + 512));
    assert_eq!(of_export("hexz_nbd_read_latency_seconds_count", ""), 6.0);
    assert_eq!(of_export("hexz_nbd_read_latency_seconds_bucket", ",le=\"+Inf\""), 6.0);
    assert_eq!(of_export("hexz_nbd_export_readers", ""), 1.0);
    assert_eq!(numbers["hexz_nbd_connections{state=\"reading\"}"], 1.0);
}

#[test]
fn blocks_are_hits_or_misses_and_decoded_once() {
    let server = shown().archive(BLOCKS).start();
    let mut client = server.go("");
    let before = status(&server);
    // No two after another, so that nothing is read ahead; and no zeros.
    let is_data =
        |block: &u64| image()[(block * BLOCK) as usize..][..512].iter().any(|it| *it != 0);
    let data: Vec<u64> = (0..IMAGE_SIZE / BLOCK).filter(is_data).collect();
    let blocks = [data[3], data[0], data[2]];
    for block in blocks {
        client.read_ok(block * BLOCK, 512);
    }
    let seen = status(&server);
    assert_eq!(seen["cache"]["misses"], 3, "{seen:#}");
    assert_eq!(seen["cache"]["hits"], 0);
    assert_eq!(seen["cache"]["decoded_blocks"], 3);
    assert_eq!(seen["cache"]["decoded_bytes"], 3 * BLOCK);
    assert!(seen["cache"]["bytes"].as_u64().unwrap() > 3 * BLOCK);
    assert!(seen["cache"]["decode_seconds"].as_f64().unwrap() > 0.0);
    let reads = |status: &Value| status["storage"]["reads"].as_u64().unwrap();
    let bytes = |status: &Value| status["storage"]["bytes"].as_u64().unwrap();
    assert!(reads(&seen) >= reads(&before) + 3);
    assert!(bytes(&seen) > bytes(&before) && bytes(&seen) < bytes(&before) + 4 * BLOCK);
    for block in [2, 0, 1, 1].map(|at| blocks[at]) {
        client.read_ok(block * BLOCK + 512, 512);
    }
    let again = status(&server);
    assert_eq!((&again["cache"]["hits"], &again["cache"]["misses"]), (&json!(4), &json!(3)));
    assert_eq!(reads(&again), reads(&seen));
}

/// An archive with a byte changed, so that one block of it can't be trusted.
fn damaged(folder: &tempfile::TempDir) -> std::path::PathBuf {
    let path = folder.path().join("damaged.hxz");
    fs::copy(archive(BLOCKS), &path).unwrap();
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4096 + 30).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], 4096 + 30).unwrap();
    path
}

#[test]
fn what_can_not_be_trusted_is_counted_by_reason() {
    let folder = tempfile::tempdir().unwrap();
    let server = shown().arg(damaged(&folder)).start();
    assert_eq!(metrics(&server)["hexz_nbd_verification_failures_total{reason=\"crc\"}"], 0.0);
    let mut client = server.go("");
    let blocks = IMAGE_SIZE / BLOCK;
    let bad: Vec<u64> =
        (0..blocks).filter(|block| client.read(block * BLOCK, 512) == Err(EIO)).collect();
    assert_eq!(bad.len(), 1);
    assert_eq!(client.read(bad[0] * BLOCK, 512), Err(EIO));
    wait_for(&server, "/verification_failures", &json!({ "crc": 2 }));
    let seen = status(&server);
    assert_eq!(seen["exports"][0]["errors_by_code"], json!({ "io": 2 }));
    assert_eq!(seen["exports"][0]["bytes"], (blocks - 1) * 512);
    let said = seen["recent_errors"][0]["message"].as_str().unwrap();
    assert!(said.contains("damaged") && said.contains("CRC-32"), "{said}");
    assert_eq!(metrics(&server)["hexz_nbd_verification_failures_total{reason=\"crc\"}"], 2.0);
}

#[test]
fn refusals_and_failures_are_counted_by_reason() {
    let server = shown()
        .archive(BASE)
        .args(["--allow", "127.0.0.1", "--max-handshakes-per-address", "2"])
        .start();
    for _ in 0..3 {
        server.connect_from([127, 0, 0, 2]).expect_closed();
    }
    wait_for(&server, "/connections_total/refused", &json!({ "address": 3 }));
    // Two negotiate, a third waits and gets no place.
    let mut waiting: Vec<_> = (0..2).map(|_| server.connect()).collect();
    waiting.iter_mut().for_each(|client| client.greet(FLAGS));
    wait_for(&server, "/connections_total/negotiating", &json!(2));
    assert_eq!(status(&server)["connections"][0]["state"], "negotiating");
    server.connect().expect_closed();
    let refused = json!({ "address": 3, "handshakes_per_address": 1 });
    wait_for(&server, "/connections_total/refused", &refused);
    // One of them says something that is no NBD.
    waiting[0].send(&[0xff; 64]);
    waiting[0].expect_closed();
    wait_for(&server, "/connections_total/failed", &json!({ "session": 1 }));
    let numbers = metrics(&server);
    assert_eq!(numbers["hexz_nbd_connections_refused_total{reason=\"address\"}"], 3.0);
    assert_eq!(numbers["hexz_nbd_connections_refused_total{reason=\"not_local\"}"], 0.0);
    assert_eq!(numbers["hexz_nbd_connections_failed_total{reason=\"session\"}"], 1.0);
    assert_eq!(numbers["hexz_nbd_connections_accepted_total"], 2.0);
    assert_eq!(numbers["hexz_nbd_connections_served_total"], 0.0);
}

#[test]
fn tls_and_who_came_in_by_it() {
    let authority = Authority::new();
    let server = shown().archive(BASE).tls(Pki::new()).clients_of(&authority).start();
    let seen = status(&server);
    assert_eq!(seen["tls"]["min_version"], "1.2");
    assert_eq!(seen["tls"]["client_certificates"], "required");
    let now = seen["now"].as_f64().unwrap();
    let numbers = metrics(&server);
    for (what, member) in [
        ("certificate", "certificate_expires"),
        ("client_ca", "client_ca_expires"),
        ("client_crl", "client_crl_expires"),
    ] {
        let ends = seen["tls"][member].as_f64().unwrap();
        assert!(ends > now, "{member} {ends}");
        let number = numbers[&format!("hexz_nbd_tls_expiry_timestamp_seconds{{what=\"{what}\"}}")];
        assert_eq!(number, ends);
    }

    let shake = |config| {
        let mut client: Client<_> = server.connect();
        client.greet(FLAGS);
        assert_eq!(client.option(OPT_STARTTLS, b"").len(), 1);
        client.handshake(config)
    };
    let alice = authority.alice();
    let mut client = shake(alice.config(server.pki())).unwrap();
    client.go("");
    client.read_ok(0, 512);
    wait_for(&server, "/connections_total/reading", &json!(1));
    let one = &status(&server)["connections"][0];
    assert_eq!(one["tls"], "TLS 1.3");
    assert!(one["identity"].as_str().unwrap().contains("alice"), "{one}");

    // Somebody without a certificate, somebody with another CA's, and somebody with no TLS.
    drop(shake(server.pki().client_config()).map(|mut client| client.rest()));
    wait_for(&server, "/connections_total/handshake_failures", &json!({ "no_certificate": 1 }));
    let stranger = Authority::named("another").alice();
    drop(shake(stranger.config(server.pki())).map(|mut client| client.rest()));
    let causes = json!({ "no_certificate": 1, "unknown_ca": 1 });
    wait_for(&server, "/connections_total/handshake_failures", &causes);
    assert_eq!(status(&server)["connections_total"]["failed"], json!({ "tls_handshake": 2 }));
    let numbers = metrics(&server);
    assert_eq!(numbers["hexz_nbd_tls_handshake_failures_total{reason=\"unknown_ca\"}"], 1.0);
}

#[test]
fn reloads_are_counted_with_what_was_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    let good = "[[rule]]\naction = \"allow\"\nnetwork = \"127.0.0.0/8\"";
    fs::write(&rules, good).unwrap();
    let server = shown().archive(BASE).arg("--rules").arg(&rules).start();
    assert_eq!(status(&server)["reloads"]["last"], Value::Null);
    server.signal("HUP");
    wait_for(&server, "/reloads/succeeded", &json!(1));
    fs::write(&rules, "nonsense").unwrap();
    server.signal("HUP");
    wait_for(&server, "/reloads/failed", &json!(1));
    let reloads = status(&server)["reloads"].clone();
    assert!(reloads["last_error"].as_str().unwrap().contains("rules"), "{reloads}");
    assert!(reloads["last"].as_f64().unwrap() > 1.7e9);
    assert_eq!(metrics(&server)["hexz_nbd_last_reload_successful"], 0.0);
    assert_eq!(metrics(&server)["hexz_nbd_reloads_total{result=\"failed\"}"], 1.0);
    fs::write(&rules, good).unwrap();
    server.signal("HUP");
    wait_for(&server, "/reloads/succeeded", &json!(2));
    assert_eq!(status(&server)["reloads"]["last_error"], Value::Null);
    assert_eq!(metrics(&server)["hexz_nbd_last_reload_successful"], 1.0);
}

#[test]
fn who_asks_too_fast_is_seen_to_wait() {
    let server = shown().archive(BASE).args(["--max-requests", "20"]).start();
    let mut client = server.go("");
    let mut sent = 0;
    let mut throttled = 0;
    wait_until("some of them wait", || {
        (0..40).for_each(|cookie| client.send_request(Request::read(cookie, 0, 512)));
        client.receive(40 * (16 + 512));
        sent += 40;
        throttled = status(&server)["exports"][0]["throttled"].as_u64().unwrap();
        throttled > 0
    });
    // A second's worth passes at once.
    assert!(throttled <= sent - 20, "{throttled} of {sent}");
    let export = &status(&server)["exports"][0];
    assert!(export["throttled_seconds"].as_f64().unwrap() > 0.0, "{export}");
}

/// What nobody waits for any more is no error.
#[test]
fn who_leaves_in_the_middle_causes_no_errors() {
    let server = shown().archive(BASE).start();
    for _ in 0..5 {
        let mut client = server.go("");
        for cookie in 0..50 {
            client.send_request(Request::read(cookie, cookie * BLOCK, 1 << 20));
        }
        client.reset();
    }
    wait_for(&server, "/connections_total/reading", &json!(0));
    let seen = status(&server);
    assert_eq!(seen["connections_total"]["served"], 5);
    let errors = seen["exports"][0]["errors_by_code"].as_object().unwrap();
    assert!(!errors.contains_key("io"), "{seen:#}");
}

/// Memory that answers on their way take, of what connections share.
#[test]
fn memory_in_flight_is_seen_and_given_back() {
    let server = shown().archive(BASE).start();
    let mut client = server.go("");
    for cookie in 0..4 {
        client.send_request(Request::read(cookie, 0, 8 << 20));
    }
    wait_until("something is in flight", || {
        let seen = status(&server);
        seen["memory"]["in_flight"].as_u64() >= Some(8 << 20)
            && seen["connections"][0]["in_flight"] == 4
    });
    assert_eq!(status(&server)["memory"]["in_flight_limit"], 32 << 20);
    client.receive(4 * (16 + (8 << 20)));
    wait_for(&server, "/memory/in_flight", &json!(0));
    wait_for(&server, "/connections/0/in_flight", &json!(0));
}

/// A name that is anybody's choice breaks neither JSON nor Prometheus' format.
#[test]
fn names_are_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let name = "a\"b\\c\nd{e}<img>.hxz";
    fs::copy(archive(BASE), folder.path().join(name)).unwrap();
    let server = shown().arg("--export-dir").arg(folder.path()).start();
    server.go(name).read_ok(0, 512);
    wait_for(&server, "/exports/0/requests/read", &json!(1));
    assert_eq!(status(&server)["exports"][0]["name"], name);
    let quoted = "hexz_nbd_export_readers{export=\"a\\\"b\\\\c\\nd{e}<img>.hxz\"}";
    assert!(metrics(&server).contains_key(quoted));
}
