//! Advice on server certificates that can't be trusted.

use std::time::{Duration, SystemTime};

use rustls::{CertificateError, Error};

use super::{Client, Server, join_first};
use crate::commands::doctor::certificate::{TrustedCas, format_time};
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};

pub(crate) fn unverified(has_name: bool, name: &str) -> Step {
    let step = Step::warning("certificate", "nothing was verified: no CA was given").advise(
        Client,
        "give the CA's certificate (--tls-ca, or --tls-dir with ca-cert.pem), or anybody may be \
         that server. libnbd 1.14 doesn't verify either where it finds no CA",
    );
    if has_name {
        return step;
    }
    step.line(format!("it isn't for the name {name}"))
        .advise(Client, format!("clients that verify will refuse it: it isn't for {name}"))
}

pub(crate) fn wrong_name(name: &str, names: &[String]) -> Step {
    let step = Step::bad("certificate", format!("trusted, but not for the name {name}"));
    if names.is_empty() {
        return step.advise(Server, format!("get a certificate that names {name}"));
    }
    step.advise(
        Client,
        format!(
            "call the server by a name that its certificate has ({}), or say which to expect \
             (--tls-hostname; libnbd: tls-hostname=, qemu: tls-hostname=, nbd-client: -H)",
            join_first(names)
        ),
    )
    .advise(
        Server,
        format!(
            "or get a certificate with {name} among its subject alternative names; the common \
             name alone doesn't count"
        ),
    )
}

/// Returns the advice that the name doesn't match either, to add to another problem.
pub(crate) fn name_mismatch_advice(name: &str, names: &[String]) -> String {
    format!("it isn't for the name {name} either; it has: {}", join_first(names))
}

/// Builds the step for a server certificate, or an intermediate one, of an unsupported kind.
pub(crate) fn unsupported(fault: &str) -> Step {
    Step::bad("certificate", "it is of a kind that clients like this one refuse")
        .advise(Server, fault)
}

/// Builds the step for a certificate that doesn't verify against the given CAs.
pub(crate) fn untrusted(error: &Error, issuer: &str, authorities: &TrustedCas) -> Step {
    const NAME: &str = "certificate";
    let Error::InvalidCertificate(error) = error else {
        return Step::bad(
            NAME,
            format!("it can't be judged: {}", escape_and_cut(&error.to_string())),
        );
    };
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
            let step = Step::bad(NAME, "it is by none of the CAs that were given");
            if authorities.certificates.iter().any(|it| it.subject == issuer) {
                return step.advise(
                    Client,
                    "a CA of that name was given, with another key: get the CA's present \
                     certificate from who runs the server",
                );
            }
            step.advise(
                Client,
                format!(
                    "give the certificate of the CA that signed it: {}",
                    escape_and_cut(issuer)
                ),
            )
            .advise(
                Server,
                "or, if a CA in between signed it, append that one's certificate to the server's",
            )
        }
        // The validity period of the server's own certificate gets lines of its own, which compare
        // it with this machine's clock: see `expired` and `not_yet_valid`.
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            Step::bad(NAME, "it, or one between it and the CA, is out of its time").advise(
                Server,
                "renew whichever has run out; those of CAs in between have their time, too",
            )
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            Step::bad(NAME, "it isn't for servers")
                .advise(Server, "get one with the extended key usage serverAuth")
        }
        CertificateError::Revoked => {
            Step::bad(NAME, "it has been revoked").advise(Server, "get a new one, with a new key")
        }
        other => {
            let text = other.to_string();
            let step = Step::bad(NAME, format!("clients refuse it: {}", escape_and_cut(&text)));
            if text.contains("CaUsedAsEndEntity") {
                step.advise(
                    Server,
                    "it is a CA's own certificate, as self-signed ones often are: let the server \
                     have one that the CA has signed (hexz-nbd pki makes such)",
                )
            } else {
                step.advise(Server, "get a certificate as RFC 5280 has it")
            }
        }
    }
}

/// Returns a step if the CA file itself is the problem: it has no CA in it, or the issuer's
/// certificate in it can't be used.
fn unusable_ca_file(issuer: &str, authorities: &TrustedCas) -> Option<Step> {
    const NAME: &str = "certificate";
    let path = escape_and_cut(&authorities.path.to_string_lossy());
    if authorities.certificates.iter().all(|it| !it.is_ca) {
        let subject = authorities
            .certificates
            .first()
            .map(|it| escape_and_cut(&it.subject))
            .unwrap_or_default();
        let step = Step::bad(NAME, format!("there is no CA's certificate in {path}"));
        return Some(step.advise(
            Client,
            format!(
                "{path} holds that of {subject}, which is no CA: give the certificate of the CA \
                 that signed the server's: {}",
                escape_and_cut(issuer)
            ),
        ));
    }
    let of_issuer = authorities.certificates.iter().filter(|it| it.subject == issuer);
    let fault = of_issuer.filter_map(|it| it.fault.as_ref()).next()?;
    let found = format!("the CA that signed it can't be used: {}", escape_and_cut(issuer));
    let advice = format!("renew the CA in {path}: {fault}");
    Some(Step::bad(NAME, found).advise(Server, advice))
}

pub(crate) fn expired(step: Step, ago: Duration, now: SystemTime) -> Step {
    step.at_least(Outcome::Bad)
        .line(format!(
            "it expired {} ago; this machine's clock says {}",
            format_validity(ago),
            format_time(now)
        ))
        .detail("expired", true)
        .advise(Server, "get a new certificate, and let the server read it (hexz-nbd: SIGHUP)")
        .advise(Client, "or is this machine's clock wrong?")
}

pub(crate) fn not_yet_valid(step: Step, still: Duration, now: SystemTime) -> Step {
    step.at_least(Outcome::Bad)
        .line(format!(
            "it is valid only in {}; this machine's clock says {}",
            format_validity(still),
            format_time(now)
        ))
        .detail("not_yet_valid", true)
        .advise(Client, "is this machine's clock right? It may be behind")
        .advise(Server, "or that of the machine that made the certificate was ahead")
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
