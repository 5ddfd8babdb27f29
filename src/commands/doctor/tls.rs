//! TLS client that records which certificates the server presents and asks for.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nbd_gateway::tls::diagnosis;
use parking_lot::{Mutex, MutexGuard};
use rustls::client::ResolvesClientCert;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::crypto::{self, CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, InconsistentKeys, RootCertStore,
    SignatureScheme, SupportedProtocolVersion, version,
};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::certificate::{CaCertificate, CertificateCheck, TrustedCas};
use super::connect::BoxedStream;
use super::probe_error::ProbeError;
use crate::cli::Doctor;
use crate::commands::pki::certificate::CertificateInfo;

/// Maximum size of a PEM file, in bytes: four times that of a system's CA bundle.
const MAX_PEM: u64 = 1024 * 1024;

/// This client's own files: CAs to verify the server with, and a certificate to present.
#[derive(Debug, Clone, Default)]
pub(crate) struct ClientCredentials {
    pub(crate) trusted_cas: Option<Arc<TrustedCas>>,
    pub(crate) certificate: Option<Arc<CertifiedKey>>,
}

/// A file that can't be used, and the problem: its label and its description.
#[derive(Debug)]
pub(crate) struct UnusableFile {
    pub(crate) path: PathBuf,
    pub(crate) reason: &'static str,
    pub(crate) problem: String,
}

/// Reads the files that were named. In a folder, the client's certificate is optional. Options take
/// precedence over the folder in a URI.
pub(super) fn load(
    options: &Doctor,
    of_uri: Option<&Path>,
) -> Result<ClientCredentials, UnusableFile> {
    let of_uri = of_uri.filter(|_| options.tls_ca.is_none());
    let Some(folder) = options.tls_dir.as_deref().or(of_uri) else {
        let authorities = options.tls_ca.as_deref().map(load_cas).transpose()?;
        let pair = options.tls_cert.as_deref().zip(options.tls_key.as_deref());
        let certificate = pair.map(|(chain, key)| load_certified_key(chain, key)).transpose()?;
        return Ok(ClientCredentials { trusted_cas: authorities, certificate });
    };
    let file = |name: &str| folder.join(name);
    let [chain, key] = ["client-cert.pem", "client-key.pem"].map(file);
    let certificate =
        if chain.exists() || key.exists() { Some(load_certified_key(&chain, &key)?) } else { None };
    Ok(ClientCredentials { trusted_cas: Some(load_cas(&file("ca-cert.pem"))?), certificate })
}

fn load_cas(path: &Path) -> Result<Arc<TrustedCas>, UnusableFile> {
    let certificates = load_certificates(path)?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates.iter().cloned());
    if added == 0 {
        return Err(unusable(path, "no_trust_anchor", "no certificate in it can verify a server"));
    }
    let given = certificates.into_iter().filter_map(|der| {
        let (is_authority, fault) =
            (diagnosis::is_authority(&der), diagnosis::certificate_fault(&der, true));
        let subject = CertificateInfo::from_der(der).ok()?.subject.to_string();
        Some(CaCertificate { subject, is_ca: is_authority, fault })
    });
    Ok(Arc::new(TrustedCas { roots, certificates: given.collect(), path: path.to_owned() }))
}

fn load_certified_key(chain: &Path, key: &Path) -> Result<Arc<CertifiedKey>, UnusableFile> {
    let certificates = load_certificates(chain)?;
    let pem = read(key)?;
    check_file(key, &pem)?;
    let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| {
        unusable(
            key,
            "no_private_key",
            "it has no private key, or an encrypted one: store the key without a passphrase",
        )
    })?;
    let signing = any_supported_type(&der).map_err(|error| {
        let fault = diagnosis::key_fault(&der).unwrap_or_else(|| error.to_string());
        unusable(key, "unsupported_key", fault)
    })?;
    let position =
        signing.public_key().and_then(|it| diagnosis::position_of_key(&certificates, &it));
    if let Some(position) = position.filter(|position| *position > 0) {
        let number = position + 1;
        let problem =
            format!("the client's certificate must be the first in it, not number {number}");
        return Err(unusable(chain, "certificate_order", problem));
    }
    let fault = certificates.first().and_then(|own| diagnosis::certificate_fault(own, false));
    if let Some(fault) = fault {
        return Err(unusable(chain, "unsupported_certificate", fault));
    }
    let certified = CertifiedKey::new(certificates, signing);
    match certified.keys_match() {
        // If it can't be checked here, the server will check it.
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified)),
        Err(Error::InconsistentKeys(_)) => {
            let problem = format!("the key doesn't match the certificate in {}", chain.display());
            Err(unusable(key, "key_mismatch", problem))
        }
        Err(other) => Err(unusable(chain, "unusable_certificate", other.to_string())),
    }
}

fn load_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, UnusableFile> {
    let pem = read(path)?;
    check_file(path, &pem)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(unusable(path, "no_certificate", "it has no \"BEGIN CERTIFICATE\" block")),
        Err(error) => Err(unusable(path, "malformed_pem", error.to_string())),
    }
}

