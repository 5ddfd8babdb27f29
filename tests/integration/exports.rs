//! Several snapshots at once: their names, a folder of them, and what becomes of files that
//! can't be opened, or are replaced.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use crate::support::client::{
    Client, Duplex, INFO_NAME, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST, OPT_LIST_META_CONTEXT,
    REP_ERR_UNKNOWN, Request, info_data, meta_data, option,
};
use crate::support::server::{Builder, Server, run_to_failure};
use crate::support::structured::{Mode, Question};
use crate::support::{IMAGE_SIZE, PASSWORD, archive, image, sha256, wait_until};

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
        let (code, stderr) = run_to_failure(&archives);
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(&format!("\"{name}\"")), "{stderr}");
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
        let (code, stderr) = two().args(["--default-export", name]).fail();
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("default export") && stderr.contains(name), "{stderr}");
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
fn a_folder_is_looked_through_when_it_is_asked_for() {
    let folder = folder(&[(BASE, "b.hxz"), (TEXT, "a.hexz")]);
    fs::write(folder.path().join("notes.txt"), "x").unwrap();
    fs::copy(archive(BASE), folder.path().join("disk.img")).unwrap();
    let server = dir(folder.path()).archive(AUXILIARY).arg("--raw").start();
    let listed = |expected: &[&str]| assert_eq!(server.greeted().list(), expected);
    listed(&[AUXILIARY, "aux-lz4.hxz/aux", "a.hexz", "b.hxz"]);
    assert_eq!(first_bytes(&server, "b.hxz"), image()[..4096]);
    for name in ["notes.txt", "disk.img", "c.hxz", "c.hxz/aux", "b.hxz/aux", "a", "A.HEXZ"] {
        is_unknown(&server, name);
    }

    // One comes, one goes; whoever reads it goes on.
    let mut reader = server.go("b.hxz");
    fs::copy(archive(AUXILIARY), folder.path().join("c.hxz")).unwrap();
    fs::remove_file(folder.path().join("b.hxz")).unwrap();
    listed(&[AUXILIARY, "aux-lz4.hxz/aux", "a.hexz", "c.hxz", "c.hxz/aux"]);
    assert_eq!(server.greeted().go("c.hxz/aux").size, 70_000);
    is_unknown(&server, "b.hxz");
    assert!(read_whole(&mut reader) == image());
    // The name that the operator gave comes first.
    fs::copy(archive(TEXT), folder.path().join(AUXILIARY)).unwrap();
    assert_eq!(server.greeted().go(AUXILIARY).size, 27);
    listed(&[AUXILIARY, "aux-lz4.hxz/aux", "a.hexz", "c.hxz", "c.hxz/aux"]);
}

/// A name is one of the folder's own files, whatever it looks like.
#[test]
fn a_name_can_not_leave_the_folder() {
    let outside = folder(&[(BASE, "secret.hxz")]);
    let secret = outside.path().join("secret.hxz");
    let inside = outside.path().join("exports");
    fs::create_dir_all(inside.join("sub.hxz")).unwrap();
    fs::copy(&secret, inside.join("sub.hxz/nested.hxz")).unwrap();
    fs::copy(&secret, inside.join("good.hxz")).unwrap();
    symlink(&secret, inside.join("link.hxz")).unwrap();
    symlink("good.hxz", inside.join("near.hxz")).unwrap();
    symlink(outside.path(), inside.join("folder.hxz")).unwrap();
    symlink("/dev/zero", inside.join("zero.hxz")).unwrap();
    let pipe = inside.join("pipe.hxz");
    let mut mkfifo = std::process::Command::new("mkfifo");
    assert!(mkfifo.arg(&pipe).status().unwrap().success());

    let server = dir(&inside).start();
    assert_eq!(server.greeted().list(), ["good.hxz"]);
    for name in [
        "../secret.hxz",
        "./good.hxz",
        "good.hxz/",
        "good.hxz/.",
        "/good.hxz",
        "//good.hxz",
        "sub.hxz",
        "sub.hxz/nested.hxz",
        "sub.hxz/../good.hxz",
        "sub.hxz/../../secret.hxz",
        "folder.hxz/secret.hxz",
        "link.hxz",
        "near.hxz",
        "zero.hxz",
        // It must not wait for a writer either.
        "pipe.hxz",
        "..",
        ".",
        "/",
        "good.hxz\0",
        "good.hxz\0.hxz",
        "..\\secret.hxz",
        "%2e%2e/secret.hxz",
        secret.to_str().unwrap(),
        "../exports/good.hxz",
        "../secret.hxz/aux",
        "/aux",
    ] {
        is_unknown(&server, name);
    }
    assert_eq!(first_bytes(&server, "good.hxz"), image()[..4096]);
    let log = server.log_text();
    assert!(!log.contains("\"ERROR\""), "{log}");
}

