//! A CA for clients: the certificates that it gives them, and takes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::ClientConfig;
use rustls::SupportedProtocolVersion;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::version::{TLS12, TLS13};
use tempfile::TempDir;

use super::pki::{Pki, authority, from_now, trusting_with, write_secret};

const DAY: i64 = 24 * 3600;

/// A CA with a folder, in which its certificate is `ca.pem` and its revocation list
/// `crl.pem`.
pub struct Authority {
    folder: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a client's certificate is made with.
pub struct Recipe {
    pub uri: Option<&'static str>,
    pub dns: Option<&'static str>,
    pub email: Option<&'static str>,
    pub name: &'static str,
    /// From how many seconds ago to in how many seconds it is valid.
    pub seconds: (i64, i64),
    pub purpose: ExtendedKeyUsagePurpose,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            uri: None,
            dns: None,
            email: None,
            name: "alice",
            seconds: (-DAY, 30 * DAY),
            purpose: ExtendedKeyUsagePurpose::ClientAuth,
        }
    }
}

/// A client's certificate and key.
pub struct Certified {
    serial: SerialNumber,
    certificate: CertificateDer<'static>,
    pem: String,
    key: KeyPair,
}

impl Authority {
    pub fn new() -> Self {
        Self::named("hexz-nbd test client CA")
    }

    pub fn named(name: &str) -> Self {
        Self::made(authority(name, 1))
    }

    /// One that runs out in so many seconds.
    pub fn until(seconds: i64) -> Self {
        let mut parameters = authority("hexz-nbd test CA that runs out", 1);
        parameters.not_before = from_now(-DAY);
        parameters.not_after = from_now(seconds);
        Self::made(parameters)
    }

    fn made(parameters: CertificateParams) -> Self {
        let folder = tempfile::Builder::new().prefix("hexz-nbd-test-ca-").tempdir().unwrap();
        let issuer =
            CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        let authority = Self { folder, issuer };
        authority.revoke(&[]);
        authority
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn certificate(&self) -> PathBuf {
        self.folder().join("ca.pem")
    }

    pub fn revocation_list(&self) -> PathBuf {
        self.folder().join("crl.pem")
    }

    /// A client called alice.
    pub fn alice(&self) -> Certified {
        self.certify(&Recipe::default())
    }

    pub fn certify(&self, recipe: &Recipe) -> Certified {
        let key = KeyPair::generate().unwrap();
        let serial = SerialNumber::from(rand_serial(&key));
        let mut parameters = CertificateParams::default();
        let text = |text: &str| Ia5String::try_from(text).unwrap();
        parameters.subject_alt_names = [
            recipe.uri.map(|uri| SanType::URI(text(uri))),
            recipe.dns.map(|name| SanType::DnsName(text(name))),
            recipe.email.map(|address| SanType::Rfc822Name(text(address))),
        ]
        .into_iter()
        .flatten()
        .collect();
        parameters.distinguished_name.push(DnType::CommonName, recipe.name);
        parameters.extended_key_usages = vec![recipe.purpose.clone()];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.use_authority_key_identifier_extension = true;
        parameters.serial_number = Some(serial.clone());
        parameters.not_before = from_now(recipe.seconds.0);
        parameters.not_after = from_now(recipe.seconds.1);
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let (pem, certificate) = (certificate.pem(), certificate.der().clone());
        Certified { serial, certificate, pem, key }
    }

    /// Writes a revocation list of exactly these, in one step.
    pub fn revoke(&self, revoked: &[&Certified]) {
        self.revoke_until(revoked, 30 * DAY);
    }

    /// The same, valid for so many seconds from now on.
    pub fn revoke_until(&self, revoked: &[&Certified], seconds: i64) {
        let new = self.folder().join("crl.new");
        fs::write(&new, self.revocations(revoked, seconds, 1)).unwrap();
        fs::rename(new, self.revocation_list()).unwrap();
    }

    /// The revocation list of that number, which is valid for a month.
    pub fn numbered_revocations(&self, revoked: &[&Certified], number: u64) -> String {
        self.revocations(revoked, 30 * DAY, number)
    }

    fn revocations(&self, revoked: &[&Certified], seconds: i64, number: u64) -> String {
        let revoked_certs = revoked.iter().map(|certified| RevokedCertParams {
            serial_number: certified.serial.clone(),
            revocation_time: from_now(-60),
            reason_code: None,
            invalidity_date: None,
        });
        CertificateRevocationListParams {
            this_update: from_now(-2 * DAY),
            next_update: from_now(seconds),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&self.issuer)
        .unwrap()
        .pem()
        .unwrap()
    }
}

fn rand_serial(key: &KeyPair) -> u64 {
    // As good as random: the end of a public key.
    let tail: [u8; 8] = key.public_key_raw().last_chunk().copied().unwrap();
    u64::from_be_bytes(tail) >> 1
}

impl Certified {
    /// A client with this certificate that trusts the server's CA.
    pub fn config(&self, server: &Pki) -> Arc<ClientConfig> {
        self.config_for(server, &[&TLS13, &TLS12])
    }

    pub fn config_for(
        &self,
        server: &Pki,
        versions: &[&'static SupportedProtocolVersion],
    ) -> Arc<ClientConfig> {
        let key = PrivateKeyDer::from_pem_slice(self.key.serialize_pem().as_bytes()).unwrap();
        trusting_with(server.authority(), versions, Some((self.certificate.clone(), key)))
    }

    /// Its SHA-256, as rules have it.
    pub fn sha256(&self) -> String {
        super::sha256(&self.certificate)
    }

    /// A folder with everything that libnbd and qemu want of a client.
    pub fn folder(&self, server: &Pki) -> TempDir {
        let folder = tempfile::Builder::new().prefix("hexz-nbd-test-client-").tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::copy(server.ca_cert(), path("ca-cert.pem")).unwrap();
        fs::write(path("client-cert.pem"), &self.pem).unwrap();
        write_secret(&path("client-key.pem"), &self.key.serialize_pem());
        folder
    }
}
