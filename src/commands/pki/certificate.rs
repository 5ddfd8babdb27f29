//! Parses certificates.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::time::SystemTime;

use aws_lc_rs::digest;
use nbd_telemetry::Hex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::KeyUsage;
use x509_cert::der::oid::db::{rfc4519, rfc5280};
use x509_cert::der::{Decode, Encode, asn1};
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{
    AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, SubjectAltName,
    SubjectKeyIdentifier,
};
use x509_cert::name::Name as DistinguishedName;

use super::PkiError;
use super::names::{SubjectName, escape_name};

/// Purpose of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CertificateKind {
    Authority,
    Server,
    Client,
    Other,
}

/// Serial number of a certificate, without leading zeros.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Serial(pub(super) Vec<u8>);

/// A parsed certificate, with the fields that a small CA needs.
#[derive(Debug, Clone)]
pub(crate) struct CertificateInfo {
    pub(crate) der: CertificateDer<'static>,
    pub(super) kind: CertificateKind,
    pub(super) serial: Serial,
    pub(crate) subject: DistinguishedName,
    pub(crate) issuer: DistinguishedName,
    /// Subject alternative names, preceded by the common name unless it is one of them.
    pub(crate) names: Vec<SubjectName>,
    pub(super) common_name: Option<String>,
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
    /// The `SubjectPublicKeyInfo`, in DER.
    pub(super) public_key: Vec<u8>,
    pub(super) key_id: Option<Vec<u8>>,
    pub(super) authority_key_id: Option<Vec<u8>>,
}

impl CertificateInfo {
    /// Parses the first certificate of a PEM file; `path` is for error messages.
    pub(super) fn from_pem(pem: &[u8], path: &Path) -> Result<Self, PkiError> {
        let der = CertificateDer::from_pem_slice(pem).map_err(|error| {
            PkiError::file(path, "no_certificate", format!("it has no certificate: {error}"))
        })?;
        Self::from_der(der).map_err(|error| {
            let problem = format!("can't parse the certificate: {error}");
            PkiError::file(path, "malformed_certificate", problem)
        })
    }

    pub(crate) fn from_der(der: CertificateDer<'static>) -> Result<Self, x509_cert::der::Error> {
        let certificate = x509_cert::Certificate::from_der(&der)?.tbs_certificate;
        let is_ca = certificate.get::<BasicConstraints>()?.is_some_and(|(_, it)| it.ca);
        let usages = certificate.get::<ExtendedKeyUsage>()?.map_or(Vec::new(), |(_, it)| it.0);
        let kind = if is_ca {
            CertificateKind::Authority
        } else if usages.contains(&rfc5280::ID_KP_SERVER_AUTH) {
            CertificateKind::Server
        } else if usages.contains(&rfc5280::ID_KP_CLIENT_AUTH) {
            CertificateKind::Client
        } else {
            CertificateKind::Other
        };
        let common_name = common_name(&certificate.subject);
        let alternatives =
            certificate.get::<SubjectAltName>()?.map_or(Vec::new(), |(_, names)| names.0);
        let mut names: Vec<SubjectName> =
            alternatives.iter().filter_map(alternative_name).collect();
        if let Some(name) = &common_name
            && names.iter().all(|other| other.to_string() != *name)
        {
            names.insert(0, SubjectName::CommonName(name.clone()));
        }
        let key_id = certificate.get::<SubjectKeyIdentifier>()?;
        let authority_key_id = certificate.get::<AuthorityKeyIdentifier>()?;
        Ok(Self {
            kind,
            serial: Serial::new(certificate.serial_number.as_bytes()),
            names,
            common_name,
            not_before: to_system_time(certificate.validity.not_before),
            not_after: to_system_time(certificate.validity.not_after),
            public_key: certificate.subject_public_key_info.to_der()?,
            key_id: key_id.map(|(_, id)| id.0.into_bytes()),
            authority_key_id: authority_key_id
                .and_then(|(_, id)| id.key_identifier)
                .map(asn1::OctetString::into_bytes),
            subject: certificate.subject,
            issuer: certificate.issuer,
            der,
        })
    }

