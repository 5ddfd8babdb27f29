//! A CA in memory: creates itself, certificates and revocation lists.

use std::path::Path;
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::{self, SystemRandom};
use aws_lc_rs::signature::Ed25519KeyPair;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType,
    DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::PrivatePkcs8KeyDer;
use x509_cert::der::{Tag, Tagged};
use x509_cert::name::Name as DistinguishedName;
use zeroize::Zeroizing;

use super::PkiError;
use super::certificate::{CertificateInfo, CertificateKind, Serial};
use super::names::SubjectName;
use super::revocations::Revocations;

/// Time by which validity begins before now, to allow for clocks that are slow.
pub(super) const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// Unit of times in certificates.
const SMALLEST_STEP: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Length of serial numbers in bytes: long enough that random ones never collide. RFC 5280 allows
/// 20 bytes.
const SERIAL_BYTES: usize = 16;

/// Kind of key to generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyAlgorithm {
    /// ECDSA on P-256, which all software supports.
    P256,
    Ed25519,
}

/// A CA with its private key.
pub(crate) struct CertificateAuthority {
    pub(crate) certificate: CertificateInfo,
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A newly issued certificate with its private key.
pub(crate) struct IssuedCertificate {
    pub(crate) certificate: CertificateInfo,
    pub(crate) pem: String,
    pub(crate) key: Zeroizing<String>,
}

impl KeyAlgorithm {
    pub(crate) fn generate(self) -> Result<KeyPair, PkiError> {
        Ok(match self {
            Self::P256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?,
            // PKCS#8 v1, without the public key: OpenSSL 3.0 and GnuTLS 3.7 can't read v2.
            Self::Ed25519 => {
                let key = Ed25519KeyPair::generate_pkcs8v1(&SystemRandom::new());
                let key = Zeroizing::new(key.map_err(|_| PkiError::Random)?.as_ref().to_vec());
                KeyPair::from_pkcs8_der_and_sign_algo(
                    &PrivatePkcs8KeyDer::from(key.as_slice()),
                    &rcgen::PKCS_ED25519,
                )?
            }
        })
    }
}

impl CertificateAuthority {
    /// Creates a CA with the given name and key.
    pub(crate) fn create(name: &str, days: u32, key: KeyPair) -> Result<Self, PkiError> {
        let mut parameters = base_parameters(days)?;
        parameters.distinguished_name.push(DnType::CommonName, name);
        // The CA signs servers and clients, but no other CA.
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let signed = parameters.self_signed(&key)?;
        let certificate = parse_issued(&signed)?;
        Ok(Self { certificate, pem: signed.pem(), issuer: Issuer::new(parameters, key) })
    }

    /// Loads a CA from its files, which may come from another program.
    pub(super) fn load(
        (certificate, certificate_path): (&[u8], &Path),
        (key, key_path): (&str, &Path),
    ) -> Result<Self, PkiError> {
        let unusable = |reason, problem: &str| PkiError::file(certificate_path, reason, problem);
        let pem = String::from_utf8_lossy(certificate).into_owned();
        let certificate = CertificateInfo::from_pem(certificate, certificate_path)?;
        if certificate.kind != CertificateKind::Authority {
            return Err(unusable("not_a_ca", "not a CA certificate"));
        }
        if certificate.not_after <= SystemTime::now() {
            return Err(unusable(
                "ca_expired",
                "the CA has expired: create a new one in another folder",
            ));
        }
        let key =
            KeyPair::from_pem(key).map_err(|error| PkiError::unusable_key(key_path, &error))?;
        if key.subject_public_key_info() != certificate.public_key {
            return Err(PkiError::file(
                key_path,
                "key_mismatch",
                "the key doesn't match ca-cert.pem",
            ));
        }
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = to_rcgen_name(&certificate.subject)
            .ok_or_else(|| unusable("unsupported_name", "the CA's name has unsupported parts"))?;
        if let Some(id) = &certificate.key_id {
            parameters.key_identifier_method = KeyIdMethod::PreSpecified(id.clone());
        }
        Ok(Self { certificate, pem, issuer: Issuer::new(parameters, key) })
    }

    /// Returns the CA's private key in PEM form.
    pub(super) fn key(&self) -> Zeroizing<String> {
        Zeroizing::new(self.issuer.key().serialize_pem())
    }

