//! Checks the server's own certificate as clients will, and watches its expiry.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, UnixTime};

use super::TlsWarning;
use super::problem::TlsFileProblem;

const DAY: u64 = 24 * 3600;

/// Remaining validity below which a warning is given when CAs and revocation lists are read.
pub(super) const EXPIRY_WARNING_PERIOD: Duration = Duration::from_secs(14 * DAY);

/// Remaining validity below which a client's certificate ought to have been renewed.
const CLIENT_WARNING_PERIOD: Duration = Duration::from_secs(14 * DAY);

/// Fraction of its validity below which a certificate ought to have been renewed, however
/// short-lived it is: programs that renew certificates do so when a third is left.
const CLIENT_WARNING_FRACTION: u32 = 4;

/// Days before the server's certificate expires on which a warning is due.
const WARNING_DAYS: [u64; 3] = [30, 7, 1];

/// Label of the warning about a certificate that expires soon.
const CERTIFICATE_EXPIRES: &str = "certificate_expires";

/// Watches the expiry of the server's certificate while the program runs. The first check of a
/// certificate yields nothing: warnings due at that time were given when it was read.
#[derive(Debug, Default)]
pub(crate) struct ExpiryWatch {
    watched: Option<(UnixTime, WarningStage)>,
}

/// Number of warnings due so far; the last one says that the certificate has expired.
type WarningStage = usize;

/// Warning about the expiry of the server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpiryWarning {
    /// The certificate expires in this number of seconds.
    Soon(u64),
    /// The certificate has expired.
    Expired,
}

impl ExpiryWarning {
    /// Returns the label for the log.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Soon(_) => CERTIFICATE_EXPIRES,
            Self::Expired => "certificate_expired",
        }
    }
}

impl ExpiryWatch {
    /// Checks the certificate in use, which expires at `expires`. Returns the warning that became
    /// due since the last check.
    pub(crate) fn check(
        &mut self,
        expires: Option<UnixTime>,
        now: UnixTime,
    ) -> Option<ExpiryWarning> {
        let expires = expires?;
        let left = expires.as_secs().saturating_sub(now.as_secs());
        let due = WARNING_DAYS.iter().filter(|days| left <= **days * DAY).count();
        let has_expired = now > expires;
        let stage = due + usize::from(has_expired);
        let before = self.watched.replace((expires, stage));
        let (_, before) = before.filter(|(watched, _)| *watched == expires)?;
        (stage > before).then_some(if has_expired {
            ExpiryWarning::Expired
        } else {
            ExpiryWarning::Soon(left)
        })
    }
}

/// Returns true if a client's certificate ought to have been renewed by now, given its validity as
/// a whole and the time left: in its last 14 days, or in its last quarter if that is shorter.
pub fn is_renewal_due(lifetime: Duration, left: Duration) -> bool {
    left < CLIENT_WARNING_PERIOD.min(lifetime / CLIENT_WARNING_FRACTION)
}

/// Checks a certificate as a client would, as far as that is possible without a trusted root.
pub(super) fn check_validity(
    certificate: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<Vec<TlsWarning>, TlsFileProblem> {
    const FIRST: Duration = Duration::from_secs(WARNING_DAYS[0] * DAY);
    match verify_as_client(certificate, now) {
        webpki::Error::CertExpired { not_after, .. } => {
            Err(TlsFileProblem::Expired(duration_between(not_after, now)))
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            Err(TlsFileProblem::NotYetValid(duration_between(now, not_before)))
        }
        // The best possible result without knowing the issuer.
        webpki::Error::UnknownIssuer => {
            let later = UnixTime::since_unix_epoch(
                Duration::from_secs(now.as_secs()).saturating_add(FIRST),
            );
            match verify_as_client(certificate, later) {
                webpki::Error::CertExpired { not_after, .. } => {
                    let text =
                        format!("the certificate expires in {}", duration_between(now, not_after));
                    Ok(vec![TlsWarning::new(CERTIFICATE_EXPIRES, text)])
                }
                _ => Ok(Vec::new()),
            }
        }
        webpki::Error::CaUsedAsEndEntity => Ok(vec![TlsWarning::new(
            "certificate_is_ca",
            "the certificate is a CA certificate; strict clients require a server certificate signed \
             by the CA",
        )]),
        other => Ok(vec![TlsWarning::new(
            "certificate_unusual",
            format!("clients may reject the certificate: {other}"),
        )]),
    }
}

fn verify_as_client(certificate: &CertificateDer<'_>, now: UnixTime) -> webpki::Error {
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
    // Without a trusted root, the best possible result is an unknown issuer.
    verified.err().unwrap_or(webpki::Error::UnknownIssuer)
}

pub(super) fn duration_between(earlier: UnixTime, later: UnixTime) -> humantime::FormattedDuration {
    format_seconds(later.as_secs().saturating_sub(earlier.as_secs()))
}

/// Formats a number of seconds as a duration.
pub(crate) fn format_seconds(seconds: u64) -> humantime::FormattedDuration {
    const MINUTE: u64 = 60;
    // Seconds matter only if there are no minutes.
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
    fn validity_period_is_checked() {
        let check = |days| check_validity(&certificate(days), UnixTime::now());
        assert!(check(-1..365).unwrap().is_empty());
        assert!(check(-1..31).unwrap().is_empty());
        for days in [29, 7, 1] {
            let warnings = check(-1..days).unwrap();
            assert_eq!(warnings[0].reason, "certificate_expires");
        }
        assert!(matches!(check(-9..-2), Err(TlsFileProblem::Expired(_))));
        assert!(matches!(check(2..9), Err(TlsFileProblem::NotYetValid(_))));
    }

    #[test]
    fn expiry_warnings_are_given_once_per_stage() {
        const END: u64 = 100 * DAY;
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let mut watch = ExpiryWatch::default();
        let mut look = |end, now| watch.check(Some(at(end)), at(now));
        let mut seen = Vec::new();
        for hour in 0..=101 * 24 {
            let now = hour * 3600;
            seen.extend(look(END, now).map(|warning| (now / DAY, warning)));
        }
        assert_eq!(
            seen,
            [
                (70, ExpiryWarning::Soon(30 * DAY)),
                (93, ExpiryWarning::Soon(7 * DAY)),
                (99, ExpiryWarning::Soon(DAY)),
                (100, ExpiryWarning::Expired),
            ]
        );
        assert_eq!(seen[3].1.reason(), "certificate_expired");
        // A new certificate has its own stages; those that are over were reported when it was read.
        assert_eq!(look(END + 5 * DAY, END), None);
        assert_eq!(look(END + 5 * DAY, END + 4 * DAY), Some(ExpiryWarning::Soon(DAY)));
        // After a suspend, only the current state is reported.
        assert_eq!(look(END + 60 * DAY, END), None);
        assert_eq!(look(END + 60 * DAY, END + 61 * DAY), Some(ExpiryWarning::Expired));
        assert_eq!(look(END + 60 * DAY, END + 61 * DAY), None);
    }
}
