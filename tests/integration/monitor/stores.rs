//! Stores of remote archives: the figures against the log of a scripted server, on all ways on which
//! they are shown.

use object_server::{Behavior, ObjectServer, Rule, Script};
use serde_json::{Value, json};

use super::page::{browse, is_hidden, rows, text};
use super::prometheus::{assert_same_in_both_formats, assert_valid};
use super::{metrics, monitor_of, status};
use crate::archive_writer::{ArchiveWriter, noise};
use crate::support::client::{Client, EIO, Request, Session};
use crate::support::server::{Builder, Server, run as run_binary};
use crate::support::wait_until;

const KEY: &str = "images/web.hxz";
const BLOCK: u64 = 64 * 1024;
const MIB: u64 = 1 << 20;

/// A server with an archive of 16 MiB that don't compress.
fn store() -> ObjectServer {
    let store = ObjectServer::builder().start().unwrap();
    let archive = ArchiveWriter::of_image(&noise(1, 16 << 20), BLOCK as usize).write();
    store.put(KEY, archive.bytes);
    store
}

fn gateway_of(store: &ObjectServer) -> Builder {
    Server::builder().arg(store.url(KEY)).args(["--monitor", "127.0.0.1:0", "--traces", "off"])
}

/// Returns the status of the only store, when no request to it is in flight.
fn quiet_status(server: &Server) -> Value {
    let mut seen = Value::Null;
    wait_until("no request is in flight", || {
        seen = status(server);
        seen["stores"][0]["in_flight"] == 0 && seen["stores"][0]["queued"] == 0
    });
    seen
}

/// Returns the number of requests with a result, of all priorities.
fn requests(store: &Value, result: &str) -> u64 {
    let by_priority = store["requests"].as_object().unwrap().values();
    by_priority.filter_map(|results| results[result].as_u64()).sum()
}

/// Sends reads of blocks that lie apart, and returns before they are answered.
fn send_reads(client: &mut Client<Session>, offsets: impl IntoIterator<Item = u64>) -> u64 {
    let mut sent = 0;
    for offset in offsets {
        client.send_request(Request::read(offset, offset, 512));
        sent += 1;
    }
    sent
}

