//! A scripted HTTP server, with or without TLS, and a proxy that opens tunnels.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_reader::{Environment, ObjectUrl, StoreConfig, Timeouts};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

/// Request as received. Names of headers are in lower case.
#[derive(Debug, Clone, Default)]
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// What happens after the bytes of a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    KeepAlive,
    Close,
    Stall,
}

/// Response, byte by byte.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) bytes: Vec<u8>,
    pub(crate) then: Then,
}

impl Reply {
    pub(crate) fn new(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Self {
        let body = body.as_ref();
        let mut text = format!("HTTP/1.1 {status} X\r\n");
        let mut announced = Some(body.len().to_string());
        for (name, value) in headers {
            if name.eq_ignore_ascii_case("content-length")
                || name.eq_ignore_ascii_case("transfer-encoding")
            {
                announced = None;
            }
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(length) = announced {
            text.push_str(&format!("content-length: {length}\r\n"));
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        bytes.extend_from_slice(body);
        Self { bytes, then: Then::KeepAlive }
    }

    pub(crate) fn then(mut self, then: Then) -> Self {
        self.then = then;
        self
    }
}

type Handler = dyn Fn(&Received) -> Reply + Send + Sync;

/// A server that records requests.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    requests: Arc<Mutex<Vec<Received>>>,
    connections: Arc<Mutex<usize>>,
    pub(crate) scheme: &'static str,
}

impl Server {
    pub(crate) async fn start(
        handler: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::with_tls(None, handler).await
    }

    pub(crate) async fn with_tls(
        tls: Option<TlsAcceptor>,
        handler: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (requests, connections) = (Arc::default(), Arc::default());
        let server = Self {
            address,
            requests: Arc::clone(&requests),
            connections: Arc::clone(&connections),
            scheme,
        };
        let handler: Arc<Handler> = Arc::new(handler);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                *connections.lock() += 1;
                let (tls, handler, requests) =
                    (tls.clone(), Arc::clone(&handler), Arc::clone(&requests));
                tokio::spawn(async move {
                    match tls {
                        None => serve(stream, handler, requests).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, handler, requests).await;
                            }
                        }
                    }
                });
            }
        });
        server
    }

    /// Returns the URL of this server by address, or by the name localhost with TLS.
    pub(crate) fn url(&self) -> String {
        match self.scheme {
            "https" => format!("https://localhost:{}", self.address.port()),
            _ => format!("http://{}", self.address),
        }
    }

    pub(crate) fn requests(&self) -> Vec<Received> {
        self.requests.lock().clone()
    }

    pub(crate) fn connections(&self) -> usize {
        *self.connections.lock()
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    handler: Arc<Handler>,
    requests: Arc<Mutex<Vec<Received>>>,
) {
    let mut stream = BufReader::new(stream);
    while let Some(received) = receive(&mut stream).await {
        requests.lock().push(received.clone());
        let reply = handler(&received);
        if stream.write_all(&reply.bytes).await.is_err() || stream.flush().await.is_err() {
            return;
        }
        match reply.then {
            Then::KeepAlive => {}
            Then::Close => return,
            Then::Stall => tokio::time::sleep(Duration::from_secs(60)).await,
        }
    }
}

async fn receive<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut BufReader<S>) -> Option<Received> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
    let mut parts = line.split_whitespace();
    let mut received = Received {
        method: parts.next()?.to_owned(),
        target: parts.next()?.to_owned(),
        ..Received::default()
    };
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await.ok().filter(|read| *read > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        received.headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = vec![0; received.header("content-length").parse().unwrap_or(0)];
    stream.read_exact(&mut body).await.ok()?;
    received.body = String::from_utf8(body).unwrap();
    Some(received)
}

