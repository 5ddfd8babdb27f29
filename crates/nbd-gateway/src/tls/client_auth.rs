//! Authenticates TLS clients: the CAs that vouch for their certificates, and the revocation lists
//! of these CAs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::name::Name;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::contents::{ContentsDigest, digest_all};
use super::diagnosis;
use super::failure::HandshakeFailure;
use super::problem::{TlsFileError, TlsFileProblem};
use super::revocation_lists::{self, RevocationList};
use super::roots::{RootVerifier, RootVerifiers};
use super::validity::{EXPIRY_WARNING_PERIOD, duration_between};
use super::{TlsWarning, pem};

/// Remaining validity from which CAs share one verifier and their expiry isn't tracked one by one.
/// No process is expected to run for longer without a reload, which leaves out expired CAs.
const LONG_LIVED: Duration = Duration::from_secs(366 * 24 * 3600);

/// Policy for client certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientAuth {
    /// Clients must have a certificate.
    #[default]
    Required,
    /// Clients may connect without a certificate; one that they present must be valid all the same.
    Optional,
}

/// Files that client authentication is based on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientAuthFiles {
    /// PEM file with the CAs that vouch for clients.
    pub authorities: PathBuf,
    /// PEM files with revocation lists of these CAs, and of intermediates between them and the
    /// clients. If there are any, each CA in a client's chain must have a list that hasn't expired.
    pub revocation_lists: Vec<PathBuf>,
    /// Policy for client certificates.
    pub auth: ClientAuth,
}

impl ClientAuthFiles {
    pub(super) fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.authorities).chain(&self.revocation_lists)
    }
}

/// Verifies clients by their certificates.
#[derive(Clone)]
pub(super) struct ClientVerifier {
    roots: Arc<RootVerifiers>,
    auth: ClientAuth,
    earliest_ca_expiry: UnixTime,
    earliest_crl_expiry: Option<UnixTime>,
    pub(super) contents: ClientAuthContents,
}

/// Contents of the files, to tell what a reload has changed.
#[derive(Debug, Clone, Default)]
pub(super) struct ClientAuthContents {
    pub(super) authorities: ContentsDigest,
    pub(super) revocation_lists: ContentsDigest,
    /// Number of revoked certificates in all lists.
    pub(super) revoked: usize,
}

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTrust").field("auth", &self.auth).finish_non_exhaustive()
    }
}

impl ClientVerifier {
    pub(super) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.roots) as Arc<dyn ClientCertVerifier>
    }

    /// Returns the earliest expiry of a verifier. One that several long-lived CAs share expires
    /// with the last of them.
    pub(super) fn earliest_verifier_expiry(&self) -> UnixTime {
        self.roots.earliest_verifier_expiry()
    }

    /// Returns the earliest expiry of a single CA, including those that share a verifier.
    pub(super) fn earliest_ca_expiry(&self) -> UnixTime {
        self.earliest_ca_expiry
    }

    /// Returns the earliest expiry of a revocation list, if there are any.
    pub(super) fn earliest_crl_expiry(&self) -> Option<UnixTime> {
        self.earliest_crl_expiry
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
        verified.map_err(|error| HandshakeFailure::from_rustls(&error))
    }
}

/// Reads the CAs and revocation lists.
pub(super) fn load(
    files: &ClientAuthFiles,
    now: UnixTime,
) -> Result<(ClientVerifier, Vec<TlsWarning>), TlsFileError> {
    let mut warnings = Vec::new();
    let of = |path: &Path| {
        let path = path.to_owned();
        move |problem| TlsFileError { path, problem }
    };
    let authorities =
        ClientCas::read(&files.authorities, now, &mut warnings).map_err(of(&files.authorities))?;
    let mut lists = Vec::new();
    for path in &files.revocation_lists {
        for list in revocation_lists::read(path, now, &mut warnings).map_err(of(path))? {
            if authorities.check_signer(&list, path, &mut warnings).map_err(of(path))? {
                lists.push(list);
            }
        }
    }
    revocation_lists::sort(&mut lists);
    // Lists were configured, so each CA needs one even if all of them were left out.
    let needs_lists = !files.revocation_lists.is_empty();
    // The verifier's builder parses the lists late, and doesn't say which of them is broken.
    let blamed = match files.revocation_lists.as_slice() {
        [only] => only,
        _ => &files.authorities,
    };
    let mut roots = Vec::new();
    for (authorities, lists) in group_by_verifier(&authorities, &lists, now) {
        let end = authorities.iter().map(|it| it.end).max().unwrap_or(now);
        let root = build_root(&authorities, end, &lists, needs_lists, files.auth);
        roots.push(root.map_err(of(blamed))?);
    }
    let none =
        || of(&files.authorities)(TlsFileProblem::NoUsableCa("there is no certificate".to_owned()));
    let earliest_ca_expiry = authorities.valid.iter().map(|it| it.end).min().ok_or_else(none)?;
    let earliest_crl_expiry = revocation_lists::earliest_end(&lists);
    let roots = Arc::new(RootVerifiers::new(roots).ok_or_else(none)?);
    let all = authorities.valid.iter().chain(&authorities.expired);
    let contents = ClientAuthContents {
        authorities: digest_all(all.map(|it| &*it.certificate)),
        revocation_lists: digest_all(lists.iter().map(|list| &*list.encoded)),
        revoked: lists.iter().map(|list| list.revoked).sum(),
    };
    let auth = files.auth;
    let verifier =
        ClientVerifier { roots, auth, earliest_ca_expiry, earliest_crl_expiry, contents };
    Ok((verifier, warnings))
}