#[test]
fn figures_agree_with_the_requests_that_the_store_has_seen() {
    let store = store();
    let server = gateway_of(&store).start();
    let mut client = server.go("");
    for offset in [3, 9, 6] {
        client.read_ok(offset * MIB, 512);
    }
    let seen = quiet_status(&server);
    let shown = &seen["stores"][0];
    assert_eq!(shown["name"], store.endpoint());
    assert_eq!((&shown["breaker"], &shown["retries"]), (&json!("closed"), &json!(0)));
    let totals = store.log().totals();
    assert_eq!(requests(shown, "ok"), totals.requests as u64, "{shown:#}");
    let bytes: u64 = shown["bytes"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert_eq!(bytes, totals.data_bytes, "{shown:#}");
    assert_eq!(shown["request_seconds"]["count"], totals.requests);
    assert_eq!(shown["credentials_expire"], Value::Null);
    let chunks = &seen["fetched"];
    assert!(chunks["misses"].as_u64() >= Some(3) && chunks["bytes"].as_u64() >= Some(3 * MIB / 4));
    assert!(chunks["capacity"].as_u64() >= Some(MIB));
    assert!(seen["read_wait_seconds"]["fetch"].as_f64() > Some(0.0), "{seen:#}");

    // Two throttled requests and one that fails are each repeated.
    let throttled = Rule::new(Behavior::status(503).retry_after(1)).times(2);
    let failing = Rule::new(Behavior::status(500)).times(1);
    store.set_script(Script::new().rule(throttled).rule(failing));
    client.read_ok(12 * MIB, 512);
    let seen = quiet_status(&server);
    let shown = &seen["stores"][0];
    let expected = (2, 1, json!(2), json!(3));
    let results = (requests(shown, "throttled"), requests(shown, "server_error"));
    let seen_now = (results.0, results.1, shown["throttled"].clone(), shown["retries"].clone());
    assert_eq!(seen_now, expected, "{shown:#}");
    let totals = store.log().totals();
    let failed = totals.errors as u64;
    assert_eq!(failed, 3);
    assert_eq!(requests(shown, "ok") + failed, totals.requests as u64);
    let waits = &seen["read_wait_seconds"];
    assert!(waits["throttled"].as_f64() > Some(1.0), "{waits}");
    assert_eq!(waits["breaker"], 0.0);

    // The same for Prometheus.
    let numbers = metrics(&server);
    let label = format!("store=\"{}\"", store.endpoint());
    let sum = |name: &str, part: &str| -> f64 {
        let prefix = format!("hexz_nbd_store_{name}{{");
        let matching = numbers.iter().filter(|(name, _)| name.starts_with(&prefix));
        matching.filter(|(name, _)| name.contains(part)).map(|(_, number)| number).sum()
    };
    assert_eq!(sum("requests_total", &label), totals.requests as f64);
    assert_eq!(sum("requests_total", "result=\"throttled\""), 2.0);
    assert_eq!(sum("received_bytes_total", &label), totals.data_bytes as f64);
    assert_eq!(sum("request_seconds_count", &label), (totals.requests as u64 - failed) as f64);
    assert_eq!((sum("throttled_total", &label), sum("retries_total", &label)), (2.0, 3.0));
    assert_eq!((sum("breaker", &label), sum("changed_total", &label)), (0.0, 0.0));
    assert!(sum("limit", &label) >= 1.0 && sum("read_wait_seconds_total", "throttled") > 1.0);
    assert!(numbers["hexz_nbd_store_cache_misses_total"] >= 4.0);
    assert!(!numbers.keys().any(|name| name.starts_with("hexz_nbd_store_credentials")));
    assert_valid(&server);
    assert_same_in_both_formats(&server);
}

/// A trace is looked for beside each archive, and most have none.
#[test]
fn objects_that_are_looked_for_in_vain_are_no_failures() {
    let store = store();
    let server = Server::builder().arg(store.url(KEY)).args(["--monitor", "127.0.0.1:0"]).start();
    wait_until("the trace was looked for", || {
        requests(&status(&server)["stores"][0], "not_found") > 0
    });
    let (page, console) = browse(&format!("http://{}/", monitor_of(&server)), 2);
    assert_eq!(console, "", "{page}");
    let shown = rows(&page, "stores");
    assert_eq!((shown[0][1].as_str(), shown[0][9].as_str()), ("working", "0"), "{shown:?}");
}

#[test]
fn a_store_that_is_down_is_shown_and_logged_once() {
    let store = store();
    let server = gateway_of(&store).start();
    let mut client = server.go("");
    let breaker = |server: &Server| status(server)["stores"][0]["breaker"].clone();
    assert_eq!(breaker(&server), "closed");
    store.stop();
    let sent = send_reads(&mut client, (1..15).map(|number| number * MIB));
    wait_until("the breaker opens", || breaker(&server) == "open");
    let label = format!("{{store=\"{}\"}}", store.endpoint());
    assert_eq!(metrics(&server)[&format!("hexz_nbd_store_breaker{label}")], 1.0);
    let down = server.wait_for_log("it is down", |line| line.reason() == "store_down");
    assert_eq!(
        (&down.json["level"], &down.json["store"]),
        (&json!("WARN"), &json!(store.endpoint()))
    );
    let shown = &status(&server)["stores"][0];
    assert!(requests(shown, "unreachable") + requests(shown, "interrupted") >= 10, "{shown:#}");

    // The page and top say so, too.
    let url = format!("http://{}/", monitor_of(&server));
    let (page, console) = browse(&url, 5);
    assert_eq!(console, "", "{page}");
    assert!(!is_hidden(&page, "stores-section") && !is_hidden(&page, "fetched-section"));
    let shown = rows(&page, "stores");
    assert_eq!((shown.len(), shown[0][0].as_str()), (1, store.endpoint().as_str()));
    assert_eq!((shown[0][1].as_str(), shown[0][12].as_str()), ("down", "–"));
    let state = text(&page, "state");
    assert!(state.starts_with(&format!("The store {} is down", store.endpoint())), "{state}");
    assert!(text(&page, "stores-waits").contains("for a store that is down"), "{page}");
    let top = || run_binary(["top", &monitor_of(&server), "--interval", "200ms"]).stdout;
    let line = format!("store {} down", store.endpoint());
    assert!(top().contains(&line), "{}", top());

    store.restart().unwrap();
    client.receive(sent as usize * (16 + 512));
    wait_until("the breaker closes", || breaker(&server) == "closed");
    let up = server.wait_for_log("it is up", |line| line.reason() == "store_up");
    assert!(up.json["down_seconds"].is_u64(), "{}", up.text);
    assert!(status(&server)["read_wait_seconds"]["breaker"].as_f64() > Some(0.0));
    let line = format!("store {} working", store.endpoint());
    assert!(top().contains(&line), "{}", top());
    let logged = |reason: &str| server.log().iter().filter(|it| it.reason() == reason).count();
    assert_eq!((logged("store_down"), logged("store_up")), (1, 1), "{}", server.log_text());
}

#[test]
fn failed_reads_are_counted_by_the_failure_of_the_store() {
    let store = store();
    let server = gateway_of(&store).args(["--store-timeout", "1s"]).start();
    let mut client = server.go("");
    let count = |label: &str| {
        metrics(&server)[&format!("hexz_nbd_verification_failures_total{{reason=\"{label}\"}}")]
    };
    assert_eq!((count("store_down"), count("store_denied")), (0.0, 0.0));
    store.set_script(Script::always(Behavior::status(403)));
    assert_eq!(client.read(3 * MIB, 512), Err(EIO));
    wait_until("it is counted", || count("store_denied") == 1.0);
    store.stop();
    assert_eq!(client.read(6 * MIB, 512), Err(EIO));
    wait_until("it is counted", || count("store_down") == 1.0);
}

#[test]
fn nothing_about_stores_is_shown_without_any() {
    let server =
        Server::builder().archive("base-zstd.hxz").args(["--monitor", "127.0.0.1:0"]).start();
    let seen = status(&server);
    for member in ["stores", "fetched", "read_wait_seconds"] {
        assert!(seen.get(member).is_none(), "{member}");
    }
    assert!(!metrics(&server).keys().any(|name| name.starts_with("hexz_nbd_store_")));
}
