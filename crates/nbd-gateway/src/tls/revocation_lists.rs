//! Reads revocation lists, and matches each to the key that signed it.
//!
//! A renewed CA keeps its name and gets a new key, and each key signs its own list. webpki uses the
//! first list with the issuer's name, so each CA is given only the lists that its own key has
//! signed. The keys of intermediates, which clients send, aren't known in advance: their lists are
//! told apart by the authority key identifier (RFC 5280, section 5.2.1).

use std::path::Path;
use std::time::Duration;

use rustls::pki_types::{CertificateRevocationListDer, UnixTime};
use x509_cert::crl::CertificateList;
use x509_cert::der::oid::AssociatedOid;
use x509_cert::der::{AnyRef, Decode, Encode, Reader, SliceReader, Tag, Tagged};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, CrlNumber};
use x509_cert::name::Name;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::client_auth::{ExpiringInput, check_not_expired, unix_time};
use super::problem::TlsFileProblem;
use super::validity::duration_between;
use super::{TlsWarning, pem};

/// Maximum number of combinations of one key per CA, where CAs have lists of several keys. Each
/// combination may be tried for each client.
const MAX_KEY_COMBINATIONS: usize = 16;

/// A parsed revocation list.
#[derive(Debug, Clone)]
pub(super) struct RevocationList {
    /// Issue time and CRL number; the newer list compares greater.
    age: (Duration, Vec<u8>),
    pub(super) issuer: Name,
    /// Authority key identifier.
    key_id: Option<Vec<u8>>,
    pub(super) end: UnixTime,
    /// Number of certificates in the list.
    pub(super) revoked: usize,
    pub(super) encoded: CertificateRevocationListDer<'static>,
}

/// Reads all revocation lists of a file; a single invalid one fails the whole file.
pub(super) fn read(
    path: &Path,
    now: UnixTime,
    warnings: &mut Vec<TlsWarning>,
) -> Result<Vec<RevocationList>, TlsFileProblem> {
    let mut lists = Vec::new();
    for list in pem::revocation_lists(path)? {
        let broken = |error: String| TlsFileProblem::BrokenRevocationList(error);
        if is_version_1(&list).unwrap_or(false) {
            return Err(TlsFileProblem::RevocationListV1);
        }
        webpki::BorrowedCertRevocationList::from_der(&list)
            .map_err(|error| broken(error.to_string()))?;
        let parsed = CertificateList::from_der(&list).map_err(|error| broken(error.to_string()))?;
        let Some(end) = parsed.tbs_cert_list.next_update else {
            return Err(broken("next update is missing".to_owned()));
        };
        let end = unix_time(end.to_unix_duration());
        check_not_expired(end, now, ExpiringInput::RevocationList, path, warnings)
            .map_err(|_| TlsFileProblem::ExpiredRevocationList(duration_between(end, now)))?;
        let number = number(&parsed).map_err(|error| broken(error.to_string()))?;
        let key_id = key_id(&parsed).map_err(|error| broken(error.to_string()))?;
        let age = (parsed.tbs_cert_list.this_update.to_unix_duration(), number);
        let revoked = parsed.tbs_cert_list.revoked_certificates.map_or(0, |entries| entries.len());
        let issuer = parsed.tbs_cert_list.issuer;
        lists.push(RevocationList { age, issuer, key_id, end, revoked, encoded: list });
    }
    Ok(lists)
}

/// Sorts the newest list first: of several lists with one key, only the first is used.
pub(super) fn sort(lists: &mut [RevocationList]) {
    lists.sort_by(|one, other| other.age.cmp(&one.age));
}

impl RevocationList {
    /// Returns true if the given key has signed the list.
    pub(super) fn is_signed_by(&self, key: &SubjectPublicKeyInfoOwned) -> bool {
        self.verify(key).unwrap_or(false)
    }

    fn verify(&self, key: &SubjectPublicKeyInfoOwned) -> Result<bool, x509_cert::der::Error> {
        let parsed = CertificateList::from_der(&self.encoded)?;
        // The signature covers the original bytes; encoding the list again might yield others.
        let whole = AnyRef::from_der(&self.encoded)?;
        let message = SliceReader::new(whole.value())?.tlv_bytes()?;
        let (signature, public_key) =
            (parsed.signature.raw_bytes(), key.subject_public_key.raw_bytes());
        let signature_algorithm = parsed.signature_algorithm.to_der()?;
        let key_algorithm = key.algorithm.to_der()?;
        let signature_algorithm = AnyRef::from_der(&signature_algorithm)?.value();
        let key_algorithm = AnyRef::from_der(&key_algorithm)?.value();
        Ok(webpki::ALL_VERIFICATION_ALGS
            .iter()
            .filter(|it| {
                it.signature_alg_id().as_ref() == signature_algorithm
                    && it.public_key_alg_id().as_ref() == key_algorithm
            })
            .any(|it| it.verify_signature(public_key, message, signature).is_ok()))
    }
}

