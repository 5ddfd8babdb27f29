//! HTTP servers as stores.

use object_reader::{
    ByteRange, CredentialSource, GetRequest, Store, StoreConfig, StoreErrorKind as Kind, Version,
};
use parking_lot::Mutex;
use std::sync::Arc;

use crate::server::{Reply, Server, Then, config, object, parse, short_timeouts};

pub(crate) fn part(start: u64, end: u64) -> GetRequest {
    GetRequest { range: ByteRange::Bounded(start..end), version: None, bypass_caches: false }
}

pub(crate) fn open(server: &Server) -> Arc<dyn Store> {
    config().open(parse(&server.url()).store()).unwrap()
}

#[tokio::test]
async fn parts_are_read_and_pinned() {
    let server = Server::start(object(b"0123456789", "\"1\"")).await;
    let store = open(&server);
    let first = store.get("v 7/a+b", &part(2, 5)).await.unwrap();
    assert_eq!((first.offset, &first.bytes[..], first.version.length), (2, &b"234"[..], 10));
    let request = GetRequest {
        range: ByteRange::Suffix(3),
        version: Some(first.version.clone()),
        bypass_caches: true,
    };
    let second = store.get("v 7/a+b", &request).await.unwrap();
    assert_eq!((second.offset, &second.bytes[..]), (7, &b"789"[..]));
    assert_eq!(second.version, first.version);

    let requests = server.requests();
    assert_eq!(requests[0].target, "/v%207/a%2Bb");
    assert_eq!(requests[0].header("range"), "bytes=2-4");
    assert_eq!(requests[0].header("user-agent"), "test-agent/1");
    assert_eq!(requests[0].header("accept-encoding"), "identity");
    assert_eq!(requests[0].header("host"), server.address.to_string());
    assert_eq!(requests[0].header("cache-control"), "");
    assert_eq!(requests[1].header("range"), "bytes=-3");
    assert_eq!(requests[1].header("if-match"), "\"1\"");
    assert_eq!(requests[1].header("cache-control"), "no-cache");
    assert_eq!(server.connections(), 1, "the connection is reused");
}

#[tokio::test]
async fn replaced_objects_are_noticed_even_if_conditions_are_ignored() {
    let etag = Arc::new(Mutex::new("\"1\""));
    let current = Arc::clone(&etag);
    let server = Server::start(move |_| {
        let headers = [("etag", *current.lock()), ("content-range", "bytes 0-1/10")];
        Reply::new(206, &headers, "01")
    })
    .await;
    let store = open(&server);
    let version = store.get("k", &part(0, 2)).await.unwrap().version;
    assert!(store.is_current("k", &version).await.unwrap());
    *etag.lock() = "\"2\"";
    let pinned = GetRequest { version: Some(version.clone()), ..part(0, 2) };
    let error = store.get("k", &pinned).await.unwrap_err();
    assert_eq!(error.kind, Kind::Changed, "{error}");
    assert!(!store.is_current("k", &version).await.unwrap());
}

#[tokio::test]
async fn dates_pin_where_there_is_no_tag() {
    const DATE: &str = "Mon, 30 Nov 2026 10:00:00 GMT";
    const OLDER: &str = "Mon, 30 Nov 2025 10:00:00 GMT";
    let current = Arc::new(Mutex::new(DATE));
    let date = Arc::clone(&current);
    let server = Server::start(move |received| match received.method.as_str() {
        "HEAD" => Reply::new(200, &[("last-modified", *date.lock()), ("content-length", "10")], ""),
        _ => {
            let headers = [("last-modified", *date.lock()), ("content-range", "bytes 0-1/10")];
            Reply::new(206, &headers, "01")
        }
    })
    .await;
    let store = open(&server);
    let version = store.get("k", &part(0, 2)).await.unwrap().version;
    let pinned = GetRequest { version: Some(version.clone()), ..part(0, 2) };
    store.get("k", &pinned).await.unwrap();
    assert!(store.is_current("k", &version).await.unwrap());
    assert_eq!(server.requests()[1].header("if-unmodified-since"), DATE);
    *current.lock() = OLDER;
    assert!(!store.is_current("k", &version).await.unwrap());
    assert_eq!(store.get("k", &pinned).await.unwrap_err().kind, Kind::Changed);
}

