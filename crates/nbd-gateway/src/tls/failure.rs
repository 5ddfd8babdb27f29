//! Explains failed handshakes: the cause, as far as this side can know, and who should fix it.

use std::fmt;
use std::io;
use std::time::Duration;

use rustls::pki_types::UnixTime;
use rustls::{AlertDescription, CertificateError, PeerIncompatible};

use super::validity::duration_between;

/// Cause of a failed handshake, as counted in metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum HandshakeFailureCause {
    /// The client has no certificate.
    NoCertificate,
    /// The client's certificate was issued by a CA that isn't trusted here.
    UnknownCa,
    /// The client's certificate has expired.
    Expired,
    /// The client's certificate isn't valid yet.
    NotYetValid,
    /// The client's certificate has been revoked.
    Revoked,
    /// No revocation list covers the client's certificate, or the list has expired.
    RevocationStatusUnknown,
    /// The client's certificate isn't intended for client authentication.
    WrongPurpose,
    /// The client's certificate is invalid for another reason.
    BadCertificate,
    /// The client offers no TLS version that this server supports.
    UnsupportedVersion,
    /// The client and this server have no cipher suite or key exchange in common.
    NoCommonAlgorithm,
    /// The client sent something other than TLS.
    NotTls,
    /// The client doesn't accept this server's certificate.
    ServerCertificateRejected,
    /// The client closed the connection before it sent any TLS message.
    ClosedBeforeHello,
    /// The client closed the connection after it had been sent this server's certificate.
    ClosedAfterCertificate,
    /// The handshake timed out.
    Timeout,
    /// Any other cause.
    Other,
}

impl HandshakeFailureCause {
    /// All causes.
    pub const ALL: [Self; 16] = [
        Self::NoCertificate,
        Self::UnknownCa,
        Self::Expired,
        Self::NotYetValid,
        Self::Revoked,
        Self::RevocationStatusUnknown,
        Self::WrongPurpose,
        Self::BadCertificate,
        Self::UnsupportedVersion,
        Self::NoCommonAlgorithm,
        Self::NotTls,
        Self::ServerCertificateRejected,
        Self::ClosedBeforeHello,
        Self::ClosedAfterCertificate,
        Self::Timeout,
        Self::Other,
    ];

    /// Returns the label used in metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::UnknownCa => "unknown_ca",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Revoked => "revoked",
            Self::RevocationStatusUnknown => "unknown_revocation",
            Self::WrongPurpose => "wrong_purpose",
            Self::BadCertificate => "bad_certificate",
            Self::UnsupportedVersion => "old_version",
            Self::NoCommonAlgorithm => "nothing_in_common",
            Self::NotTls => "not_tls",
            Self::ServerCertificateRejected => "distrust",
            Self::ClosedBeforeHello => "left_before",
            Self::ClosedAfterCertificate => "left_after",
            Self::Timeout => "deadline",
            Self::Other => "other",
        }
    }
}

/// A failed handshake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct HandshakeFailure {
    /// Cause, as counted in metrics.
    pub(crate) cause: HandshakeFailureCause,
    message: String,
}

/// Progress of a handshake when the stream failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HandshakeStage {
    /// The client hasn't sent its hello.
    Hello,
    /// The server's certificate is on its way or has arrived.
    CertificateSent,
}

impl HandshakeFailure {
    fn new(cause: HandshakeFailureCause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into() }
    }

    /// Describes a handshake that exceeded its timeout.
    pub(crate) fn timed_out() -> Self {
        Self::new(HandshakeFailureCause::Timeout, "timed out")
    }

    pub(crate) fn from_io(error: &io::Error, stage: HandshakeStage) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
        match (cause, error.kind(), stage) {
            (Some(cause), ..) => Self::from_rustls(cause),
            (None, UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe, stage) => {
                match stage {
                    HandshakeStage::Hello => Self::new(
                        HandshakeFailureCause::ClosedBeforeHello,
                        "the client closed the connection before it sent its ClientHello",
                    ),
                    HandshakeStage::CertificateSent => Self::new(
                        HandshakeFailureCause::ClosedAfterCertificate,
                        "the client closed the connection after the server's certificate was sent; \
                         it may not trust the certificate",
                    ),
                }
            }
            (None, ..) => Self::new(HandshakeFailureCause::Other, error.to_string()),
        }
    }

    pub(crate) fn from_rustls(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::NoCertificatesPresented => Self::new(
                HandshakeFailureCause::NoCertificate,
                "the client presented no certificate, and one is required",
            ),
            rustls::Error::InvalidCertificate(problem) => from_certificate_error(problem),
            rustls::Error::AlertReceived(alert) => from_alert(*alert),
            rustls::Error::InvalidMessage(_) => {
                Self::new(HandshakeFailureCause::NotTls, "the client sent data that is not TLS")
            }
            rustls::Error::PeerIncompatible(
                // The client lacks features that TLS 1.2 and newer require.
                PeerIncompatible::SignatureAlgorithmsExtensionRequired
                | PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::SupportedVersionsExtensionRequired,
            ) => Self::new(
                HandshakeFailureCause::UnsupportedVersion,
                "the client offers only TLS versions older than the minimum",
            ),
            rustls::Error::PeerIncompatible(reason) => Self::new(
                HandshakeFailureCause::NoCommonAlgorithm,
                format!("no common cipher suite or key exchange ({reason:?})"),
            ),
            other => Self::new(HandshakeFailureCause::Other, other.to_string()),
        }
    }
}