    /// Issues a certificate for `names` with a new key; it expires no later than the CA. Its
    /// validity begins after `newer_than`, but not in the future.
    pub(crate) fn issue(
        &self,
        kind: CertificateKind,
        names: &[SubjectName],
        days: u32,
        key: KeyAlgorithm,
        newer_than: Option<SystemTime>,
    ) -> Result<IssuedCertificate, PkiError> {
        let mut parameters = base_parameters(days)?;
        if let Some(start) = newer_than {
            let start = (start + SMALLEST_STEP).min(SystemTime::now());
            parameters.not_before = parameters.not_before.max(start.into());
        }
        parameters.not_after = parameters.not_after.min(self.certificate.not_after.into());
        if let Some(name) = names.iter().find(|name| matches!(name, SubjectName::CommonName(_))) {
            parameters.distinguished_name.push(DnType::CommonName, name.to_string());
        } else if let Some(name) = names.first().filter(|name| name.fits_common_name()) {
            parameters.distinguished_name.push(DnType::CommonName, name.to_string());
        }
        parameters.subject_alt_names = names
            .iter()
            .filter_map(|name| to_alternative_name(name).transpose())
            .collect::<Result<_, _>>()?;
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.custom_extensions = vec![key_usage_extension()];
        parameters.extended_key_usages = match kind {
            CertificateKind::Server => vec![ExtendedKeyUsagePurpose::ServerAuth],
            _ => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        parameters.use_authority_key_identifier_extension = true;
        let key = key.generate()?;
        let signed = parameters.signed_by(&key, &self.issuer)?;
        let certificate = parse_issued(&signed)?;
        if !certificate.names_as_issuer(&self.certificate) {
            return Err(PkiError::UnsupportedCa);
        }
        let key = Zeroizing::new(key.serialize_pem());
        Ok(IssuedCertificate { certificate, pem: signed.pem(), key })
    }

    /// Signs the revocation list, and returns it in PEM form. The list expires only with the CA: it
    /// is distributed by hand, and a server with an expired list refuses every client.
    pub(super) fn sign_revocations(&self, revocations: &Revocations) -> Result<String, PkiError> {
        let list = CertificateRevocationListParams {
            this_update: (SystemTime::now() - CLOCK_SKEW).into(),
            next_update: self.certificate.not_after.into(),
            crl_number: SerialNumber::from_slice(&revocations.number.to_be_bytes()),
            issuing_distribution_point: None,
            revoked_certs: revocations.entries.clone(),
            key_identifier_method: match &self.certificate.key_id {
                Some(id) => KeyIdMethod::PreSpecified(id.clone()),
                None => KeyIdMethod::Sha256,
            },
        };
        Ok(list.signed_by(&self.issuer)?.pem()?)
    }
}

/// Returns the parameters that all certificates have in common.
fn base_parameters(days: u32) -> Result<CertificateParams, PkiError> {
    let now = SystemTime::now();
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.not_before = (now - CLOCK_SKEW).into();
    parameters.not_after = (now + DAY * days).into();
    parameters.serial_number = Some(SerialNumber::from_slice(&random_serial()?.0));
    Ok(parameters)
}

fn random_serial() -> Result<Serial, PkiError> {
    let mut bytes: [u8; SERIAL_BYTES] = random_bytes()?;
    // Serial numbers must be positive; this also gives all of them the same length.
    if let Some(first) = bytes.first_mut() {
        *first = *first & 0x7f | 0x40;
    }
    Ok(Serial::new(&bytes))
}

pub(super) fn random_bytes<const N: usize>() -> Result<[u8; N], PkiError> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| PkiError::Random)?;
    Ok(bytes)
}

/// Returns the key usage extension, with digitalSignature only: EC keys can't encipher keys (RFC
/// 8813). The extension should be critical but isn't: qemu 10.0 and older would then require
/// keyEncipherment as well, and refuse the certificate.
fn key_usage_extension() -> CustomExtension {
    const KEY_USAGE: [u64; 4] = [2, 5, 29, 15];
    const DIGITAL_SIGNATURE: [u8; 4] = [0x03, 0x02, 0x07, 0x80];
    CustomExtension::from_oid_content(&KEY_USAGE, DIGITAL_SIGNATURE.to_vec())
}

fn to_alternative_name(name: &SubjectName) -> Result<Option<SanType>, rcgen::Error> {
    Ok(match name {
        SubjectName::Dns(name) => Some(SanType::DnsName(name.as_str().try_into()?)),
        SubjectName::Email(name) => Some(SanType::Rfc822Name(name.as_str().try_into()?)),
        SubjectName::Uri(name) => Some(SanType::URI(name.as_str().try_into()?)),
        SubjectName::Ip(address) => Some(SanType::IpAddress(*address)),
        SubjectName::CommonName(_) => None,
    })
}

/// Converts a distinguished name so that it is encoded again byte for byte; returns `None` if that
/// isn't possible.
fn to_rcgen_name(name: &DistinguishedName) -> Option<rcgen::DistinguishedName> {
    let mut same = rcgen::DistinguishedName::new();
    for part in &name.0 {
        let [attribute] = part.0.as_slice() else { return None };
        let text = std::str::from_utf8(attribute.value.value()).ok()?;
        let value = match attribute.value.tag() {
            Tag::Utf8String => DnValue::Utf8String(text.to_owned()),
            Tag::PrintableString => DnValue::PrintableString(text.try_into().ok()?),
            Tag::Ia5String => DnValue::Ia5String(text.try_into().ok()?),
            _ => return None,
        };
        let oid: Vec<u64> = attribute.oid.arcs().map(u64::from).collect();
        let kind = DnType::from_oid(&oid);
        if same.get(&kind).is_some() {
            return None;
        }
        same.push(kind, value);
    }
    Some(same)
}

fn parse_issued(signed: &rcgen::Certificate) -> Result<CertificateInfo, PkiError> {
    CertificateInfo::from_der(signed.der().clone()).map_err(|_| PkiError::UnsupportedCa)
}
