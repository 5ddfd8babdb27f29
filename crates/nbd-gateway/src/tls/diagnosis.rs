//! Diagnoses files, keys and certificates that exist but can't be used here: says in one sentence
//! what each one is, and how to make a usable one.

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_cert::certificate::Version;
use x509_cert::der::asn1::{ObjectIdentifier, UintRef};
use x509_cert::der::{AnyRef, Decode, Encode, Reader, SliceReader, Tag, Tagged};
use x509_cert::ext::pkix::BasicConstraints;
use x509_cert::spki::{AlgorithmIdentifierRef, SubjectPublicKeyInfoOwned};
use x509_cert::{Certificate, der};

/// Supported sizes of RSA keys, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");

/// Unsupported keys, by algorithm.
const UNSUPPORTED_KEYS: [(&str, &str); 5] = [
    ("1.3.101.113", "Ed448 key"),
    ("1.3.101.110", "X25519 key, which can't sign"),
    ("1.3.101.111", "X448 key, which can't sign"),
    ("1.2.840.10040.4.1", "DSA key"),
    ("1.2.840.113549.1.3.1", "Diffie-Hellman key, which can't sign"),
];

/// Supported curves: P-256, P-384 and P-521.
const SUPPORTED_CURVES: [&str; 3] = ["1.2.840.10045.3.1.7", "1.3.132.0.34", "1.3.132.0.35"];

/// Names of unsupported curves.
const UNSUPPORTED_CURVES: [(&str, &str); 6] = [
    ("1.3.132.0.10", "secp256k1"),
    ("1.3.132.0.33", "P-224"),
    ("1.2.840.10045.3.1.1", "P-192"),
    ("1.3.36.3.3.2.8.1.1.7", "brainpoolP256r1"),
    ("1.3.36.3.3.2.8.1.1.11", "brainpoolP384r1"),
    ("1.3.36.3.3.2.8.1.1.13", "brainpoolP512r1"),
];

/// Returns the reason why PEM readers miss the first block of a file, and how to fix it.
#[must_use]
pub fn file_fault(content: &[u8]) -> Option<&'static str> {
    if content.starts_with(&[0xEF, 0xBB, 0xBF]) {
        return Some(
            "the file starts with a byte order mark, which hides its first block from PEM readers: \
             remove it with tail -c +4 FILE > NEW-FILE",
        );
    }
    let is_utf16 = content.starts_with(&[0xFF, 0xFE]) || content.starts_with(&[0xFE, 0xFF]);
    is_utf16.then_some(
        "the file is encoded in UTF-16, PEM must be ASCII: convert it with iconv -f UTF-16 -t ASCII \
         FILE > NEW-FILE",
    )
}

/// Returns the reason why a private key can't be used here, and how to make a usable one. Returns
/// `None` if the key is usable, or isn't recognized.
#[must_use]
pub fn key_fault(key: &PrivateKeyDer<'_>) -> Option<String> {
    let kind = match key {
        PrivateKeyDer::Pkcs8(key) => of_pkcs8(key.secret_pkcs8_der()),
        PrivateKeyDer::Sec1(key) => of_sec1(key.secret_sec1_der()),
        PrivateKeyDer::Pkcs1(key) => of_rsa_key(key.secret_pkcs1_der(), true),
        _ => Ok(None),
    };
    kind.ok().flatten().map(|kind| {
        format!(
            "unsupported {kind}: create a P-256 key (openssl genpkey -algorithm EC -pkeyopt \
             ec_paramgen_curve:P-256 -out KEY), and have a certificate issued for it"
        )
    })
}

/// Returns the reason why a certificate can't be used here, and how to make a usable one. Returns
/// `None` if it is usable, or isn't recognized. A CA's certificate may be X.509 version 1, as old
/// roots are.
#[must_use]
pub fn certificate_fault(certificate: &CertificateDer<'_>, is_ca: bool) -> Option<String> {
    let parsed = Certificate::from_der(certificate).ok()?.tbs_certificate;
    if parsed.version == Version::V1 && !is_ca {
        return Some(
            "X.509 version 1 has no subject alternative names, which clients require: issue a \
             version 3 certificate (openssl x509 -req -extfile FILE, with subjectAltName=DNS:NAME in \
             that file)"
                .to_owned(),
        );
    }
    let kind = of_public_key(&parsed.subject_public_key_info).ok().flatten()?;
    Some(format!(
        "unsupported {kind}: have a certificate issued for a P-256 key (openssl genpkey -algorithm \
         EC -pkeyopt ec_paramgen_curve:P-256)"
    ))
}

