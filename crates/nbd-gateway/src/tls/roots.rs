//! Verifies clients against CAs, each until it expires: rustls ignores the expiry of trust anchors.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// A verifier for one CA, or for several that share it, with its expiry.
pub(super) struct RootVerifier {
    pub(super) end: UnixTime,
    /// Verifier that trusts only this CA, or this group.
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    /// The same verifier with other revocation lists, where an intermediate has lists of several
    /// keys.
    pub(super) alternatives: Vec<Arc<dyn ClientCertVerifier>>,
    /// Flag set if revocation lists are in use, but none of them applies here.
    pub(super) lacks_lists: bool,
}

impl RootVerifier {
    /// Verifies a client. It is accepted if at least one set of lists accepts it, and none says
    /// that it is revoked. A list counts only with its issuer's signature, so both can happen only
    /// if one of the lists is out of date.
    fn verify(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let mut ended = Err(CertificateError::UnknownIssuer.into());
        for verifier in std::iter::once(&self.verifier).chain(&self.alternatives) {
            match verifier.verify_client_cert(own, others, now) {
                Err(revoked @ Error::InvalidCertificate(CertificateError::Revoked)) => {
                    return Err(revoked);
                }
                Ok(verified) => ended = Ok(verified),
                Err(error) => match &ended {
                    Err(before) if weight(&error) > weight(before) => ended = Err(error),
                    _ => {}
                },
            }
        }
        let verified = ended?;
        if self.lacks_lists {
            return Err(CertificateError::UnknownRevocationStatus.into());
        }
        if now > self.end {
            let ended = CertificateError::ExpiredContext { time: now, not_after: self.end };
            return Err(ended.into());
        }
        Ok(verified)
    }
}

/// Ranks errors, of which there is one for each CA: the further the verification got, the more the
/// error says.
fn weight(reason: &Error) -> u8 {
    match reason {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => 0,
        // The CA has the right name, but another key.
        Error::InvalidCertificate(CertificateError::BadSignature) => 1,
        Error::InvalidCertRevocationList(_) => 2,
        Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => 3,
        _ => 4,
    }
}

/// Verifies clients against all CAs that haven't expired; there is at least one.
pub(super) struct RootVerifiers {
    first: RootVerifier,
    others: Vec<RootVerifier>,
}

impl fmt::Debug for RootVerifiers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots").field("count", &(1 + self.others.len())).finish_non_exhaustive()
    }
}

impl RootVerifiers {
    /// Returns `None` if there are no roots.
    pub(super) fn new(mut roots: Vec<RootVerifier>) -> Option<Self> {
        let others = roots.split_off(roots.len().min(1));
        roots.pop().map(|first| Self { first, others })
    }

    fn all(&self) -> impl Iterator<Item = &RootVerifier> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// Returns the earliest expiry.
    pub(super) fn earliest_verifier_expiry(&self) -> UnixTime {
        self.all().map(|root| root.end).min().unwrap_or(self.first.end)
    }
}

impl ClientCertVerifier for RootVerifiers {
    fn client_auth_mandatory(&self) -> bool {
        self.first.verifier.client_auth_mandatory()
    }

    /// Returns no hints: the trusted CAs aren't disclosed to unauthenticated clients.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let mut reason = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        for root in self.all() {
            match root.verify(own, others, now) {
                Ok(verified) => return Ok(verified),
                Err(error) if weight(&error) > weight(&reason) => reason = error,
                Err(_) => {}
            }
        }
        Err(match reason {
            // No list applies; the alert for this error says so.
            Error::InvalidCertRevocationList(_) => CertificateError::UnknownRevocationStatus.into(),
            reason => reason,
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verifier.verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.first.verifier.verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.first.verifier.supported_verify_schemes()
    }
}
