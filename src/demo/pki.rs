//! A CA and a server certificate that live as long as the demonstration.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::CertificateDer;

/// The CA's certificate, under the name that libnbd and qemu look for.
pub(crate) const CA_CERTIFICATE: &str = "ca-cert.pem";
/// The server's certificate.
pub(crate) const SERVER_CERTIFICATE: &str = "server-cert.pem";
/// Its key.
pub(crate) const SERVER_KEY: &str = "server-key.pem";

/// Writes the three files into `folder`; returns the CA's certificate. The CA's key is
/// forgotten at once.
pub(crate) fn create(folder: &Path) -> Result<CertificateDer<'static>, Box<dyn std::error::Error>> {
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters.distinguished_name.push(DnType::CommonName, "hexz-nbd demo CA");
    let authority = CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?;

    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let mut parameters = CertificateParams::new(names)?;
    parameters.distinguished_name.push(DnType::CommonName, "localhost");
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = parameters.signed_by(&key, &authority)?;

    write(&folder.join(CA_CERTIFICATE), &authority.pem(), 0o644)?;
    write(&folder.join(SERVER_CERTIFICATE), &certificate.pem(), 0o644)?;
    write(&folder.join(SERVER_KEY), &key.serialize_pem(), 0o600)?;
    Ok(authority.der().clone())
}

fn write(path: &Path, content: &str, mode: u32) -> std::io::Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?
        .write_all(content.as_bytes())
}
