//! CAs that vouch for clients, each until it runs out: trust anchors have no end for rustls.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

/// A CA, and when it runs out.
pub(super) struct Root {
    pub(super) end: UnixTime,
    /// Trusts this one alone.
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    /// The same with other revocation lists, where a CA between it and a client has lists of
    /// several keys.
    pub(super) alternatives: Vec<Arc<dyn ClientCertVerifier>>,
    /// Revocation lists are in use, and none of them is of any use here.
    pub(super) lacks_lists: bool,
}

impl Root {
    /// A client is good if one set of lists says so and none says that it is revoked: a list
    /// counts only with its issuer's signature, so that both may hold only if one is out of date.
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

/// Ranks reasons, of which a client gets one for each CA: the more of the way to a CA was good,
/// the more it says.
fn weight(reason: &Error) -> u8 {
    match reason {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => 0,
        // Of a CA of the same name, which has another key.
        Error::InvalidCertificate(CertificateError::BadSignature) => 1,
        Error::InvalidCertRevocationList(_) => 2,
        Error::InvalidCertificate(CertificateError::UnknownRevocationStatus) => 3,
        _ => 4,
    }
}

/// Verifies clients by those CAs that haven't run out; there is at least one.
pub(super) struct Roots {
    first: Root,
    others: Vec<Root>,
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots").field("count", &(1 + self.others.len())).finish_non_exhaustive()
    }
}

impl Roots {
    /// `None` without any.
    pub(super) fn new(mut roots: Vec<Root>) -> Option<Self> {
        let others = roots.split_off(roots.len().min(1));
        roots.pop().map(|first| Self { first, others })
    }

    fn all(&self) -> impl Iterator<Item = &Root> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// When the first of them runs out.
    pub(super) fn first_end(&self) -> UnixTime {
        self.all().map(|root| root.end).min().unwrap_or(self.first.end)
    }
}

impl ClientCertVerifier for Roots {
    fn client_auth_mandatory(&self) -> bool {
        self.first.verifier.client_auth_mandatory()
    }

    /// Which CAs are trusted here is nobody's business who isn't known yet.
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
            // No list is of use; the alert says as much.
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