/// Serves one object with ranges and conditions, as a good server does.
pub(crate) fn object(content: &'static [u8], etag: &'static str) -> impl Fn(&Received) -> Reply {
    move |received| {
        let total = content.len();
        let if_match = received.header("if-match");
        if !if_match.is_empty() && if_match != etag {
            return Reply::new(412, &[], "");
        }
        if received.header("if-none-match") == etag {
            return Reply::new(304, &[("etag", etag)], "");
        }
        if received.method == "HEAD" {
            let length = total.to_string();
            return Reply::new(200, &[("etag", etag), ("content-length", &length)], "");
        }
        let range = received.header("range").trim_start_matches("bytes=").to_owned();
        let Some((first, last)) = range.split_once('-') else {
            return Reply::new(200, &[("etag", etag)], content);
        };
        let (start, end) = match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(start), Ok(last)) => (start, total.min(last + 1)),
            (Ok(start), Err(_)) => (start, total),
            (Err(_), Ok(length)) => (total.saturating_sub(length), total),
            (Err(_), Err(_)) => panic!("{range}"),
        };
        if start >= end {
            return Reply::new(416, &[("content-range", &format!("bytes */{total}"))], "");
        }
        let part = format!("bytes {start}-{}/{total}", end - 1);
        Reply::new(206, &[("etag", etag), ("content-range", &part)], &content[start..end])
    }
}

/// A proxy that opens tunnels for those who send `authorization`, and records where to.
pub(crate) async fn start_proxy(
    authorization: &'static str,
) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let targets: Arc<Mutex<Vec<String>>> = Arc::default();
    let recorded = Arc::clone(&targets);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let recorded = Arc::clone(&recorded);
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let Some(received) = receive(&mut stream).await else { return };
                recorded.lock().push(format!("{} {}", received.method, received.target));
                if received.header("proxy-authorization") != authorization {
                    let refusal = Reply::new(407, &[], "");
                    stream.write_all(&refusal.bytes).await.unwrap();
                    return;
                }
                if received.method != "CONNECT" {
                    let reply = object(b"through the proxy", "\"p\"")(&received);
                    stream.write_all(&reply.bytes).await.unwrap();
                    return;
                }
                // All names lead to this machine.
                let port = received.target.rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
                let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
                tokio::io::copy_bidirectional(&mut stream, &mut server).await.ok();
            });
        }
    });
    (address, targets)
}

/// Certificate of a server, and the file with its CA.
pub(crate) struct TestTls {
    pub(crate) acceptor: TlsAcceptor,
    pub ca_file: PathBuf,
    _folder: tempfile::TempDir,
}

impl TestTls {
    /// Creates a certificate for `name`, which expired long ago if `is_expired`.
    pub(crate) fn new(name: &str, is_expired: bool) -> Self {
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_certificate = ca.self_signed(&ca_key).unwrap();
        let issuer = rcgen::Issuer::new(ca, ca_key);

        let key = rcgen::KeyPair::generate().unwrap();
        let mut own = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        if is_expired {
            own.not_before = rcgen::date_time_ymd(2001, 1, 1);
            own.not_after = rcgen::date_time_ymd(2002, 1, 1);
        }
        let certificate = own.signed_by(&key, &issuer).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let ca_file = folder.path().join("ca.pem");
        std::fs::write(&ca_file, ca_certificate.pem()).unwrap();
        Self { acceptor: TlsAcceptor::from(Arc::new(config)), ca_file, _folder: folder }
    }
}

/// Configuration with an empty environment.
pub(crate) fn config() -> StoreConfig {
    config_with(&[])
}

/// Configuration with some environment variables.
pub(crate) fn config_with(variables: &[(&str, &str)]) -> StoreConfig {
    StoreConfig {
        environment: Environment::from_pairs(variables.iter().copied()),
        user_agent: "test-agent/1".to_owned(),
        ..StoreConfig::default()
    }
}

/// Limits for tests that wait for them. Others would fail on a busy machine.
pub(crate) fn short_timeouts() -> Timeouts {
    Timeouts {
        connect: Duration::from_secs(3),
        first_byte: Duration::from_millis(500),
        stall: Duration::from_millis(300),
        ..Timeouts::default()
    }
}

pub(crate) fn parse(url: &str) -> ObjectUrl {
    url.parse().unwrap()
}
