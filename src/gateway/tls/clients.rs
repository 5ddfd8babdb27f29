//! By what clients are known: the CAs that vouch for them, and the lists of those for whom
//! they don't any more.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use x509_cert::Certificate;
use x509_cert::crl::CertificateList;
use x509_cert::der::Decode;
use x509_cert::der::oid::AssociatedOid;
use x509_cert::ext::pkix::CrlNumber;
use x509_cert::name::Name;

use super::failure::HandshakeFailure;
use super::problem::{TlsError, TlsProblem};
use super::roots::{Root, Roots};
use super::validity::{SOON, between};
use super::{Warning, pem};

/// CAs that don't run out within this time are looked after together: nobody goes on for
/// longer without a reload, which leaves out those that have.
const LONG: Duration = Duration::from_secs(366 * 24 * 3600);

/// Whether clients have to have a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientAuth {
    /// They have to.
    #[default]
    Required,
    /// They needn't; one that they show has to be good all the same.
    Optional,
}

/// Where that is by which clients are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// PEM: the CAs that vouch for clients.
    pub authorities: PathBuf,
    /// PEM: revocation lists of these CAs, and of those between them and the clients. If
    /// there are any, each CA on the way has to have one that hasn't run out.
    pub revocation_lists: Vec<PathBuf>,
    /// Whether clients have to have a certificate.
    pub auth: ClientAuth,
}

impl ClientFiles {
    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.authorities).chain(&self.revocation_lists)
    }
}

/// Judges clients by their certificates.
#[derive(Clone)]
pub(super) struct ClientTrust {
    roots: Arc<Roots>,
    auth: ClientAuth,
    earliest_end: UnixTime,
    earliest_list_end: Option<UnixTime>,
}

impl fmt::Debug for ClientTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTrust").field("auth", &self.auth).finish_non_exhaustive()
    }
}

impl ClientTrust {
    pub(super) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.roots) as Arc<dyn ClientCertVerifier>
    }

    /// When the first CA runs out.
    pub(super) fn first_end(&self) -> UnixTime {
        self.roots.first_end()
    }

    /// The same to the day: CAs that last are looked after together above.
    pub(super) fn earliest_end(&self) -> UnixTime {
        self.earliest_end
    }

    /// When the first list runs out, if there are any.
    pub(super) fn earliest_list_end(&self) -> Option<UnixTime> {
        self.earliest_list_end
    }

    pub(super) fn requires_certificates(&self) -> bool {
        self.auth == ClientAuth::Required
    }

    /// Verifies a chain as a handshake at that time would.
    pub(super) fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), HandshakeFailure> {
        let verified = match chain.split_first() {
            None => Err(rustls::Error::NoCertificatesPresented),
            Some((own, others)) => self.roots.verify_client_cert(own, others, now).map(|_| ()),
        };
        verified.map_err(|error| HandshakeFailure::of_rustls(&error))
    }
}

/// Reads CAs and lists.
pub(super) fn load(
    files: &ClientFiles,
    now: UnixTime,
) -> Result<(ClientTrust, Vec<Warning>), TlsError> {
    let mut warnings = Vec::new();
    let of = |path: &Path| {
        let path = path.to_owned();
        move |problem| TlsError { path, problem }
    };
    let (earliest_end, authorities) =
        authorities(&files.authorities, now, &mut warnings).map_err(of(&files.authorities))?;
    let mut lists = Vec::new();
    for path in &files.revocation_lists {
        lists.extend(revocation_lists(path, now, &mut warnings).map_err(of(path))?);
    }
    // Of several lists of one CA only the first is asked, so that has to be the newest.
    lists.sort_by(|one, other| other.age.cmp(&one.age));
    let earliest_list_end = earliest_list_end(&lists);
    let lists: Vec<_> = lists.into_iter().map(|list| list.encoded).collect();
    let has_lists = !lists.is_empty();

    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = Vec::with_capacity(authorities.len());
    for (end, store) in authorities {
        let provider = Arc::clone(&provider);
        let mut builder = WebPkiClientVerifier::builder_with_provider(store.into(), provider)
            .with_crls(lists.clone())
            // A list that ran out says nothing of those who were revoked since.
            .enforce_revocation_expiration();
        if files.auth == ClientAuth::Optional {
            builder = builder.allow_unauthenticated();
        }
        let verifier = builder.build().map_err(|error| {
            // It looks at the lists only now; which of them it was it doesn't say.
            let path = match files.revocation_lists.as_slice() {
                [only] if has_lists => only,
                _ => &files.authorities,
            };
            of(path)(TlsProblem::BrokenRevocationList(error.to_string()))
        })?;
        roots.push(Root { end, verifier });
    }
    let none = || of(&files.authorities)(TlsProblem::NoUsableCa("there is none".to_owned()));
    let roots = Arc::new(Roots::new(roots).ok_or_else(none)?);
    Ok((ClientTrust { roots, auth: files.auth, earliest_end, earliest_list_end }, warnings))
}

/// When the first of those lists runs out that are asked: of each CA the newest, which is the
/// first here.
fn earliest_list_end(lists: &[RevocationList]) -> Option<UnixTime> {
    let mut asked: Vec<&RevocationList> = Vec::new();
    for list in lists {
        if !asked.iter().any(|other| other.issuer == list.issuer) {
            asked.push(list);
        }
    }
    asked.iter().map(|list| list.end).min()
}

