//! Requests that a store denies: the label tells wrong permissions from a wrong clock.

use std::time::{Duration, Instant};

use object_server::{Behavior, Credentials, Issuer, ObjectServer, Script};

use super::serving::{permanent_issuer, signed_store};
use super::{
    MIB, assert_serves, gateway, gateway_of, has_export, monitor_page, pause, put_file, sample,
    store,
};
use crate::support::client::EIO;
use crate::support::server::Builder;
use crate::support::wait_until;

/// Responses of a store that rejects all requests, the label, and the one of the status.
fn rejections() -> [(Behavior, &'static str, &'static str); 3] {
    [
        (Behavior::status(403), "store_denied", "denied"),
        (Behavior::error(403, "RequestTimeTooSkewed"), "store_clock_skew", "clock_skew"),
        (Behavior::expired_token(), "store_credentials", "credentials_expired"),
    ]
}

/// Returns the message of a gateway that can't start with a store which always responds like that.
#[track_caller]
fn is_denied(behavior: Behavior, label: &str) -> String {
    let store = signed_store(&permanent_issuer());
    store.set_script(Script::always(behavior));
    gateway()
        .args(["--strict", "--store-timeout", "2s", "--store-endpoint", &store.endpoint()])
        .arg("s3://golden/web.hxz")
        .env("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
        .env("AWS_SECRET_ACCESS_KEY", "a+secret/key")
        .fails_with(3, label)
}

#[test]
fn access_is_denied() {
    is_denied(Behavior::status(403), "store_denied");
}

#[test]
fn the_clock_is_wrong() {
    let message = is_denied(Behavior::error(403, "RequestTimeTooSkewed"), "store_clock_skew");
    assert!(message.contains("clock"), "{message}");
}

#[test]
fn permanent_credentials_have_expired() {
    is_denied(Behavior::expired_token(), "store_credentials");
}

#[test]
fn a_signature_is_wrong() {
    let issuer = Issuer::new(Duration::from_secs(3600));
    issuer.add(Credentials::permanent("AKIATESTTESTTEST", "another secret"));
    let store = signed_store(&issuer);
    let message = gateway()
        .args(["--strict", "--store-endpoint", &store.endpoint(), "s3://golden/web.hxz"])
        .env("AWS_ACCESS_KEY_ID", "AKIATESTTESTTEST")
        .env("AWS_SECRET_ACCESS_KEY", "a+secret/key")
        .fails_with(3, "store_denied");
    assert!(!message.contains("a+secret/key"), "{message}");
}

#[test]
fn credentials_that_are_missing_are_an_error_of_the_configuration() {
    let store = signed_store(&permanent_issuer());
    let builder = gateway().args(["--store-endpoint", &store.endpoint()]);
    builder.env("HOME", "/nonexistent").arg("s3://golden/web.hxz").fails_with(2, "invalid_store");
    assert_eq!(store.log().totals().requests, 0);
}

/// Plain HTTP to other machines needs an option.
#[test]
fn plain_http_to_other_machines_is_refused() {
    let url = "http://192.0.2.1/web.hxz";
    gateway().arg(url).fails_with(2, "invalid_store");
}

/// Permissions that are taken away while clients read, and given back.
#[test]
fn access_is_denied_in_between() {
    let store = store();
    let server = gateway_of(&store).args(["--fresh-for", "1ms", "--store-timeout", "2s"]).start();
    let mut client = server.go("");
    for (behavior, label) in [
        (Behavior::status(403), "store_denied"),
        (Behavior::error(403, "RequestTimeTooSkewed"), "store_"),
        (Behavior::expired_token(), "store_"),
    ] {
        store.set_script(Script::always(behavior));
        assert_eq!(client.read(4 * MIB, 512), Err(EIO));
        server.wait_for_log(label, |line| line.reason().starts_with(label));
    }
    store.set_script(Script::new());
    sample().is_read_at(&mut client, 4 * MIB);
    sample().is_read(&mut server.go(""));
}

/// An S3 store with the sample as `s3://images/web.hxz`. Its errors have codes, unlike those of an
/// HTTP server.
fn bucket() -> ObjectServer {
    let store = ObjectServer::builder().s3().start().unwrap();
    store.put(super::WEB, sample().bytes());
    store
}

fn with_bucket(store: &ObjectServer) -> Builder {
    let args = ["--store-endpoint", &store.endpoint(), "--store-credentials", "anonymous"];
    gateway().args(args)
}

fn gateway_of_bucket(store: &ObjectServer) -> Builder {
    with_bucket(store).arg("s3://images/web.hxz")
}

/// Expired credentials hit all gateways at once. None must lose what it has.
#[test]
fn cached_archives_are_served_to_new_clients_while_requests_are_rejected() {
    for (behavior, label, rejection) in rejections() {
        let store = bucket();
        let args = ["--fresh-for", "1s", "--store-timeout", "2s", "--monitor", "0"];
        let server = gateway_of_bucket(&store).args(args).start();
        sample().is_read(&mut server.go(""));
        store.set_script(Script::always(behavior));
        pause(1100);
        for _ in 0..2 {
            sample().is_read(&mut server.go(""));
            pause(1100);
        }
        let line = server.wait_for_log("requests are rejected", |line| {
            line.reason() == label && line.json["level"] == "WARN"
        });
        assert!(line.message().contains("rejects requests"), "{}", line.text);
        assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"), "{label}");
        let status = monitor_page(&server, "/status.json");
        let shown = [format!("\"rejection\":\"{rejection}\""), "\"store_rejects\"".to_owned()];
        assert!(shown.iter().all(|text| status.contains(text)), "{status}");
        assert!(monitor_page(&server, "/metrics").contains(&format!("result=\"{rejection}\"")));

        store.set_script(Script::new());
        pause(1100);
        sample().is_read(&mut server.go(""));
        server.wait_for_reason("store_up");
        assert!(!monitor_page(&server, "/status.json").contains("\"store_rejects\""));
    }
}

/// What isn't cached is an error: at once, or when new credentials haven't come in time.
#[test]
fn reads_of_what_is_not_cached_fail_with_the_reason() {
    for (behavior, label, _) in rejections() {
        let store = bucket();
        let server = gateway_of_bucket(&store).args(["--store-timeout", "2s"]).start();
        let mut client = server.go("");
        store.set_script(Script::always(behavior));
        let begin = Instant::now();
        assert_eq!(client.read(4 * MIB, 512), Err(EIO));
        let waits = label == "store_credentials";
        assert_eq!(begin.elapsed() >= Duration::from_secs(2), waits, "{:?}", begin.elapsed());
        server.wait_for_log(label, |line| line.reason() == label && line.json["level"] == "ERROR");
    }
}

/// A read waits for new credentials. Nothing but a delay is seen of those that come late.
#[test]
fn credentials_that_come_late_are_only_a_delay() {
    let store = bucket();
    let server = gateway_of_bucket(&store).start();
    let mut client = server.go("");
    store.set_script(Script::always(Behavior::expired_token()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("a request is rejected", || {
                store.log().entries().iter().any(|request| request.status == 400)
            });
            store.set_script(Script::new());
        });
        sample().is_read_at(&mut client, 4 * MIB);
    });
}

