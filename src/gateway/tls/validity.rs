//! Whether a certificate of our own is what clients will accept.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};

use super::Warning;
use super::problem::TlsProblem;

/// What runs out within this time is told so when it is read.
pub(super) const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// Checks a certificate as a client would, as far as that needs no trusted root.
pub(super) fn check_validity(
    certificate: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<Vec<Warning>, TlsProblem> {
    match judge_as_client(certificate, now) {
        webpki::Error::CertExpired { not_after, .. } => {
            Err(TlsProblem::Expired(between(not_after, now)))
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            Err(TlsProblem::NotYetValid(between(now, not_before)))
        }
        // What a client makes of it without knowing its issuer: it is as it should be.
        webpki::Error::UnknownIssuer => {
            let later =
                UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs()).saturating_add(SOON));
            match judge_as_client(certificate, later) {
                webpki::Error::CertExpired { not_after, .. } => {
                    Ok(vec![format!("the certificate expires in {}", between(now, not_after))])
                }
                _ => Ok(Vec::new()),
            }
        }
        webpki::Error::CaUsedAsEndEntity => Ok(vec![
            "the certificate is a CA's own; strict clients want a server certificate \
             that the CA has signed"
                .to_owned(),
        ]),
        other => Ok(vec![format!("clients may refuse the certificate: {other}")]),
    }
}

fn judge_as_client(certificate: &CertificateDer<'_>, now: UnixTime) -> webpki::Error {
    let verified = webpki::EndEntityCert::try_from(certificate).and_then(|certificate| {
        certificate
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &[],
                &[],
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map(|_| ())
    });
    // Without a trusted root the best verdict is that the issuer is unknown.
    verified.err().unwrap_or(webpki::Error::UnknownIssuer)
}

pub(super) fn between(earlier: UnixTime, later: UnixTime) -> humantime::FormattedDuration {
    const MINUTE: u64 = 60;
    let seconds = later.as_secs().saturating_sub(earlier.as_secs());
    // Seconds of a certificate's life matter to nobody, unless they are all there is.
    let shown = if seconds > MINUTE { seconds - seconds % MINUTE } else { seconds };
    humantime::format_duration(Duration::from_secs(shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(days: std::ops::Range<i64>) -> CertificateDer<'static> {
        let mut parameters = rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap();
        let day = |days: i64| {
            let seconds = UnixTime::now().as_secs().cast_signed() + days * 86_400;
            rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds.cast_unsigned())
        };
        parameters.not_before = day(days.start);
        parameters.not_after = day(days.end);
        let key = rcgen::KeyPair::generate().unwrap();
        parameters.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_has_its_time() {
        let check = |days| check_validity(&certificate(days), UnixTime::now());
        assert!(check(-1..365).unwrap().is_empty());
        assert!(check(-1..7).unwrap()[0].starts_with("the certificate expires in 7days"));
        assert!(matches!(check(-9..-2), Err(TlsProblem::Expired(_))));
        assert!(matches!(check(2..9), Err(TlsProblem::NotYetValid(_))));
    }
}