/// CAs that share a verifier, and the revocation lists that apply to them.
type VerifierGroup<'a> = (Vec<&'a ClientCa>, Vec<RevocationList>);

/// Groups CAs by verifier: long-lived CAs with unique names share one.
fn group_by_verifier<'a>(
    authorities: &'a ClientCas,
    lists: &[RevocationList],
    now: UnixTime,
) -> Vec<VerifierGroup<'a>> {
    let all = &authorities.valid;
    let shares_name =
        |one: &ClientCa| all.iter().filter(|other| other.subject == one.subject).count() > 1;
    let (grouped, alone): (Vec<_>, Vec<_>) =
        all.iter().partition(|it| it.is_long_lived(now) && !shares_name(it));
    let mut groups: Vec<VerifierGroup<'_>> =
        alone.into_iter().map(|it| (vec![it], authorities.lists_for(it, lists))).collect();
    if let Some(first) = grouped.first() {
        // Names are unique within the group, and each list under such a name is signed by that CA,
        // so the same lists apply to all of them.
        let lists = authorities.lists_for(first, lists);
        groups.push((grouped, lists));
    }
    groups
}

/// Builds verifiers that trust the given CAs, one for each choice of lists.
fn build_root(
    authorities: &[&ClientCa],
    end: UnixTime,
    lists: &[RevocationList],
    needs_lists: bool,
    auth: ClientAuth,
) -> Result<RootVerifier, TlsFileProblem> {
    let mut store = RootCertStore::empty();
    for authority in authorities {
        store.add(authority.certificate.clone()).map_err(TlsFileProblem::Unusable)?;
    }
    let store = Arc::new(store);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifiers = revocation_lists::key_combinations(lists)?.into_iter().map(|lists| {
        let lists = lists.into_iter().map(|list| list.encoded);
        let mut builder =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&store), Arc::clone(&provider))
                .with_crls(lists)
                // An expired list doesn't cover later revocations.
                .enforce_revocation_expiration();
        if auth == ClientAuth::Optional {
            builder = builder.allow_unauthenticated();
        }
        let built = builder.build();
        built
            .map(|verifier| verifier as Arc<dyn ClientCertVerifier>)
            .map_err(|error| TlsFileProblem::BrokenRevocationList(error.to_string()))
    });
    let mut verifiers = verifiers.collect::<Result<Vec<_>, _>>()?;
    let none = || TlsFileProblem::NoUsableCa("there is no certificate".to_owned());
    let verifier = verifiers.pop().ok_or_else(none)?;
    // Without any list, webpki wouldn't check revocation at all.
    let lacks_lists = needs_lists && lists.is_empty();
    Ok(RootVerifier { end, verifier, alternatives: verifiers, lacks_lists })
}

/// A CA certificate from the file.
struct ClientCa {
    certificate: CertificateDer<'static>,
    subject: Name,
    key: SubjectPublicKeyInfoOwned,
    end: UnixTime,
}

/// The CA certificates of a file, by validity.
struct ClientCas {
    valid: Vec<ClientCa>,
    /// Expired CAs. Certificates that they signed are no longer accepted, whatever their own
    /// validity.
    expired: Vec<ClientCa>,
}

impl ClientCas {
    fn read(
        path: &Path,
        now: UnixTime,
        warnings: &mut Vec<TlsWarning>,
    ) -> Result<Self, TlsFileProblem> {
        let (mut usable, mut expired) = (Vec::new(), Vec::new());
        let mut last_reason = String::new();
        for certificate in pem::certificates(path)? {
            let reason = match ClientCa::parse(certificate) {
                Ok(authority) => {
                    match check_not_expired(authority.end, now, ExpiringInput::Ca, path, warnings) {
                        Ok(()) => {
                            warnings.extend(authority.unusable_warning(path));
                            usable.push(authority);
                            continue;
                        }
                        Err(reason) => {
                            expired.push(authority);
                            reason
                        }
                    }
                }
                Err(reason) => reason,
            };
            let text = format!("a CA is ignored: {reason}");
            warnings.push(TlsWarning::of(path, "client_ca_left_out", text));
            last_reason = reason;
        }
        if usable.is_empty() {
            return Err(TlsFileProblem::NoUsableCa(last_reason));
        }
        Ok(Self { valid: usable, expired })
    }

