//! TLS to stores: trusted CAs, and explanations of failures.

use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::WantsClientCert;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CertificateError, ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};

/// Maximum size of a file of CA certificates, in bytes.
const MAX_CA_FILE: u64 = 16 * 1024 * 1024;

/// Creates the client configuration. `ca_file` replaces the system's CAs, as for curl, so that a
/// store with a private CA can't be impersonated with a certificate of a public one. A system without
/// CAs is an error if TLS is required.
pub(super) fn client_config(
    ca_file: Option<&Path>,
    requires_tls: bool,
) -> Result<Arc<ClientConfig>, String> {
    let roots = trusted_roots(ca_file, requires_tls)?;
    Ok(finish(builder()?.with_root_certificates(roots)))
}

/// Returns the CAs of `ca_file`, or else those of the system.
pub(super) fn trusted_roots(
    ca_file: Option<&Path>,
    requires_tls: bool,
) -> Result<Arc<RootCertStore>, String> {
    let roots = match ca_file {
        Some(path) => {
            Arc::new(read_roots(path).map_err(|why| format!("{}: {why}", path.display()))?)
        }
        None => system_roots(),
    };
    if roots.is_empty() && requires_tls {
        return Err("the system has no CA certificates: install ca-certificates, or name a file \
                    with the store's CA"
            .to_owned());
    }
    Ok(roots)
}

pub(super) fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())
}

pub(super) fn finish(builder: ConfigBuilder<ClientConfig, WantsClientCert>) -> Arc<ClientConfig> {
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

fn read_roots(path: &Path) -> Result<RootCertStore, String> {
    let length = std::fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_CA_FILE {
        return Err("too large for a file of CA certificates".to_owned());
    }
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| format!("invalid PEM: {error}"))?;
        roots.add(certificate).map_err(|error| format!("unusable CA certificate: {error}"))?;
    }
    if roots.is_empty() {
        return Err("contains no CA certificate in PEM format".to_owned());
    }
    Ok(roots)
}

/// Returns the system's CAs, which are loaded once for all stores.
fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        let loaded = rustls_native_certs::load_native_certs();
        for error in &loaded.errors {
            tracing::warn!(%error, "some of the system's CA certificates can't be read");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(loaded.certs);
        Arc::new(roots)
    });
    Arc::clone(roots)
}

/// Explains a failed handshake or read with `host`.
pub(super) fn explain(error: &io::Error, host: &str) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match inner {
        Some(error) => explain_tls(error, host),
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            format!("{host} closed the connection during the TLS handshake")
        }
        None => format!("TLS with {host} failed: {error}"),
    }
}

fn explain_tls(error: &rustls::Error, host: &str) -> String {
    use CertificateError as Reason;
    let rustls::Error::InvalidCertificate(reason) = error else {
        return match error {
            rustls::Error::InvalidMessage(_) => {
                format!("{host} doesn't speak TLS on this port: check the port, or use http://")
            }
            _ => format!("TLS with {host} failed: {error}"),
        };
    };
    match reason {
        Reason::Expired | Reason::ExpiredContext { .. } => {
            format!("the certificate of {host} has expired, or this machine's clock is wrong")
        }
        Reason::NotValidYet | Reason::NotValidYetContext { .. } => {
            format!("the certificate of {host} isn't valid yet, or this machine's clock is wrong")
        }
        // The signature is wrong if another CA of the same name is trusted.
        Reason::UnknownIssuer | Reason::BadSignature => format!(
            "the certificate of {host} is signed by an unknown CA: name a file with the store's CA"
        ),
        Reason::NotValidForName | Reason::NotValidForNameContext { .. } => {
            format!("the certificate is valid for other names than {host}")
        }
        _ => format!("the certificate of {host} can't be used: {error}"),
    }
}
