//! Traces: recorded from clients' reads, and replayed when an archive is opened.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use object_server::{Behavior, ObjectServer, Rule, Script};

use super::{BLOCK, MIB, WEB, monitor_page, sample, sandboxed, store};
use crate::support::server::{Server, run};
use crate::support::wait_until;

const TRACE: &str = "images/web.hxz.trace";

/// Blocks in the middle of the sample, which aren't fetched when it is opened.
const TRACED: [u64; 3] = [5 * MIB, 2 * MIB, 2 * MIB + BLOCK];

fn trace() -> String {
    let lines = TRACED.map(|offset| format!("{offset} {BLOCK} 0\n"));
    format!("hexz-trace 1\nexport web main {}\n{}", 8 * MIB, lines.concat())
}

/// A store that has the trace beside the sample.
fn traced_store() -> ObjectServer {
    let store = store();
    store.put(TRACE, trace().into_bytes());
    store
}

fn wait_for_prefetch(server: &Server) {
    server.wait_for_log("the trace was replayed", |line| line.json["wanted"].is_u64());
}

/// Returns the bytes of the archive that were requested, except those that opening it requests.
fn requested(store: &ObjectServer) -> u64 {
    let entries = store.log().entries_for(WEB);
    let archive = entries.iter().filter(|entry| entry.path.ends_with(".hxz"));
    let ranges = archive.filter_map(|entry| entry.requested_range());
    ranges.filter(|range| range.start > 0).map(|range| range.end - range.start).sum()
}

#[test]
fn what_clients_read_is_recorded() {
    let store = store();
    let server =
        sandboxed().arg(format!("web={}", store.url(WEB))).args(["--monitor", "0"]).start();
    let line = server.wait_for_log("the monitor runs", |line| line.json["monitor"].is_string());
    let monitor = line.json["monitor"].as_str().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("web.hxz.trace");
    let is_over = AtomicBool::new(false);
    let record = |export| run(["trace", "record", "--monitor", monitor, "--for", "1s", export]);
    let recorded = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = server.go("web");
            while !is_over.load(Relaxed) {
                TRACED.iter().for_each(|offset| sample().is_read_at(&mut client, *offset));
                super::pause(10);
            }
        });
        let recorded = record("web");
        is_over.store(true, Relaxed);
        recorded
    });
    assert_eq!(recorded.code, Some(0), "{}", recorded.stderr);
    let mut lines: Vec<&str> = recorded.stdout.lines().collect();
    assert_eq!(lines[..2], ["hexz-trace 1", "export web main 8388608"]);
    lines.drain(..2);
    let mut ranges: Vec<(u64, u64)> = lines
        .iter()
        .map(|line| {
            let mut words = line.split(' ').map(|word| word.parse().unwrap());
            (words.next().unwrap(), words.next().unwrap())
        })
        .collect();
    // The recording may begin with any of them.
    ranges.sort_unstable();
    let traced: u64 = ranges.iter().map(|(_, length)| length).sum();
    assert_eq!((traced, ranges[0].0), (3 * BLOCK, 2 * MIB), "{ranges:?}");

    std::fs::write(&file, &recorded.stdout).unwrap();
    let merged = run([Path::new("trace"), Path::new("merge"), &file, &file]);
    assert_eq!(merged.code, Some(0), "{}", merged.stderr);
    let shown = run([Path::new("trace"), Path::new("show"), &file]);
    assert!(shown.stdout.contains("192.0 KiB"), "{}", shown.stdout);
    let broken = folder.path().join("broken");
    std::fs::write(&broken, recorded.stdout + "x\n").unwrap();
    let broken = run([Path::new("trace"), Path::new("show"), &broken]);
    assert_eq!(broken.code, Some(1));
    assert!(broken.stderr.contains("expected an offset"), "{}", broken.stderr);
}

