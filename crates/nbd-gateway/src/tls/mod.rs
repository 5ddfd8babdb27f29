//! TLS: builds the server's configuration from PEM files, performs handshakes, and authenticates
//! clients.

mod client_auth;
mod contents;
mod credentials;
pub mod diagnosis;
mod exposure;
mod failure;
mod handshake;
mod pem;
mod problem;
mod records;
mod revocation_lists;
mod roots;
mod validity;

use std::fmt;
use std::io::ErrorKind::PermissionDenied;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, sign::any_supported_type};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls::{
    InconsistentKeys, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion, version,
};

use client_auth::ClientVerifier;
pub use client_auth::{ClientAuth, ClientAuthFiles};
pub use contents::TlsChange;
pub(crate) use credentials::{Credentials, CredentialsError};
pub use exposure::check_not_exposed;
pub(crate) use failure::HandshakeFailure;
pub use failure::HandshakeFailureCause;
pub(super) use handshake::{EncryptedStream, handshake};
pub use problem::{TlsFileError, TlsFileProblem};
pub(super) use records::RecordCountingStream;
pub use validity::is_renewal_due;
pub(super) use validity::{ExpiryWarning, ExpiryWatch, format_seconds};

/// Minimum TLS version that is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TlsVersion {
    /// TLS 1.2, with forward-secret AEAD suites only.
    #[default]
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// Paths of all files that TLS needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// PEM file with the server's certificate, followed by the chain towards the root.
    pub certificate: PathBuf,
    /// PEM file with the private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
    /// Files for client authentication; without them, clients aren't asked for a certificate.
    pub clients: Option<ClientAuthFiles>,
}

impl TlsFiles {
    /// Returns the paths of all files.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        let of_clients = self.clients.iter().flat_map(ClientAuthFiles::paths);
        [&self.certificate, &self.key].into_iter().chain(of_clients)
    }
}

/// A problem that will occur later, or affects only some clients.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct TlsWarning {
    /// Stable label, such as `certificate_expires`.
    pub reason: &'static str,
    text: String,
}

impl TlsWarning {
    fn new(reason: &'static str, text: impl Into<String>) -> Self {
        Self { reason, text: text.into() }
    }

    /// Creates a warning that names the file it is about.
    fn of(path: &Path, reason: &'static str, text: impl fmt::Display) -> Self {
        Self::new(reason, format!("{}: {text}", nbd_telemetry::escape::path(path)))
    }
}

/// Validated TLS configuration of the server.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    /// The server's certificate and its chain, if known.
    chain: Arc<[CertificateDer<'static>]>,
    /// Private key, if it was read from a file.
    key: Option<Arc<dyn SigningKey>>,
    clients: Option<ClientVerifier>,
    min_version: Option<TlsVersion>,
    /// Expiry of the server's certificate, if known.
    expires: Option<UnixTime>,
}

/// Earliest expiry of each kind of TLS file; `None` if there is no such file, or its expiry isn't
/// known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expiry {
    /// Expiry of the server's certificate.
    pub certificate: Option<UnixTime>,
    /// Earliest expiry among the CAs that vouch for clients.
    pub client_ca: Option<UnixTime>,
    /// Earliest expiry among the newest revocation lists of these CAs.
    pub client_crl: Option<UnixTime>,
}

impl ServerTls {
    /// Returns the configuration for the handshake.
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// Returns true if clients must present a certificate.
    pub fn requires_certificates(&self) -> bool {
        self.clients.as_ref().is_some_and(ClientVerifier::requires_certificates)
    }

    /// Returns true if clients are asked for a certificate.
    pub fn requests_certificates(&self) -> bool {
        self.clients.is_some()
    }

    /// Returns the earliest time at which the trust in client CAs changes because one of them
    /// expires. From then on, admitted clients have to be verified again.
    pub(crate) fn first_ca_expiry(&self) -> Option<UnixTime> {
        self.clients.as_ref().map(ClientVerifier::earliest_verifier_expiry)
    }

    /// Returns the minimum TLS version, if known.
    pub fn min_version(&self) -> Option<TlsVersion> {
        self.min_version
    }

    /// Returns the expiry of what was read from the files.
    pub fn expiry(&self) -> Expiry {
        let clients = self.clients.as_ref();
        Expiry {
            certificate: self.expires,
            client_ca: clients.map(ClientVerifier::earliest_ca_expiry),
            client_crl: clients.and_then(ClientVerifier::earliest_crl_expiry),
        }
    }

