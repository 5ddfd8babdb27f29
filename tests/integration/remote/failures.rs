//! Requests that fail now and then: clients read the right bytes.

use std::thread;
use std::time::{Duration, Instant};

use object_server::{Behavior, DelayProxy, Link, ObjectServer, Rule, Script};

use super::{BLOCK, MIB, WEB, gateway, gateway_of, monitor_page, sample, store};
use crate::support::client::EIO;
use crate::support::server::run;

/// Reads all of the sample while some requests fail, and returns how long that took.
fn recovers(store: &ObjectServer, rule: Rule) -> Duration {
    let server = gateway_of(store).args(["--store-timeout", "20s"]).start();
    store.set_script(Script::new().rule(rule));
    let begin = Instant::now();
    sample().is_read(&mut server.go(""));
    assert!(server.log().iter().all(|line| line.json["level"] != "ERROR"), "{}", server.log_text());
    begin.elapsed()
}

/// In a third of the cases, the store wants a second of rest, which it gets.
#[test]
fn throttling() {
    let offsets: Vec<u64> = [3, 6, 1, 4, 2, 5].map(|part| part * MIB).into();
    // Each is of a request of its own, read by two clients at a time.
    let read = |store: &ObjectServer, rule: Option<Rule>| {
        let server = gateway_of(store).start();
        store.set_script(rule.map_or_else(Script::new, |rule| Script::new().rule(rule)));
        store.log().clear();
        thread::scope(|scope| {
            for offsets in offsets.chunks(3) {
                let server = &server;
                scope.spawn(move || {
                    let mut client = server.go("");
                    offsets.iter().for_each(|&at| sample().is_read_at(&mut client, at + 65536));
                });
            }
        });
        store.log().totals()
    };
    let store = store();
    let undisturbed = read(&store, None);
    let throttled = Rule::new(Behavior::status(503).retry_after(1)).percent(30);
    let totals = read(&store, Some(throttled));
    assert!(totals.errors > 0);
    // Each failure needs one more, and some of these fail too.
    let needed = undisturbed.requests as f64 / 0.7;
    assert!(totals.requests as f64 <= (needed * 1.1).ceil(), "{totals:?}, {undisturbed:?}");
    assert!(totals.data_bytes <= undisturbed.data_bytes, "{totals:?}, {undisturbed:?}");
}