fn check_file(path: &Path, content: &[u8]) -> Result<(), UnusableFile> {
    diagnosis::file_fault(content).map_or(Ok(()), |fault| Err(unusable(path, "file_format", fault)))
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, UnusableFile> {
    let mut content = Zeroizing::new(Vec::new());
    // The length of a pipe isn't known before it has been read.
    let read = File::open(path).and_then(|file| file.take(MAX_PEM + 1).read_to_end(&mut content));
    let length = read.map_err(|error| unusable(path, "unreadable", error.to_string()))?;
    if length as u64 > MAX_PEM {
        return Err(unusable(path, "too_long", "it is longer than 1 MiB"));
    }
    Ok(content)
}

fn unusable(path: &Path, reason: &'static str, problem: impl Into<String>) -> UnusableFile {
    UnusableFile { path: path.to_owned(), reason, problem: problem.into() }
}

fn provider() -> CryptoProvider {
    aws_lc_rs::default_provider()
}

/// Negotiated TLS parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TlsParameters {
    pub(crate) version: String,
    pub(crate) cipher: String,
    pub(crate) key_exchange: String,
}

/// Record of a handshake, as far as it got: the server's certificates, and its request for one.
#[derive(Debug, Clone, Default)]
pub(crate) struct HandshakeRecord {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) asks_for_certificate: bool,
}

pub(super) const TLS_1_2_AND_1_3: &[&SupportedProtocolVersion] =
    &[&version::TLS13, &version::TLS12];
pub(super) const TLS_1_2_ONLY: &[&SupportedProtocolVersion] = &[&version::TLS12];

/// Performs the handshake. The record is complete even if the handshake fails.
pub(super) async fn handshake(
    stream: BoxedStream,
    name: ServerName<'static>,
    own: &ClientCredentials,
    versions: &[&'static SupportedProtocolVersion],
) -> (Result<(BoxedStream, TlsParameters), ProbeError>, HandshakeRecord) {
    let recorder = Arc::new(RecordingVerifier { own: own.clone(), record: Mutex::default() });
    let agreed = match config(&recorder, versions) {
        Ok(config) => TlsConnector::from(Arc::new(config)).connect(name, stream).await,
        Err(error) => Err(io::Error::other(error)),
    };
    let agreed = agreed.map_err(|error| ProbeError::from_io(&error)).map(|stream| {
        let agreed = negotiated_parameters(stream.get_ref().1);
        (Box::new(stream) as BoxedStream, agreed)
    });
    let record = recorder.record().clone();
    (agreed, record)
}

fn config(
    recorder: &Arc<RecordingVerifier>,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ClientConfig, Error> {
    let verifier: Arc<dyn ServerCertVerifier> = Arc::<RecordingVerifier>::clone(recorder);
    let resolver: Arc<dyn ResolvesClientCert> = Arc::<RecordingVerifier>::clone(recorder);
    Ok(ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(versions)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(resolver))
}

/// Returns the ClientHello of a TLS client, to probe a silent server with.
pub(super) fn client_hello() -> Option<Vec<u8>> {
    let recorder =
        Arc::new(RecordingVerifier { own: ClientCredentials::default(), record: Mutex::default() });
    let config = Arc::new(config(&recorder, TLS_1_2_AND_1_3).ok()?);
    let name = ServerName::try_from("localhost").ok()?;
    let mut hello = Vec::new();
    ClientConnection::new(config, name).ok()?.write_tls(&mut hello).ok()?;
    Some(hello)
}

fn negotiated_parameters(session: &ClientConnection) -> TlsParameters {
    let version = match session.protocol_version() {
        Some(rustls::ProtocolVersion::TLSv1_2) => "TLS 1.2".to_owned(),
        Some(rustls::ProtocolVersion::TLSv1_3) => "TLS 1.3".to_owned(),
        other => format!("{other:?}"),
    };
    let cipher = session.negotiated_cipher_suite().map(|suite| format!("{:?}", suite.suite()));
    let exchange =
        session.negotiated_key_exchange_group().map(|group| format!("{:?}", group.name()));
    TlsParameters {
        version,
        cipher: cipher.unwrap_or_default(),
        key_exchange: exchange.unwrap_or_default(),
    }
}

/// Certificate verifier that records what the server presents and asks for. Without CAs it accepts
/// any server; the report then warns that nothing was verified.
#[derive(Debug)]
struct RecordingVerifier {
    own: ClientCredentials,
    record: Mutex<HandshakeRecord>,
}

impl RecordingVerifier {
    fn record(&self) -> MutexGuard<'_, HandshakeRecord> {
        self.record.lock()
    }
}

impl ServerCertVerifier for RecordingVerifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain: Vec<CertificateDer<'static>> =
            std::iter::once(own).chain(others).map(|it| it.clone().into_owned()).collect();
        self.record().chain.clone_from(&chain);
        CertificateCheck::verify(&chain, self.own.trusted_cas.as_deref(), name, now)?
            .result()
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        crypto::verify_tls12_signature(message, own, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        crypto::verify_tls13_signature(message, own, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ResolvesClientCert for RecordingVerifier {
    fn resolve(
        &self,
        _authorities: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        self.record().asks_for_certificate = true;
        self.own.certificate.clone()
    }

    /// Returns true even without a certificate, so that a request for one is noticed.
    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn long_input_is_rejected_from_files_and_pipes() {
        let folder = tempfile::tempdir().unwrap();
        let (file, pipe) = (folder.path().join("file"), folder.path().join("pipe"));
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
        for (length, is_accepted) in [(MAX_PEM, true), (MAX_PEM + 1, false)] {
            let content = vec![b'x'; usize::try_from(length).unwrap()];
            std::fs::write(&file, &content).unwrap();
            assert_eq!(read(&file).is_ok(), is_accepted);
            let writer = std::thread::spawn({
                let pipe = pipe.clone();
                move || std::fs::write(pipe, content)
            });
            assert_eq!(read(&pipe).is_ok(), is_accepted);
            writer.join().unwrap().unwrap();
        }
    }
}