/// The CAs of a file, and when they run out; before that, when the first of them does. Those that have run out are left out: certificates that they signed
/// have run out as well, whatever they say themselves.
fn authorities(
    path: &Path,
    now: UnixTime,
    warnings: &mut Vec<Warning>,
) -> Result<(UnixTime, Vec<(UnixTime, RootCertStore)>), TlsProblem> {
    let mut earliest: Option<UnixTime> = None;
    let mut alone = Vec::new();
    let mut together: Option<(UnixTime, RootCertStore)> = None;
    let mut last_reason = String::new();
    for certificate in pem::certificates(path)? {
        let mut add = |store: &mut RootCertStore| {
            let end = expiry_of_certificate(&certificate)?;
            in_time(end, now, "the CA's certificate", path, warnings)?;
            store.add(certificate.clone()).map_err(|error| error.to_string())?;
            earliest = Some(earliest.map_or(end, |other| other.min(end)));
            Ok::<_, String>(end)
        };
        let mut store = RootCertStore::empty();
        match add(&mut store) {
            Ok(end) if end.as_secs() < now.as_secs().saturating_add(LONG.as_secs()) => {
                alone.push((end, store));
            }
            Ok(end) => {
                let (latest, all) = together.get_or_insert((end, RootCertStore::empty()));
                *latest = end.max(*latest);
                all.roots.append(&mut store.roots);
            }
            Err(reason) => {
                warnings.push(format!("{}: a CA is left out: {reason}", path.display()));
                last_reason = reason;
            }
        }
    }
    alone.extend(together);
    match earliest {
        Some(earliest) if !alone.is_empty() => Ok((earliest, alone)),
        _ => Err(TlsProblem::NoUsableCa(last_reason)),
    }
}

/// A revocation list that can be read.
struct RevocationList {
    /// When it was issued, and its number among those of its CA: the newer, the greater.
    age: (Duration, Vec<u8>),
    issuer: Name,
    end: UnixTime,
    encoded: CertificateRevocationListDer<'static>,
}

/// The revocation lists of a file, all of which have to be good.
fn revocation_lists(
    path: &Path,
    now: UnixTime,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<RevocationList>, TlsProblem> {
    let mut lists = Vec::new();
    for list in pem::revocation_lists(path)? {
        let broken = |error: String| TlsProblem::BrokenRevocationList(error);
        webpki::BorrowedCertRevocationList::from_der(&list)
            .map_err(|error| broken(error.to_string()))?;
        let parsed = CertificateList::from_der(&list).map_err(|error| broken(error.to_string()))?;
        let Some(end) = parsed.tbs_cert_list.next_update else {
            return Err(broken("it doesn't say when it runs out".to_owned()));
        };
        let end = unix_time(end.to_unix_duration());
        in_time(end, now, "the revocation list", path, warnings)
            .map_err(|_| TlsProblem::ExpiredRevocationList(between(end, now)))?;
        let number = number(&parsed).map_err(|error| broken(error.to_string()))?;
        let age = (parsed.tbs_cert_list.this_update.to_unix_duration(), number);
        let issuer = parsed.tbs_cert_list.issuer.clone();
        lists.push(RevocationList { age, issuer, end, encoded: list });
    }
    Ok(lists)
}

/// A list's number, so that those of one CA can be compared.
fn number(list: &CertificateList) -> Result<Vec<u8>, x509_cert::der::Error> {
    let extensions = list.tbs_cert_list.crl_extensions.as_deref().unwrap_or_default();
    let Some(number) = extensions.iter().find(|it| it.extn_id == CrlNumber::OID) else {
        return Ok(Vec::new());
    };
    // RFC 5280: "CRL issuers … MUST NOT use CRLNumber values longer than 20 octets."
    const LONGEST: usize = 20;
    let number = CrlNumber::from_der(number.extn_value.as_bytes())?;
    let digits = number.0.as_bytes();
    let padding = LONGEST.saturating_sub(digits.len());
    Ok([&[0].repeat(padding), digits].concat())
}

/// Checks that something hasn't run out, and warns if it soon will.
fn in_time(
    end: UnixTime,
    now: UnixTime,
    what: &str,
    path: &Path,
    warnings: &mut Vec<Warning>,
) -> Result<(), String> {
    if end < now {
        return Err(format!("{what} ran out {} ago", between(end, now)));
    }
    if end.as_secs() < now.as_secs().saturating_add(SOON.as_secs()) {
        warnings.push(format!("{}: {what} runs out in {}", path.display(), between(now, end)));
    }
    Ok(())
}

/// When a certificate runs out, if it can be read at all.
pub(super) fn end_of_certificate(certificate: &CertificateDer<'_>) -> Option<UnixTime> {
    expiry_of_certificate(certificate).ok()
}

fn expiry_of_certificate(certificate: &CertificateDer<'_>) -> Result<UnixTime, String> {
    let parsed = Certificate::from_der(certificate).map_err(|error| error.to_string())?;
    Ok(unix_time(parsed.tbs_certificate.validity.not_after.to_unix_duration()))
}

fn unix_time(since: Duration) -> UnixTime {
    UnixTime::since_unix_epoch(since)
}
