//! Derives a client's identity, and how long it is valid, from its certificates.

use aws_lc_rs::digest;
use nbd_telemetry::Hex;
use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::attr::AttributeValue;
use x509_cert::der::asn1::{
    BmpString, Ia5StringRef, PrintableStringRef, TeletexStringRef, Utf8StringRef,
};
use x509_cert::der::{Decode, Tag, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use crate::access::{Identity, IdentityName, NameKind, Timestamp};

/// OID of the subject's common name.
const COMMON_NAME: &str = "2.5.4.3";

/// Maximum number of names in a certificate; real ones have far fewer. All of them are matched
/// against each rule, time and again.
const MAX_NAMES: usize = 64;

/// Maximum length of a name, in bytes: the maximum length of a pattern. Names appear in log lines.
const MAX_NAME_LEN: usize = 4096;

/// A client's certificate chain, verified by TLS.
#[derive(Debug, Clone)]
pub(crate) struct Credentials {
    identity: Identity,
    chain: Vec<CertificateDer<'static>>,
    not_before: Timestamp,
    expires: Timestamp,
}

/// Reason why no identity can be read from a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CredentialsError {
    /// The encoding is invalid.
    #[error("can't parse the client's certificate: {0}")]
    Encoding(String),
    /// There are too many names: matching them against the rules would take too long.
    #[error("the client's certificate has {0} names, more than the limit of {MAX_NAMES}")]
    TooManyNames(usize),
    /// A name is too long: it would fill the log. Holds its length in bytes.
    #[error(
        "a name in the client's certificate has {0} bytes, more than the limit of {MAX_NAME_LEN}"
    )]
    LongName(usize),
}

impl CredentialsError {
    /// Returns the stable label for log fields and audit events.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Encoding(_) => "malformed_certificate",
            Self::TooManyNames(_) => "too_many_names",
            Self::LongName(_) => "name_too_long",
        }
    }
}

impl Credentials {
    /// Reads the names from a chain that is valid at the time `now`, the client's own certificate
    /// first.
    ///
    /// # Errors
    /// The chain is empty, a certificate is encoded incorrectly, or the client's own has too many
    /// names or too long a name.
    pub(crate) fn from_chain(
        chain: &[CertificateDer<'_>],
        now: Timestamp,
    ) -> Result<Self, CredentialsError> {
        let not_understood =
            |error: x509_cert::der::Error| CredentialsError::Encoding(error.to_string());
        let own = chain
            .first()
            .ok_or_else(|| CredentialsError::Encoding("there is no certificate".to_owned()))?;
        let mut expires = Timestamp(u64::MAX);
        for certificate in chain {
            let certificate = Certificate::from_der(certificate).map_err(not_understood)?;
            let end = certificate.tbs_certificate.validity.not_after.to_unix_duration();
            let end = Timestamp(end.as_secs());
            // Clients also send certificates that aren't needed, such as a root that was replaced
            // long ago. One that had expired before the chain was verified isn't part of the valid
            // path.
            if end >= now {
                expires = expires.min(end);
            }
        }
        let parsed = Certificate::from_der(own).map_err(not_understood)?;
        let mut names = alternative_names(&parsed).map_err(not_understood)?;
        names.extend(common_names(&parsed));
        if names.len() > MAX_NAMES {
            return Err(CredentialsError::TooManyNames(names.len()));
        }
        if let Some(name) = names.iter().find(|name| name.text.len() > MAX_NAME_LEN) {
            return Err(CredentialsError::LongName(name.text.len()));
        }
        names.push(IdentityName { kind: NameKind::Sha256, text: sha256(own) });
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let not_before = parsed.tbs_certificate.validity.not_before.to_unix_duration();
        let not_before = Timestamp(not_before.as_secs());
        Ok(Self { identity: Identity::new(names), chain, not_before, expires })
    }

    /// Returns the client's identity.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns the certificates, the client's own first.
    pub(crate) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// Returns the details of the client's own certificate; `None` if it can't be parsed.
    pub(crate) fn details(&self) -> Option<CertificateDetails> {
        let own = Certificate::from_der(self.chain.first()?).ok()?.tbs_certificate;
        let serial = own.serial_number.as_bytes();
        let zeros = serial.iter().take_while(|&&byte| byte == 0).count();
        Some(CertificateDetails {
            subject: own.subject.to_string(),
            issuer: own.issuer.to_string(),
            serial: Hex(serial.get(zeros..).unwrap_or_default()).to_string(),
            not_after: Timestamp(own.validity.not_after.to_unix_duration().as_secs()),
        })
    }

    /// Returns the time at which the client's own certificate became valid.
    pub(crate) fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// Returns the earliest expiry among the certificates that were valid when the chain was read.
    pub(crate) fn expires(&self) -> Timestamp {
        self.expires
    }
}

/// Details of a certificate, for display.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CertificateDetails {
    /// Distinguished name of the owner, in the form of RFC 4514.
    pub(crate) subject: String,
    /// Distinguished name of the issuer, in the form of RFC 4514.
    pub(crate) issuer: String,
    /// Serial number in hexadecimal digits, without leading zero bytes.
    pub(crate) serial: String,
    /// Expiry.
    pub(crate) not_after: Timestamp,
}

