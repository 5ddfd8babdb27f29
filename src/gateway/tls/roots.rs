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
        let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let mut reason = unknown.clone();
        for root in self.all() {
            match root.verifier.verify_client_cert(own, others, now) {
                Ok(verified) if now <= root.end => return Ok(verified),
                Ok(_) => {
                    reason =
                        CertificateError::ExpiredContext { time: now, not_after: root.end }.into();
                }
                // That another CA signed it says nothing if one of them did.
                Err(error) if error != unknown => reason = error,
                Err(_) => {}
            }
        }
        Err(reason)
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
