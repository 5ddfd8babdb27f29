//! Names and URLs: what is sent to the server, and what is shown.

use std::ffi::OsString;

use object_server::{Index, ObjectServer, Rule, Script};

use super::{MIB, WEB, gateway, monitor_page, sample, sandboxed, store};
use crate::support::server::run;

const SIGNATURE: &str = "0123456789abcdef0123456789abcdef";

#[test]
fn an_export_is_named_by_the_operator_or_like_the_object() {
    let store = store();
    let server =
        gateway().arg(format!("other={}", store.url(WEB))).arg(store.url(WEB) + "?a=b").start();
    let mut names = server.greeted().list();
    names.sort();
    assert_eq!(names, ["other", "web.hxz"]);
    sample().is_read_at(&mut server.go("other"), 0);
    sample().is_read_at(&mut server.go("web.hxz"), 0);
}

/// The query of a presigned URL is as good as a password.
#[test]
fn a_query_is_sent_to_the_store_and_shown_nowhere() {
    let store = store();
    let query = format!("X-Amz-Credential=AKIAPRESIGNED%2Fs3&X-Amz-Signature={SIGNATURE}");
    let url = format!("web={}?{query}", store.url(WEB));
    let args = ["-vvv", "--monitor", "0", "--store-timeout", "1s", "--fresh-for", "1ms"];
    let mut server = gateway().args(args).arg(&url).start();
    let mut client = server.go("web");
    sample().is_read_at(&mut client, 0);
    sample().is_read_at(&mut client, 4 * super::MIB);
    let requests = store.log().entries();
    assert!(requests.len() > 2);
    assert!(requests.iter().all(|request| request.query == query), "{requests:?}");

    let mut shown = monitor_page(&server, "/status.json") + &monitor_page(&server, "/metrics");
    // Failures of all kinds.
    store.remove(WEB);
    client.read(2 * super::MIB, 4096).unwrap_err();
    super::assert_no_export(&server, "web");
    store.stop();
    client.read(6 * super::MIB, 4096).unwrap_err();
    server.signal("HUP");
    server.wait_for_reloads(1);
    shown += &(monitor_page(&server, "/status.json") + &monitor_page(&server, "/metrics"));
    drop(client);
    server.terminate();
    shown += &server.log_text();
    assert!(shown.contains(WEB));
    for secret in [SIGNATURE, "X-Amz", "AKIAPRESIGNED"] {
        assert!(!shown.contains(secret), "{secret}: {shown}");
    }
}

#[test]
fn errors_at_the_start_hide_a_query() {
    let store = ObjectServer::builder().start().unwrap();
    let url = format!("{}?X-Amz-Signature={SIGNATURE}", store.url("images/none.hxz"));
    let (code, error) = gateway().args(["-vvv", "--strict"]).arg(&url).fail();
    assert_eq!(code, 3);
    assert!(error.contains("images/none.hxz") && !error.contains(SIGNATURE), "{error}");
    for url in [
        format!("http://127.0.0.1:99999/x.hxz?sig={SIGNATURE}"),
        format!("http:///x.hxz?sig={SIGNATURE}"),
        format!("http://user:{SIGNATURE}@127.0.0.1/x.hxz"),
    ] {
        let (code, error) = gateway().args(["-vvv"]).arg(&url).fail();
        assert!([2, 3].contains(&code), "{code}: {error}");
        assert!(!error.contains(SIGNATURE), "{error}");
    }
}

/// Runs a command, which fails and doesn't show the signature.
#[track_caller]
fn fails_without_signature(args: &[&str], code: i32) -> String {
    let ended = run(args);
    assert_eq!(ended.code, Some(code), "{args:?}: {}", ended.stderr);
    let shown = ended.stdout + &ended.stderr;
    assert!(!shown.contains(SIGNATURE) && !shown.contains("X-Amz"), "{args:?}: {shown}");
    shown
}