fn alternative_names(
    certificate: &Certificate,
) -> Result<Vec<IdentityName>, x509_cert::der::Error> {
    let Some((_, SubjectAltName(names))) = certificate.tbs_certificate.get::<SubjectAltName>()?
    else {
        return Ok(Vec::new());
    };
    let of = |kind, text: &str| Some(IdentityName { kind, text: text.to_owned() });
    let names = names.iter().filter_map(|name| match name {
        GeneralName::UniformResourceIdentifier(uri) => of(NameKind::Uri, uri.as_str()),
        GeneralName::DnsName(name) => of(NameKind::Dns, name.as_str()),
        GeneralName::Rfc822Name(address) => of(NameKind::Email, address.as_str()),
        _ => None,
    });
    Ok(names.collect())
}

fn common_names(certificate: &Certificate) -> Vec<IdentityName> {
    let attributes = certificate.tbs_certificate.subject.0.iter().flat_map(|part| part.0.iter());
    attributes
        .filter(|attribute| attribute.oid.to_string() == COMMON_NAME)
        .filter_map(|attribute| text(&attribute.value))
        .map(|text| IdentityName { kind: NameKind::CommonName, text })
        .collect()
}

/// Decodes a name in any of X.520's encodings. Returns `None` for one that can't be decoded: no
/// rule can mean it.
fn text(value: &AttributeValue) -> Option<String> {
    match value.tag() {
        Tag::Utf8String => value.decode_as::<Utf8StringRef<'_>>().ok().map(|text| text.to_string()),
        Tag::PrintableString => {
            value.decode_as::<PrintableStringRef<'_>>().ok().map(|text| text.to_string())
        }
        Tag::Ia5String => value.decode_as::<Ia5StringRef<'_>>().ok().map(|text| text.to_string()),
        Tag::TeletexString => {
            value.decode_as::<TeletexStringRef<'_>>().ok().map(|text| text.to_string())
        }
        Tag::BmpString => value.decode_as::<BmpString>().ok().map(|text| text.to_string()),
        _ => None,
    }
}

