//! Files that are replaced, broken or repaired while they are served.

use std::fs;

use super::{
    BASE, CHILD, CHILD_SHA256, TEXT, TEXT_SIZE, dir, first_bytes, folder, is_unknown, read_whole,
    replace,
};
use crate::support::server::{Line, Server};
use crate::support::{IMAGE_SIZE, PASSWORD, archive, image, sha256, wait_until};

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
        server.wait_for_reason("not_hexz");
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
    let line = server.wait_for_reason("parent_missing");
    assert!(line.message().contains(BASE), "{}", line.text);
    fs::copy(archive(BASE), folder.path().join(BASE)).unwrap();
    wait_until("the child is served", || server.greeted().list().contains(&CHILD.to_owned()));
    assert_eq!(sha256(&read_whole(&mut server.go(CHILD))), CHILD_SHA256);
    let is_error =
        |line: &&Line| line.json["level"] == "ERROR" && line.json["reason"] == "parent_missing";
    assert_eq!(server.log().iter().filter(is_error).count(), 1);
}
