//! Requests to a server's monitor.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri};
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

use crate::cli::{MonitorAccess, MonitorEndpoint};
use crate::exit_status::{self, ExitStatus, Failure, fixed_exit_status};
use crate::monitor::read_token_file;

/// Reason why there is no answer: its label and its description.
#[derive(Debug, thiserror::Error)]
#[error("{endpoint}: {problem}")]
pub(crate) struct MonitorError {
    pub(super) endpoint: MonitorEndpoint,
    pub(super) reason: &'static str,
    pub(super) problem: String,
}

impl ExitStatus for MonitorError {
    fn exit_status(&self) -> u8 {
        exit_status::FAILED
    }

    fn label(&self) -> &'static str {
        self.reason
    }
}

/// A label and a description.
pub(super) type Problem = (&'static str, String);

/// A client of a monitor.
#[derive(Debug, Clone)]
pub(super) struct MonitorClient {
    endpoint: MonitorEndpoint,
    /// Value of the field `Authorization`.
    authorization: Option<HeaderValue>,
    tls: Option<Arc<ClientConfig>>,
}

/// A response whose body has yet to be read.
pub(super) struct MonitorResponse {
    pub(super) body: Incoming,
    /// The connection. It ends when it is dropped.
    _driver: JoinSet<hyper::Result<()>>,
}

impl MonitorClient {
    /// Reads the files that the options name.
    ///
    /// # Errors
    /// One of them can't be used, or is missing.
    pub(super) fn new(endpoint: &MonitorEndpoint, access: &MonitorAccess) -> Result<Self, Failure> {
        let unusable =
            |path: &Path, problem: String| UnusableFile { path: path.to_owned(), problem };
        let authorization = match &access.token_file {
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
        let tls = match (endpoint, &access.tls_ca) {
            (MonitorEndpoint::Https(..), Some(path)) => {
                let roots = load_roots(path).map_err(|problem| unusable(path, problem))?;
                Some(Arc::new(tls_config(roots)?))
            }
            (MonitorEndpoint::Https(..), None) => return Err(MissingCa.into()),
            _ => None,
        };
        Ok(Self { endpoint: endpoint.clone(), authorization, tls })
    }

    /// Returns the error for a problem with this monitor.
    pub(super) fn error(&self, (reason, problem): Problem) -> MonitorError {
        MonitorError { endpoint: self.endpoint.clone(), reason, problem }
    }

    /// Requests the resource at `path`, which may have a query. Any status but 200 is an error.
    pub(super) async fn get(
        &self,
        path: Uri,
        accept: &'static str,
    ) -> Result<MonitorResponse, Problem> {
        let unreachable = |error: io::Error| {
            ("connect_failed", format!("can't connect: {error}; start the server with --monitor"))
        };
        match &self.endpoint {
            MonitorEndpoint::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await;
                self.get_from(stream.map_err(unreachable)?, path, accept).await
            }
            MonitorEndpoint::Https(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await;
                let stream = self.encrypt(host, stream.map_err(unreachable)?).await?;
                self.get_from(stream, path, accept).await
            }
            MonitorEndpoint::Unix(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(unreachable)?;
                self.get_from(stream, path, accept).await
            }
        }
    }

    async fn encrypt(
        &self,
        host: &str,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, Problem> {
        let failed = |error: String| ("tls_failed", format!("TLS failed: {error}"));
        let name =
            ServerName::try_from(host.to_owned()).map_err(|error| failed(error.to_string()))?;
        let config = self.tls.clone().ok_or_else(|| failed("no CAs".to_owned()))?;
        let connected = TlsConnector::from(config).connect(name, stream).await;
        connected.map_err(|error| failed(error.to_string()))
    }

    async fn get_from(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        path: Uri,
        accept: &'static str,
    ) -> Result<MonitorResponse, Problem> {
        let failed = |error: hyper::Error| {
            ("not_http", format!("not HTTP: {error}; check the address of the server's --monitor"))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        // Aborts the connection's task when the response is dropped.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let resource = path.path().to_owned();
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.uri_mut() = path;
        if let Ok(host) = self.endpoint.host_header().parse() {
            request.headers_mut().insert(HOST, host);
        }
        if let Some(authorization) = &self.authorization {
            request.headers_mut().insert(AUTHORIZATION, authorization.clone());
        }
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static(accept));
        let response: Response<Incoming> = sender.send_request(request).await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => Ok(MonitorResponse { body: response.into_body(), _driver: driver }),
            StatusCode::SERVICE_UNAVAILABLE => {
                Err(("unavailable", explanation(response.into_body()).await))
            }
            StatusCode::MISDIRECTED_REQUEST => {
                let problem =
                    "unknown host name: use the address, or give the server --monitor-name";
                Err(("unknown_host", problem.to_owned()))
            }
            StatusCode::UNAUTHORIZED => {
                let problem = match self.authorization {
                    Some(_) => "the token isn't that of the server's --monitor-token-file",
                    None => "the monitor requires a token: use --token-file",
                };
                Err(("unauthorized", problem.to_owned()))
            }
            other => {
                let problem = format!("{resource}: HTTP status {other}; check that it is hexz-nbd");
                Err(("http_status", problem))
            }
        }
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
#[error("{}: {problem}", escape::path(.path))]
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

/// Returns the first line of a response that says why the server can't do what was requested.
async fn explanation(body: Incoming) -> String {
    /// More than the server's explanations have.
    const MAX_BYTES: usize = 1024;
    let text = match Limited::new(body, MAX_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(_) => Bytes::new(),
    };
    match String::from_utf8_lossy(&text).lines().next() {
        Some(line) if !line.is_empty() => escape::text(line).into_owned(),
        _ => "unavailable, for an unknown reason".to_owned(),
    }
}
