//! Several snapshots at once: their names, a folder of them, and what becomes of files that
//! can't be opened, or are replaced.

mod comparisons;
mod folder;
mod replaced;

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::client::{
    Client, Duplex, INFO_NAME, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT,
    REP_ERR_UNKNOWN, Request, info_data, meta_data, option,
};
use crate::support::server::{Builder, Server, run_to_failure};
use crate::support::structured::{Mode, Question};
use crate::support::{IMAGE_SIZE, archive, image, sha256};

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";
const CHILD_SHA256: &str = "bdfb933e575594c1e7909a1d8cac0836966fad767893806bd8303d0b2ce7c8d1";
const TEXT: &str = "text-dict-zstd.hxz";
const TEXT_SIZE: u64 = 700_000;
const AUXILIARY: &str = "aux-lz4.hxz";

/// A folder with copies of archives, under other names.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in files {
        fs::copy(archive(from), folder.path().join(to)).unwrap();
    }
    folder
}

/// Puts another file under a name, in one step.
fn replace(folder: &Path, name: &str, content: &[u8]) {
    let new = folder.join("new.tmp");
    fs::write(&new, content).unwrap();
    fs::rename(&new, folder.join(name)).unwrap();
}

fn dir(folder: &Path) -> Builder {
    Server::builder().arg("--export-dir").arg(folder)
}

fn is_unknown(server: &Server, name: &str) {
    let mut client = server.greeted();
    let name = name.as_bytes();
    for number in [OPT_INFO, OPT_GO] {
        client.refused(number, &info_data(name, &[]), REP_ERR_UNKNOWN);
    }
    client.refused(OPT_LIST_META_CONTEXT, &meta_data(name, &[]), REP_ERR_UNKNOWN);
    client.send(&option(OPT_EXPORT_NAME, name));
    client.expect_closed();
}

fn first_bytes(server: &Server, name: &str) -> Vec<u8> {
    server.go(name).read_ok(0, 4096)
}

/// The whole of an export of the size that every disk here has, by small reads.
fn read_whole(client: &mut Client<impl Duplex>) -> Vec<u8> {
    (0..IMAGE_SIZE).step_by(1 << 20).flat_map(|at| client.read_ok(at, 1 << 20)).collect()
}

/// `NBD_OPT_LIST`: every stream of every snapshot, under the name that it was given.
#[test]
fn names_and_descriptions() {
    let server = Server::builder()
        .arg(format!("disk={}", archive(BASE).display()))
        .archive(CHILD)
        .archive(AUXILIARY)
        .arg(format!("memo/1={}", archive(TEXT).display()))
        .arg("--raw")
        .start();
    let mut client = server.greeted();
    assert_eq!(client.list(), ["disk", CHILD, AUXILIARY, "aux-lz4.hxz/aux", "memo/1"]);
    let replies = client.option(OPT_LIST, b"");
    let described = |position: usize, words: &str| {
        let text = String::from_utf8_lossy(&replies[position].data).into_owned();
        assert!(text.ends_with(words), "{text}");
    };
    described(0, "main stream, 8.0 MiB, Zstandard");
    described(1, "main stream, 8.0 MiB, Zstandard, thin over base-zstd.hxz");
    described(3, "auxiliary stream, 68.4 KiB, LZ4");

    for (name, size) in [
        ("disk", IMAGE_SIZE),
        (CHILD, IMAGE_SIZE),
        (AUXILIARY, 27),
        ("aux-lz4.hxz/aux", 70_000),
        ("memo/1", TEXT_SIZE),
    ] {
        assert_eq!(server.greeted().go(name).size, size);
    }
    assert_eq!(first_bytes(&server, "disk"), image()[..4096]);
    assert_eq!(sha256(&read_whole(&mut server.go(CHILD))), CHILD_SHA256);
    for name in [BASE, "disk/aux", "disk/", "Disk", "memo", "memo/1/aux", "aux", "/aux"] {
        is_unknown(&server, name);
    }
}

#[test]
fn every_name_once() {
    let named = |name: &str| format!("{name}={}", archive(BASE).display());
    let path = |name: &str| archive(name).into_os_string().into_string().unwrap();
    for (archives, name) in [
        ([path(BASE), path(BASE)], BASE),
        ([named("a"), named("a")], "a"),
        ([path(CHILD), named(CHILD)], CHILD),
        // The second stream of the one would be the first stream of the other.
        ([named("a"), named("a/aux")], "a/aux"),
        ([named("a/aux"), named("a")], "a/aux"),
    ] {
        let twice = Server::builder().args(&archives).fails_with(2, "duplicate_export");
        assert!(twice.contains(&format!("\"{name}\"")), "{twice}");
    }
    for bad in ["=x.hxz", "a=", ""] {
        assert_eq!(run_to_failure([bad]).0, 2);
    }
}

