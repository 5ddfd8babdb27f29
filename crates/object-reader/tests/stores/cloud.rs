//! S3, Google Cloud Storage and Azure against scripted servers.

use std::sync::Arc;

use object_reader::{
    ByteRange, CredentialSource, GetRequest, S3Style, Store, StoreConfig, StoreErrorKind as Kind,
    Timeouts, Version,
};
use parking_lot::Mutex;

use crate::plain::part;
use crate::server::{Received, Reply, Server, Then, config_with, object, parse, short_timeouts};

const AWS: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
    ("AWS_SECRET_ACCESS_KEY", "aws-s3cret"),
    ("AWS_REGION", "eu-west-1"),
];
// The key of Azure's emulators, which is public.
const AZURE: [(&str, &str); 2] =
    [("AZURE_STORAGE_ACCOUNT", "account"), ("AZURE_STORAGE_KEY", "czNjcmV0LWtleQ==")];

fn s3(server: &Server) -> StoreConfig {
    StoreConfig { endpoint: Some(server.url()), ..config_with(&AWS) }
}

fn open(config: &StoreConfig, url: &str) -> Arc<dyn Store> {
    config.open(parse(url).store()).unwrap()
}

/// Opens the same bucket as S3, Google Cloud Storage and Azure.
fn all_clouds(server: &Server) -> [Arc<dyn Store>; 3] {
    all_clouds_with(server, Timeouts::default())
}

fn all_clouds_with(server: &Server, timeouts: Timeouts) -> [Arc<dyn Store>; 3] {
    let google = StoreConfig {
        credentials: CredentialSource::Anonymous,
        endpoint: Some(server.url()),
        timeouts,
        ..config_with(&[])
    };
    let azure = StoreConfig { endpoint: Some(server.url()), timeouts, ..config_with(&AZURE) };
    let s3 = StoreConfig { timeouts, ..s3(server) };
    [open(&s3, "s3://golden"), open(&google, "gs://golden"), open(&azure, "az://golden")]
}

#[tokio::test]
async fn parts_are_read_from_all_clouds() {
    let server = Server::start(object(b"0123456789", "\"1\"")).await;
    for store in all_clouds(&server) {
        let label = store.label().to_owned();
        let response = store.get("v 7/a+b%ü", &part(2, 5)).await.unwrap();
        assert_eq!((response.offset, &response.bytes[..]), (2, &b"234"[..]), "{label}");
        let version = response.version;
        assert_eq!((version.length, version.etag.as_deref()), (10, Some("\"1\"")), "{label}");
        let received = server.requests().pop().unwrap();
        // A slash and a plus may also be encoded, or not, in the paths of Google and Azure.
        let target = received.target.replace("%2F", "/").replace("%2B", "+");
        assert_eq!(target, "/golden/v%207/a+b%25%C3%BC", "{label}");
        assert!(received.target.contains("%2B") || !label.starts_with("s3"), "{label}");
        assert_eq!(received.header("user-agent"), "test-agent/1");

        for (range, offset, bytes) in [
            (ByteRange::Suffix(3), 7, "789"),
            (ByteRange::Suffix(30), 0, "0123456789"),
            (ByteRange::Bounded(8..100), 8, "89"),
        ] {
            for pinned in [None, Some(version.clone())] {
                let request =
                    GetRequest { range: range.clone(), version: pinned, bypass_caches: true };
                let response = store.get("k", &request).await.unwrap();
                assert_eq!((response.offset, &response.bytes[..]), (offset, bytes.as_bytes()));
                assert_eq!(response.version, version, "{label}");
                assert_eq!(server.requests().pop().unwrap().header("cache-control"), "no-cache");
            }
        }
        assert!(store.is_current("k", &version).await.unwrap(), "{label}");
        let old = Version { etag: Some("\"0\"".to_owned()), ..version };
        assert!(!store.is_current("k", &old).await.unwrap(), "{label}");
        let stale = GetRequest { version: Some(old), ..part(0, 4) };
        assert_eq!(store.get("k", &stale).await.unwrap_err().kind, Kind::Changed, "{label}");
    }
}

#[tokio::test]
async fn empty_objects_are_read_from_all_clouds() {
    let server = Server::start(object(b"", "\"0\"")).await;
    for store in all_clouds(&server) {
        for range in [ByteRange::Bounded(0..10), ByteRange::Suffix(10)] {
            let request = GetRequest { range, version: None, bypass_caches: false };
            let response = store.get("k", &request).await.unwrap();
            assert_eq!((response.version.length, response.bytes.len()), (0, 0));
        }
    }
}

