//! Connections: reuse, TLS, proxies and plain HTTP.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use object_reader::{
    CredentialSource, Dial, GetRequest, ProxyChoice, ReceiveBytes, Secret, StoreConfig,
    StoreErrorKind as Kind, Timeouts, Version,
};

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::plain::{open, part};
use crate::server::{
    Reply, Server, TestTls, Then, config, config_with, object, parse, start_proxy,
};

#[tokio::test]
async fn connections_that_the_server_closed_are_replaced() {
    let server =
        Server::start(|received| object(b"0123456789", "\"1\"")(received).then(Then::Close)).await;
    let store = open(&server);
    for _ in 0..5 {
        store.get("k", &part(0, 4)).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    store.get("k", &part(0, 4)).await.unwrap();
    assert_eq!(server.requests().len(), 6);
    assert_eq!(server.connections(), 6);
}

#[tokio::test]
async fn requests_lost_on_an_old_connection_are_sent_again() {
    // The server reads the second request of a connection, and closes it without a response.
    let counts = std::sync::atomic::AtomicUsize::new(0);
    let server = Server::start(move |received| {
        match counts.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            1 => Reply { bytes: Vec::new(), then: Then::Close },
            _ => object(b"0123456789", "\"1\"")(received),
        }
    })
    .await;
    let store = open(&server);
    store.get("k", &part(0, 4)).await.unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    assert_eq!((server.requests().len(), server.connections()), (3, 2));
}

#[tokio::test]
async fn servers_that_refuse_connections_are_unreachable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let store = config().open(parse(&format!("http://{address}/")).store()).unwrap();
    let error = store.get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unreachable, "{error}");
}

#[tokio::test]
async fn servers_that_never_finish_tls_time_out() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tls = TestTls::new("localhost", false);
    let mut config = config();
    config.ca_file = Some(tls.ca_file.clone());
    config.timeouts.connect = Duration::from_millis(200);
    let store = config.open(parse(&format!("https://localhost:{port}/")).store()).unwrap();
    let error = store.get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::TimedOut, "{error}");
}

#[tokio::test]
async fn private_cas_are_trusted_if_named() {
    let tls = TestTls::new("localhost", false);
    let handler = object(b"0123456789", "\"1\"");
    let server = Server::with_tls(Some(tls.acceptor.clone()), handler).await;
    let url = parse(&server.url());
    let mut config = config();
    config.ca_file = Some(tls.ca_file.clone());
    let store = config.open(url.store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    assert_eq!(server.connections(), 1);

    let other = TestTls::new("localhost", false);
    config.ca_file = Some(other.ca_file.clone());
    let store = config.open(url.store()).unwrap();
    let error = store.get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unreachable);
    assert!(error.message.contains("unknown CA"), "{error}");

    let unusable = tempfile::NamedTempFile::new().unwrap();
    config.ca_file = Some(unusable.path().to_owned());
    let error = config.open(url.store()).unwrap_err().to_string();
    assert!(error.contains("no CA certificate"), "{error}");
}

#[tokio::test]
async fn failures_of_tls_are_explained() {
    for (name, is_expired, words) in [
        ("localhost", true, "has expired"),
        ("elsewhere.example", false, "valid for other names than localhost"),
    ] {
        let tls = TestTls::new(name, is_expired);
        let server =
            Server::with_tls(Some(tls.acceptor.clone()), |_| Reply::new(500, &[], "")).await;
        let mut config = config();
        config.ca_file = Some(tls.ca_file.clone());
        let store = config.open(parse(&server.url()).store()).unwrap();
        let error = store.get("k", &part(0, 4)).await.unwrap_err();
        assert_eq!(error.kind, Kind::Unreachable);
        assert!(error.message.contains(words), "{error}");
    }
    let plain = Server::start(|_| Reply::new(500, &[], "")).await;
    let tls = TestTls::new("localhost", false);
    let mut config = config();
    config.ca_file = Some(tls.ca_file.clone());
    let url = parse(&format!("https://localhost:{}/", plain.address.port()));
    let error = config.open(url.store()).unwrap().get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Unreachable, "{error}");
}

