//! Tests that compare whole screens.

use serde_json::json;

use super::lines::Style;
use super::view::{Frame, Sort, TableSelection, ViewOptions, plain, screen};
use crate::monitor::Status;

const NOW: f64 = 1_795_600_000.0;

/// Returns the status of a server at `second`, with counters that grow steadily.
fn status(second: u64) -> Status {
    let reads = |all: u64| json!({ "count": all, "buckets": [[0.000_1, all / 2], [0.001, all * 9 / 10], [0.01, all]] });
    let status = json!({
        "format": 1, "version": "0.1.0", "pid": 1, "ready": true, "listen": ["127.0.0.1:10809"],
        "now": NOW + second as f64, "started": NOW - 90_000.0,
        "tls": { "certificate_expires": NOW + 20.5 * 86_400.0 },
        "connections_total": { "reading": 2, "negotiating": 1, "accepted": 40,
            "refused": { "address": 12, "full": 3 }, "failed": {}, "handshake_failures": { "no certificate": 7 } },
        "connections": [
            { "id": 7, "state": "reading", "peer": "10.1.2.3", "via": "192.0.2.1", "identity": "uri:spiffe://example.org/backup/7",
              "export": "web.hexz", "tls": "TLS 1.3", "since": NOW - 60.0, "requests": 100 * second, "bytes": 1_048_576 * second,
              "in_flight": 4, "errors": 0 },
            { "id": 8, "state": "reading", "peer": "10.1.2.4", "identity": "cn:\u{1b}[31m<b>", "export": "db.hexz", "tls": "TLS 1.2",
              "since": NOW - 3700.0, "requests": 300 * second, "bytes": 409_600 * second, "in_flight": 0, "errors": 2 },
            { "id": 9, "state": "negotiating", "peer": "10.1.2.5", "since": NOW },
        ],
        "exports": [
            { "name": "db.hexz", "size": 8_589_934_592_u64, "readers": 1, "requests": { "read": 290 * second, "other": 10 * second },
              "bytes": 409_600 * second, "errors": 2, "read_seconds": reads(300 * second) },
            { "name": "web.hexz", "size": null, "readers": 1, "requests": { "read": 100 * second }, "bytes": 1_048_576 * second,
              "errors": 0, "read_seconds": reads(100 * second) },
        ],
        "cache": { "bytes": 209_715_200, "capacity": 268_435_456, "hits": 90 * second, "misses": 10 * second },
        "memory": { "resident": 262_144_000, "budget": 268_435_456, "in_flight": 0 },
        "verification_failures": { "crc32": 1 },
        "reloads": { "succeeded": 1, "failed": 0 },
        "recent_errors": [{ "at": NOW, "message": "db.hexz, byte 20552: the stored block is damaged" }],
    });
    serde_json::from_value(status).unwrap()
}

fn text(columns: usize, height: usize, choice: ViewOptions, error: Option<&str>) -> String {
    let (before, now) = (status(10), status(14));
    let rates = [0.0, 1e5, 7e5, 1.4e6];
    let error = error.map(str::to_owned);
    let frame = Frame { latest: Some(&now), earlier: Some((&before, 4.0)), rates: &rates, error };
    let lines = screen(&frame, &choice, columns, height);
    assert_eq!(lines.len(), height);
    assert!(lines.iter().all(|line| line.width() <= columns));
    lines.iter().map(super::lines::StyledLine::text).collect::<Vec<_>>().join("\n")
}

