//! Reads and extends the revocation list.

use std::path::Path;
use std::time::SystemTime;

use rcgen::{RevocationReason, RevokedCertParams, SerialNumber};
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use x509_cert::crl::{CertificateList, RevokedCert};
use x509_cert::der::asn1::GeneralizedTime;
use x509_cert::der::oid::AssociatedOid;
use x509_cert::der::oid::db::rfc5280::ID_CE_INVALIDITY_DATE;
use x509_cert::der::{self, Decode, ErrorKind};
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::{CrlNumber, CrlReason};

use super::PkiError;
use super::certificate::{CertificateInfo, Serial, to_system_time};

/// Content of a CA's revocation list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Revocations {
    /// CRL number; increases with each list.
    pub(super) number: u128,
    pub(super) entries: Vec<RevokedCertParams>,
}

impl Revocations {
    /// Returns the first list of a CA, which is empty.
    pub(super) fn empty() -> Self {
        Self { number: 1, entries: Vec::new() }
    }

    /// Reads a list of the given CA; `path` is for error messages.
    pub(super) fn from_pem(
        pem: &[u8],
        path: &Path,
        authority: &CertificateInfo,
    ) -> Result<Self, PkiError> {
        let malformed = |what: &str, error: der::Error| {
            PkiError::file(path, "malformed_crl", format!("can't parse {what}: {error}"))
        };
        let der = CertificateRevocationListDer::from_pem_slice(pem).map_err(|error| {
            PkiError::file(path, "no_crl", format!("it has no revocation list: {error}"))
        })?;
        let list = CertificateList::from_der(&der)
            .map_err(|error| malformed("the revocation list", error))?
            .tbs_cert_list;
        if list.issuer != authority.subject {
            return Err(PkiError::file(path, "other_ca", "the revocation list of another CA"));
        }
        let number = extension(list.crl_extensions.as_deref(), CrlNumber::OID)
            .map_or(Ok(0), |number| parse_crl_number(CrlNumber::from_der(number)?.0.as_bytes()))
            .map_err(|error| malformed("its number", error))?;
        let entries = list.revoked_certificates.unwrap_or_default();
        let entries = entries
            .iter()
            .map(parse_entry)
            .collect::<Result<_, _>>()
            .map_err(|error| malformed("an entry", error))?;
        Ok(Self { number, entries })
    }

    pub(super) fn find(&self, serial: &Serial) -> Option<&RevokedCertParams> {
        self.entries.iter().find(|entry| entry.serial_number.as_ref() == serial.0)
    }

    /// Adds a certificate that isn't on the list yet.
    pub(super) fn add(&mut self, serial: &Serial, reason: Option<RevocationReason>) {
        self.entries.push(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&serial.0),
            revocation_time: SystemTime::now().into(),
            reason_code: reason,
            invalidity_date: None,
        });
    }
}

fn parse_entry(entry: &RevokedCert) -> der::Result<RevokedCertParams> {
    let extensions = entry.crl_entry_extensions.as_deref();
    let invalid_since = extension(extensions, ID_CE_INVALIDITY_DATE)
        .map(|date| GeneralizedTime::from_der(date).map(|date| to_system_time(date.into()).into()))
        .transpose()?;
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(&Serial::new(entry.serial_number.as_bytes()).0),
        revocation_time: to_system_time(entry.revocation_date).into(),
        reason_code: extension(extensions, CrlReason::OID)
            .map(|reason| CrlReason::from_der(reason).map(to_rcgen_reason))
            .transpose()?,
        invalidity_date: invalid_since,
    })
}

fn extension(
    extensions: Option<&[Extension]>,
    id: x509_cert::der::asn1::ObjectIdentifier,
) -> Option<&[u8]> {
    let wanted = extensions?.iter().find(|extension| extension.extn_id == id)?;
    Some(wanted.extn_value.as_bytes())
}

fn parse_crl_number(bytes: &[u8]) -> der::Result<u128> {
    if bytes.len() >= size_of::<u128>() {
        // The next number has to fit as well.
        return Err(ErrorKind::Overlength.into());
    }
    Ok(bytes.iter().fold(0, |number, &byte| number << 8 | u128::from(byte)))
}

fn to_rcgen_reason(reason: CrlReason) -> RevocationReason {
    match reason {
        CrlReason::Unspecified => RevocationReason::Unspecified,
        CrlReason::KeyCompromise => RevocationReason::KeyCompromise,
        CrlReason::CaCompromise => RevocationReason::CaCompromise,
        CrlReason::AffiliationChanged => RevocationReason::AffiliationChanged,
        CrlReason::Superseded => RevocationReason::Superseded,
        CrlReason::CessationOfOperation => RevocationReason::CessationOfOperation,
        CrlReason::CertificateHold => RevocationReason::CertificateHold,
        CrlReason::RemoveFromCRL => RevocationReason::RemoveFromCrl,
        CrlReason::PrivilegeWithdrawn => RevocationReason::PrivilegeWithdrawn,
        CrlReason::AaCompromise => RevocationReason::AaCompromise,
    }
}

/// Returns the reason's name in RFC 5280.
pub(super) fn reason_name(reason: RevocationReason) -> &'static str {
    match reason {
        RevocationReason::Unspecified => "unspecified",
        RevocationReason::KeyCompromise => "keyCompromise",
        RevocationReason::CaCompromise => "cACompromise",
        RevocationReason::AffiliationChanged => "affiliationChanged",
        RevocationReason::Superseded => "superseded",
        RevocationReason::CessationOfOperation => "cessationOfOperation",
        RevocationReason::CertificateHold => "certificateHold",
        RevocationReason::RemoveFromCrl => "removeFromCRL",
        RevocationReason::PrivilegeWithdrawn => "privilegeWithdrawn",
        RevocationReason::AaCompromise => "aACompromise",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::pki::authority::{CertificateAuthority, KeyAlgorithm};

    #[test]
    fn revocation_list_round_trips() {
        let path = Path::new("crl.pem");
        let authority =
            |name| CertificateAuthority::create(name, 30, KeyAlgorithm::P256.generate().unwrap());
        let ours = authority("ours").unwrap();
        let mut list = Revocations::empty();
        for (first, reason) in [(1, None), (2, Some(RevocationReason::KeyCompromise))] {
            let pem = ours.sign_revocations(&list).unwrap();
            let read = Revocations::from_pem(pem.as_bytes(), path, &ours.certificate).unwrap();
            assert_eq!(read.number, list.number);
            assert_eq!(read.entries.len(), list.entries.len());
            for (read, written) in read.entries.iter().zip(&list.entries) {
                assert_eq!(read.serial_number, written.serial_number);
                assert_eq!(read.reason_code, written.reason_code);
            }
            // Written again, the list stays the same, to the second.
            let again = Revocations { number: read.number, ..read.clone() };
            let pem = ours.sign_revocations(&again).unwrap();
            assert_eq!(
                Revocations::from_pem(pem.as_bytes(), path, &ours.certificate).unwrap(),
                read
            );
            list.number += 0xff;
            list.add(&Serial::new(&[first, 0xff]), reason);
        }
        assert!(list.find(&Serial::new(&[0, 1, 0xff])).is_some());
        assert!(list.find(&Serial::new(&[1])).is_none());

        let pem = ours.sign_revocations(&list).unwrap();
        let other = authority("others").unwrap();
        for (pem, authority) in [(pem.as_str(), &other), (ours.pem.as_str(), &ours), ("", &ours)] {
            let read = Revocations::from_pem(pem.as_bytes(), path, &authority.certificate);
            assert!(read.is_err());
        }
    }
}