    /// Returns true if the given CA has signed this certificate.
    pub(super) fn is_signed_by(&self, authority: &Self) -> bool {
        let usage = match self.kind {
            CertificateKind::Server => KeyUsage::server_auth(),
            _ => KeyUsage::client_auth(),
        };
        // Verified at the start of validity, since it doesn't matter if the certificate has
        // expired.
        let then = self.not_before.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let verified = webpki::anchor_from_trusted_cert(&authority.der).and_then(|anchor| {
            let (algorithms, then) =
                (webpki::ALL_VERIFICATION_ALGS, UnixTime::since_unix_epoch(then));
            webpki::EndEntityCert::try_from(&self.der)?
                .verify_for_usage(algorithms, &[anchor], &[], then, usage, None, None)
                .map(|_| ())
        });
        verified.is_ok()
    }

    /// Returns true if the certificate names the given CA as its issuer.
    pub(super) fn names_as_issuer(&self, authority: &Self) -> bool {
        let same_key = match (&self.authority_key_id, &authority.key_id) {
            (Some(named), Some(id)) => named == id,
            _ => true,
        };
        self.issuer == authority.subject && same_key
    }

    pub(super) fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|own| own.to_string() == name)
            || self.common_name.as_deref() == Some(name)
    }

    /// Returns the SHA-256 of the whole certificate, in hexadecimal digits.
    pub(crate) fn fingerprint(&self) -> String {
        Hex(digest::digest(&digest::SHA256, &self.der).as_ref()).to_string()
    }

    pub(super) fn names_for_display(&self) -> String {
        self.names.iter().map(escape_name).collect::<Vec<_>>().join(", ")
    }
}

impl Serial {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().copied().skip_while(|&byte| byte == 0).collect())
    }

    /// Parses a serial number as shown by this program, openssl or a browser: hexadecimal digits,
    /// with or without colons.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("0x").unwrap_or(text);
        let digits: Vec<u8> = text
            .chars()
            .filter(|&character| character != ':')
            .map(|digit| digit.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect::<Option<_>>()?;
        let bytes: Vec<u8> = digits
            .rchunks(2)
            .rev()
            .map(|pair| pair.iter().fold(0, |sum, d| sum * 16 + d))
            .collect();
        Some(Self::new(&bytes)).filter(|serial| !serial.0.is_empty())
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Display for CertificateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Authority => "ca",
            Self::Server => "server",
            Self::Client => "client",
            Self::Other => "other",
        })
    }
}

pub(super) fn to_system_time(time: x509_cert::time::Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + time.to_unix_duration()
}

fn common_name(name: &DistinguishedName) -> Option<String> {
    let mut attributes = name.0.iter().rev().flat_map(|part| part.0.iter());
    let value = &attributes.find(|attribute| attribute.oid == rfc4519::CN)?.value;
    String::from_utf8(value.value().to_vec()).ok()
}

fn alternative_name(name: &GeneralName) -> Option<SubjectName> {
    match name {
        GeneralName::DnsName(name) => Some(SubjectName::Dns(name.to_string())),
        GeneralName::Rfc822Name(name) => Some(SubjectName::Email(name.to_string())),
        GeneralName::UniformResourceIdentifier(name) => Some(SubjectName::Uri(name.to_string())),
        GeneralName::IpAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_bytes()).map(IpAddr::from);
            let v6 = || <[u8; 16]>::try_from(bytes.as_bytes()).map(IpAddr::from);
            v4.or_else(|_| v6()).ok().map(SubjectName::Ip)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_serial_formats_are_parsed() {
        let serial = Serial::new(&[0, 1, 0xab, 0xcd]);
        assert_eq!(serial.to_string(), "01abcd");
        for text in ["01abcd", "01ABCD", "1abcd", "01:AB:CD", "0x1abcd", "0001abcd"] {
            assert_eq!(Serial::parse(text).unwrap(), serial, "{text}");
        }
        for text in ["", "0", "::", "xyz", "01abcd.pem", "-1", "ü"] {
            assert_eq!(Serial::parse(text), None, "{text}");
        }
    }
}