/// A link that takes a file's place is no file any more.
#[test]
fn a_file_that_becomes_a_link_is_served_no_more() {
    let folder = folder(&[(BASE, "a.hxz"), (TEXT, "outside.img")]);
    let server = dir(folder.path()).start();
    assert_eq!(first_bytes(&server, "a.hxz"), image()[..4096]);
    symlink(folder.path().join("outside.img"), folder.path().join("link")).unwrap();
    fs::rename(folder.path().join("link"), folder.path().join("a.hxz")).unwrap();
    is_unknown(&server, "a.hxz");
    assert!(server.greeted().list().is_empty());
}

/// More than are kept open at once.
#[test]
fn a_folder_of_many() {
    const COUNT: usize = 140;
    let folder = tempfile::tempdir().unwrap();
    let name = |number: usize| format!("{number:03}.hxz");
    for number in 0..COUNT {
        fs::copy(archive(AUXILIARY), folder.path().join(name(number))).unwrap();
    }
    let server = dir(folder.path()).arg("--raw").start();
    let mut old = server.go(&name(0));
    assert_eq!(server.greeted().list().len(), 2 * COUNT);
    for number in [0, COUNT / 2, COUNT - 1, 0] {
        assert_eq!(server.go(&name(number)).read_ok(0, 5), b"hello");
    }
    assert_eq!(old.read_ok(0, 5), b"hello");
}

#[test]
fn a_folder_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().join("nothing"), archive(BASE)] {
        let (code, stderr) = dir(&path).fail();
        assert_eq!(code, 3, "{stderr}");
        assert!(stderr.contains(path.to_str().unwrap()), "{stderr}");
    }
    // An empty one may fill.
    let server = dir(folder.path()).start();
    assert!(server.greeted().list().is_empty());
    fs::copy(archive(BASE), folder.path().join("a.hxz")).unwrap();
    assert_eq!(server.greeted().list(), ["a.hxz"]);
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
    let line = server.wait_for_message("left out");
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

/// Whoever asks for it again and again must not fill the log.
#[test]
fn a_broken_archive_in_a_folder_is_logged_once() {
    let folder = folder(&[(BASE, "good.hxz")]);
    fs::write(folder.path().join("broken.hxz"), "no archive").unwrap();
    let server = dir(folder.path()).start();
    for _ in 0..50 {
        assert_eq!(server.greeted().list(), ["good.hxz"]);
        is_unknown(&server, "broken.hxz");
    }
    let line = server.wait_for_message("can't be served");
    assert!(line.message().contains("broken.hxz"), "{}", line.text);
    assert_eq!(server.log_text().matches("can't be served").count(), 1);
    // It is one that can be opened now.
    replace(folder.path(), "broken.hxz", &fs::read(archive(TEXT)).unwrap());
    assert_eq!(server.greeted().go("broken.hxz").size, TEXT_SIZE);
    assert_eq!(server.greeted().list(), ["broken.hxz", "good.hxz"]);
}

/// Nothing is cached when the file is replaced: what the old client reads comes from the
/// file that has no name any more.
#[test]
fn a_replaced_file_is_read_on_by_those_who_have_it() {
    let of_child = fs::read(archive(CHILD)).unwrap();
    for in_folder in [false, true] {
        for (kind, more) in
            [("fixed-4k-zstd.hxz", &[][..]), (BASE, &[]), ("encrypted-lz4.hxz", &[PASSWORD])]
        {
            let folder = folder(&[(kind, "disk.hxz"), (BASE, BASE)]);
            let path = folder.path().join("disk.hxz");
            let builder = if in_folder {
                dir(folder.path())
            } else {
                Server::builder().arg(&path).arg("--parent-dir").arg(folder.path())
            };
            let password = more.iter().map(|password| ("HEXZ_PASSWORD", *password));
            let server = password.fold(builder, |builder, (key, value)| builder.env(key, value));
            let server = server.start();
            let mut old = server.go("disk.hxz");
            replace(folder.path(), "disk.hxz", &of_child);

            let mut new = server.go("disk.hxz");
            let (mut old_bytes, mut new_bytes) = (Vec::new(), Vec::new());
            for at in (0..IMAGE_SIZE).step_by(1 << 20) {
                new_bytes.extend(new.read_ok(at, 1 << 20));
                old_bytes.extend(old.read_ok(at, 1 << 20));
            }
            assert!(old_bytes == image(), "{kind}");
            assert_eq!(sha256(&new_bytes), CHILD_SHA256, "{kind}");

            // And once more; both go on.
            replace(folder.path(), "disk.hxz", &fs::read(archive(TEXT)).unwrap());
            assert_eq!(server.greeted().go("disk.hxz").size, TEXT_SIZE);
            assert_eq!(old.read_ok(0, 4096), image()[..4096]);
            assert_eq!(new.read_ok(0, 4096), new_bytes[..4096]);
        }
    }
}