    /// Verifies an admitted client again, against the CAs and revocation lists that are trusted
    /// now.
    ///
    /// # Errors
    /// A client with these credentials, or without any, would be refused at the time `now`.
    pub(crate) fn reverify(
        &self,
        who: Option<&Credentials>,
        now: UnixTime,
    ) -> Result<(), HandshakeFailure> {
        match (&self.clients, who) {
            (Some(clients), Some(who)) => clients.verify(who.chain(), now),
            (Some(clients), None) if clients.requires_certificates() => {
                Err(HandshakeFailure::from_rustls(&rustls::Error::NoCertificatesPresented))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls")
            .field("asks_for_certificates", &self.requests_certificates())
            .finish_non_exhaustive()
    }
}

/// Wraps a configuration that doesn't authenticate clients.
impl From<ServerConfig> for ServerTls {
    fn from(config: ServerConfig) -> Self {
        Self {
            config: Arc::new(config),
            chain: Arc::default(),
            key: None,
            clients: None,
            min_version: None,
            expires: None,
        }
    }
}

/// Reads the files, and checks everything that can be checked before a client connects.
///
/// If the key can't be read any more because the process has dropped its privileges, the key of
/// `before` stays in use.
///
/// # Errors
/// A file can't be read or used, is readable by others, has expired or isn't valid yet, or the
/// files don't match each other.
pub fn load(
    files: &TlsFiles,
    min_version: TlsVersion,
    previous: Option<&ServerTls>,
) -> Result<(ServerTls, Vec<TlsWarning>), TlsFileError> {
    let of = |path: &PathBuf| {
        let path = path.clone();
        move |problem| TlsFileError { path, problem }
    };
    let chain = pem::certificates(&files.certificate).map_err(of(&files.certificate))?;
    let mut warnings = Vec::new();
    let key = match (pem::private_key(&files.key), previous.and_then(|tls| tls.key.clone())) {
        (Err(TlsFileProblem::Io(error)), Some(key)) if error.kind() == PermissionDenied => {
            let text = format!("can't be read again, keeping the previous key: {error}");
            warnings.push(TlsWarning::of(&files.key, "key_kept", text));
            key
        }
        (read, _) => read.and_then(|key| signing_key(&key)).map_err(of(&files.key))?,
    };
    check_own_certificate(&chain, &*key).map_err(of(&files.certificate))?;
    let more = chain
        .first()
        .map_or(Ok(Vec::new()), |own| validity::check_validity(own, UnixTime::now()))
        .map_err(of(&files.certificate))?
        .into_iter()
        .map(|warning| TlsWarning::of(&files.certificate, warning.reason, warning.text));
    warnings.extend(more);
    let clients = match &files.clients {
        Some(files) => {
            let (clients, more) = client_auth::load(files, UnixTime::now())?;
            warnings.extend(more);
            Some(clients)
        }
        None => None,
    };

    let expires = chain.first().and_then(client_auth::certificate_expiry);
    let own: Arc<[_]> = chain.clone().into();
    let configured = configure(chain, Arc::clone(&key), min_version, clients.as_ref());
    let config = configured.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            of(&files.key)(TlsFileProblem::KeyMismatch(files.certificate.clone()))
        }
        other => of(&files.certificate)(TlsFileProblem::Unusable(other)),
    })?;
    let config = Arc::new(config);
    let (key, min_version) = (Some(key), Some(min_version));
    let tls = ServerTls { config, chain: own, key, clients, min_version, expires };
    Ok((tls, warnings))
}

fn signing_key(key: &PrivateKeyDer<'_>) -> Result<Arc<dyn SigningKey>, TlsFileProblem> {
    any_supported_type(key).map_err(|error| match diagnosis::key_fault(key) {
        Some(fault) => TlsFileProblem::UnsupportedKey(fault),
        None => TlsFileProblem::Unusable(error),
    })
}

/// Checks that the first certificate is the server's own, and of a kind that clients accept.
fn check_own_certificate(
    chain: &[CertificateDer<'_>],
    key: &dyn SigningKey,
) -> Result<(), TlsFileProblem> {
    let position = key.public_key().and_then(|key| diagnosis::position_of_key(chain, &key));
    if let Some(position) = position.filter(|position| *position > 0) {
        return Err(TlsFileProblem::ServerCertificateNotFirst(position + 1));
    }
    let fault = chain.first().and_then(|own| diagnosis::certificate_fault(own, false));
    fault.map_or(Ok(()), |fault| Err(TlsFileProblem::UnsupportedCertificate(fault)))
}

/// Builds a configuration from a certificate and key in memory, for clients without certificates.
///
/// # Errors
/// The two don't match, or can't be used.
pub fn without_client_auth(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    min_version: TlsVersion,
) -> Result<ServerTls, rustls::Error> {
    let expires = chain.first().and_then(client_auth::certificate_expiry);
    let own = chain.clone().into();
    let config = configure(chain, any_supported_type(&key)?, min_version, None)?;
    let min_version = Some(min_version);
    Ok(ServerTls { chain: own, min_version, expires, ..ServerTls::from(config) })
}

fn configure(
    chain: Vec<CertificateDer<'static>>,
    key: Arc<dyn SigningKey>,
    min_version: TlsVersion,
    clients: Option<&ClientVerifier>,
) -> Result<ServerConfig, rustls::Error> {
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        // A mismatch that can't be detected here will be detected by clients.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
        Err(error) => return Err(error),
    }
    let certified = Arc::new(SingleCertAndKey::from(certified));
    let versions: &[&SupportedProtocolVersion] = match min_version {
        TlsVersion::V1_2 => &[&version::TLS13, &version::TLS12],
        TlsVersion::V1_3 => &[&version::TLS13],
    };
    let builder = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(versions)?;
    let Some(clients) = clients else {
        let mut config = builder.with_no_client_auth().with_cert_resolver(certified);
        config.ignore_client_order = true;
        return Ok(config);
    };
    let mut config =
        builder.with_client_cert_verifier(clients.verifier()).with_cert_resolver(certified);
    config.ignore_client_order = true;
    // A resumed session doesn't present the certificate again, so a revocation in the meantime
    // would go unnoticed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Returns the crypto provider, with its suites in the server's order of preference; all of them
/// are forward-secret AEAD suites. Of TLS 1.2, ChaCha20-Poly1305 is first: AES-GCM keys are used up
/// after 2^24 records there, and many clients, such as nbd-client, would choose AES-GCM.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| match suite {
        SupportedCipherSuite::Tls13(_) => 0,
        SupportedCipherSuite::Tls12(_) if records::record_limit(*suite).is_none() => 1,
        SupportedCipherSuite::Tls12(_) => 2,
    });
    provider
}
