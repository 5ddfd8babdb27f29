//! Certificates: of the server, of clients, and of somebody whom nobody trusts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber,
};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::{ClientConfig, RootCertStore};
use time::OffsetDateTime;

const DAY: i64 = 24 * 3600;

/// The server's name in its certificates.
pub(crate) const SERVER_NAME: &str = "stress.example.org";

/// A CA.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its key.
pub(crate) struct Certified {
    pub(crate) certificate: CertificateDer<'static>,
    serial: SerialNumber,
    pem: String,
    key: KeyPair,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (parameters.not_before, parameters.not_after) = (from_now(-DAY), from_now(30 * DAY));
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)?;
        Ok(Self { issuer })
    }

    pub(crate) fn server(&self) -> Result<Certified> {
        let name = SanType::DnsName(Ia5String::try_from(SERVER_NAME)?);
        self.certify(name, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// A client whose identity is `uri`.
    pub(crate) fn client(&self, uri: &str) -> Result<Certified> {
        let name = SanType::URI(Ia5String::try_from(uri)?);
        self.certify(name, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn certify(&self, name: SanType, purpose: ExtendedKeyUsagePurpose) -> Result<Certified> {
        let key = KeyPair::generate()?;
        // As good as random: the end of a public key.
        let tail = key.public_key_raw().last_chunk::<8>().copied().unwrap_or_default();
        let serial = SerialNumber::from(u64::from_be_bytes(tail) >> 1);
        let mut parameters = CertificateParams::default();
        parameters.subject_alt_names = vec![name];
        parameters.extended_key_usages = vec![purpose];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.use_authority_key_identifier_extension = true;
        parameters.serial_number = Some(serial.clone());
        (parameters.not_before, parameters.not_after) = (from_now(-DAY), from_now(30 * DAY));
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        let (pem, certificate) = (certificate.pem(), certificate.der().clone());
        Ok(Certified { certificate, serial, pem, key })
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        replace(path, &self.issuer.pem())
    }

    /// Writes a revocation list of exactly these.
    pub(crate) fn revoke(&self, revoked: &[&Certified], path: &Path) -> Result<()> {
        let revoked_certs = revoked.iter().map(|certified| RevokedCertParams {
            serial_number: certified.serial.clone(),
            revocation_time: from_now(-60),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: from_now(-2 * DAY),
            next_update: from_now(30 * DAY),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked_certs.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        replace(path, &list.signed_by(&self.issuer)?.pem()?)
    }

    /// A client that trusts this CA alone, and shows that certificate.
    pub(crate) fn trusting(&self, own: Option<&Certified>) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone())?;
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(rustls::ALL_VERSIONS)?
            .with_root_certificates(roots);
        let mut config = match own {
            Some(own) => {
                let key = PrivatePkcs8KeyDer::from(own.key.serialize_der());
                config.with_client_auth_cert(vec![own.certificate.clone()], key.into())?
            }
            None => config.with_no_client_auth(),
        };
        // Each handshake is a whole one.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

impl Certified {
    /// Writes it and its key, each in one step.
    pub(crate) fn write(&self, certificate: &Path, key: &Path) -> Result<()> {
        replace(certificate, &self.pem)?;
        replace(key, &self.key.serialize_pem())
    }
}

/// Puts another file under that name, in one step.
pub(crate) fn replace(path: &Path, content: &str) -> Result<()> {
    let new = PathBuf::from(format!("{}.new", path.display()));
    fs::write(&new, content)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    Ok(fs::rename(new, path)?)
}

fn from_now(seconds: i64) -> OffsetDateTime {
    let now =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(now.saturating_add_signed(seconds))
}