/// Splits the lists by issuer, and by key where the lists of an issuer name several keys. Returns
/// all combinations of one key per issuer; there is at least one.
pub(super) fn key_combinations(
    lists: &[RevocationList],
) -> Result<Vec<Vec<RevocationList>>, TlsFileProblem> {
    let mut issuers: Vec<&Name> = Vec::new();
    for list in lists {
        if !issuers.contains(&&list.issuer) {
            issuers.push(&list.issuer);
        }
    }
    let mut choices: Vec<Vec<RevocationList>> = vec![Vec::new()];
    for issuer in issuers {
        let of_issuer: Vec<_> = lists.iter().filter(|list| list.issuer == *issuer).collect();
        let groups = group_by_key(&of_issuer);
        if choices.len() * groups.len() > MAX_KEY_COMBINATIONS {
            return Err(TlsFileProblem::TooManyRevocationKeys(issuer.to_string()));
        }
        let with = |group: &Vec<&RevocationList>, choice: &Vec<RevocationList>| {
            choice.iter().chain(group.iter().copied()).cloned().collect()
        };
        choices = groups
            .iter()
            .flat_map(|group| choices.iter().map(move |choice| with(group, choice)))
            .collect();
    }
    Ok(choices)
}

/// Splits the lists of one issuer by key. A list that doesn't name its key may belong to any of
/// them, so the lists can't be told apart then.
fn group_by_key<'a>(lists: &[&'a RevocationList]) -> Vec<Vec<&'a RevocationList>> {
    let mut groups: Vec<Vec<&RevocationList>> = Vec::new();
    for list in lists {
        if list.key_id.is_none() {
            return vec![lists.to_vec()];
        }
        let is_of = |group: &&mut Vec<&RevocationList>| {
            group.first().is_some_and(|other| other.key_id == list.key_id)
        };
        match groups.iter_mut().find(is_of) {
            Some(group) => group.push(list),
            None => groups.push(vec![list]),
        }
    }
    groups
}

/// Returns the earliest expiry of a list in use: the newest list of each key, which is the first
/// here.
pub(super) fn earliest_end(lists: &[RevocationList]) -> Option<UnixTime> {
    let mut asked: Vec<&RevocationList> = Vec::new();
    for list in lists {
        let is_same =
            |other: &&RevocationList| other.issuer == list.issuer && other.key_id == list.key_id;
        if !asked.iter().any(is_same) {
            asked.push(list);
        }
    }
    asked.iter().map(|list| list.end).min()
}

/// Returns true if a list begins with its signature algorithm, as in version 1, rather than with a
/// version number (RFC 5280, section 5.1.2.1).
fn is_version_1(list: &[u8]) -> Result<bool, x509_cert::der::Error> {
    let whole = AnyRef::from_der(list)?;
    let to_be_signed = AnyRef::decode(&mut SliceReader::new(whole.value())?)?;
    let first = AnyRef::decode(&mut SliceReader::new(to_be_signed.value())?)?;
    Ok(first.tag() == Tag::Sequence)
}

/// Returns a list's CRL number, padded so that the numbers of one CA compare bytewise.
fn number(list: &CertificateList) -> Result<Vec<u8>, x509_cert::der::Error> {
    let Some(number) = extension(list, CrlNumber::OID) else { return Ok(Vec::new()) };
    // RFC 5280: "CRL issuers … MUST NOT use CRLNumber values longer than 20 octets."
    const LONGEST: usize = 20;
    let number = CrlNumber::from_der(number)?;
    let digits = number.0.as_bytes();
    let padding = LONGEST.saturating_sub(digits.len());
    Ok([&[0].repeat(padding), digits].concat())
}

fn key_id(list: &CertificateList) -> Result<Option<Vec<u8>>, x509_cert::der::Error> {
    let Some(named) = extension(list, AuthorityKeyIdentifier::OID) else { return Ok(None) };
    let named = AuthorityKeyIdentifier::from_der(named)?;
    Ok(named.key_identifier.map(|id| id.as_bytes().to_vec()))
}

fn extension(list: &CertificateList, kind: x509_cert::der::oid::ObjectIdentifier) -> Option<&[u8]> {
    let extensions = list.tbs_cert_list.crl_extensions.as_deref().unwrap_or_default();
    let extension = extensions.iter().find(|it| it.extn_id == kind)?;
    Some(extension.extn_value.as_bytes())
}
