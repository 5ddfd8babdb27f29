//! Thin archives and their parents.

use std::time::Duration;

use object_server::{Behavior, LoggedRequest, ObjectServer, Script};

use super::{MIB, assert_no_export, assert_serves, gateway, pause, put_file, sandboxed};
use crate::archive_writer::{ArchiveWriter, Piece, noise};
use crate::support::{archive, wait_until};

const CHAIN: [&str; 3] = ["grandchild-zstd.hxz", "child-zstd.hxz", "base-zstd.hxz"];

/// A server with a chain of three in the folder `v7`.
fn chain_of_three() -> ObjectServer {
    let store = ObjectServer::builder().start().unwrap();
    CHAIN.iter().for_each(|name| put_file(&store, &format!("v7/{name}"), name));
    store
}

#[test]
fn opening_a_chain_of_three_takes_few_requests() {
    let store = chain_of_three();
    let args = ["--fresh-for", "4s"];
    let server = gateway().args(args).arg(store.url("v7/grandchild-zstd.hxz")).start();
    let opened = store.log().totals().requests;
    assert!(opened <= 6, "{opened} requests: {:#?}", store.log().entries());
    assert_serves(&server, "", CHAIN[0]);

    // While they are fresh, a client causes none.
    store.log().clear();
    drop(server.go(""));
    assert_eq!(store.log().totals().requests, 0);
    // After that, one for each archive, without a body.
    pause(4100);
    drop(server.go(""));
    let requests = store.log().entries();
    assert_eq!(requests.len(), 3, "{requests:?}");
    for request in &requests {
        assert_eq!((request.status, request.bytes_sent), (304, 0), "{request:?}");
    }
    drop(server.go(""));
    assert_eq!(store.log().totals().requests, 3);
}

/// With the options as they are. The trace is looked for when the archives are open, and no more
/// than that of the archive that is served.
#[test]
fn a_chain_of_three_is_opened_in_three_round_trips() {
    let (store, folder) = (chain_of_three(), tempfile::tempdir().unwrap());
    let round_trip = Duration::from_millis(500);
    store.set_script(Script::always(Behavior::new().delay(round_trip)));
    let builder = || {
        let args = ["--disk-cache-size", "16MiB", "--disk-cache"];
        let builder = sandboxed().args(args).arg(folder.path());
        builder.arg(store.url("v7/grandchild-zstd.hxz"))
    };
    let is_trace = |request: &LoggedRequest| request.path.ends_with(".trace");
    let archives = || {
        wait_until("the trace is looked for", || store.log().entries().iter().any(is_trace));
        let mut requests = store.log().entries();
        let traces: Vec<_> = requests.extract_if(.., |request| is_trace(request)).collect();
        assert_eq!(traces.len(), 1, "{traces:?}");
        assert!(traces[0].path.ends_with("grandchild-zstd.hxz.trace"), "{traces:?}");
        assert!(requests.iter().all(|request| request.received < traces[0].received));
        let first = requests.iter().map(|request| request.received).min().unwrap();
        let last = requests.iter().map(|request| request.received).max().unwrap();
        (requests, last - first)
    };
    let mut server = builder().start();
    let (requests, time) = archives();
    assert_eq!(requests.len(), 6, "{requests:#?}");
    // The requests of the third round trip are sent after two.
    assert!((round_trip * 2..round_trip * 3).contains(&time), "{time:?}");
    assert_serves(&server, "", CHAIN[0]);
    server.terminate();

    // From the disk cache: all are compared with the store at once.
    store.log().clear();
    let mut server = builder().start();
    let (requests, time) = archives();
    assert_eq!(requests.len(), 3, "{requests:#?}");
    for request in &requests {
        assert_eq!((request.status, request.bytes_sent), (304, 0), "{request:?}");
    }
    assert!(time < round_trip, "{time:?}");
    assert_serves(&server, "", CHAIN[0]);
    server.terminate();
}

/// What is opened from the disk cache is compared with the store before it is served.
#[test]
fn a_replaced_archive_of_a_chain_is_noticed_at_the_start() {
    let (store, folder) = (chain_of_three(), tempfile::tempdir().unwrap());
    let builder = || {
        let args = ["--disk-cache-size", "16MiB", "--disk-cache"];
        let builder = gateway().args(args).arg(folder.path());
        builder.arg(store.url("v7/grandchild-zstd.hxz"))
    };
    let mut server = builder().start();
    assert_serves(&server, "", CHAIN[0]);
    server.terminate();
    // Another archive of the same name, without parents.
    put_file(&store, "v7/grandchild-zstd.hxz", "fixed-64k-zstd.hxz");
    let mut server = builder().start();
    assert_serves(&server, "", "fixed-64k-zstd.hxz");
    server.terminate();
    // A parent that is gone.
    put_file(&store, "v7/grandchild-zstd.hxz", CHAIN[0]);
    let mut server = builder().start();
    assert_serves(&server, "", CHAIN[0]);
    server.terminate();
    store.remove("v7/base-zstd.hxz");
    builder().arg("--strict").fails_with(3, "parent_missing");
}