#[test]
fn a_recording_needs_the_name_of_an_export_and_a_monitor() {
    let server = Server::builder().archive("base-zstd.hxz").args(["--monitor", "0"]).start();
    for target in ["/trace", "/trace?export=", "/trace?export=%ff"] {
        let page = monitor_page(&server, target);
        assert!(page.starts_with("HTTP/1.1 400"), "{page}");
    }
    let monitor = format!("unix:{}/no.socket", tempfile::tempdir().unwrap().path().display());
    let ended = run(["trace", "record", "--monitor", &monitor, "web"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("start the server with --monitor"), "{}", ended.stderr);
}

#[test]
fn a_trace_is_replayed_when_its_archive_is_opened() {
    let store = traced_store();
    let server = sandboxed().arg(store.url(WEB)).start();
    wait_for_prefetch(&server);
    // 64 KiB of noise take a little more; the two neighbors lie in two parts of 256 KiB at most.
    let fetched = requested(&store);
    assert!((MIB / 2..=5 * MIB / 4).contains(&fetched), "{fetched}");
    assert_eq!(store.log().entries_for(TRACE).len(), 1);
    store.log().clear();
    let mut client = server.go("");
    TRACED.iter().for_each(|offset| sample().is_read_at(&mut client, *offset));
    assert_eq!(requested(&store), 0, "{:?}", store.log().entries());
    sample().is_read(&mut client);
}

#[test]
fn traces_may_be_in_a_folder_or_off() {
    let store = store();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("web.hxz.trace"), trace()).unwrap();
    let server = sandboxed().arg(store.url(WEB)).arg("--traces").arg(folder.path()).start();
    wait_for_prefetch(&server);
    assert!(store.log().entries_for(TRACE).is_empty());
    drop(server);

    let store = traced_store();
    let server = sandboxed().arg(store.url(WEB)).args(["--traces", "off"]).start();
    sample().is_read(&mut server.go(""));
    assert!(store.log().entries_for(TRACE).is_empty());
}

#[test]
fn a_trace_that_cannot_be_used_is_named() {
    let store = store();
    store.put(TRACE, b"hexz-trace 1\nexport web main 4096\n".to_vec());
    let server = sandboxed().arg(store.url(WEB)).start();
    let line = server.wait_for_log("it is named", |line| line.reason() == "trace_unusable");
    assert!(line.message().contains("web.hxz.trace: it was recorded"), "{}", line.text);
    sample().is_read(&mut server.go(""));
}

/// As S3 answers for objects that don't exist, without permission to list.
#[test]
fn a_trace_to_which_access_is_denied_counts_as_missing() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    let is_denied = Rule::new(Behavior::status(403)).path(TRACE);
    store.set_script(Script::new().rule(is_denied));
    let cache = folder.path().to_str().unwrap();
    let url = store.url(WEB);
    let ended = run(["warm", "--disk-cache", cache, "--disk-cache-size", "16MiB", &url]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("of    8."), "{}", ended.stdout);

    let server = sandboxed().arg(url).arg("-v").start();
    server.wait_for_log("it is looked for", |line| line.message().contains("no trace is used"));
    sample().is_read(&mut server.go(""));
    assert!(!server.log_text().contains("trace_unusable"), "{}", server.log_text());
}

#[test]
fn the_server_is_ready_when_it_is_warm() {
    let store = traced_store();
    let is_down = Rule::new(Behavior::status(503)).path(TRACE);
    store.set_script(Script::new().rule(is_down));
    let server =
        sandboxed().arg(store.url(WEB)).args(["--monitor", "0", "--ready-when", "warm"]).start();
    let page = monitor_page(&server, "/readyz");
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("warming up"), "{page}");
    // Clients are served nevertheless.
    sample().is_read_at(&mut server.go(""), 0);
    store.set_script(Script::new());
    wait_until("it is ready", || monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
    wait_for_prefetch(&server);
}

#[test]
fn a_cache_that_was_filled_before_serves_without_requests() {
    let (store, folder) = (store(), tempfile::tempdir().unwrap());
    let cache = folder.path().to_str().unwrap();
    let warm = |more: &[&str]| {
        let url = store.url(WEB);
        let args = ["warm", "--disk-cache", cache, "--disk-cache-size", "16MiB", &url];
        let ended = run(args.iter().chain(more));
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        ended.stdout
    };
    let first = warm(&[]);
    assert!(first.contains("of    8.") && first.contains("web.hxz"), "{first}");
    assert!(warm(&[]).trim_start().starts_with("0 B of"));
    store.log().clear();
    let server = sandboxed()
        .arg(store.url(WEB))
        .args(["--disk-cache-size", "16MiB", "--disk-cache", cache])
        .start();
    sample().is_read(&mut server.go(""));
    assert_eq!(store.log().totals().data_bytes, 0, "{:?}", store.log().entries());
    drop(server);

    let local = run(["warm", "--disk-cache", cache, "local.hxz"]);
    assert_eq!(local.code, Some(2), "{}", local.stderr);
}

#[test]
fn only_what_a_trace_names_is_kept() {
    let (store, folder) = (traced_store(), tempfile::tempdir().unwrap());
    let cache = folder.path().to_str().unwrap();
    let ended = run(["warm", "--disk-cache", cache, "--disk-cache-size", "16MiB", &store.url(WEB)]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let fetched = requested(&store);
    assert!((MIB / 2..=5 * MIB / 4).contains(&fetched), "{fetched}");
}
