//! Reloads (SIGHUP) of a gateway with stores.

use std::fs;

use object_server::{Behavior, ObjectServer, Script};

use super::{MIB, WEB, assert_no_export, has_export, other_sample, sample, store};
use crate::support::server::Server;
use crate::support::wait_until;

struct Gateway {
    server: Server,
    folder: tempfile::TempDir,
}

impl Gateway {
    fn start(exports: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hexz-nbd.toml");
        fs::write(&path, content(exports)).unwrap();
        Self { server: Server::builder().arg("--config").arg(&path).start(), folder }
    }

    fn reload(&self, exports: &str) {
        fs::write(self.folder.path().join("hexz-nbd.toml"), content(exports)).unwrap();
        self.server.signal("HUP");
    }
}

fn content(exports: &str) -> String {
    format!("sandbox = \"require\"\nstore-timeout = \"2s\"\nfresh-for = \"1ms\"\n{exports}")
}

#[test]
fn an_archive_of_the_same_store_can_be_added() {
    let store = store();
    store.put("images/new.hxz", other_sample().bytes());
    let web = format!("[exports]\nweb = \"{}\"\n", store.url(WEB));
    let gateway = Gateway::start(&web);
    let server = &gateway.server;
    let mut reader = server.go("web");
    gateway.reload(&format!("{web}new = \"{}\"\n", store.url("images/new.hxz")));
    wait_until("it is served", || has_export(server, "new"));
    other_sample().is_read(&mut server.go("new"));
    sample().is_read(&mut reader);
    sample().is_read_at(&mut server.go("web"), 4 * MIB);
    // And removed.
    gateway.reload(&web);
    wait_until("it isn't served", || !has_export(server, "new"));
    sample().is_read_at(&mut server.go("web"), 4 * MIB);
}

/// The sandbox permits connections to the stores of the start only.
#[test]
fn an_archive_of_another_store_needs_a_restart() {
    let (store, other) = (store(), store());
    let web = format!("[exports]\nweb = \"{}\"\n", store.url(WEB));
    let gateway = Gateway::start(&web);
    let server = &gateway.server;
    let mut reader = server.go("web");
    sample().is_read_at(&mut reader, 0);
    gateway.reload(&format!("{web}new = \"{}\"\n", other.url(WEB)));
    let line =
        server.wait_for_log("the store is unknown", |line| line.reason() == "store_unsupported");
    assert!(line.text.contains("restart"), "{}", line.text);
    assert_no_export(server, "new");
    sample().is_read(&mut reader);
    sample().is_read_at(&mut server.go("web"), 4 * MIB);
    assert_eq!(other.log().totals().requests, 0);
}

/// A gateway without any remote archive has no dialer.
#[test]
fn the_first_remote_archive_needs_a_restart() {
    let store = store();
    let local =
        format!("[exports]\nlocal = \"{}\"\n", crate::support::archive("base-zstd.hxz").display());
    let gateway = Gateway::start(&local);
    let server = &gateway.server;
    gateway.reload(&format!("{local}web = \"{}\"\n", store.url(WEB)));
    let line = server.wait_for_reason("store_unsupported");
    assert!(line.text.contains("restart"), "{}", line.text);
    server.go("local").read_ok(0, 4096);
    assert_eq!(store.log().totals().requests, 0);
}

/// A presigned URL expires; its successor has another query.
#[test]
fn a_reload_replaces_the_query_of_a_url() {
    let store = store();
    store.set_script(Script::from_fn(|request| match request.query.as_str() {
        "signature=valid" => Behavior::new(),
        _ => Behavior::status(403),
    }));
    let web = |query| format!("[exports]\nweb = \"{}?{query}\"\n", store.url(WEB));
    let gateway = Gateway::start(&format!("{}\n", web("signature=valid")));
    let server = &gateway.server;
    let mut reader = server.go("web");
    sample().is_read_at(&mut reader, 0);
    store.set_script(Script::from_fn(|request| match request.query.as_str() {
        "signature=renewed" => Behavior::new(),
        _ => Behavior::status(403),
    }));
    gateway.reload(&web("signature=renewed"));
    wait_until("the query is replaced", || reader.read(6 * MIB, 4096).is_ok());
    sample().is_read(&mut reader);
    assert!(has_export(server, "web"));
}

/// Reloads during an outage keep what is served.
#[test]
fn a_reload_while_the_store_is_down() {
    let store: ObjectServer = store();
    store.put("images/new.hxz", other_sample().bytes());
    let web = format!("[exports]\nweb = \"{}\"\n", store.url(WEB));
    let gateway = Gateway::start(&web);
    let server = &gateway.server;
    let mut reader = server.go("web");
    sample().is_read_at(&mut reader, 4 * MIB);
    store.stop();
    gateway.reload(&format!("{web}new = \"{}\"\n", store.url("images/new.hxz")));
    server.wait_for_reloads(1);
    sample().is_read_at(&mut reader, 4 * MIB);
    sample().is_read_at(&mut server.go("web"), 4 * MIB);
    store.restart().unwrap();
    wait_until("it is served", || has_export(server, "new"));
    other_sample().is_read(&mut server.go("new"));
}
