//! NBD client of the demonstration.

use std::net::SocketAddr;
use std::sync::Arc;

use aws_lc_rs::digest;
use nbd_server::client::{self, ClientError};
use nbd_telemetry::Hex;
use rustls::crypto::aws_lc_rs as provider;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Result of reading an export.
pub(crate) struct ReadBack {
    pub(crate) tls: String,
    pub(crate) size: u64,
    pub(crate) description: String,
    pub(crate) sha256: String,
}

/// Maximum length of a read, in bytes.
const READ_BYTES: u32 = 1024 * 1024;

/// Reads a whole export over TLS, trusting only the given CA.
pub(crate) async fn read_all(
    address: SocketAddr,
    name: &str,
    authority: CertificateDer<'static>,
) -> Result<ReadBack, Box<dyn std::error::Error>> {
    let mut stream = TcpStream::connect(address).await?;
    client::greet(&mut stream).await?;
    client::start_tls(&mut stream).await?;
    let server = ServerName::try_from("localhost")?;
    let mut stream = connector_trusting(authority)?.connect(server, stream).await?;
    let (_, session) = stream.get_ref();
    let tls = format!(
        "{}, {}",
        session.protocol_version().and_then(|version| version.as_str()).unwrap_or("TLS"),
        session
            .negotiated_cipher_suite()
            .and_then(|suite| suite.suite().as_str())
            .unwrap_or("unknown cipher"),
    );

    let names = client::list(&mut stream).await?;
    if !names.iter().any(|(listed, _)| listed == name) {
        return Err(format!("{name} isn't listed: {names:?}").into());
    }
    let mut transmission = client::go(stream, name).await?;
    let size = transmission.export().size;
    let description = transmission.export().description.clone().unwrap_or_default();
    let mut hash = digest::Context::new(&digest::SHA256);
    let mut at = 0;
    while at < size {
        let length = u32::try_from(size - at).unwrap_or(READ_BYTES).min(READ_BYTES);
        hash.update(&transmission.read(at, length).await?);
        at += u64::from(length);
    }
    expect_refusal(transmission.read(size, 1).await)?;
    transmission.disconnect().await?;

    let sha256 = Hex(hash.finish().as_ref()).to_string();
    Ok(ReadBack { tls, size, description, sha256 })
}

fn expect_refusal(result: Result<Vec<u8>, ClientError>) -> Result<(), String> {
    match result {
        Err(ClientError::Failed(_)) => Ok(()),
        Err(other) => Err(format!("a read past the end ended the session: {other}")),
        Ok(_) => Err("a read past the end was answered with data".to_owned()),
    }
}

fn connector_trusting(authority: CertificateDer<'static>) -> Result<TlsConnector, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority)?;
    let config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
