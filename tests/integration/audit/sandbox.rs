//! What the sandbox lets be written.

use std::fs;

use std::os::unix::fs::chown;

use super::{BASE, Record, assert_no_gaps, read};
use crate::support::server::Server;
use crate::support::{archive, is_root, wait_until};

/// What is appended to isn't what is served.
#[test]
fn the_folder_is_named_and_should_be_its_own() {
    let record = Record::new();
    let line = |server: &Server, text: &str| server.wait_for_message(text).message().to_owned();
    let server = Server::builder().archive(BASE).args(["-v", "--sandbox", "auto"]);
    let server = server.arg("--audit").arg(record.path()).start();
    let enforced = line(&server, "sandbox: ");
    let folder = fs::canonicalize(record.0.path()).unwrap();
    assert!(enforced.contains(&format!(", appends to {}/", folder.display())), "{enforced}");
    assert!(!server.has_reason("readable_and_appendable"), "{}", server.log_text());

    let served = record.at("served.hxz");
    fs::copy(archive(BASE), &served).unwrap();
    let server = Server::builder().arg(&served).args(["--sandbox", "auto"]);
    let server = server.arg("--audit").arg(record.path()).start();
    let note = server.wait_for_reason("readable_and_appendable");
    assert!(note.message().contains(folder.to_str().unwrap()), "{}", note.text);

    let server = Server::builder().archive(BASE).args(["-v", "--sandbox", "auto"]).start();
    assert!(!line(&server, "sandbox: ").contains("appends"));
}

/// Who gave up root goes on with the file that it opened as root. Where it may make none in the
/// folder, a warning says so at the start, and a rotation isn't the end.
#[test]
fn another_user_needs_the_folder() {
    const NOBODY: u32 = 65534;
    let record = Record::new();
    let served = tempfile::tempdir().unwrap();
    let disk = served.path().join("disk.hxz");
    fs::copy(archive(BASE), &disk).unwrap();
    let start = |name: &str| Server::builder().arg(&disk).args(["--user", name]);
    if !is_root() {
        let server = start("4000000:4000000").arg("--audit").arg(record.path());
        assert_eq!(server.fail().0, 6);
        return;
    }
    for path in [served.path(), &disk] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let server = start("nobody").args(["--sandbox", "auto", "--audit"]).arg(record.path());
    let mut server = server.start();
    let note = server.wait_for_reason("file_not_recreatable");
    assert!(note.message().contains(record.path().to_str().unwrap()), "{}", note.text);
    fs::rename(record.path(), record.at("old")).unwrap();
    server.signal("HUP");
    server.wait_for_reason("audit_reopen_failed");
    server.assert_alive();
    server.terminate();
    let events = read(&record.at("old"));
    assert_eq!(assert_no_gaps(&events), 0);
    assert_eq!(events.last().unwrap()["event"], "stop");

    chown(record.0.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let server = start("nobody").args(["--sandbox", "auto", "--audit"]).arg(record.path());
    let mut server = server.start();
    fs::rename(record.path(), record.at("old")).unwrap();
    server.signal("HUP");
    wait_until("there is a new one", || record.path().exists());
    server.terminate();
    assert!(!server.has_reason("file_not_recreatable"), "{}", server.log_text());
    assert_eq!(record.events().last().unwrap()["event"], "stop");
}
