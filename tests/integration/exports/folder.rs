//! A folder of archives.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::{
    AUXILIARY, BASE, TEXT, TEXT_SIZE, dir, first_bytes, folder, is_unknown, read_whole, replace,
};
use crate::support::client::{
    OPT_GO, OPT_LIST_META_CONTEXT, REP_ERR_UNKNOWN, info_data, meta_data,
};
use crate::support::server::{Line, Server};
use crate::support::{PASSWORD, archive, image, wait_until};

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

/// A client learns that there is no such export, the operator why.
#[test]
fn lookups_that_fail_are_told_to_the_operator_alone() {
    let folder = folder(&[(BASE, "good.hxz"), (BASE, "shout.HXZ")]);
    let odd = OsStr::from_bytes(b"odd-\xff.hxz");
    fs::copy(archive(BASE), folder.path().join(odd)).unwrap();
    fs::create_dir(folder.path().join("sub.hxz")).unwrap();
    symlink("good.hxz", folder.path().join("link.hxz")).unwrap();
    let server = dir(folder.path()).start();
    let line = server.wait_for_reason("unserved_files");
    assert_eq!(line.json["files"], 4, "{}", line.text);
    for named in [
        r"odd-\xff.hxz (not_utf8)",
        "shout.HXZ (wrong_extension)",
        "sub.hxz (not_a_file)",
        "link.hxz (symbolic_link)",
    ] {
        assert!(line.message().contains(named), "{named}: {}", line.text);
    }

    let mut answers = BTreeSet::new();
    for (name, reason) in [
        (&b"none.hxz"[..], "unknown_name"),
        (b"notes.txt", "unknown_name"),
        (b"shout.HXZ", "wrong_extension"),
        (b"link.hxz", "symbolic_link"),
        (b"sub.hxz", "not_a_file"),
        (b"../good.hxz", "invalid_name"),
        (odd.as_bytes(), "not_utf8"),
        (b"good.hxz/aux", "no_auxiliary_stream"),
        (b"", "no_default"),
    ] {
        let shown = format!("{:?}", nbd_telemetry::escape::bytes(name));
        let answer = server.greeted().refused(OPT_GO, &info_data(name, &[]), REP_ERR_UNKNOWN);
        answers.insert(answer.replace(&shown, "NAME"));
        let line = server.wait_for_log(reason, |line| {
            line.json["reason"] == reason && line.message().ends_with(&shown)
        });
        assert_eq!(
            (&line.json["level"], &line.json["peer"]),
            (&"INFO".into(), &"127.0.0.1".into())
        );
    }
    // But for the default export, which has no name, all are answered alike.
    assert_eq!(answers.len(), 2, "{answers:?}");
    let question = meta_data(b"sub.hxz", &[]);
    server.greeted().refused(OPT_LIST_META_CONTEXT, &question, REP_ERR_UNKNOWN);
    let count = |line: &&Line| line.json["reason"] == "not_a_file";
    wait_until("asking for contexts is a lookup", || {
        server.log().iter().filter(count).count() == 2
    });
    // Files that come later are told of when the folder is listed.
    symlink("good.hxz", folder.path().join("later.hxz")).unwrap();
    assert_eq!(server.greeted().list(), ["good.hxz"]);
    server.wait_for_log("the new one", |line| line.json["files"] == 5);
}

/// Whoever goes on asking can't fill the log.
#[test]
fn lookups_that_fail_are_logged_at_a_limited_rate() {
    let folder = folder(&[(BASE, "good.hxz")]);
    let server = dir(folder.path()).start();
    let count = |server: &Server| {
        let log = server.log();
        log.iter().filter(|line| line.json["reason"] == "unknown_name").count()
    };
    let mut client = server.greeted();
    for _ in 0..100 {
        client.refused(OPT_GO, &info_data(b"none.hxz", &[]), REP_ERR_UNKNOWN);
    }
    drop(client);
    server.wait_for_log("the first", |line| line.json["reason"] == "unknown_name");
    // Its connection is over when another one has been served.
    server.go("good.hxz").disconnect();
    server.wait_for_how("left");
    assert_eq!(count(&server), 16, "{}", server.log_text());
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
    let is_open_error =
        |line: &Line| line.json["level"] == "ERROR" && line.json["reason"] == "not_hexz";
    let line = server.wait_for_log("it can't be opened", is_open_error);
    assert!(line.message().contains("broken.hxz"), "{}", line.text);
    assert_eq!(server.log().iter().filter(|line| is_open_error(line)).count(), 1);
    // It is one that can be opened now.
    replace(folder.path(), "broken.hxz", &fs::read(archive(TEXT)).unwrap());
    assert_eq!(server.greeted().go("broken.hxz").size, TEXT_SIZE);
    assert_eq!(server.greeted().list(), ["broken.hxz", "good.hxz"]);
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
    assert!(server.wait_for_reason("io").message().contains("too-late.hxz"));
    assert_eq!(first_bytes(&server, "later.hxz"), image()[..4096]);

    const ALL: [&str; 4] = ["later.hxz", "open.hxz", "secret.hxz", "too-late.hxz"];
    let server = dir(folder.path()).start();
    assert_eq!(server.greeted().list(), ["open.hxz"]);
    is_unknown(&server, "secret.hxz");
    assert_eq!(first_bytes(&server, "open.hxz"), image()[..4096]);
    let line = server.wait_for_reason("password_needed");
    assert!(line.json["hint"].as_str().unwrap().contains("--password-file"), "{}", line.text);
    let server = dir(folder.path()).env("HEXZ_PASSWORD", "wrong horse").start();
    // No key is derived for a list, so that the password is wrong turns out when one is opened.
    assert_eq!(server.greeted().list(), ALL);
    is_unknown(&server, "secret.hxz");
    assert_eq!(server.greeted().list(), ["later.hxz", "open.hxz", "too-late.hxz"]);
    let log = server.log_text();
    assert!(!log.contains("horse"), "a secret is in the log: {log}");
}