/// A default export is there only where it can't be mistaken.
#[test]
fn the_default_export() {
    let canonical = |server: &Server| {
        let replies = server.greeted().option(OPT_INFO, &info_data(b"", &[INFO_NAME]));
        String::from_utf8(replies[1].data[2..].to_vec()).unwrap()
    };
    let one = Server::builder().archive(AUXILIARY).arg("--raw").start();
    assert_eq!(canonical(&one), AUXILIARY);

    let two = || Server::builder().archive(BASE).archive(AUXILIARY).arg("--raw");
    let server = two().start();
    is_unknown(&server, "");
    assert_eq!(first_bytes(&server, BASE), image()[..4096]);
    for name in [BASE, AUXILIARY, "aux-lz4.hxz/aux"] {
        assert_eq!(canonical(&two().args(["--default-export", name]).start()), name);
    }
    for name in ["nothing", "base", "aux", ""] {
        let unknown = two().args(["--default-export", name]);
        let message = unknown.fails_with(2, "unknown_default_export");
        assert!(message.contains(&format!("\"{name}\"")), "{message}");
    }

    // What is in a folder may change at any time.
    let folder = folder(&[(BASE, BASE)]);
    is_unknown(&dir(folder.path()).start(), "");
    let server = dir(folder.path()).args(["--default-export", "later.hxz"]).start();
    is_unknown(&server, "");
    fs::copy(archive(TEXT), folder.path().join("later.hxz")).unwrap();
    assert_eq!(server.greeted().go("").size, TEXT_SIZE);
    assert_eq!(canonical(&server), "later.hxz");
}

#[test]
fn what_can_not_be_opened_stops_nobody_else() {
    let folder = folder(&[(BASE, "good.hxz"), (TEXT, "alsogood.hxz")]);
    let broken = folder.path().join("broken.hxz");
    fs::write(&broken, "no archive").unwrap();
    let with = |good: &[&str]| {
        let good = good.iter().map(|name| folder.path().join(name));
        Server::builder().arg(&broken).args(good)
    };

    let server = with(&["good.hxz"]).start();
    let line = server.wait_for_reason("not_hexz");
    assert!(line.message().contains("broken.hxz"), "{}", line.text);
    assert_eq!(line.json["level"], "ERROR");
    is_unknown(&server, "broken.hxz");
    // There were two of them, so there is no default export.
    is_unknown(&server, "");
    assert_eq!(server.greeted().list(), ["good.hxz"]);
    assert_eq!(first_bytes(&server, "good.hxz"), image()[..4096]);

    let (code, stderr) = with(&["good.hxz", "alsogood.hxz"]).arg("--strict").fail();
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("broken.hxz"), "{stderr}");
    let (code, stderr) = with(&[]).fail();
    assert_eq!(code, 3, "{stderr}");
    let (code, stderr) = with(&["nothing.hxz"]).fail();
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("broken.hxz") && stderr.contains("nothing.hxz"), "{stderr}");
    // All that are named can be opened.
    let strict = Server::builder().archive(BASE).archive(TEXT).arg("--strict").start();
    assert_eq!(strict.greeted().list(), [BASE, TEXT]);
}

/// What was named can be compared with, however busy it is with other clients.
#[test]
fn snapshots_can_be_compared_while_others_choose_them() {
    let server = Server::builder().archive(BASE).archive("sparse-zstd.hxz").start();
    let context = "hexz:changed:sparse-zstd.hxz";
    std::thread::scope(|scope| {
        let busy: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = server.greeted();
                    let info = option(OPT_INFO, &info_data(b"sparse-zstd.hxz", &[]));
                    for _ in 0..20 {
                        client.send(&info.repeat(50));
                        (0..50).for_each(|_| drop(client.option_replies(OPT_INFO)));
                    }
                })
            })
            .collect();
        while busy.iter().any(|thread| !thread.is_finished()) {
            let mut client = server.greeted();
            Mode::Structured.negotiate(&mut client);
            assert_eq!(client.set_contexts(BASE, &[context]).len(), 1);
            client.go(BASE);
            let question = Question::status(0, 4096);
            client.send(&question.encode(Mode::Structured));
            let outcomes = client.outcomes_in(Mode::Structured, &[question]);
            assert_eq!(outcomes[&question.cookie].number(), 0);
        }
    });
}

/// Clients of several exports at the same time, each with its own bytes.
#[test]
fn several_exports_at_once() {
    let server = Server::builder().archive(BASE).archive(CHILD).archive(TEXT).start();
    let text = server.go(TEXT).read_ok(0, TEXT_SIZE as u32);
    let child = read_whole(&mut server.go(CHILD));
    std::thread::scope(|scope| {
        for (name, expected) in [(BASE, image()), (CHILD, &child), (TEXT, &text)] {
            let server = &server;
            scope.spawn(move || {
                let mut client = server.go(name);
                for round in 0..20 {
                    let at = round * 30_000;
                    let data = client.read_ok(at, 50_000);
                    assert!(data == expected[at as usize..][..50_000], "{name}");
                }
                client.send_request(Request::disc());
                client.stream.socket().set_read_timeout(Duration::from_secs(20));
                client.expect_end();
            });
        }
    });
}