#[tokio::test]
async fn currency_is_checked_by_get_where_head_is_refused() {
    let server = Server::start(|received| match received.method.as_str() {
        "HEAD" => Reply::new(403, &[], ""),
        _ => object(b"0123456789", "\"1\"")(received),
    })
    .await;
    let store = open(&server);
    let version = store.get("k", &part(0, 2)).await.unwrap().version;
    assert!(store.is_current("k", &version).await.unwrap());
    let old = Version { etag: Some("\"0\"".to_owned()), ..version };
    assert!(!store.is_current("k", &old).await.unwrap());
}

#[tokio::test]
async fn failures_have_kinds() {
    let part_of_10 = [("etag", "\"1\""), ("content-range", "bytes 0-3/10")];
    let chunked = [part_of_10[0], part_of_10[1], ("transfer-encoding", "chunked")];
    let announced = |length| [part_of_10[0], part_of_10[1], ("content-length", length)];
    let large = "x".repeat(20_000);
    for (name, reply, kind, words) in [
        ("missing", Reply::new(404, &[], ""), Kind::NotFound, "404"),
        ("denied", Reply::new(403, &[], ""), Kind::Denied, "403"),
        ("throttled", Reply::new(503, &[("retry-after", "7")], ""), Kind::Throttled, "503"),
        ("failing", Reply::new(500, &[], "x".repeat(10_000)), Kind::ServerError, "500"),
        (
            "no ranges",
            Reply::new(200, &[("etag", "\"1\"")], "0123456789"),
            Kind::Unsupported,
            "ignores ranges",
        ),
        (
            "compressed",
            Reply::new(206, &[part_of_10[0], part_of_10[1], ("content-encoding", "gzip")], "0123"),
            Kind::Unsupported,
            "gzip",
        ),
        (
            "short",
            Reply::new(206, &announced("4"), "01").then(Then::Close),
            Kind::Interrupted,
            "broke off after 2 of 4 bytes",
        ),
        ("short part", Reply::new(206, &part_of_10, "01"), Kind::Interrupted, "sent 2"),
        (
            "long part",
            Reply::new(206, &chunked, "6\r\n012345\r\n0\r\n\r\n"),
            Kind::Interrupted,
            "more than 4",
        ),
        ("long body", Reply::new(206, &announced("6"), "012345"), Kind::Interrupted, "more than"),
        (
            "endless",
            Reply::new(206, &chunked, format!("4e20\r\n{large}")).then(Then::Stall),
            Kind::Interrupted,
            "more than 4",
        ),
        (
            "stalled",
            Reply::new(206, &announced("4"), "01").then(Then::Stall),
            Kind::TimedOut,
            "stalled: no more data for 0.3 s after 2 bytes",
        ),
        (
            "silent",
            Reply { bytes: Vec::new(), then: Then::Stall },
            Kind::TimedOut,
            "no response from 127.0.0.1",
        ),
        ("closed", Reply { bytes: Vec::new(), then: Then::Close }, Kind::Interrupted, "closed"),
        ("large headers", Reply::new(206, &[("x", &large)], ""), Kind::Unsupported, "16 KiB"),
        (
            "not HTTP",
            Reply { bytes: b"SSH-2.0-x\r\n\r\n".to_vec(), then: Then::Close },
            Kind::Unsupported,
            "valid HTTP",
        ),
    ] {
        let server = Server::start(move |_| reply.clone()).await;
        let mut config = config();
        if kind == Kind::TimedOut {
            config.timeouts = short_timeouts();
        }
        let store = config.open(parse(&server.url()).store()).unwrap();
        let error = store.get("k", &part(0, 4)).await.unwrap_err();
        assert_eq!(error.kind, kind, "{name}: {error}");
        assert!(error.message.contains(words), "{name}: {error}");
        assert_eq!(server.requests().len(), 1, "{name}: no retry");
        assert_eq!(error.retry_after.is_some(), name == "throttled");
    }
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let target = Server::start(object(b"0123456789", "\"1\"")).await;
    let location = format!("{}/k?token=s3cret", target.url());
    let server =
        Server::start(move |_| Reply::new(302, &[("location", &location)], location.as_bytes()))
            .await;
    let error = open(&server).get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unsupported);
    assert!(error.message.contains("redirects to 127.0.0.1"), "{error}");
    assert!(!error.message.contains("s3cret"), "{error}");
    assert!(target.requests().is_empty());
}

