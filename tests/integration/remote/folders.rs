//! Folders of archives (`--export-dir`) on HTTP servers and in buckets.

use std::collections::HashSet;

use object_server::{Behavior, Index, ObjectServer, Rule, Script};

use super::{assert_no_export, assert_serves, gateway, monitor_page, pause, put_file};
use crate::support::client::{OPT_INFO, REP_ERR_UNKNOWN, info_data};
use crate::support::server::{Builder, Server};
use crate::support::wait_until;

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

/// A folder that may not be listed is an error of the configuration.
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

/// Listings are requested like everything else: a failure is followed by another attempt.
#[test]
fn a_listing_that_fails_once_is_requested_again() {
    for behavior in
        [Behavior::status(503).retry_after(1), Behavior::status(500), Behavior::drop_connection()]
    {
        let store = ObjectServer::builder().start().unwrap();
        put_file(&store, "v7/a.hxz", "base-zstd.hxz");
        let is_throttled = format!("{behavior:?}").contains("503");
        store.set_script(Script::new().rule(Rule::new(behavior).times(1)));
        let args = ["--monitor", "0", "--export-dir"];
        let server = gateway().args(args).arg(store.url("v7/")).start();
        assert_eq!(server.greeted().list(), ["a.hxz"]);
        let requests = store.log().entries();
        assert_eq!(requests.len(), 2, "{requests:?}");
        let time = requests[1].received - requests[0].received;
        assert!(!is_throttled || time >= std::time::Duration::from_secs(1), "{time:?}");
        assert!(!server.has_reason("folder_store"));
        let metrics = monitor_page(&server, "/metrics");
        let retries = metrics.lines().find(|line| line.starts_with("hexz_nbd_store_retries_total"));
        assert!(retries.is_some_and(|line| line.ends_with(" 1")), "{metrics}");
    }
}

