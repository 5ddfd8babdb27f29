//! Examination of a server step by step, for diagnostics: tunnel, TLS handshake, and the heads of
//! responses.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::HeaderMap;
use hyper::header::{AGE, DATE, LOCATION};
use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, ProtocolVersion, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use super::proxy::{Proxy, ProxyRules};
use super::{Origin, connect, is_loopback, tls};
use crate::response::RawResponse;
use crate::store::StoreError;

/// Head of a response: status and headers.
#[derive(Clone)]
pub struct ResponseHead {
    status: u16,
    headers: HeaderMap,
    received: SystemTime,
}

impl ResponseHead {
    /// Returns the status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Returns the value of a header, if it is visible ASCII. It is as the server sent it, and may
    /// contain secrets, such as the query of a URL.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns the host that a redirect leads to.
    pub fn redirect_host(&self) -> Option<String> {
        let location: hyper::Uri = self.header(LOCATION.as_str())?.parse().ok()?;
        location.host().map(str::to_owned)
    }

    /// Returns the server's time when it sent the response, and this machine's when it arrived. The
    /// time that the response was in caches is taken into account.
    pub fn clocks(&self) -> Option<(SystemTime, SystemTime)> {
        let date = httpdate::parse_http_date(self.header(DATE.as_str())?).ok()?;
        let age = self.header(AGE.as_str()).and_then(|age| age.trim().parse::<u32>().ok());
        let server = date.checked_add(Duration::from_secs(age.unwrap_or(0).into()))?;
        Some((server, self.received))
    }
}

impl fmt::Debug for ResponseHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseHead").field("status", &self.status).finish_non_exhaustive()
    }
}

/// Keeps the head of the latest response.
#[derive(Debug, Clone, Default)]
pub(crate) struct ResponseObserver(Arc<Mutex<Option<ResponseHead>>>);

impl ResponseObserver {
    pub(super) fn observe(&self, response: &Result<RawResponse, StoreError>) {
        *self.0.lock() = response.as_ref().ok().map(|raw| ResponseHead {
            status: raw.status.as_u16(),
            headers: raw.headers.clone(),
            received: SystemTime::now(),
        });
    }

    /// Takes the head of the latest response. Returns `None` if there was no response to the latest
    /// request.
    pub(crate) fn take(&self) -> Option<ResponseHead> {
        self.0.lock().take()
    }
}

/// Negotiated TLS parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsParameters {
    /// Version, such as `TLS 1.3`.
    pub version: String,
    /// Cipher suite.
    pub cipher: String,
    /// Key exchange, such as `X25519MLKEM768`.
    pub key_exchange: String,
}

/// Kind of a failed TLS handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TlsFailure {
    /// The server doesn't speak TLS.
    NotTls,
    /// The server closed the connection.
    Closed,
    /// A certificate has expired.
    Expired,
    /// A certificate isn't valid yet.
    NotValidYet,
    /// No trusted CA has signed the certificate.
    UnknownCa,
    /// The certificate is valid for other names.
    WrongName,
    /// The certificate can't be used for another reason.
    InvalidCertificate,
    /// Anything else.
    Other,
}

impl TlsFailure {
    fn of(error: &io::Error) -> Self {
        use CertificateError as Reason;
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match inner {
            None if error.kind() == io::ErrorKind::UnexpectedEof
                || error.kind() == io::ErrorKind::ConnectionReset =>
            {
                Self::Closed
            }
            Some(rustls::Error::InvalidMessage(_)) => Self::NotTls,
            Some(rustls::Error::InvalidCertificate(reason)) => match reason {
                Reason::Expired | Reason::ExpiredContext { .. } => Self::Expired,
                Reason::NotValidYet | Reason::NotValidYetContext { .. } => Self::NotValidYet,
                Reason::UnknownIssuer | Reason::BadSignature => Self::UnknownCa,
                Reason::NotValidForName | Reason::NotValidForNameContext { .. } => Self::WrongName,
                _ => Self::InvalidCertificate,
            },
            _ => Self::Other,
        }
    }
}

/// Result of a TLS handshake. No connection remains.
#[derive(Debug, Clone)]
pub struct TlsHandshake {
    /// The parameters, or why the handshake failed, in words too.
    pub result: Result<TlsParameters, (TlsFailure, String)>,
    /// The server's certificates in DER form, its own first, as far as it sent them.
    pub certificates: Vec<Vec<u8>>,
}