#[tokio::test]
async fn tunnels_lead_through_the_proxy_with_its_credentials() {
    // u:s3cret
    let (proxy, targets) = start_proxy("Basic dTpzM2NyZXQ=").await;
    let tls = TestTls::new("store.example", false);
    let handler = object(b"0123456789", "\"1\"");
    let server = Server::with_tls(Some(tls.acceptor.clone()), handler).await;
    let port = server.address.port();
    let url = parse(&format!("https://store.example:{port}/"));
    let mut config = config_with(&[("HTTPS_PROXY", &format!("http://u:s3cret@{proxy}"))]);
    config.ca_file = Some(tls.ca_file.clone());
    let store = config.open(url.store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    assert_eq!(*targets.lock(), [format!("CONNECT store.example:{port}")]);
    assert_eq!(server.requests()[0].header("proxy-authorization"), "");
    assert_eq!(config.addresses(url.store()).unwrap(), [("127.0.0.1".to_owned(), proxy.port())]);

    config.proxy = ProxyChoice::Url(Secret::new(format!("http://u:other-s3cret@{proxy}")));
    let store = config.open(url.store()).unwrap();
    let error = store.get("k", &part(0, 4)).await.unwrap_err();
    assert_eq!(error.kind, Kind::Denied);
    let shown = format!("{error} {error:?} {store:?} {config:?}");
    assert!(shown.contains("407") && !shown.contains("s3cret"), "{shown}");
}

#[tokio::test]
async fn plain_requests_go_to_the_proxy_in_absolute_form() {
    let (proxy, targets) = start_proxy("Basic dTpzM2NyZXQ=").await;
    let mut config = config();
    config.proxy = ProxyChoice::Url(Secret::new(format!("http://u:s3cret@{proxy}")));
    config.allow_insecure = true;
    let store = config.open(parse("http://store.example/").store()).unwrap();
    let response = store.get("k", &part(0, 7)).await.unwrap();
    assert_eq!(response.bytes, "through");
    assert_eq!(*targets.lock(), ["GET http://store.example/k"]);
}

#[tokio::test]
async fn exceptions_are_connected_to_directly() {
    let (proxy, targets) = start_proxy("").await;
    let variables = [("HTTPS_PROXY", &*format!("http://{proxy}")), ("NO_PROXY", "example")];
    let config = config_with(&variables);
    let url = parse("https://store.example/");
    assert_eq!(config.addresses(url.store()).unwrap(), [("store.example".to_owned(), 443)]);
    assert!(targets.lock().is_empty());
    // Loopback addresses are exceptions without being named.
    let server = Server::start(object(b"0123456789", "\"1\"")).await;
    let mut config = config_with(&[("HTTP_PROXY", &format!("http://{proxy}"))]);
    config.allow_insecure = true;
    let store = config.open(parse(&server.url()).store()).unwrap();
    store.get("k", &part(0, 4)).await.unwrap();
    assert!(targets.lock().is_empty());
}

#[tokio::test]
async fn plain_http_to_other_hosts_is_refused() {
    let url = parse("http://store.example/");
    let error = config().open(url.store()).unwrap_err().to_string();
    assert!(error.contains("plain http to store.example is refused"), "{error}");
    let mut config = config();
    config.endpoint = Some("http://store.example".to_owned());
    config.credentials = object_reader::CredentialSource::Anonymous;
    assert!(config.open(parse("s3://b/").store()).is_err());
    config.allow_insecure = true;
    assert!(config.open(url.store()).is_ok() && config.open(parse("s3://b/").store()).is_ok());
}

/// Records where to it connects.
#[derive(Debug, Default)]
struct RecordingDialer(Mutex<Vec<(String, u16)>>);

impl Dial for RecordingDialer {
    fn dial<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<TcpStream>> {
        self.0.lock().push((host.to_owned(), port));
        TcpStream::connect((host, port)).boxed()
    }
}

#[tokio::test]
async fn only_announced_addresses_are_dialed() {
    let folder = tempfile::tempdir().unwrap();
    let token = folder.path().join("token");
    std::fs::write(&token, "identity").unwrap();
    let sts = Server::start(|_| {
        let credentials = "<AccessKeyId>K</AccessKeyId><SecretAccessKey>S</SecretAccessKey>\
                           <SessionToken>T</SessionToken>";
        Reply::new(200, &[], credentials)
    })
    .await;
    let server = Server::start(object(b"0123456789", "\"1\"")).await;
    let sts_url = sts.url();
    let mut config = config_with(&[
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::1:role/r"),
        ("AWS_ENDPOINT_URL_STS", &sts_url),
    ]);
    let dialer = Arc::new(RecordingDialer::default());
    config.dialer = Arc::<RecordingDialer>::clone(&dialer);
    config.endpoint = Some(server.url());
    let url = parse("s3://b");
    let store = config.open(url.store()).unwrap();
    assert!(dialer.0.lock().is_empty(), "opening connects to nothing");
    store.get("k", &part(0, 4)).await.unwrap();
    let mut dialed = dialer.0.lock().clone();
    let mut announced = config.addresses(url.store()).unwrap();
    dialed.sort();
    announced.sort();
    assert_eq!(dialed, announced);
}

/// Sends a response of 100 kB in parts, one each 10 ms.
async fn send_slowly(listener: &TcpListener, part: usize) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        assert!(stream.read_buf(&mut request).await.unwrap() > 0);
    }
    let head = "HTTP/1.1 206 X\r\netag: \"1\"\r\ncontent-length: 100000\r\n\
                content-range: bytes 0-99999/100000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..100_000 / part {
        if stream.write_all(&vec![7; part]).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn slow_bodies_are_received_and_trickling_ones_given_up() {
    let timeouts =
        Timeouts { min_rate: 500, rate_time: Duration::from_millis(300), ..Timeouts::default() };
    for (part_length, is_received) in [(1000, true), (1, false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = parse(&format!("http://{}/k", listener.local_addr().unwrap()));
        let server = tokio::spawn(async move { send_slowly(&listener, part_length).await });
        let store = StoreConfig { timeouts, ..config() }.open(url.store()).unwrap();
        match store.get("k", &part(0, 100_000)).await {
            Ok(response) => assert!(is_received && response.bytes.len() == 100_000),
            Err(error) => {
                assert_eq!((is_received, error.kind), (false, Kind::TimedOut), "{error}");
                assert!(error.message.contains("too slow"), "{error}");
            }
        }
        server.abort();
    }
}

/// Keeps the lengths of what it receives.
#[derive(Default)]
struct Arrivals(Mutex<Vec<(u64, usize)>>);

impl ReceiveBytes for Arrivals {
    fn receive(&self, offset: u64, so_far: &[u8]) {
        assert!(so_far.iter().all(|byte| *byte == 7));
        self.0.lock().push((offset, so_far.len()));
    }
}

#[tokio::test]
async fn bytes_are_passed_on_while_they_arrive() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            send_slowly(&listener, 10_000).await;
        }
    });
    let http = config().open(parse(&format!("{endpoint}/k")).store()).unwrap();
    let cloud = StoreConfig {
        endpoint: Some(endpoint),
        credentials: CredentialSource::Anonymous,
        ..config()
    };
    let cloud = cloud.open(parse("s3://b/k").store()).unwrap();
    for store in [http, cloud] {
        let received = |request: GetRequest| {
            let (store, arrivals) = (Arc::clone(&store), Arc::new(Arrivals::default()));
            async move {
                let response = store.get_streaming("k", &request, Arc::clone(&arrivals) as _).await;
                let lengths = std::mem::take(&mut *arrivals.0.lock());
                (response.map(|response| response.bytes.len()), lengths)
            }
        };
        let version = |etag: &str| Version {
            length: 100_000,
            etag: Some(etag.to_owned()),
            version_id: None,
            last_modified: None,
        };
        let pinned = GetRequest { version: Some(version("\"1\"")), ..part(0, 100_000) };
        let (response, lengths) = received(pinned.clone()).await;
        assert_eq!(response.unwrap(), 100_000);
        assert!(lengths.len() > 2, "{lengths:?}");
        assert!(lengths.is_sorted() && lengths.last() == Some(&(0, 100_000)), "{lengths:?}");
        // Another version, another range, a version that nobody has asked for.
        let other = GetRequest { version: Some(version("\"2\"")), ..part(0, 100_000) };
        let shorter = GetRequest { range: part(0, 50_000).range, ..pinned };
        for request in [other, shorter, part(0, 100_000)] {
            let (_, lengths) = received(request).await;
            assert_eq!(lengths, []);
        }
    }
}