fn from_certificate_error(problem: &CertificateError) -> HandshakeFailure {
    let (cause, message) = match problem {
        CertificateError::UnknownIssuer => (
            HandshakeFailureCause::UnknownCa,
            "the client's certificate is issued by an untrusted CA".to_owned(),
        ),
        CertificateError::Expired => {
            (HandshakeFailureCause::Expired, "the client's certificate has expired".to_owned())
        }
        CertificateError::ExpiredContext { time, not_after } => (
            HandshakeFailureCause::Expired,
            format!(
                "the client's certificate expired at {}, {} ago",
                format_time(*not_after),
                duration_between(*not_after, *time)
            ),
        ),
        CertificateError::NotValidYet => (
            HandshakeFailureCause::NotYetValid,
            "the client's certificate is not valid yet".to_owned(),
        ),
        CertificateError::NotValidYetContext { not_before, .. } => (
            HandshakeFailureCause::NotYetValid,
            format!(
                "the client's certificate is not valid before {}; check both clocks",
                format_time(*not_before)
            ),
        ),
        CertificateError::Revoked => {
            (HandshakeFailureCause::Revoked, "the client's certificate has been revoked".to_owned())
        }
        CertificateError::UnknownRevocationStatus => (
            HandshakeFailureCause::RevocationStatusUnknown,
            "no revocation list is signed by the CA of the client's certificate, or by a CA above it"
                .to_owned(),
        ),
        CertificateError::ExpiredRevocationList => (
            HandshakeFailureCause::RevocationStatusUnknown,
            "the revocation list has expired".to_owned(),
        ),
        CertificateError::ExpiredRevocationListContext { next_update, .. } => (
            HandshakeFailureCause::RevocationStatusUnknown,
            format!("the revocation list expired at {}: install a new one", format_time(*next_update)),
        ),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => (
            HandshakeFailureCause::WrongPurpose,
            "the client's certificate lacks the extended key usage clientAuth"
                .to_owned(),
        ),
        CertificateError::Other(other)
            if other.0.downcast_ref() == Some(&webpki::Error::UnsupportedCertVersion) =>
        {
            (
                HandshakeFailureCause::BadCertificate,
                "the client's certificate is X.509 version 1 and has no extended key usage: issue a \
                 version 3 certificate (openssl x509 -req -extfile FILE, with \
                 extendedKeyUsage=clientAuth in that file)"
                    .to_owned(),
            )
        }
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => (
            HandshakeFailureCause::BadCertificate,
            "the client's certificate, or a CA certificate above it, is signed with an unsupported \
             key: use RSA with 2048 bits or more, P-256, P-384, P-521 or Ed25519"
                .to_owned(),
        ),
        other => (
            HandshakeFailureCause::BadCertificate,
            format!("the client's certificate is invalid: {other}"),
        ),
    };
    HandshakeFailure { cause, message }
}

fn from_alert(alert: AlertDescription) -> HandshakeFailure {
    let reason = match alert {
        AlertDescription::UnknownCA => {
            "it doesn't trust the CA of the server's certificate; install that CA on the client"
        }
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            "it rejects the server's certificate; check that it has the name that the client uses"
        }
        AlertDescription::DecryptError => {
            "a signature doesn't verify; the client may trust another CA of the same name"
        }
        AlertDescription::CertificateExpired => {
            "the server's certificate has expired by the client's clock"
        }
        _ => {
            let message = format!("the client aborted the handshake: {alert:?}");
            return HandshakeFailure::new(HandshakeFailureCause::Other, message);
        }
    };
    HandshakeFailure::new(
        HandshakeFailureCause::ServerCertificateRejected,
        format!("the client aborted the handshake: {reason} ({alert:?})"),
    )
}

fn format_time(time: UnixTime) -> impl fmt::Display {
    let since = Duration::from_secs(time.as_secs());
    humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_mapped_to_causes() {
        let of = |error: rustls::Error| HandshakeFailure::from_rustls(&error).cause;
        assert_eq!(
            of(rustls::Error::AlertReceived(AlertDescription::UnknownCA)),
            HandshakeFailureCause::ServerCertificateRejected
        );
        assert_eq!(
            of(rustls::Error::InvalidCertificate(CertificateError::Expired)),
            HandshakeFailureCause::Expired
        );
        let gone = io::Error::from(io::ErrorKind::UnexpectedEof);
        for (stage, cause) in [
            (HandshakeStage::Hello, HandshakeFailureCause::ClosedBeforeHello),
            (HandshakeStage::CertificateSent, HandshakeFailureCause::ClosedAfterCertificate),
        ] {
            assert_eq!(HandshakeFailure::from_io(&gone, stage).cause, cause);
        }
    }

    /// Sentences: they say what to do.
    mod wording {
        use super::*;

        #[test]
        fn failures_are_explained() {
            let of = |error: rustls::Error| HandshakeFailure::from_rustls(&error).to_string();
            let alert = of(rustls::Error::AlertReceived(AlertDescription::UnknownCA));
            assert!(alert.contains("install that CA on the client"), "{alert}");

            let second = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
            let expired =
                CertificateError::ExpiredContext { time: second(120), not_after: second(60) };
            let expired = of(rustls::Error::InvalidCertificate(expired));
            assert!(expired.contains("expired at 1970-01-01T00:01:00Z, 1m ago"), "{expired}");
        }
    }
}
