//! Digests of what was read from the TLS files, to tell what a reload has changed.

use aws_lc_rs::digest;
use nbd_telemetry::Hex;

use super::ServerTls;

/// A part of the TLS settings that a reload can replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsChange {
    /// The server's certificate, or its chain.
    Certificate,
    /// The CAs that vouch for clients.
    ClientCas,
    /// The revocation lists of these CAs.
    RevocationLists,
    /// Anything else: the minimum version, or the policy for client certificates.
    Settings,
}

impl TlsChange {
    /// Returns the stable label for log fields.
    pub fn label(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::ClientCas => "client_cas",
            Self::RevocationLists => "revocation_lists",
            Self::Settings => "tls_settings",
        }
    }
}

/// SHA-256 of several encoded certificates or lists; the order counts.
pub(super) type ContentsDigest = [u8; digest::SHA256_OUTPUT_LEN];

/// Returns the digest of several encoded certificates or lists.
pub(super) fn digest_all<'a>(encoded: impl IntoIterator<Item = &'a [u8]>) -> ContentsDigest {
    let mut hash = digest::Context::new(&digest::SHA256);
    for one in encoded {
        hash.update(&one.len().to_be_bytes());
        hash.update(one);
    }
    let mut digest = ContentsDigest::default();
    digest.copy_from_slice(hash.finish().as_ref());
    digest
}

impl ServerTls {
    /// Returns the SHA-256 of the server's certificate, in hexadecimal digits, if it is known.
    pub fn certificate_sha256(&self) -> Option<String> {
        let own = self.chain.first()?;
        Some(Hex(digest::digest(&digest::SHA256, own).as_ref()).to_string())
    }

    /// Returns what differs from the settings that were active before.
    pub fn changes_since(&self, before: &Self) -> Vec<TlsChange> {
        let clients = |tls: &Self| {
            let digests = tls.clients.as_ref().map(|clients| clients.contents.clone());
            digests.unwrap_or_default()
        };
        let (now, then) = (clients(self), clients(before));
        let settings = |tls: &Self| {
            (tls.min_version, tls.requests_certificates(), tls.requires_certificates())
        };
        [
            (TlsChange::Certificate, self.chain != before.chain),
            (TlsChange::ClientCas, now.authorities != then.authorities),
            (TlsChange::RevocationLists, now.revocation_lists != then.revocation_lists),
            (TlsChange::Settings, settings(self) != settings(before)),
        ]
        .into_iter()
        .filter_map(|(change, has_changed)| has_changed.then_some(change))
        .collect()
    }

    /// Returns the number of certificates that the revocation lists in use revoke.
    pub fn revoked_certificates(&self) -> usize {
        self.clients.as_ref().map_or(0, |clients| clients.contents.revoked)
    }
}