#[tokio::test]
async fn failures_have_the_same_kinds_for_all_clouds() {
    let code = |code: &str| format!("<Error><Code>{code}</Code></Error>");
    let part_of_10 = [("etag", "\"1\""), ("content-range", "bytes 0-3/10")];
    let announced = [part_of_10[0], part_of_10[1], ("content-length", "4")];
    for (reply, kind) in [
        (Reply::new(404, &[], code("NoSuchKey")), Kind::NotFound),
        (Reply::new(403, &[], code("AccessDenied")), Kind::Denied),
        (Reply::new(401, &[], ""), Kind::Denied),
        (Reply::new(400, &[], code("ExpiredToken")), Kind::CredentialsExpired),
        (Reply::new(403, &[], code("RequestTimeTooSkewed")), Kind::ClockSkew),
        (Reply::new(503, &[], code("SlowDown")), Kind::Throttled),
        (Reply::new(500, &[], code("InternalError")), Kind::ServerError),
        (Reply::new(301, &[("location", "https://h/?s3cret")], ""), Kind::Unsupported),
        (Reply::new(200, &[("etag", "\"1\"")], "0123456789"), Kind::Unsupported),
        (Reply::new(206, &[part_of_10[1]], "0123"), Kind::Unsupported),
        (Reply::new(206, &part_of_10, "01"), Kind::Interrupted),
        (Reply::new(206, &part_of_10, "012345"), Kind::Interrupted),
        (Reply::new(206, &announced, "01").then(Then::Close), Kind::Interrupted),
        (Reply::new(206, &announced, "01").then(Then::Stall), Kind::TimedOut),
        (Reply { bytes: Vec::new(), then: Then::Stall }, Kind::TimedOut),
    ] {
        let server = Server::start(move |_| reply.clone()).await;
        let timeouts = match kind {
            Kind::TimedOut => short_timeouts(),
            _ => Timeouts::default(),
        };
        for (index, store) in all_clouds_with(&server, timeouts).into_iter().enumerate() {
            let error = store.get("k", &part(0, 4)).await.unwrap_err();
            assert_eq!(error.kind, kind, "{}: {error}", store.label());
            assert_eq!(server.requests().len(), index + 1, "no retry: {error}");
            let shown = format!("{error} {error:?} {store:?}");
            assert!(!shown.contains("s3cret") && !shown.contains("AKID"), "{shown}");
        }
    }
}

#[tokio::test]
async fn requests_to_s3_are_signed_for_the_region() {
    let server = Server::start(object(b"0123456789", "\"1\"")).await;
    open(&s3(&server), "s3://golden").get("k", &part(0, 4)).await.unwrap();
    let authorization = server.requests()[0].header("authorization").to_owned();
    assert!(authorization.starts_with("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/"));
    assert!(authorization.contains("/eu-west-1/s3/aws4_request"), "{authorization}");
    let anonymous = StoreConfig { credentials: CredentialSource::Anonymous, ..s3(&server) };
    open(&anonymous, "s3://golden").get("k", &part(0, 4)).await.unwrap();
    assert_eq!(server.requests()[1].header("authorization"), "");
}

#[test]
fn servers_of_buckets_depend_on_style_and_region() {
    let addresses = |config: &StoreConfig, url: &str| {
        let addresses = config.addresses(parse(url).store()).unwrap();
        addresses.into_iter().map(|(host, port)| format!("{host}:{port}")).collect::<Vec<_>>()
    };
    let config = config_with(&AWS);
    assert_eq!(addresses(&config, "s3://golden"), ["golden.s3.eu-west-1.amazonaws.com:443"]);
    assert_eq!(addresses(&config, "s3://gol.den"), ["s3.eu-west-1.amazonaws.com:443"]);
    let china = StoreConfig { region: Some("cn-north-1".into()), ..config.clone() };
    assert_eq!(addresses(&china, "s3://golden"), ["golden.s3.cn-north-1.amazonaws.com.cn:443"]);
    let own = StoreConfig { endpoint: Some("https://ceph:8443/".into()), ..config.clone() };
    assert_eq!(addresses(&own, "s3://golden"), ["ceph:8443"]);
    let own = StoreConfig { style: S3Style::VirtualHost, ..own };
    assert_eq!(addresses(&own, "s3://golden"), ["golden.ceph:8443"]);
    let azure = config_with(&AZURE);
    assert_eq!(addresses(&azure, "az://golden"), ["account.blob.core.windows.net:443"]);
    let anonymous = StoreConfig { credentials: CredentialSource::Anonymous, ..config };
    assert_eq!(addresses(&anonymous, "gs://golden"), ["storage.googleapis.com:443"]);
    let instance = StoreConfig { credentials: CredentialSource::Instance, ..anonymous };
    let expected = ["storage.googleapis.com:443", "169.254.169.254:80"];
    assert_eq!(addresses(&instance, "gs://golden"), expected);
}

