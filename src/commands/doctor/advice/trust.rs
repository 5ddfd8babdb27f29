//! Advice on server certificates that can't be trusted.

use std::time::{Duration, SystemTime};

use rustls::{CertificateError, Error};

use super::{Client, FEW, Server};
use crate::commands::doctor::certificate::TrustedCas;
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};
use crate::commands::output::{format_time, join_first};

/// Name of the steps.
const NAME: &str = "certificate";

pub(crate) fn unverified(has_name: bool, name: &str) -> Step {
    let step = Step::warning(NAME, "not_verified", "not verified, because no CA was given").advise(
        Client,
        "give the CA's certificate (--tls-ca, or --tls-dir with ca-cert.pem); otherwise anyone can \
         impersonate this server. libnbd 1.14 doesn't verify it either if it finds no CA",
    );
    if has_name {
        return step;
    }
    step.problem(Outcome::Warning, "wrong_name")
        .line(format!("not valid for the name {name}"))
        .advise(Client, format!("clients that verify it will reject it: it isn't valid for {name}"))
}

pub(crate) fn wrong_name(name: &str, names: &[String]) -> Step {
    let step = Step::bad(NAME, "wrong_name", format!("trusted, but not valid for the name {name}"));
    if names.is_empty() {
        return step.advise(Server, format!("get a certificate for the name {name}"));
    }
    step.advise(
        Client,
        format!(
            "connect to a name that the certificate has ({}), or give the name to expect \
             (--tls-hostname; libnbd and qemu: tls-hostname=, nbd-client: -H)",
            join_first(names, FEW)
        ),
    )
    .advise(
        Server,
        format!(
            "or get a certificate with {name} among its subject alternative names; clients ignore \
             the common name"
        ),
    )
}

/// Adds that the name doesn't match either to a step with another problem.
pub(crate) fn also_wrong_name(step: Step, name: &str, names: &[String]) -> Step {
    let names = join_first(names, FEW);
    step.problem(Outcome::Bad, "wrong_name")
        .advise(Client, format!("it isn't valid for the name {name} either, only for: {names}"))
}

/// Builds the step for a server certificate, or an intermediate one, of an unsupported kind.
pub(crate) fn unsupported(fault: &str) -> Step {
    Step::bad(NAME, "unsupported_certificate", "of a kind that clients reject")
        .advise(Server, fault)
}

/// Builds the step for a certificate that doesn't verify against the given CAs.
pub(crate) fn untrusted(error: &Error, issuer: &str, authorities: &TrustedCas) -> Step {
    let rejected = |reason: &str| {
        let found = format!("rejected: {}", escape_and_cut(reason));
        Step::bad(NAME, "certificate_rejected", found)
    };
    let Error::InvalidCertificate(error) = error else { return rejected(&error.to_string()) };
    let is_unknown = matches!(
        error,
        CertificateError::UnknownIssuer
            | CertificateError::BadSignature
            | CertificateError::UnsupportedSignatureAlgorithmContext { .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
    );
    if is_unknown && let Some(step) = unusable_ca_file(issuer, authorities) {
        return step;
    }
    match error {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            let step = |reason| Step::bad(NAME, reason, "not signed by any of the given CAs");
            if authorities.certificates.iter().any(|it| it.subject == issuer) {
                return step("ca_key_differs").advise(
                    Client,
                    "the given CA has the same name but another key: get the CA's current \
                     certificate from the server's operator",
                );
            }
            step("unknown_ca")
                .advise(
                    Client,
                    format!(
                        "give the certificate of the CA that signed it: {}",
                        escape_and_cut(issuer)
                    ),
                )
                .advise(
                    Server,
                    "or, if an intermediate CA signed it, append that CA's certificate to the \
                     server's",
                )
        }
        // The validity period of the server's own certificate gets lines of its own, which compare
        // it with this machine's clock: see `expired` and `not_yet_valid`.
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => Step::bad(
            NAME,
            "outside_validity",
            "a certificate of the chain has expired or isn't valid yet",
        )
        .advise(Server, "renew it; certificates of intermediate CAs expire, too"),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            Step::bad(NAME, "not_for_servers", "not for servers")
                .advise(Server, "get one with the extended key usage serverAuth")
        }
        CertificateError::Revoked => Step::bad(NAME, "revoked", "revoked")
            .advise(Server, "get a new certificate with a new key"),
        other => {
            let text = other.to_string();
            if text.contains("CaUsedAsEndEntity") {
                Step::bad(NAME, "ca_as_server", "the CA's own certificate").advise(
                    Server,
                    "self-signed certificates are often CA certificates, which clients reject: use \
                     a certificate that the CA has signed (hexz-nbd pki creates those)",
                )
            } else {
                rejected(&text).advise(Server, "get a certificate that conforms to RFC 5280")
            }
        }
    }
}

/// Returns a step if the CA file itself is the problem: it has no CA in it, or the issuer's
/// certificate in it can't be used.
fn unusable_ca_file(issuer: &str, authorities: &TrustedCas) -> Option<Step> {
    let path = escape_and_cut(&authorities.path.to_string_lossy());
    let issuer_name = escape_and_cut(issuer);
    if authorities.certificates.iter().all(|it| !it.is_ca) {
        let subject = authorities.certificates.first().map(|it| escape_and_cut(&it.subject));
        let subject = subject.unwrap_or_default();
        return Some(Step::bad(NAME, "no_ca", format!("{path} has no CA certificate")).advise(
            Client,
            format!(
                "{path} has the certificate of {subject}, which isn't a CA: give that of the CA \
                 that signed the server's: {issuer_name}"
            ),
        ));
    }
    let of_issuer = authorities.certificates.iter().filter(|it| it.subject == issuer);
    let fault = of_issuer.filter_map(|it| it.fault.as_ref()).next()?;
    let found = format!("the CA that signed it can't be used: {issuer_name}");
    let advice = format!("renew the CA in {path}: {fault}");
    Some(Step::bad(NAME, "unsupported_ca", found).advise(Server, advice))
}

pub(crate) fn expired(step: Step, ago: Duration, now: SystemTime) -> Step {
    let (ago, now) = (format_validity(ago), format_time(now));
    step.problem(Outcome::Bad, "expired")
        .line(format!("expired {ago} ago, by this machine's clock ({now})"))
        .detail("expired", true)
        .advise(Server, "get a new certificate, and make the server read it (hexz-nbd: SIGHUP)")
        .advise(Client, "or correct this machine's clock, if it is wrong")
}

pub(crate) fn not_yet_valid(step: Step, still: Duration, now: SystemTime) -> Step {
    let (still, now) = (format_validity(still), format_time(now));
    step.problem(Outcome::Bad, "not_yet_valid")
        .line(format!("becomes valid in {still}, by this machine's clock ({now})"))
        .detail("not_yet_valid", true)
        .advise(Client, "correct this machine's clock, if it is slow")
        .advise(Server, "or the clock of the machine that issued the certificate was fast")
}

/// Formats a duration in days, or, below two days, in hours or minutes.
pub(crate) fn format_validity(time: Duration) -> String {
    const DAY: u64 = 24 * 3600;
    match time.as_secs() {
        seconds if seconds >= 2 * DAY => format!("{} days", seconds / DAY),
        seconds if seconds >= 2 * 3600 => format!("{} hours", seconds / 3600),
        seconds => format!("{} minutes", seconds / 60),
    }
}