/// Returns true if a certificate belongs to a CA: it says so, or is of X.509 version 1, which can't
/// say.
#[must_use]
pub fn is_authority(certificate: &CertificateDer<'_>) -> bool {
    let Ok(parsed) = Certificate::from_der(certificate) else { return false };
    let parsed = parsed.tbs_certificate;
    parsed.version == Version::V1
        || parsed.get::<BasicConstraints>().ok().flatten().is_some_and(|(_, it)| it.ca)
}

/// Returns the position in a chain of the certificate with the given public key, in DER.
#[must_use]
pub fn position_of_key(chain: &[CertificateDer<'_>], key: &[u8]) -> Option<usize> {
    chain.iter().position(|certificate| {
        let parsed = Certificate::from_der(certificate).ok();
        let own = parsed.and_then(|it| it.tbs_certificate.subject_public_key_info.to_der().ok());
        own.is_some_and(|own| own == key)
    })
}

/// Description of an unsupported key; `None` if it is supported or not recognized.
type KeyCheck = Result<Option<String>, der::Error>;

fn of_pkcs8(key: &[u8]) -> KeyCheck {
    // RFC 5958: version, algorithm and key, then optional fields.
    let mut parts = SliceReader::new(AnyRef::from_der(key)?.value())?;
    parts.tlv_bytes()?;
    let algorithm = AlgorithmIdentifierRef::decode(&mut parts)?;
    let key = AnyRef::decode(&mut parts)?;
    match algorithm.oid {
        RSA => of_rsa_key(key.value(), true),
        oid => of_algorithm(oid, algorithm.parameters),
    }
}

fn of_sec1(key: &[u8]) -> KeyCheck {
    // RFC 5915: version, key, [0] parameters, [1] public key.
    let mut parts = SliceReader::new(AnyRef::from_der(key)?.value())?;
    parts.tlv_bytes()?;
    parts.tlv_bytes()?;
    if parts.is_finished() {
        return Ok(None);
    }
    let parameters = AnyRef::decode(&mut parts)?;
    of_algorithm(EC, Some(AnyRef::from_der(parameters.value())?))
}

fn of_public_key(key: &SubjectPublicKeyInfoOwned) -> KeyCheck {
    let parameters = key.algorithm.parameters.as_ref().map(AnyRef::from);
    match key.algorithm.oid {
        RSA => of_rsa_key(key.subject_public_key.raw_bytes(), false),
        oid => of_algorithm(oid, parameters),
    }
}

/// Checks the length of an RSA key's modulus. It is the first field of a public key, and follows
/// the version in a private key (RFC 8017, appendix A.1).
fn of_rsa_key(key: &[u8], is_private: bool) -> KeyCheck {
    let mut parts = SliceReader::new(AnyRef::from_der(key)?.value())?;
    if is_private {
        parts.tlv_bytes()?;
    }
    let modulus = UintRef::decode(&mut parts)?;
    let digits = modulus.as_bytes();
    let unused = digits.first().map_or(0, |first| first.leading_zeros());
    let bits = (digits.len() * 8).saturating_sub(usize::try_from(unused).unwrap_or(0));
    Ok((!RSA_BITS.contains(&bits)).then(|| format!("RSA key of {bits} bits")))
}

fn of_algorithm(oid: ObjectIdentifier, parameters: Option<AnyRef<'_>>) -> KeyCheck {
    if oid == RSA_PSS {
        return Ok(Some("RSA key that is restricted to RSA-PSS".to_owned()));
    }
    if oid != EC {
        let other = UNSUPPORTED_KEYS.iter().find(|(known, _)| oid.to_string() == *known);
        return Ok(other.map(|(_, name)| (*name).to_owned()));
    }
    let curve = match parameters {
        Some(parameters) if parameters.tag() == Tag::ObjectIdentifier => {
            parameters.decode_as::<ObjectIdentifier>()?.to_string()
        }
        _ => return Ok(Some("key on a curve without a name".to_owned())),
    };
    if SUPPORTED_CURVES.contains(&curve.as_str()) {
        return Ok(None);
    }
    let name = UNSUPPORTED_CURVES.iter().find(|(known, _)| *known == curve);
    let name = name.map_or(curve.as_str(), |(_, name)| name);
    Ok(Some(format!("key on the curve {name}")))
}