#[tokio::test]
async fn presigned_queries_are_sent_but_never_shown() {
    const QUERY: &str = "X-Amz-Signature=s3cret&x=1";
    let server = Server::start(|received| {
        // A hostile server repeats the query where its words would be shown.
        let body = format!("<Error><Code>Odd</Code><Message>{}</Message></Error>", received.target);
        Reply::new(400, &[], body)
    })
    .await;
    let url = parse(&format!("{}/k?{QUERY}", server.url()));
    let config = config();
    let store = config.open(url.store()).unwrap();
    let error = store.get(url.key(), &part(0, 4)).await.unwrap_err();
    assert_eq!(server.requests()[0].target, format!("/k?{QUERY}"));
    let shown = format!("{url} {url:?} {store:?} {} {error} {error:?} {config:?}", store.label());
    assert!(!shown.contains("s3cret"), "{shown}");
}

#[tokio::test]
async fn credentials_for_a_server_are_read_again_when_they_are_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    for (old, new, header) in [
        ("old-s3cret", "new-s3cret", "Bearer new-s3cret"),
        ("u:old-s3cret", "u:new-s3cret", "Basic dTpuZXctczNjcmV0"),
    ] {
        std::fs::write(&file, old).unwrap();
        let (path, accepted) = (file.clone(), header.to_owned());
        let server = Server::start(move |received| {
            if received.header("authorization") == accepted {
                return object(b"0123456789", "\"1\"")(received);
            }
            std::fs::write(&path, format!("{new}\n")).unwrap();
            Reply::new(401, &[], "")
        })
        .await;
        let mut config = config();
        config.credentials = CredentialSource::File(file.clone());
        let store = config.open(parse(&server.url()).store()).unwrap();
        store.get("k", &part(0, 4)).await.unwrap();
        assert_eq!(server.requests().len(), 2);
        let shown = format!("{store:?} {config:?}");
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}

#[tokio::test]
async fn folders_are_listed() {
    let server = Server::start(|received| match received.target.as_str() {
        "/v7/" => Reply::new(
            200,
            &[("content-type", "text/html")],
            "<title>Index of /v7/</title><a href=\"../\">../</a><a href=\"b%20c\">b c</a>",
        ),
        "/json/" => Reply::new(
            200,
            &[("content-type", "application/json")],
            r#"[{"name":"a","type":"file"}]"#,
        ),
        "/page/" => Reply::new(200, &[], "hello"),
        "/off/" => Reply::new(403, &[], ""),
        "/large/" => Reply::new(200, &[], vec![b' '; 9 * 1024 * 1024]),
        _ => Reply::new(404, &[], ""),
    })
    .await;
    let store = open(&server);
    assert_eq!(store.list("v7/").await.unwrap()[0].name, "b c");
    assert_eq!(store.list("json/").await.unwrap()[0].name, "a");
    for (prefix, kind, words) in [
        ("page/", Kind::Unsupported, "autoindex on"),
        ("off/", Kind::Unsupported, "refuses (status 403)"),
        ("large/", Kind::Unsupported, "8 MiB"),
        ("missing/", Kind::NotFound, "404"),
    ] {
        let error = store.list(prefix).await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(words), "{error}");
    }
}

#[tokio::test]
async fn impossible_ranges_and_keys_are_refused() {
    let server = Server::start(object(b"0123456789", "\"1\"")).await;
    let store = open(&server);
    for range in [ByteRange::Bounded(4..4), ByteRange::Suffix(0), ByteRange::Bounded(0..u64::MAX)] {
        let request = GetRequest { range, ..part(0, 1) };
        assert_eq!(store.get("k", &request).await.unwrap_err().kind, Kind::Unsupported);
    }
    let anonymous = StoreConfig {
        credentials: CredentialSource::Anonymous,
        endpoint: Some(server.url()),
        ..config()
    };
    for store in [store, anonymous.open(parse("s3://b").store()).unwrap()] {
        for key in ["../k", "a/../k", "a/./k", "a//k", "/k", "a\nk"] {
            let error = store.get(key, &part(0, 4)).await.unwrap_err();
            assert_eq!(error.kind, Kind::Unsupported, "{key}: {error}");
        }
    }
    assert!(server.requests().is_empty());
}