/// The way to a server, for diagnostics.
pub(crate) struct HttpProbe {
    origin: Origin,
    proxy: Option<Proxy>,
    tls: Arc<rustls::ClientConfig>,
    recorder: Arc<RecordingVerifier>,
}

impl fmt::Debug for HttpProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpProbe").field("origin", &self.origin).finish_non_exhaustive()
    }
}

impl HttpProbe {
    /// Creates a probe. Errors are about the CA certificates.
    pub(crate) fn new(
        (is_https, host, port): (bool, &str, u16),
        proxies: &ProxyRules,
        ca_file: Option<&Path>,
    ) -> Result<Self, String> {
        let roots = tls::trusted_roots(ca_file, is_https)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = match roots.is_empty() {
            true => None,
            false => Some(
                WebPkiServerVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|error| error.to_string())?,
            ),
        };
        let recorder = Arc::new(RecordingVerifier { verifier, chain: Mutex::default() });
        let verifier = Arc::clone(&recorder) as Arc<dyn ServerCertVerifier>;
        let builder = tls::builder()?.dangerous().with_custom_certificate_verifier(verifier);
        Ok(Self {
            origin: Origin { is_https, host: host.to_owned(), port },
            proxy: proxies.proxy_for(is_https, host).cloned(),
            tls: tls::finish(builder),
            recorder,
        })
    }

    /// Returns the server's host, without brackets, and its port.
    pub(crate) fn server(&self) -> (&str, u16) {
        (&self.origin.host, self.origin.port)
    }

    pub(crate) fn is_https(&self) -> bool {
        self.origin.is_https
    }

    /// Returns true if requests leave this machine without TLS.
    pub(crate) fn is_insecure(&self) -> bool {
        !self.origin.is_https && !is_loopback(&self.origin.host)
    }

    pub(crate) fn proxy(&self) -> Option<(&str, u16)> {
        self.proxy.as_ref().map(|proxy| (&*proxy.host, proxy.port))
    }

    /// Asks the proxy on the other end of `stream` for a tunnel to the server.
    pub(crate) async fn open_tunnel<S>(&self, stream: &mut S) -> Result<(), StoreError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match &self.proxy {
            Some(proxy) => connect::open_tunnel(stream, proxy, &self.origin).await,
            None => Ok(()),
        }
    }

    /// Performs the handshake, and closes the connection.
    pub(crate) async fn handshake<S>(&self, stream: S) -> TlsHandshake
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.recorder.chain.lock().clear();
        let host = &self.origin.host;
        let result = match ServerName::try_from(host.clone()) {
            Err(_) => Err((
                TlsFailure::WrongName,
                format!("{host} isn't a name that a certificate can have"),
            )),
            Ok(name) => TlsConnector::from(Arc::clone(&self.tls))
                .connect(name, stream)
                .await
                .map(|stream| negotiated_parameters(stream.get_ref().1))
                .map_err(|error| (TlsFailure::of(&error), tls::explain(&error, host))),
        };
        let certificates = std::mem::take(&mut *self.recorder.chain.lock());
        TlsHandshake { result, certificates }
    }
}

fn negotiated_parameters(connection: &rustls::ClientConnection) -> TlsParameters {
    let name = |name: Option<String>| name.unwrap_or_else(|| "unknown".to_owned());
    TlsParameters {
        version: name(connection.protocol_version().map(|version| match version {
            ProtocolVersion::TLSv1_2 => "TLS 1.2".to_owned(),
            ProtocolVersion::TLSv1_3 => "TLS 1.3".to_owned(),
            other => format!("{other:?}"),
        })),
        cipher: name(connection.negotiated_cipher_suite().map(|it| format!("{:?}", it.suite()))),
        key_exchange: name(
            connection.negotiated_key_exchange_group().map(|it| format!("{:?}", it.name())),
        ),
    }
}

/// Verifies certificates like other connections do, and records them.
#[derive(Debug)]
struct RecordingVerifier {
    /// `None` if there are no CAs, so that no certificate is trusted.
    verifier: Option<Arc<WebPkiServerVerifier>>,
    chain: Mutex<Vec<Vec<u8>>>,
}

impl RecordingVerifier {
    fn verifier(&self) -> Result<&WebPkiServerVerifier, rustls::Error> {
        self.verifier
            .as_deref()
            .ok_or(rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer))
    }
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = std::iter::once(own).chain(intermediates);
        *self.chain.lock() = chain.map(|der| der.to_vec()).collect();
        self.verifier()?.verify_server_cert(own, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier()?.verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier()?.verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
