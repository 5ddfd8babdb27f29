//! Who may come in: by certificate and by rules, and when that changes.

mod check;
mod failures;
mod identities;
mod matrix;
mod reload;
mod renewed;
mod rules;
mod staying;

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use rustls::ClientConfig;

use crate::support::authority::{Authority, Certified};
use crate::support::client::{Client, FLAGS, Session};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Line, Server};
use crate::support::{archive, wait_until};

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";

/// A server that asks clients for certificates of that CA.
fn asking(authority: &Authority) -> Builder {
    Server::builder().archive(BASE).tls(Pki::new()).clients_of(authority)
}

/// Inside TLS, with that configuration.
pub fn come_in(server: &Server, config: Arc<ClientConfig>) -> Client<Session> {
    let mut client = server.connect();
    client.greet(FLAGS);
    client.starttls(config).boxed()
}

fn come_in_as(server: &Server, who: &Certified) -> Client<Session> {
    come_in(server, who.config(server.pki()))
}

/// Whether such a client reads something. With TLS 1.3 it believes that the handshake is
/// over before the server has looked at its certificate.
pub fn reads(server: &Server, config: Arc<ClientConfig>) -> bool {
    let mut client = server.connect();
    client.greet(FLAGS);
    assert_eq!(client.option(crate::support::client::OPT_STARTTLS, b"").len(), 1);
    let Ok(mut client) = client.handshake(config) else { return false };
    let list = crate::support::client::option(crate::support::client::OPT_LIST, b"");
    if client.try_send(&list).is_err() || client.stream.read_exact(&mut [0]).is_err() {
        return false;
    }
    drop(client);
    true
}

/// Puts another content under a name, in one step.
pub fn replace(path: &Path, content: &str) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::rename(new, path).unwrap();
}

/// A folder with a rules file.
fn rules_file(content: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rules.toml");
    fs::write(&path, content).unwrap();
    (folder, path)
}

/// Sends SIGHUP and waits for what comes of it, `times` times since the start.
fn reload(server: &Server, times: usize) {
    server.signal("HUP");
    server.wait_for_reloads(times);
}

/// The lines about reloads that failed.
fn failed_reloads(server: &Server) -> Vec<Line> {
    server.log().into_iter().filter(|line| line.reason() == "reload_failed").collect()
}

fn wait_for_failed_reloads(server: &Server, times: usize) {
    wait_until("a reload fails", || failed_reloads(server).len() >= times);
}

/// The archives that the tests of rules serve.
fn served() -> [std::path::PathBuf; 2] {
    [archive(BASE), archive(CHILD)]
}
