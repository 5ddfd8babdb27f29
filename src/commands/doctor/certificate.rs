//! Examines the server's certificates: contents, trust, name and validity period. Pure.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use nbd_gateway::tls::diagnosis;
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, Error, RootCertStore};

use super::advice;
use super::report::{Outcome, Side, Step, escape_and_cut};
use crate::commands::output::{format_time, join_first};
use crate::commands::pki::certificate::CertificateInfo;

/// Remaining validity below which there is a warning.
const EXPIRY_WARNING: Duration = Duration::from_secs(14 * 24 * 3600);
/// Maximum number of names and of certificates shown. A certificate may have thousands of names.
const MAX_SHOWN: usize = 20;

/// CAs to verify the server with.
#[derive(Debug)]
pub(crate) struct TrustedCas {
    pub(crate) roots: RootCertStore,
    pub(crate) certificates: Vec<CaCertificate>,
    /// File that they were read from.
    pub(crate) path: PathBuf,
}

/// A certificate from the CA file.
#[derive(Debug)]
pub(crate) struct CaCertificate {
    /// Subject, in the form in which certificates name their issuer.
    pub(crate) subject: String,
    pub(crate) is_ca: bool,
    /// Reason why signatures by it can't be verified here; `None` if they can.
    pub(crate) fault: Option<String>,
}

/// Result of verifying a server's certificate.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CertificateCheck {
    /// Result of verifying the chain; `None` if no CAs were given.
    pub(crate) trust: Option<Result<(), Error>>,
    /// True if the certificate is valid for the expected name.
    pub(crate) matches_name: bool,
}

impl CertificateCheck {
    pub(crate) fn verify(
        chain: &[CertificateDer<'_>],
        authorities: Option<&TrustedCas>,
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<Self, Error> {
        let none = || Error::InvalidCertificate(CertificateError::BadEncoding);
        let (own, others) = chain.split_first().ok_or_else(none)?;
        let own = ParsedCertificate::try_from(own)?;
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms.all;
        let trust = authorities.map(|authorities| {
            let roots = &authorities.roots;
            verify_server_cert_signed_by_trust_anchor(&own, roots, others, now, algorithms)
        });
        Ok(Self { trust, matches_name: verify_server_name(&own, name).is_ok() })
    }

    /// Returns the first reason to reject the server. Without CAs there is none.
    pub(crate) fn result(&self) -> Result<(), Error> {
        match &self.trust {
            None => Ok(()),
            Some(Err(error)) => Err(error.clone()),
            Some(Ok(())) if !self.matches_name => {
                Err(Error::InvalidCertificate(CertificateError::NotValidForName))
            }
            Some(Ok(())) => Ok(()),
        }
    }
}

/// Builds the step that reports on the certificate chain of a server expected to be `name`.
pub(crate) fn step(
    chain: &[CertificateDer<'static>],
    authorities: Option<&TrustedCas>,
    name: &ServerName<'_>,
    now: SystemTime,
) -> Step {
    let unix =
        UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
    let Some(own) = chain.first() else { return unreadable("the server sent none") };
    if let Some(fault) = diagnosis::certificate_fault(own, false) {
        return advice::unsupported(&fault);
    }
    let judgement = match CertificateCheck::verify(chain, authorities, name, unix) {
        Ok(judgement) => judgement,
        Err(error) => return unreadable(&error.to_string()),
    };
    let own = match CertificateInfo::from_der(own.clone()) {
        Ok(own) => own,
        Err(error) => return unreadable(&error.to_string()),
    };
    let names: Vec<String> =
        own.names.iter().map(|name| escape_and_cut(&name.to_string())).collect();
    let called = name.to_str().into_owned();
    let issuer = escape_and_cut(&own.issuer.to_string());
    let (from, to) = (format_time(own.not_before), format_time(own.not_after));
    let step = match &judgement.trust {
        None => advice::unverified(judgement.matches_name, &called),
        Some(Ok(())) if judgement.matches_name => {
            Step::good("certificate", format!("trusted, and valid for the name {called}"))
        }
        Some(Ok(())) => advice::wrong_name(&called, &names),
        Some(Err(error)) => {
            let issuer = own.issuer.to_string();
            // An unsupported intermediate explains more than the verifier's error does.
            let between =
                chain.iter().skip(1).find_map(|it| diagnosis::certificate_fault(it, true));
            let step = match (between, authorities) {
                (Some(fault), _) => advice::unsupported(&fault),
                (None, Some(authorities)) => advice::untrusted(error, &issuer, authorities),
                (None, None) => unreadable("no CA was given"),
            };
            if judgement.matches_name {
                step
            } else {
                advice::also_wrong_name(step, &called, &names)
            }
        }
    };
    let step = check_validity(step, &own, now);
    let mut step = step
        .line(format!("names: {}", join_first(&names, MAX_SHOWN)))
        .line(format!("issuer: {issuer}"))
        .line(format!("valid from {from} to {to}"))
        .line(format!("SHA-256: {}", own.fingerprint()))
        .detail("names", names.into_iter().take(MAX_SHOWN).collect::<Vec<_>>())
        .detail("issuer", issuer)
        .detail("not_before", from)
        .detail("not_after", to)
        .detail("sha256", own.fingerprint())
        .detail("verified", judgement.trust.is_some() && judgement.result().is_ok())
        .detail("name", called)
        .detail("name_fits", judgement.matches_name)
        .detail("chain", chain.len());
    for other in chain.iter().skip(1).take(MAX_SHOWN) {
        step = step.line(match CertificateInfo::from_der(other.clone()) {
            Ok(other) => format!("intermediate: {}", escape_and_cut(&other.subject.to_string())),
            Err(_) => "intermediate: can't be parsed".to_owned(),
        });
    }
    step
}

fn unreadable(why: &str) -> Step {
    let found = format!("can't parse the server's certificate: {}", escape_and_cut(why));
    Step::bad("certificate", "malformed_certificate", found)
        .advise(Side::Server, "use a certificate that conforms to RFC 5280")
}

/// Adds what is wrong with the validity period, independently of the other findings.
fn check_validity(step: Step, own: &CertificateInfo, now: SystemTime) -> Step {
    match (own.not_after.duration_since(now), now.duration_since(own.not_before)) {
        (Err(ago), _) => advice::expired(step, ago.duration(), now),
        (_, Err(still)) => advice::not_yet_valid(step, still.duration(), now),
        (Ok(left), Ok(_)) if left < EXPIRY_WARNING => step
            .problem(Outcome::Warning, "expires_soon")
            .line(format!("expires in {}", advice::format_validity(left)))
            .advise(Side::Server, "renew the certificate before it expires"),
        _ => step,
    }
}
