//! What a name in `hexz:changed:NAME` means, and what many snapshots cost.

use std::fs;
use std::path::Path;

use super::{BASE, CHILD, dir, replace};
use crate::archive_writer::{ArchiveWriter, text};
use crate::support::client::{OPT_GO, info_data};
use crate::support::server::{Line, Server};
use crate::support::structured::{Mode, Question};
use crate::support::{IMAGE_SIZE, archive, wait_until};

const OF_BASE: &str = "hexz:changed:base-zstd.hxz";

/// Another disk of the same size, block by block as the base has none of them.
fn other_disk() -> Vec<u8> {
    let image = text(7, IMAGE_SIZE as usize);
    ArchiveWriter::of_image(&image, 65_536).write().bytes
}

fn contexts(server: &Server, export: &str) -> Vec<String> {
    let mut client = server.greeted();
    Mode::Structured.negotiate(&mut client);
    client.list_contexts(export, &["hexz:"])
}

/// How many bytes of the child may differ from what its context for "base-zstd.hxz" means.
fn changed(server: &Server) -> u64 {
    let mut peer = server.peer(Mode::Structured, CHILD, &[OF_BASE]);
    let outcome = peer.ask(Question::status(0, IMAGE_SIZE));
    let extents = outcome.extents(peer.ids[0]);
    extents.iter().filter(|extent| extent.flags == 1).map(|extent| extent.length).sum()
}

/// Clients copy the export of a name and then ask what has changed since that name: it has
/// to be the same archive, though a parent of another place is called like it.
#[test]
fn a_name_means_the_export_before_it_means_a_parent() {
    let elsewhere = tempfile::tempdir().unwrap();
    let other = elsewhere.path().join(BASE);
    fs::write(&other, other_disk()).unwrap();

    let server = Server::builder().arg(&other).archive(CHILD).start();
    assert_eq!(changed(&server), IMAGE_SIZE);
    let server = Server::builder().archive(BASE).archive(CHILD).start();
    assert!((1..IMAGE_SIZE / 4).contains(&changed(&server)));
    let server = Server::builder().archive(CHILD).start();
    assert!((1..IMAGE_SIZE / 4).contains(&changed(&server)));

    // In a folder, the parent's name is that of the folder's own file.
    fs::copy(archive(CHILD), elsewhere.path().join(CHILD)).unwrap();
    let server = dir(elsewhere.path()).start();
    assert_eq!(contexts(&server, CHILD), [OF_BASE]);
    assert_eq!(changed(&server), IMAGE_SIZE);
    let alone = tempfile::tempdir().unwrap();
    fs::copy(archive(CHILD), alone.path().join(CHILD)).unwrap();
    let beside = || dir(alone.path()).arg("--parent-dir").arg(archive("")).start();
    assert!((1..IMAGE_SIZE / 4).contains(&changed(&beside())));
    // As soon as the folder has another file of that name, the parent has none.
    let server = beside();
    drop(server.go(CHILD));
    fs::write(alone.path().join(BASE), other_disk()).unwrap();
    assert_eq!(contexts(&server, CHILD).len(), 0);
}

/// A replaced snapshot isn't compared with any more under its name, and isn't kept open.
#[test]
fn nobody_compares_with_what_has_been_replaced() {
    let folder = tempfile::tempdir().unwrap();
    for name in [BASE, "sparse-zstd.hxz"] {
        fs::copy(archive(name), folder.path().join(name)).unwrap();
    }
    let [base, sparse] = [BASE, "sparse-zstd.hxz"].map(|name| folder.path().join(name));
    let server = Server::builder().arg(&base).arg(&sparse).start();
    assert_eq!(contexts(&server, "sparse-zstd.hxz"), [OF_BASE]);
    replace(folder.path(), BASE, &other_disk());
    assert!(contexts(&server, "sparse-zstd.hxz").is_empty());
    assert!(deleted_files(&server).is_empty(), "{:?}", deleted_files(&server));
    // It comes back once somebody has opened the new one.
    drop(server.go(BASE));
    assert_eq!(contexts(&server, "sparse-zstd.hxz"), [OF_BASE]);
}

/// What SET_META_CONTEXT has promised holds at GO, whatever happens to files in between.
#[test]
fn selected_contexts_outlive_a_replacement() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(archive(BASE), folder.path().join(BASE)).unwrap();
    fs::copy(archive(CHILD), folder.path().join(CHILD)).unwrap();
    let server = dir(folder.path()).start();
    let mut client = server.greeted();
    Mode::Structured.negotiate(&mut client);
    let selected = client.set_contexts(CHILD, &["base:allocation", OF_BASE]);
    assert_eq!(selected.len(), 2);
    replace(folder.path(), CHILD, b"rubbish");
    client.option(OPT_GO, &info_data(CHILD.as_bytes(), &[]));
    let question = Question::status(0, IMAGE_SIZE);
    client.send(&question.encode(Mode::Structured));
    let outcome = client.outcomes_in(Mode::Structured, &[question]).remove(&question.cookie);
    assert_eq!(outcome.unwrap().status.len(), 2);
}

fn deleted_files(server: &Server) -> Vec<String> {
    fs::read_dir(format!("/proc/{}/fd", server.pid()))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.display().to_string())
        .filter(|target| target.ends_with(" (deleted)") && target.contains(".hxz"))
        .collect()
}

fn fill(folder: &Path, count: usize, content: &[u8]) {
    for number in 0..count {
        fs::write(folder.join(format!("{number:04}.hxz")), content).unwrap();
    }
}

/// LIST names all that is there, however much it is, and keeps little of it open.
#[test]
fn a_large_folder_is_listed_whole_and_not_kept_open() {
    const COUNT: usize = 400;
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), COUNT, &ArchiveWriter::of_image(&text(1, 5000), 5000).write().bytes);
    let server = dir(folder.path()).start();
    let before = server.fd_count();
    for _ in 0..3 {
        assert_eq!(server.greeted().list().len(), COUNT);
    }
    let opened = server.fd_count() - before;
    assert!(opened <= 150, "{opened} descriptors");

    // What is deleted is let go, when somebody looks.
    for number in 0..COUNT {
        fs::remove_file(folder.path().join(format!("{number:04}.hxz"))).unwrap();
    }
    assert!(server.greeted().list().is_empty());
    wait_until("deleted files are closed", || deleted_files(&server).is_empty());
}

/// What is broken is said once, not each time that somebody lists it.
#[test]
fn broken_files_do_not_fill_the_log() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path(), 160, b"rubbish");
    let mut server = dir(folder.path()).start();
    for _ in 0..20 {
        assert!(server.greeted().list().is_empty());
    }
    fs::remove_dir_all(folder.path()).unwrap();
    for _ in 0..300 {
        server.greeted().list();
    }
    server.terminate();
    let log = server.log();
    let count = |is_wanted: &dyn Fn(&Line) -> bool| log.iter().filter(|it| is_wanted(it)).count();
    // They are logged at a limited rate.
    let lines = count(&|line| line.json["level"] == "WARN" && line.json["reason"] == "not_hexz");
    assert!((100..=160).contains(&lines), "{lines} lines");
    assert_eq!(count(&|line| line.json["level"] == "ERROR"), 1);
    assert_eq!(count(&|line| line.json["reason"] == "folder_missing"), 1);
}