    /// Returns the revocation lists that apply to a CA: those that its own key has signed, and
    /// those of other issuers, which may be intermediates between the CA and its clients. Lists of
    /// an issuer whose name several other CAs of the file share are left out: they can't be of use
    /// there.
    fn lists_for(&self, authority: &ClientCa, lists: &[RevocationList]) -> Vec<RevocationList> {
        let concerns = |list: &&RevocationList| {
            if list.issuer == authority.subject {
                return list.is_signed_by(&authority.key);
            }
            self.valid.iter().filter(|other| other.subject == list.issuer).count() < 2
        };
        lists.iter().filter(concerns).cloned().collect()
    }

    /// Checks that a list in the name of a CA of the file is signed by that CA's key, or by the key
    /// of another CA of the same name. Returns false for lists of expired CAs, which are to be left
    /// out.
    fn check_signer(
        &self,
        list: &RevocationList,
        path: &Path,
        warnings: &mut Vec<TlsWarning>,
    ) -> Result<bool, TlsFileProblem> {
        let has_signed = |it: &ClientCa| it.subject == list.issuer && list.is_signed_by(&it.key);
        if self.valid.iter().all(|it| it.subject != list.issuer)
            || self.valid.iter().any(has_signed)
        {
            return Ok(true);
        }
        if self.expired.iter().any(has_signed) {
            let text = "a revocation list is ignored: the certificate of its CA has expired";
            warnings.push(TlsWarning::of(path, "client_crl_left_out", text));
            return Ok(false);
        }
        Err(TlsFileProblem::RevocationListNotSigned(list.issuer.to_string()))
    }
}

impl ClientCa {
    fn parse(certificate: CertificateDer<'static>) -> Result<Self, String> {
        let parsed = Certificate::from_der(&certificate).map_err(|error| error.to_string())?;
        let parsed = parsed.tbs_certificate;
        webpki::anchor_from_trusted_cert(&certificate).map_err(|error| error.to_string())?;
        let end = unix_time(parsed.validity.not_after.to_unix_duration());
        let (subject, key) = (parsed.subject, parsed.subject_public_key_info);
        Ok(Self { certificate, subject, key, end })
    }

    /// Returns a warning if the CA can't vouch for any client, although TLS accepts it.
    fn unusable_warning(&self, path: &Path) -> Option<TlsWarning> {
        let (certificate, subject) = (&self.certificate, &self.subject);
        if !diagnosis::is_authority(certificate) {
            let text = format!(
                "{subject} is not a CA (basicConstraints CA:TRUE) and authenticates no client, except \
                 itself if it is self-signed: use the certificate of the CA that signed the clients'"
            );
            return Some(TlsWarning::of(path, "client_ca_is_none", text));
        }
        let fault = diagnosis::certificate_fault(certificate, true)?;
        let text = format!("clients of the CA {subject} will be rejected: {fault}");
        Some(TlsWarning::of(path, "client_ca_unusable", text))
    }

    /// Returns true if the CA is valid for so long that its expiry needn't be tracked.
    fn is_long_lived(&self, now: UnixTime) -> bool {
        self.end.as_secs() >= now.as_secs().saturating_add(LONG_LIVED.as_secs())
    }
}

/// Kind of input that must not have expired, or no client is accepted.
#[derive(Debug, Clone, Copy)]
pub(super) enum ExpiringInput {
    Ca,
    RevocationList,
}

/// Checks that something hasn't expired, and warns if it soon will.
pub(super) fn check_not_expired(
    end: UnixTime,
    now: UnixTime,
    what: ExpiringInput,
    path: &Path,
    warnings: &mut Vec<TlsWarning>,
) -> Result<(), String> {
    let (name, reason) = match what {
        ExpiringInput::Ca => ("the CA's certificate", "client_ca_expires"),
        ExpiringInput::RevocationList => ("the revocation list", "client_crl_expires"),
    };
    if end < now {
        return Err(format!("{name} expired {} ago", duration_between(end, now)));
    }
    if end.as_secs() < now.as_secs().saturating_add(EXPIRY_WARNING_PERIOD.as_secs()) {
        let text = format!("{name} expires in {}", duration_between(now, end));
        warnings.push(TlsWarning::of(path, reason, text));
    }
    Ok(())
}

/// Returns the expiry of a certificate; `None` if it can't be parsed.
pub(super) fn certificate_expiry(certificate: &CertificateDer<'_>) -> Option<UnixTime> {
    let parsed = Certificate::from_der(certificate).ok()?;
    Some(unix_time(parsed.tbs_certificate.validity.not_after.to_unix_duration()))
}

pub(super) fn unix_time(since: Duration) -> UnixTime {
    UnixTime::since_unix_epoch(since)
}