#[test]
fn errors_of_commands_hide_a_query() {
    let store = ObjectServer::builder().start().unwrap();
    let query = format!("X-Amz-Credential=a&X-Amz-Signature={SIGNATURE}");
    let none = format!("{}?{query}", store.url("v7/none.hxz"));
    let upper = none.replace("http", "HTTP");
    let folder = format!("{}?{query}", store.url("v7/"));
    let foreign = format!("gcs://golden/none.hxz?{query}");
    for url in [&none, &upper] {
        for command in ["verify", "inspect", "digest"] {
            fails_without_signature(&[command, url], 3);
        }
        fails_without_signature(&["tree", url], 3);
        fails_without_signature(&["trace", "show", url], 1);
        fails_without_signature(&["trace", "merge", url, url], 1);
        fails_without_signature(&[url], 3);
        fails_without_signature(&["--digest", url, "x.hxz"], 3);
        fails_without_signature(&["--password-file", url, "x.hxz"], 3);
        fails_without_signature(&["--tls-cert", url, "--tls-key", url, "x.hxz"], 4);
    }
    let unlisted = ObjectServer::builder().index(Index::Off).start().unwrap();
    let unlisted = format!("{}?{query}", unlisted.url("v7"));
    let shown = fails_without_signature(&["--export-dir", &unlisted], 3);
    assert!(shown.contains("v7/"), "{shown}");
    assert!(fails_without_signature(&[&folder], 2).contains("--export-dir"));
    fails_without_signature(&["verify", &folder], 2);
    fails_without_signature(&["doctor", &none], 2);
    for args in [&["verify"][..], &["--export-dir"], &[], &["x.hxz", "--parent-dir"]] {
        let shown = fails_without_signature(&[args, &[&foreign]].concat(), 2);
        assert!(shown.contains("gs://"), "{shown}");
    }

    let files = tempfile::tempdir().unwrap();
    let config = files.path().join("gateway.toml");
    let config_name = config.to_str().unwrap();
    for (text, code) in [
        (format!("[exports]\na = \"{upper}\""), 3),
        (format!("[exports]\na = \"{folder}\""), 2),
        (format!("exports = \"{none}\""), 2),
        (format!("traces = \"{foreign}\"\n[exports]\na = \"b\""), 2),
    ] {
        std::fs::write(&config, text).unwrap();
        fails_without_signature(&["--config", config_name], code);
    }
}

/// A file whose name looks like a URL is a file.
#[test]
fn a_file_may_be_called_like_a_url() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("gcs:")).unwrap();
    sample().archive.save(&folder.path().join("gcs:/web.hxz"));
    let within = ["env".into(), "--chdir".into(), OsString::from(folder.path())];
    let server = gateway().within(within).arg("gcs://web.hxz").start();
    sample().is_read_at(&mut server.go("web.hxz"), 0);
}

/// Folders with archives, parents or traces can be given by a URL with a query, which is sent with
/// all requests for what is in them.
#[test]
fn a_query_of_a_folder_is_sent_for_its_objects() {
    let store = store();
    let trace = format!("hexz-trace 1\nexport web main {}\n{} 65536 0\n", 8 * MIB, 4 * MIB);
    store.put("traces/web.hxz.trace", trace);
    let query = format!("token={SIGNATURE}");
    let [archives, traces] =
        ["images/", "traces"].map(|folder| format!("{}?{query}", store.url(folder)));
    let args = ["-vvv", "--export-dir", &archives, "--traces", &traces];
    let server = sandboxed().args(args).start();
    assert_eq!(server.greeted().list(), ["web.hxz"]);
    sample().is_read_at(&mut server.go("web.hxz"), 0);
    server.wait_for_log("the trace was replayed", |line| line.json["wanted"].is_u64());
    let requests = store.log().entries();
    assert!(requests.iter().all(|request| request.query == query), "{requests:?}");
    assert!(!server.log_text().contains(SIGNATURE), "{}", server.log_text());

    // So is that of a trace's folder for the command that fills a disk cache.
    let cache = tempfile::tempdir().unwrap();
    let cache = cache.path().to_str().unwrap();
    let url = store.url(WEB);
    let rule = Rule::new(object_server::Behavior::status(500)).path("traces/web.hxz.trace");
    store.set_script(Script::new().rule(rule));
    let size = ["--disk-cache-size", "16MiB", "--store-timeout", "1s"];
    let args = ["warm", "--disk-cache", cache, "--traces", &traces, &url];
    let shown = fails_without_signature(&[&args[..], &size].concat(), 3);
    assert!(shown.contains("traces/web.hxz.trace"), "{shown}");
}
