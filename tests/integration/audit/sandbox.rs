//! What the sandbox lets be written.

use std::fs;

use super::{BASE, Record};
use crate::support::archive;
use crate::support::server::Server;

/// What is appended to isn't what is served.
#[test]
fn the_folder_is_named_and_should_be_its_own() {
    let record = Record::new();
    let line = |server: &Server, text: &str| server.wait_for_message(text).message().to_owned();
    let server = Server::builder().archive(BASE).args(["--sandbox", "auto"]);
    let server = server.arg("--audit").arg(record.path()).start();
    let enforced = line(&server, "sandbox: ");
    let folder = fs::canonicalize(record.0.path()).unwrap();
    assert!(enforced.contains(&format!(", appends to {}/", folder.display())), "{enforced}");
    assert!(!server.log_text().contains("a folder of its own"));

    let served = record.at("served.hxz");
    fs::copy(archive(BASE), &served).unwrap();
    let server = Server::builder().arg(&served).args(["--sandbox", "auto"]);
    let server = server.arg("--audit").arg(record.path()).start();
    line(&server, "give that one a folder of its own");

    let server = Server::builder().archive(BASE).args(["--sandbox", "auto"]).start();
    assert!(!line(&server, "sandbox: ").contains("appends"));
}