#[test]
fn a_body_that_stalls() {
    let stalled = Behavior::new().stall_after(100_000);
    let took = recovers(&store(), Rule::new(stalled).skip(1).times(2));
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[test]
fn headers_that_never_come() {
    let silent = Behavior::new().delay(Duration::from_secs(3600));
    let took = recovers(&store(), Rule::new(silent).skip(1).times(1));
    assert!(took < Duration::from_secs(19), "{took:?}");
}

#[test]
fn a_slow_body_is_no_failure() {
    let slow = Behavior::new().pause_after(200_000, Duration::from_millis(1500));
    recovers(&store(), Rule::new(slow).skip(1).times(2));
}

/// Requests may take longer than readers wait. What arrives is kept, and the store isn't "down".
#[test]
fn a_slow_link_is_no_failure() {
    let store = store();
    let link = Link { bytes_per_second: Some(1_000_000), ..Link::default() };
    let proxy = DelayProxy::start(store.address(), link).unwrap();
    let server = gateway()
        .args(["--store-timeout", "2s", "--monitor", "0", "--fetch-size", "4MiB"])
        .arg(format!("http://{}/{WEB}", proxy.address()))
        .start();
    let mut client = server.go("");
    // A request for 4 MiB takes 4 s. Its first parts don't wait for the last ones.
    sample().is_read_at(&mut client, 4 * MIB + BLOCK);
    let mut failed = 0;
    while client.read(7 * MIB, BLOCK as u32).is_err() {
        failed += 1;
        assert!(failed < 4);
    }
    let data = store.log().totals().data_bytes;
    [4, 5, 6, 7].iter().for_each(|part| sample().is_read_at(&mut client, part * MIB + BLOCK));
    assert_eq!(store.log().totals().data_bytes, data);
    let metrics = monitor_page(&server, "/metrics");
    assert!(!metrics.contains("result=\"timed_out\"") && metrics.contains("result=\"ok\""));
    assert!(!server.has_reason("store_down"));
}

/// The rest of a response that broke off is requested, and nothing twice.
#[test]
fn a_body_that_breaks_off() {
    let store = store();
    let server = gateway_of(&store).start();
    let mut client = server.go("");
    let rule = Rule::new(Behavior::new().truncate_after(600_000)).times(1);
    store.set_script(Script::new().rule(rule));
    store.log().clear();
    sample().is_read_at(&mut client, 4 * MIB + 12 * BLOCK);
    let ranges = store.log().entries().into_iter().filter_map(|it| it.requested_range());
    let ranges: Vec<_> = ranges.collect();
    assert_eq!(ranges, [4 * MIB..5 * MIB, 4 * MIB + MIB / 2..5 * MIB]);
}

#[test]
fn short_bodies() {
    recovers(&store(), Rule::new(Behavior::new().truncate_after(70_000)).percent(40).times(6));
    recovers(&store(), Rule::new(Behavior::new().truncate_after(0)).percent(40).times(6));
}

#[test]
fn dropped_connections() {
    recovers(&store(), Rule::new(Behavior::drop_connection()).percent(50).times(6));
}

#[test]
fn errors_of_the_server() {
    for status in [500, 502, 504, 429, 408] {
        recovers(&store(), Rule::new(Behavior::status(status)).percent(40).times(3));
    }
}

/// Connections that the server closes while they are idle are opened again.
#[test]
fn idle_connections_that_were_closed() {
    let store = store();
    let server = gateway_of(&store).start();
    let mut client = server.go("");
    for part in 1..7 {
        store.disconnect_all();
        sample().is_read_at(&mut client, part * MIB);
    }
    assert!(!server.log().iter().any(|line| line.json["level"] == "ERROR"));
}

/// Only what is read from the part that can't be had fails; the client stays connected.
#[test]
fn a_part_that_cannot_be_had() {
    let store = store();
    let server = gateway_of(&store).args(["--store-timeout", "1s"]).start();
    let broken = Rule::new(Behavior::status(500)).overlapping(4 * MIB..4 * MIB + 1);
    store.set_script(Script::new().rule(broken));
    let mut client = server.go("");
    assert_eq!(client.read(4 * MIB, 4096), Err(EIO));
    for offset in [0, 2 * MIB, 6 * MIB, 7 * MIB + BLOCK] {
        sample().is_read_at(&mut client, offset);
    }
    server.wait_for_log("the store failed", |line| line.reason().starts_with("store_"));
    store.set_script(Script::new());
    sample().is_read(&mut client);
}

/// Somebody waits for the result, and a store that can't be connected to probably has another name
/// or port. All of these took `--store-timeout`.
#[test]
fn commands_give_up_if_they_never_reach_the_store() {
    let plain = store();
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unknown_ca = ObjectServer::builder().https().start().unwrap();
    let not_tls = plain.url(WEB).replace("http://", "https://");
    let refused = format!("http://{unused}/{WEB}");
    for (command, url) in [
        ("verify", &not_tls),
        ("digest", &refused),
        ("inspect", &unknown_ca.url(WEB)),
        ("inspect", &"https://no-such-host.invalid/web.hxz".to_owned()),
    ] {
        let begun = Instant::now();
        let args = [command, "--log-format", "json", "--store-timeout", "10min", url];
        let ended = run(args);
        assert_eq!(ended.code, Some(3), "{url}: {}", ended.stderr);
        assert!(ended.stderr.contains("\"store_down\""), "{}", ended.stderr);
        assert!(begun.elapsed() > Duration::from_secs(2), "{url}: without retries");
    }
    // A store that is reached may be down for a while.
    plain.set_script(Script::new().rule(Rule::new(Behavior::status(500)).times(8)));
    let ended = run(["verify", &plain.url(WEB)]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}