#[test]
fn wide_terminals_show_all_columns() {
    let expected = r"hexz-nbd 0.1.0   127.0.0.1:10809   up 1 d 1 h
read 1.4 MiB/s   requests 400/s   2 reading, 1 negotiating   cache hits 90.0 %   cache 200 MiB of 256 MiB   resident 250 MiB of 256 MiB
certificate expires in 20 days
refused: address 12, full 3   TLS: no certificate 7   unreadable blocks: crc32 1
last error, 14 s ago: db.hexz, byte 20552: the stored block is damaged
▁▁▄█ max 1.3 MiB/s
EXPORTS 2
NAME         SIZE  READERS       RATE  REQUESTS  READ P50     P99  TOTAL READ  ERRORS
web.hexz        –        1  1.0 MiB/s     100/s    100 µs  9.1 ms    14.0 MiB       0
db.hexz   8.0 GiB        1  400 KiB/s     300/s    100 µs  9.1 ms     5.5 MiB       2
CONNECTIONS 3
IDENTITY               PEER                   EXPORT    STATE        TLS        DURATION       RATE  REQUESTS  IN FLIGHT  TOTAL READ  ERRORS
uri:spiffe://example…  10.1.2.3 via 192.0.2…  web.hexz  reading      TLS 1.3  1 min 14 s  1.0 MiB/s     100/s          4    14.0 MiB       0
cn:\u{1b}[31m<b>       10.1.2.4               db.hexz   reading      TLS 1.2   1 h 1 min  400 KiB/s     300/s          0     5.5 MiB       2
unknown yet            10.1.2.5               –         negotiating  none           14 s      0 B/s       0/s          0         0 B       0




q quit   s sort: rate   e exports, connections   arrows scroll";
    assert_eq!(text(140, 20, ViewOptions::default(), None), expected);
}

#[test]
fn narrow_terminals_drop_columns_by_rank() {
    let expected = r"hexz-nbd 0.1.0   127.0.0.1:10809   up 1 d 1 h
read 1.4 MiB/s   requests 400/s   2 reading, 1 negotiating
cache hits 90.0 %   cache 200 MiB of 256 MiB
resident 250 MiB of 256 MiB   certificate expires in 20 days
refused: address 12, full 3   TLS: no certificate 7
unreadable blocks: crc32 1
last error, 14 s ago: db.hexz, byte 20552: the stored block…
▁▁▄█ max 1.3 MiB/s
EXPORTS 2
NAME         SIZE  READERS       RATE  REQUESTS  ERRORS
db.hexz   8.0 GiB        1  400 KiB/s     300/s       2
web.hexz        –        1  1.0 MiB/s     100/s       0
CONNECTIONS 3
IDENTITY              PEER                      RATE  ERRORS
cn:\u{1b}[31m<b>      10.1.2.4             400 KiB/s       2
unknown yet           10.1.2.5                 0 B/s       0
uri:spiffe://exampl…  10.1.2.3 via 192.0…  1.0 MiB/s       0


q quit   s sort: errors   e exports, connections   arrows s…";
    assert_eq!(
        text(60, 20, ViewOptions { sort: Sort::Errors, ..ViewOptions::default() }, None),
        expected
    );
}

#[test]
fn long_lists_can_be_scrolled() {
    let choice = ViewOptions { sort: Sort::Name, show: TableSelection::Connections, skip: 900 };
    let expected = r"hexz-nbd 0.1.0   127.0.0.1:10809   up 1 d 1 h
nobody is there
read 1.4 MiB/s   requests 400/s   2 reading, 1 negotiating   cache hits 90.0 %
cache 200 MiB of 256 MiB   resident 250 MiB of 256 MiB
certificate expires in 20 days
▁▁▄█ max 1.3 MiB/s
CONNECTIONS 3   2 more above, 0 below
IDENTITY              PEER                 EXPORT         RATE  REQUESTS  ERRORS
uri:spiffe://exampl…  10.1.2.3 via 192.0…  web.hexz  1.0 MiB/s     100/s       0
q quit   s sort: name   e exports, connections   arrows scroll";
    assert_eq!(text(80, 10, choice, Some("nobody is there")), expected);
    // No size is too small.
    for (columns, height) in [(0, 0), (1, 1), (5, 3), (20, 8), (39, 12)] {
        text(columns, height, choice, Some("nobody is there"));
    }
}

#[test]
fn errors_are_shown_before_the_first_answer() {
    let frame =
        Frame { latest: None, earlier: None, rates: &[], error: Some("nobody\u{7}".to_owned()) };
    let lines = screen(&frame, &ViewOptions::default(), 80, 4);
    assert_eq!(lines[0].0, [(Style::Bad, r"nobody\u{7}".to_owned())]);
}

#[test]
fn output_to_a_pipe_is_not_cut() {
    let (before, now) = (status(10), status(14));
    let frame =
        Frame { latest: Some(&now), earlier: Some((&before, 4.0)), rates: &[1.0], error: None };
    let lines =
        plain(&frame).iter().map(super::lines::StyledLine::text).collect::<Vec<_>>().join("\n");
    let expected = r"hexz-nbd 0.1.0   127.0.0.1:10809   up 1 d 1 h
read 1.4 MiB/s   requests 400/s   2 reading, 1 negotiating   cache hits 90.0 %
cache 200 MiB of 256 MiB   resident 250 MiB of 256 MiB   certificate expires in 20 days
refused: address 12, full 3   TLS: no certificate 7   unreadable blocks: crc32 1
last error, 14 s ago: db.hexz, byte 20552: the stored block is damaged

EXPORTS 2
NAME         SIZE  READERS       RATE  REQUESTS  READ P50     P99  TOTAL READ  ERRORS
web.hexz        –        1  1.0 MiB/s     100/s    100 µs  9.1 ms    14.0 MiB       0
db.hexz   8.0 GiB        1  400 KiB/s     300/s    100 µs  9.1 ms     5.5 MiB       2

CONNECTIONS 3
IDENTITY                           PEER                    EXPORT    STATE        TLS        DURATION       RATE  REQUESTS  IN FLIGHT  TOTAL READ  ERRORS
uri:spiffe://example.org/backup/7  10.1.2.3 via 192.0.2.1  web.hexz  reading      TLS 1.3  1 min 14 s  1.0 MiB/s     100/s          4    14.0 MiB       0
cn:\u{1b}[31m<b>                   10.1.2.4                db.hexz   reading      TLS 1.2   1 h 1 min  400 KiB/s     300/s          0     5.5 MiB       2
unknown yet                        10.1.2.5                –         negotiating  none           14 s      0 B/s       0/s          0         0 B       0";
    assert_eq!(lines, expected);
}

/// Counters may have any value: sums must not overflow.
#[test]
fn extreme_counters_do_not_overflow() {
    let (before, mut now) = (status(10), status(14));
    for count in
        [&mut now.cache.hits, &mut now.cache.misses, &mut now.gateway.connections_total.accepted]
    {
        *count = u64::MAX;
    }
    for export in &mut now.gateway.exports {
        export.bytes = u64::MAX;
        (export.requests.read, export.requests.other) = (u64::MAX, u64::MAX);
        export.read_seconds.count = u64::MAX;
    }
    let frame =
        Frame { latest: Some(&now), earlier: Some((&before, 4.0)), rates: &[], error: None };
    let text: String = plain(&frame).iter().map(super::lines::StyledLine::text).collect();
    assert!(text.contains("cache hits 100 %"), "{text}");
}

/// Returns the status of a server that has stores, the last of which is down.
fn with_stores(second: u64, count: usize) -> Status {
    let mut status = status(second);
    let store = |number: usize| {
        json!({
            "name": format!("s3://golden-{number}"),
            "requests": { "demand": { "ok": 10 * second }, "ahead": { "ok": 2 * second, "throttled": 1 } },
            "bytes": { "demand": 1_048_576 * second },
            "request_seconds": { "count": 12 * second, "buckets": [[0.01, 0], [0.05, 12 * second]] },
            "in_flight": 2, "queued": 3, "limit": 16,
            "throttled": if number == 1 { second } else { 1 },
            "retries": 4, "breaker": if number + 1 == count { "open" } else { "closed" },
            "credentials_expire": (number == 0).then_some(NOW + 3600.0),
        })
    };
    status.remote.stores =
        serde_json::from_value((0..count).map(store).collect::<Vec<_>>().into()).unwrap();
    status
}

fn store_lines(count: usize) -> String {
    let (before, now) = (with_stores(10, count), with_stores(14, count));
    let frame =
        Frame { latest: Some(&now), earlier: Some((&before, 4.0)), rates: &[], error: None };
    let lines = plain(&frame);
    let lines = lines.iter().map(super::lines::StyledLine::text);
    lines.filter(|line| line.starts_with("store")).collect::<Vec<_>>().join("\n")
}

#[test]
fn each_store_has_a_line() {
    assert_eq!(store_lines(0), "");
    let expected = "\
store s3://golden-0 working   1.0 MiB/s   12/s   p95 48 ms   received 14.0 MiB   queued 3
store s3://golden-1 throttled   1.0 MiB/s   12/s   p95 48 ms   received 14.0 MiB   queued 3
store s3://golden-2 down   1.0 MiB/s   12/s   p95 48 ms   received 14.0 MiB   queued 3   retries 4";
    assert_eq!(store_lines(3), expected);
}

#[test]
fn many_stores_are_summarized() {
    let lines = store_lines(6);
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[0], "stores 6   4 working   1 throttled   1 down");
    assert!(lines[1].starts_with("store s3://golden-5 down   "), "{lines:?}");
    assert!(lines[2].starts_with("store s3://golden-1 throttled   "), "{lines:?}");
    assert_eq!(lines.len(), 3);
}

#[test]
fn client_certificates_that_expire_soon_are_named() {
    let mut now = status(14);
    let shown = |now: &Status| {
        let rates = [0.0; 4];
        let frame = Frame { latest: Some(now), earlier: None, rates: &rates, error: None };
        let lines = screen(&frame, &ViewOptions::default(), 200, 20);
        lines.iter().map(super::lines::StyledLine::text).collect::<Vec<_>>().join("\n")
    };
    assert!(!shown(&now).contains("client certificate"));
    let expiring = |left: f64| json!([{ "identity": "dns:\u{1b}a", "expires": NOW + 14.0 + left }]);
    for (left, soon, expired, expected) in [
        (3.5 * 86_400.0, 1, 0, "client certificate of dns:\\u{1b}a expires in 3 d 12 h"),
        (3.5 * 86_400.0, 2, 1, "client certificate of dns:\\u{1b}a expires in 3 d 12 h (2 more)"),
        (-1.0, 0, 1, "client certificate of dns:\\u{1b}a expired"),
    ] {
        let clients =
            json!({ "expires_soon": soon, "expired": expired, "expiring": expiring(left) });
        now.gateway.client_certificates = serde_json::from_value(clients).unwrap();
        let shown = shown(&now);
        assert!(shown.contains(expected), "{expected} isn't in {shown}");
    }
}