/// The same for a parent, of which a child takes its blocks.
#[test]
fn a_replaced_parent_is_read_on_by_those_who_have_the_child() {
    let folder = folder(&[(CHILD, CHILD), (BASE, BASE)]);
    let server = dir(folder.path()).start();
    let mut old = server.go(CHILD);
    // Other blocks, other hashes: what the child needs isn't there any more.
    replace(folder.path(), BASE, &fs::read(archive(TEXT)).unwrap());
    assert_eq!(server.greeted().go(BASE).size, TEXT_SIZE);
    assert_eq!(server.greeted().go(CHILD).size, IMAGE_SIZE);
    assert_eq!(sha256(&read_whole(&mut old)), CHILD_SHA256);
}

#[test]
fn a_file_that_is_broken_for_a_while() {
    for in_folder in [false, true] {
        let folder = folder(&[(BASE, "disk.hxz")]);
        let path = folder.path().join("disk.hxz");
        let good = fs::read(&path).unwrap();
        let server = match in_folder {
            true => dir(folder.path()).start(),
            false => Server::builder().arg(&path).start(),
        };
        let mut old = server.go("disk.hxz");
        for content in [&b""[..], b"no archive", &good[..good.len() / 2], &[0; 9000]] {
            replace(folder.path(), "disk.hxz", content);
            is_unknown(&server, "disk.hxz");
            is_unknown(&server, "");
            assert!(server.greeted().list().is_empty());
        }
        fs::remove_file(&path).unwrap();
        is_unknown(&server, "disk.hxz");
        server.wait_for_message("can't be served");
        replace(folder.path(), "disk.hxz", &good);
        assert_eq!(first_bytes(&server, "disk.hxz"), image()[..4096]);
        assert_eq!(server.greeted().list(), ["disk.hxz"]);
        assert_eq!(old.read_ok(0, 4096), image()[..4096]);
    }
}

/// A child may be in the folder before its parent is: nothing about the child's own file
/// changes when the parent comes.
#[test]
fn a_parent_that_comes_later() {
    let folder = folder(&[(CHILD, CHILD)]);
    let server = dir(folder.path()).start();
    is_unknown(&server, CHILD);
    let line = server.wait_for_message("can't be served");
    assert!(line.message().contains(BASE), "{}", line.text);
    fs::copy(archive(BASE), folder.path().join(BASE)).unwrap();
    wait_until("the child is served", || server.greeted().list().contains(&CHILD.to_owned()));
    assert_eq!(sha256(&read_whole(&mut server.go(CHILD))), CHILD_SHA256);
    assert_eq!(server.log_text().matches("can't be served").count(), 1);
}

#[test]
fn encrypted_archives_in_a_folder() {
    let folder = folder(&[("encrypted-zstd.hxz", "secret.hxz"), (BASE, "open.hxz")]);
    let file = folder.path().join("password");
    fs::write(&file, PASSWORD).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();

    let server = dir(folder.path()).arg("--password-file").arg(&file).start();
    assert_eq!(server.greeted().list(), ["open.hxz", "secret.hxz"]);
    for name in ["open.hxz", "secret.hxz"] {
        assert!(read_whole(&mut server.go(name)) == image());
    }
    // It is read again for those that come later, since nobody keeps it.
    let later = |name: &str| {
        fs::copy(archive("encrypted-lz4.hxz"), folder.path().join(name)).unwrap();
    };
    later("later.hxz");
    assert_eq!(first_bytes(&server, "later.hxz"), image()[..4096]);
    fs::remove_file(&file).unwrap();
    later("too-late.hxz");
    is_unknown(&server, "too-late.hxz");
    server.wait_for_message("can't get its password");
    assert_eq!(first_bytes(&server, "later.hxz"), image()[..4096]);

    let server = dir(folder.path()).start();
    is_unknown(&server, "secret.hxz");
    assert_eq!(first_bytes(&server, "open.hxz"), image()[..4096]);
    assert!(server.wait_for_message("can't be served").message().contains("--password-file"));
    let server = dir(folder.path()).env("HEXZ_PASSWORD", "wrong horse").start();
    assert_eq!(server.greeted().list(), ["open.hxz"]);
    let log = server.log_text();
    assert!(!log.contains("horse"), "a secret is in the log: {log}");
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
