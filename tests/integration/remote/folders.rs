//! Folders of archives (`--export-dir`) on HTTP servers and in buckets.

use object_server::{Behavior, Index, ObjectServer, Script};

use super::{assert_no_export, assert_serves, gateway, pause, put_file};
use crate::support::server::{Builder, Server};

const NAMES: [&str; 6] =
    ["a.hxz", "and & more.hxz", "b.hexz", "eq=al+.hxz", "quo'te\".hxz", "ümläut.hxz"];

/// Puts archives and other objects into the folder `v7` of a bucket.
fn fill(store: &ObjectServer) {
    for name in NAMES {
        put_file(store, &format!("golden/v7/{name}"), "base-zstd.hxz");
    }
    // These can't be exports.
    for name in ["per%cent.hxz", "que?ry.hxz", "read.me", "web.hxz.tree", "deeper/x.hxz"] {
        store.put(&format!("golden/v7/{name}"), "nothing");
    }
    store.put("golden/x.hxz", "nothing");
}

fn lists_and_serves(store: &ObjectServer, builder: Builder) {
    fill(store);
    let server = builder.start();
    let mut names = server.greeted().list();
    names.sort();
    assert_eq!(names, NAMES);
    // Nothing was opened for that, and it is remembered.
    let requests = store.log().entries();
    assert_eq!(requests.len(), 1, "{requests:?}");
    server.greeted().list();
    assert_eq!(store.log().totals().requests, 1);
    for name in NAMES {
        assert_serves(&server, name, "base-zstd.hxz");
    }
    for name in ["x.hxz", "../x.hxz", "deeper/x.hxz", "per%cent.hxz", "read.me", "web.hxz.tree"] {
        assert_no_export(&server, name);
    }
    let strange = store.log().entries().into_iter().find(|request| {
        let name = request.path.strip_prefix("/golden/v7/").unwrap_or("outside");
        !name.is_empty() && !NAMES.contains(&name) && name != "x.hxz"
    });
    assert!(strange.is_none_or(|request| request.query.contains("prefix=")), "other requests");
}

#[test]
fn an_html_index() {
    let store = ObjectServer::builder().start().unwrap();
    lists_and_serves(&store, gateway().args(["--export-dir", &store.url("golden/v7/")]));
}

#[test]
fn a_json_index() {
    let store = ObjectServer::builder().index(Index::Json).start().unwrap();
    lists_and_serves(&store, gateway().args(["--export-dir", &store.url("golden/v7")]));
}

#[test]
fn a_bucket() {
    let store = ObjectServer::builder().s3().start().unwrap();
    let args = ["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"];
    lists_and_serves(&store, gateway().args(args).args(["--export-dir", "s3://golden/v7/"]));
}

#[test]
fn a_bucket_of_more_than_a_page() {
    let store = ObjectServer::builder().s3().start().unwrap();
    let archive = std::fs::read(crate::support::archive("base-zstd.hxz")).unwrap();
    (0..1500).for_each(|number| store.put(&format!("golden/{number:04}.hxz"), archive.clone()));
    let args = ["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"];
    let server = gateway().args(args).args(["--export-dir", "s3://golden/"]).start();
    let names = server.greeted().list();
    assert_eq!(names.len(), 1500);
    assert_eq!(store.log().totals().requests, 2);
    server.go("1499.hxz").read_ok(0, 4096);
}

#[test]
fn new_archives_are_listed_once_the_listing_is_stale() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/a.hxz", "base-zstd.hxz");
    let args = ["--fresh-for", "1s", "--export-dir"];
    let server = gateway().args(args).arg(store.url("v7/")).start();
    assert_eq!(server.greeted().list(), ["a.hxz"]);
    put_file(&store, "v7/b.hxz", "base-zstd.hxz");
    // A client that names it needs no listing.
    server.go("b.hxz").read_ok(0, 512);
    pause(1100);
    assert_eq!(server.greeted().list(), ["a.hxz", "b.hxz"]);
}

/// The folder can't be listed: that stops nobody from opening an archive by its name.
#[test]
fn an_index_that_is_denied() {
    let store = ObjectServer::builder().index(Index::Off).start().unwrap();
    put_file(&store, "v7/a.hxz", "base-zstd.hxz");
    let args = ["--monitor", "0", "--export-dir"];
    let builder = gateway().args(args).arg(store.url("v7/"));
    let (code, error) = builder.fail();
    assert_eq!(code, 3);
    assert!(error.contains("folder_store"), "{error}");
}

/// Anything in a listing that isn't the name of an object in the folder is ignored.
#[test]
fn a_hostile_index() {
    let page = "<a href=\"/v7/a.hxz\">1</a><a href=\"http://evil.invalid/b.hxz\">2</a>\
                <a href=\"../c.hxz\">3</a><a href=\"d.hxz?x=y\">4</a><a href=\"e%2Ff.hxz\">5</a>\
                <a href=\"..%2fg.hxz\">6</a><a href=\"%00.hxz\">7</a><a href=\"h.hxz\">8</a>\
                <a href=\"javascript:i.hxz\">9</a><a href=\"%1b[31m.hxz\">10</a><a href=\"";
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/h.hxz", "base-zstd.hxz");
    store.put("v7/", page);
    store.set_script(Script::always(Behavior::new().header("content-type", "text/html")));
    let server = gateway().args(["--export-dir", &store.url("v7/")]).start();
    assert_eq!(server.greeted().list(), ["a.hxz", "h.hxz"]);
    assert_serves(&server, "h.hxz", "base-zstd.hxz");
}

fn with_rules(rules: &str) -> (tempfile::TempDir, Builder) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.toml");
    std::fs::write(&file, rules).unwrap();
    (folder, gateway().arg("--rules").arg(&file))
}

/// Authorization comes before requests.
#[test]
fn clients_without_permission_cause_no_request() {
    let store = ObjectServer::builder().start().unwrap();
    fill(&store);
    let rules = "[[rule]]\naction = \"allow\"\nnetwork = \"127.0.0.1\"\nexport = \"a.hxz\"\n";
    let (_folder, builder) = with_rules(rules);
    let args = ["--fresh-for", "1h", "--export-dir", &store.url("golden/v7/")];
    let server: Server = builder.args(args).start();
    server.greeted().list();
    store.log().clear();
    for name in ["b.hexz", "none.hxz", "ümläut.hxz", "../x.hxz"] {
        assert_no_export(&server, name);
    }
    // Isn't admitted at all.
    assert!(!server.connect_from([127, 0, 0, 2]).is_greeted());
    assert_eq!(server.greeted().list(), ["a.hxz"]);
    assert_eq!(store.log().totals().requests, 0, "{:?}", store.log().entries());
    assert_serves(&server, "a.hxz", "base-zstd.hxz");
    assert!(store.log().totals().requests > 0);
}