#[tokio::test]
async fn versions_are_pinned_and_given_up_if_not_permitted() {
    let is_permitted = Arc::new(Mutex::new(true));
    let permitted = Arc::clone(&is_permitted);
    let server = Server::start(move |received| {
        if received.target.contains("versionId=v1") && !*permitted.lock() {
            return Reply::new(403, &[], "<Error><Code>AccessDenied</Code></Error>");
        }
        let headers =
            [("etag", "\"1\""), ("x-amz-version-id", "v1"), ("content-range", "bytes 0-3/10")];
        Reply::new(206, &headers, "0123")
    })
    .await;
    let store = open(&s3(&server), "s3://golden");
    let version = store.get("k", &part(0, 4)).await.unwrap().version;
    let pinned = GetRequest { version: Some(version), ..part(0, 4) };
    store.get("k", &pinned).await.unwrap();
    assert_eq!(server.requests()[1].target, "/golden/k?versionId=v1");
    *is_permitted.lock() = false;
    store.get("k", &pinned).await.unwrap();
    store.get("k", &pinned).await.unwrap();
    let targets: Vec<_> = server.requests().into_iter().map(|it| it.target).collect();
    assert_eq!(targets[2..], ["/golden/k?versionId=v1", "/golden/k", "/golden/k"]);
}

fn s3_page(received: &Received) -> Reply {
    let entry = |key: &str| {
        format!(
            "<Contents><Key>{key}</Key><LastModified>2026-11-30T10:00:00.000Z</LastModified>\
             <ETag>&quot;{}&quot;</ETag><Size>7</Size></Contents>",
            key.len()
        )
    };
    let (entries, rest) = if received.target.contains("continuation-token=next%2Bpage") {
        (entry("v7/b &amp; c"), String::new())
    } else {
        (
            entry("v7/") + &entry("v7/a"),
            "<NextContinuationToken>next+page</NextContinuationToken>".to_owned(),
        )
    };
    let xml = format!(
        "<?xml version=\"1.0\"?><ListBucketResult><Name>golden</Name><IsTruncated>true\
         </IsTruncated>{rest}{entries}<CommonPrefixes><Prefix>v7/old/</Prefix></CommonPrefixes>\
         </ListBucketResult>"
    );
    Reply::new(200, &[("content-type", "application/xml")], xml)
}

#[tokio::test]
async fn buckets_are_listed_page_by_page() {
    let server = Server::start(s3_page).await;
    let objects = open(&s3(&server), "s3://golden").list("v7/").await.unwrap();
    let names: Vec<_> = objects.iter().map(|object| object.name.as_str()).collect();
    assert_eq!(names, ["a", "b & c"]);
    let version = objects[0].version.clone().unwrap();
    assert_eq!((version.length, version.etag.as_deref()), (7, Some("\"4\"")));
    let target = server.requests()[0].target.clone();
    assert!(target.contains("delimiter=%2F") && target.contains("prefix=v7%2F"), "{target}");
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn unusable_listings_are_errors() {
    for (reply, kind, words) in [
        (Reply::new(403, &[], "<Code>AccessDenied</Code>"), Kind::Denied, "AccessDenied"),
        (Reply::new(404, &[], "<Code>NoSuchBucket</Code>"), Kind::NotFound, "no such bucket"),
        (Reply::new(503, &[], ""), Kind::Throttled, "503"),
        (Reply::new(200, &[], "<ListBucketResult><Contents>"), Kind::Unsupported, "XML"),
        (Reply::new(200, &[], vec![b' '; 9 * 1024 * 1024]), Kind::Unsupported, "longer than"),
    ] {
        let server = Server::start(move |_| reply.clone()).await;
        let error = open(&s3(&server), "s3://golden").list("").await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(words), "{error}");
    }
}