fn sha256(certificate: &CertificateDer<'_>) -> String {
    Hex(digest::digest(&digest::SHA256, certificate).as_ref()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::string::Ia5String;
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType};

    /// The beginning of 2026.
    const NOW: Timestamp = Timestamp(1_767_225_600);

    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> rcgen::Certificate {
        let mut parameters = CertificateParams::default();
        change(&mut parameters);
        parameters.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    fn credentials(change: impl FnOnce(&mut CertificateParams)) -> Credentials {
        let certificate = certificate(change);
        Credentials::from_chain(&[certificate.der().clone()], NOW).unwrap()
    }

    fn names(credentials: &Credentials) -> Vec<String> {
        credentials.identity().names().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_kinds_of_names_are_read() {
        let ia5 = |text: &str| Ia5String::try_from(text).unwrap();
        let credentials = credentials(|parameters| {
            parameters.subject_alt_names = vec![
                SanType::DnsName(ia5("laptop.example.org")),
                SanType::Rfc822Name(ia5("alice@example.org")),
                SanType::IpAddress("10.0.0.1".parse().unwrap()),
                SanType::URI(ia5("spiffe://corp/alice")),
            ];
            parameters.distinguished_name.push(DnType::CommonName, "Alice Ünlü");
            parameters.not_after = rcgen::date_time_ymd(2030, 1, 1);
        });
        let hash = sha256(&credentials.chain()[0]);
        assert_eq!(
            names(&credentials),
            [
                "uri:spiffe://corp/alice",
                "dns:laptop.example.org",
                "email:alice@example.org",
                "cn:Alice Ünlü",
                &format!("sha256:{hash}"),
            ]
        );
        assert_eq!(credentials.expires(), Timestamp(1_893_456_000));
    }

    #[test]
    fn a_common_name_is_read_in_each_encoding() {
        let printable = DnValue::PrintableString("bob".try_into().unwrap());
        let bmp = DnValue::BmpString("böb".try_into().unwrap());
        for (value, name) in [(printable, "cn:bob"), (bmp, "cn:böb")] {
            let credentials = credentials(|parameters| {
                parameters.distinguished_name = rcgen::DistinguishedName::new();
                parameters.distinguished_name.push(DnType::CommonName, value);
            });
            assert_eq!(names(&credentials)[0], name);
        }
    }

    #[test]
    fn certificate_without_names_is_identified_by_hash() {
        let credentials = credentials(|parameters| {
            parameters.distinguished_name = rcgen::DistinguishedName::new();
        });
        assert_eq!(credentials.identity().names().len(), 1);
        assert!(names(&credentials)[0].starts_with("sha256:"));
    }

    /// An expired root that wasn't needed used to end every session at once.
    #[test]
    fn already_expired_certificates_are_ignored() {
        let until = |year| {
            let end = rcgen::date_time_ymd(year, 1, 1);
            certificate(|parameters| parameters.not_after = end).der().clone()
        };
        let expires = |chain: &[_]| Credentials::from_chain(chain, NOW).unwrap().expires();
        assert_eq!(expires(&[until(2030), until(2025)]), Timestamp(1_893_456_000));
        assert_eq!(expires(&[until(2031), until(2030), until(2025)]), Timestamp(1_893_456_000));
    }

    /// Matching a certificate with thousands of names against the rules used to keep the program
    /// busy.
    #[test]
    fn names_are_limited_in_count_and_length() {
        let of = |names: Vec<String>| {
            let dns = |name: String| SanType::DnsName(Ia5String::try_from(name).unwrap());
            let certificate = certificate(|parameters| {
                parameters.distinguished_name = rcgen::DistinguishedName::new();
                parameters.subject_alt_names = names.into_iter().map(dns).collect();
            });
            Credentials::from_chain(&[certificate.der().clone()], NOW)
                .map(|it| it.identity().names().len())
        };
        let many = |count| (0..count).map(|number| format!("host-{number}")).collect();
        assert_eq!(of(many(MAX_NAMES)), Ok(MAX_NAMES + 1));
        assert_eq!(of(many(MAX_NAMES + 1)), Err(CredentialsError::TooManyNames(65)));
        assert!(of(vec!["a".repeat(MAX_NAME_LEN)]).is_ok());
        let long = of(vec!["a".repeat(MAX_NAME_LEN + 1)]);
        assert_eq!(long, Err(CredentialsError::LongName(4097)));
    }

    #[test]
    fn invalid_certificates_are_rejected() {
        assert!(Credentials::from_chain(&[], NOW).is_err());
        assert!(Credentials::from_chain(&[CertificateDer::from(vec![0x30, 0])], NOW).is_err());
    }
}