#[test]
fn parents_are_found_in_another_folder_of_a_store() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/child-zstd.hxz", "child-zstd.hxz");
    put_file(&store, "base/base-zstd.hxz", "base-zstd.hxz");
    let folder = store.url("base/");
    for folder in [&folder, folder.trim_end_matches('/')] {
        let builder = gateway().args(["--parent-dir", folder]);
        let server = builder.arg(store.url("v7/child-zstd.hxz")).start();
        assert_serves(&server, "", "child-zstd.hxz");
    }
}

#[test]
fn parents_are_found_in_a_local_folder() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/child-zstd.hxz", "child-zstd.hxz");
    let folder = archive("");
    let builder = gateway().arg("--parent-dir").arg(&folder);
    let server = builder.arg(store.url("v7/child-zstd.hxz")).start();
    assert_serves(&server, "", "child-zstd.hxz");
}

/// The child is a file, its parent isn't.
#[test]
fn parents_of_local_archives_are_found_in_a_store() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "base/base-zstd.hxz", "base-zstd.hxz");
    let folder = tempfile::tempdir().unwrap();
    let child = folder.path().join("child-zstd.hxz");
    std::fs::copy(archive("child-zstd.hxz"), &child).unwrap();
    let server = gateway().args(["--parent-dir", &store.url("base/")]).arg(&child).start();
    assert_serves(&server, "", "child-zstd.hxz");
}

/// The names of parents come from the archive, so from anybody. They select objects beside it, and
/// nothing else.
#[test]
fn a_hostile_name_of_a_parent_leads_nowhere_else() {
    let image = noise(5, 64 * 1024);
    let base = ArchiveWriter::of_image(&image, 64 * 1024).write().bytes;
    let evil = ObjectServer::builder().start().unwrap();
    let evil_url = evil.url("v7/x.hxz");
    for (name, requested) in [
        ("../x.hxz", true),
        ("../../secret/x.hxz", true),
        ("/secret/x.hxz", true),
        (evil_url.as_str(), true),
        ("//evil.invalid/x.hxz", true),
        ("x.hxz?y=z", false),
        ("x.hxz#y", false),
        ("%2e%2e/x.hxz", true),
        ("..%2fx.hxz", false),
        ("..\\x.hxz", false),
        ("..", false),
        ("x.hxz\r\nHost: evil", false),
    ] {
        let store = ObjectServer::builder().start().unwrap();
        for key in ["x.hxz", "secret/x.hxz", "y/x.hxz", "v7/y/x.hxz"] {
            store.put(key, base.clone());
        }
        let writer = ArchiveWriter {
            parents: vec![name.to_owned()],
            main: vec![Piece::InParent(image.clone())],
            ..ArchiveWriter::default()
        };
        store.put("v7/child.hxz", writer.write().bytes);
        let (code, error) = gateway().arg("--strict").arg(store.url("v7/child.hxz")).fail();
        assert_eq!(code, 3, "{name}: {error}");
        let requests = store.log().entries();
        let allowed = ["/v7/child.hxz", "/v7/x.hxz"];
        for request in &requests {
            let path = request.path.as_str();
            let is_allowed = allowed.contains(&path) || path.starts_with("/v7/x.hxz\r\n");
            assert!(is_allowed && request.query.is_empty(), "{name}: {request:?}");
        }
        if !name.contains('\r') {
            let is_requested = requests.iter().any(|request| request.path == allowed[1]);
            assert_eq!(is_requested, requested, "{name}: {requests:?}");
        }
    }
    assert_eq!(evil.log().totals().requests, 0);
}

/// A parent that appears later is found by a later client.
#[test]
fn a_missing_parent_can_be_added() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/child-zstd.hxz", "child-zstd.hxz");
    put_file(&store, "v7/base-zstd.hxz", "base-zstd.hxz");
    store
        .put("v7/other.hxz", ArchiveWriter::of_image(&noise(1, MIB as usize), 65536).write().bytes);
    store.remove("v7/base-zstd.hxz");
    let urls = ["v7/child-zstd.hxz", "v7/other.hxz"].map(|key| store.url(key));
    let server = gateway().args(urls).args(["--fresh-for", "1ms"]).start();
    server.wait_for_reason("parent_missing");
    assert_no_export(&server, "child-zstd.hxz");
    put_file(&store, "v7/base-zstd.hxz", "base-zstd.hxz");
    wait_until("it is found", || super::has_export(&server, "child-zstd.hxz"));
    assert_serves(&server, "child-zstd.hxz", "child-zstd.hxz");
}