#[test]
fn a_gateway_starts_while_its_folder_cannot_be_listed() {
    let (store, other) = (super::store(), super::store());
    put_file(&store, "v7/a.hxz", "base-zstd.hxz");
    let builder = || {
        let args = ["--store-timeout", "1s", "--monitor", "0", "--export-dir"];
        gateway().args(args).arg(store.url("v7/"))
    };
    for has_others in [false, true] {
        store.stop();
        let builder = builder();
        let server = match has_others {
            true => builder.arg(other.url(super::WEB)).start(),
            false => builder.start(),
        };
        server.wait_for_reason("folder_store");
        wait_until("it is ready", || monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
        assert!(monitor_page(&server, "/status.json").contains("\"folder_store\""));
        if has_others {
            super::sample().is_read(&mut server.go("web.hxz"));
        }
        store.restart().unwrap();
        // No client has to ask for that.
        server
            .wait_for_log("the folder is listed", |line| line.message().contains("readable again"));
        let expected: &[&str] = if has_others { &["a.hxz", "web.hxz"] } else { &["a.hxz"] };
        let mut names = server.greeted().list();
        names.sort();
        assert_eq!(names, expected);
        assert_serves(&server, "a.hxz", "base-zstd.hxz");
    }
    store.stop();
    builder().arg("--strict").fails_with(3, "folder_store");
}

/// What is in the disk cache is listed, too.
#[test]
fn a_folder_is_listed_from_the_disk_cache_while_its_store_fails() {
    let folder = tempfile::tempdir().unwrap();
    let store = ObjectServer::builder().s3().start().unwrap();
    for name in ["a.hxz", "b.hxz"] {
        put_file(&store, &format!("golden/v7/{name}"), "base-zstd.hxz");
    }
    put_file(&store, "golden/c.hxz", "base-zstd.hxz");
    let builder = || {
        gateway()
            .args(["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"])
            .args(["--store-timeout", "1s", "--monitor", "0", "--disk-cache-size", "64MiB"])
            .args(["--export-dir", "s3://golden/v7/", "s3://golden/c.hxz", "--disk-cache"])
            .arg(folder.path())
    };
    let mut server = builder().start();
    assert_serves(&server, "a.hxz", "base-zstd.hxz");
    server.terminate();
    for behavior in [
        Behavior::status(403),
        Behavior::expired_token(),
        Behavior::status(500),
        Behavior::drop_connection(),
    ] {
        store.set_script(Script::always(behavior));
        let mut server = builder().start();
        let mut names = server.greeted().list();
        names.sort();
        assert_eq!(names, ["a.hxz", "c.hxz"]);
        assert_serves(&server, "a.hxz", "base-zstd.hxz");
        assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
        server.wait_for_reason("folder_unconfirmed");
        server.terminate();
    }
}

/// A listing tells which archives are small, and whether they have traces.
#[test]
fn a_listing_saves_requests() {
    let store = ObjectServer::builder().s3().start().unwrap();
    for name in ["a.hxz", "b.hxz"] {
        put_file(&store, &format!("golden/v7/{name}"), "base-zstd.hxz");
    }
    store.put("golden/v7/b.hxz.trace", "hexz-trace 1\nexport b main 8388608\n");
    let args = ["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"];
    let args = args.into_iter().chain(["--fresh-for", "1h", "--export-dir", "s3://golden/v7/"]);
    let server = super::sandboxed().args(args).start();
    for (name, expected) in [("a.hxz", 1), ("b.hxz", 2)] {
        store.log().clear();
        assert_serves(&server, name, "base-zstd.hxz");
        let traced = expected == 2;
        if traced {
            server.wait_for_log("the trace is read", |line| line.json["wanted"].is_u64());
        }
        let requests = store.log().entries();
        assert_eq!(requests.len(), expected, "{requests:?}");
        assert_eq!(requests.iter().any(|it| it.path.ends_with(".trace")), traced);
    }
}

/// Access to the folder is denied while other archives are served.
#[test]
fn a_folder_to_which_access_is_denied_stops_no_other_archive() {
    let store = ObjectServer::builder().s3().start().unwrap();
    put_file(&store, "golden/v7/a.hxz", "base-zstd.hxz");
    let denied = |request: &object_server::LoggedRequest| match request.query.contains("list-type")
    {
        true => Behavior::status(403),
        false => Behavior::new(),
    };
    store.set_script(Script::from_fn(denied));
    let builder = || {
        gateway()
            .args(["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"])
            .args(["--export-dir", "s3://golden/v7/"])
    };
    builder().fails_with(3, "folder_store");
    let server = builder().arg("s3://golden/v7/a.hxz").start();
    assert_serves(&server, "a.hxz", "base-zstd.hxz");
    server.wait_for_reason("folder_store");
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

/// Asks for exports that don't exist.
fn ask_for(server: &Server, names: impl Iterator<Item = String>) {
    let mut client = server.greeted();
    for name in names {
        client.refused(OPT_INFO, &info_data(name.as_bytes(), &[]), REP_ERR_UNKNOWN);
    }
}

/// A client may ask for as many names as it likes.
#[test]
fn made_up_names_cause_few_requests() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/a.hxz", "base-zstd.hxz");
    let args = ["--fresh-for", "1h", "--monitor", "0", "--export-dir"];
    let server = gateway().args(args).arg(store.url("v7/")).start();
    // It is newer than the listing.
    put_file(&store, "v7/b.hxz", "base-zstd.hxz");
    assert_serves(&server, "b.hxz", "base-zstd.hxz");
    store.log().clear();
    ask_for(&server, (0..1000).map(|number| format!("{number}.hxz")));
    let entries = store.log().entries();
    let distinct: HashSet<_> = entries.iter().map(|request| &request.path).collect();
    // A hundred, and one more in each second.
    assert!((100..400).contains(&distinct.len()), "{}", distinct.len());
    // Archives are served nevertheless, listed or open.
    assert_serves(&server, "a.hxz", "base-zstd.hxz");
    assert_serves(&server, "b.hxz", "base-zstd.hxz");
    let status = monitor_page(&server, "/status.json");
    assert!(!status.contains("0.hxz"), "{status}");
    assert!(!server.log_text().contains("store_not_found"), "{}", server.log_text());
}

/// Without a recent listing, the first of them causes one.
#[test]
fn made_up_names_cause_a_listing() {
    let store = ObjectServer::builder().start().unwrap();
    put_file(&store, "v7/a.hxz", "base-zstd.hxz");
    let args = ["--fresh-for", "1ms", "--export-dir"];
    let server = gateway().args(args).arg(store.url("v7/")).start();
    store.log().clear();
    ask_for(&server, (0..10).map(|number| format!("{number}.hxz")));
    let entries = store.log().entries();
    let listings = entries.iter().filter(|request| request.path.ends_with('/')).count();
    // One in five seconds.
    assert!((1..10).contains(&listings), "{listings}");
    assert_serves(&server, "a.hxz", "base-zstd.hxz");
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