#[test]
fn an_export_that_cannot_be_opened_for_lack_of_access_does_not_make_the_server_unready() {
    let store = bucket();
    store.put("images/other.hxz", sample().bytes());
    let server = gateway_of_bucket(&store)
        .arg("s3://images/other.hxz")
        .args(["--fresh-for", "1ms", "--monitor", "0"])
        .start();
    // Nothing is known about a replaced object.
    store.put("images/other.hxz", super::other_sample().bytes());
    store.remove("images/web.hxz");
    let denied = |request: &object_server::LoggedRequest| match &*request.method {
        "GET" => Behavior::status(403),
        _ => Behavior::new(),
    };
    store.set_script(Script::from_fn(denied));
    for name in ["web.hxz", "other.hxz"] {
        assert!(!has_export(&server, name));
    }
    let status = monitor_page(&server, "/status.json");
    assert!(status.contains("\"reason\":\"store_denied\""), "{status}");
    assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
}

/// Starts from a disk cache while the store rejects all requests. Parents may be in another folder.
#[test]
fn a_gateway_starts_from_its_disk_cache_while_requests_are_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let store = ObjectServer::builder().s3().start().unwrap();
    put_file(&store, "v7/child-zstd.hxz", "child-zstd.hxz");
    put_file(&store, "base/base-zstd.hxz", "base-zstd.hxz");
    let cached = || {
        with_bucket(&store)
            .args(["--disk-cache-size", "64MiB", "--store-timeout", "2s", "--monitor", "0"])
            .args(["--parent-dir", "s3://base/"])
            .arg("--disk-cache")
            .arg(folder.path())
            .arg("s3://v7/child-zstd.hxz")
    };
    let mut server = cached().start();
    assert_serves(&server, "", "child-zstd.hxz");
    server.terminate();
    for (behavior, label, rejection) in rejections() {
        store.set_script(Script::always(behavior));
        let mut server = cached().start();
        assert_serves(&server, "", "child-zstd.hxz");
        assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"), "{label}");
        server.wait_for_reason(label);
        let line = server.wait_for_reason("object_unconfirmed");
        assert_eq!(line.json["cause"], rejection, "{}", line.text);
        server.terminate();
    }
    store.set_script(Script::new());
    let server = cached().start();
    assert_serves(&server, "", "child-zstd.hxz");
}

/// Without anything in a cache, a gateway that may read nothing is of no use.
#[test]
fn a_gateway_without_anything_cached_does_not_start_while_requests_are_rejected() {
    for (behavior, label, _) in rejections() {
        let store = bucket();
        store.set_script(Script::always(behavior));
        gateway_of_bucket(&store).fails_with(3, label);
    }
}
