//! Fetches the status from a status listener.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use nbd_telemetry::escape;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use zeroize::Zeroizing;

use crate::cli::{MonitorEndpoint, Top};
use crate::exit_status::{self, ExitStatus, Failure, fixed_exit_status};
use crate::monitor::{Status, read_token_file};

/// Timeout of a request. A healthy server answers within milliseconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum size of an answer, in bytes. A thousand exports and a thousand connections take half a
/// MiB, or a few MiB if names are long.
const MAX_RESPONSE_BYTES: usize = 8 << 20;

/// Reason why there is no status: its label and its description.
#[derive(Debug, thiserror::Error)]
#[error("{endpoint}: {problem}")]
pub(crate) struct StatusError {
    pub(super) endpoint: MonitorEndpoint,
    pub(super) reason: &'static str,
    pub(super) problem: String,
}

impl ExitStatus for StatusError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }

    fn label(&self) -> &'static str {
        self.reason
    }
}

/// A client of a status listener.
#[derive(Debug, Clone)]
pub(super) struct StatusClient {
    endpoint: MonitorEndpoint,
    /// Value of the field `Authorization`.
    authorization: Option<HeaderValue>,
    tls: Option<Arc<ClientConfig>>,
}

impl StatusClient {
    /// Reads the files that the options name.
    ///
    /// # Errors
    /// One of them can't be used, or is missing.
    pub(super) fn new(options: &Top) -> Result<Self, Failure> {
        let endpoint = options.place.clone();
        let unusable =
            |path: &Path, problem: String| UnusableFile { path: path.to_owned(), problem };
        let authorization = match &options.token_file {
            Some(path) => {
                let token =
                    read_token_file(path).map_err(|error| unusable(path, error.to_string()))?;
                let token = Zeroizing::new([&b"Bearer "[..], token.trim_ascii_end()].concat());
                let field = HeaderValue::from_bytes(&token);
                let mut field = field.map_err(|_| unusable(path, "it has no token".to_owned()))?;
                field.set_sensitive(true);
                Some(field)
            }
            None => None,
        };
        let tls = match (&endpoint, &options.tls_ca) {
            (MonitorEndpoint::Https(..), Some(path)) => {
                let roots = load_roots(path).map_err(|problem| unusable(path, problem))?;
                Some(Arc::new(tls_config(roots)?))
            }
            (MonitorEndpoint::Https(..), None) => return Err(MissingCa.into()),
            _ => None,
        };
        Ok(Self { endpoint, authorization, tls })
    }

    /// Fetches the status.
    pub(super) async fn fetch_status(&self) -> Result<Status, StatusError> {
        let result = tokio::time::timeout(REQUEST_TIMEOUT, connect_and_fetch(self)).await;
        let no_response = format!("no response within {} s", REQUEST_TIMEOUT.as_secs());
        result.unwrap_or(Err(("timeout", no_response))).map_err(|(reason, problem)| StatusError {
            endpoint: self.endpoint.clone(),
            reason,
            problem,
        })
    }
}

/// Error for an `https://` address without CAs.
#[derive(Debug, thiserror::Error)]
#[error(
    "an https:// address requires --tls-ca FILE: the CA of the monitor's certificate, or \
     /etc/ssl/certs/ca-certificates.crt for those of the system"
)]
struct MissingCa;

/// A file that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", escape::name(.path))]
struct UnusableFile {
    path: PathBuf,
    problem: String,
}

fixed_exit_status! {
    MissingCa => USAGE, "usage";
    UnusableFile => FAILED, "unusable_file";
}

fn tls_config(roots: RootCertStore) -> Result<ClientConfig, io::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}

fn load_roots(path: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| error.to_string())?;
        // One that can't be used doesn't make the others useless.
        drop(roots.add(certificate));
    }
    if roots.is_empty() { Err("it has no certificate of a CA".to_owned()) } else { Ok(roots) }
}

/// A label and a description.
type Problem = (&'static str, String);

async fn connect_and_fetch(client: &StatusClient) -> Result<Status, Problem> {
    let unreachable = |error: io::Error| {
        ("connect_failed", format!("can't connect: {error}; start the server with --monitor"))
    };
    let response = match &client.endpoint {
        MonitorEndpoint::Tcp(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            fetch(client, stream.map_err(unreachable)?).await?
        }
        MonitorEndpoint::Https(host, port) => {
            let stream = TcpStream::connect((host.as_str(), *port)).await;
            fetch(client, encrypt(client, host, stream.map_err(unreachable)?).await?).await?
        }
        MonitorEndpoint::Unix(path) => {
            fetch(client, UnixStream::connect(path).await.map_err(unreachable)?).await?
        }
    };
    let problem = |error| ("not_a_status", format!("not a status of hexz-nbd: {error}"));
    Status::parse(&response).map_err(problem)
}

async fn encrypt(
    client: &StatusClient,
    host: &str,
    stream: TcpStream,
) -> Result<TlsStream<TcpStream>, Problem> {
    let failed = |error: String| ("tls_failed", format!("TLS failed: {error}"));
    let name = ServerName::try_from(host.to_owned()).map_err(|error| failed(error.to_string()))?;
    let config = client.tls.clone().ok_or_else(|| failed("no CAs".to_owned()))?;
    let connected = TlsConnector::from(config).connect(name, stream).await;
    connected.map_err(|error| failed(error.to_string()))
}

async fn fetch(
    client: &StatusClient,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Bytes, Problem> {
    let failed = |error: hyper::Error| {
        ("not_http", format!("not HTTP: {error}; check the address of the server's --monitor"))
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // Aborts the connection's task when this request ends, however it ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let mut request = Request::new(Empty::<Bytes>::new());
    *request.uri_mut() = Uri::from_static("/status.json");
    if let Ok(host) = client.endpoint.host_header().parse() {
        request.headers_mut().insert(HOST, host);
    }
    if let Some(authorization) = &client.authorization {
        request.headers_mut().insert(AUTHORIZATION, authorization.clone());
    }
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/json"));
    let response = sender.send_request(request).await.map_err(failed)?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::MISDIRECTED_REQUEST => {
            let problem = "unknown host name: use the address, or give the server --monitor-name";
            return Err(("unknown_host", problem.to_owned()));
        }
        StatusCode::UNAUTHORIZED => {
            let problem = match client.authorization {
                Some(_) => "the token isn't that of the server's --monitor-token-file",
                None => "the monitor requires a token: use --token-file",
            };
            return Err(("unauthorized", problem.to_owned()));
        }
        other => {
            let problem = format!("/status.json: HTTP status {other}; check that it is hexz-nbd");
            return Err(("http_status", problem));
        }
    }
    match Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let problem = format!("the response is longer than {} MiB", MAX_RESPONSE_BYTES >> 20);
            Err(("too_long", problem))
        }
        Err(error) => Err(("truncated", format!("the response was cut off: {error}"))),
    }
}
