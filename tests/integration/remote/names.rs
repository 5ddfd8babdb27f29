//! Names and URLs: what is sent to the server, and what is shown.

use object_server::ObjectServer;

use super::{WEB, gateway, monitor_page, sample, store};

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
