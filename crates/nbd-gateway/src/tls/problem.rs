//! Errors in TLS files, with advice on how to fix them.

use std::io;
use std::path::PathBuf;

use nbd_telemetry::escape;

/// An error in a TLS file, with advice on how to fix it.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", escape::path(.path))]
pub struct TlsFileError {
    /// Path of the file.
    pub path: PathBuf,
    /// Problem with the file.
    pub problem: TlsFileProblem,
}

/// Problem with a TLS file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsFileProblem {
    /// The file can't be read.
    #[error("can't be read: {0}")]
    Io(#[from] io::Error),
    /// The file is larger than any certificate, key or list should be.
    #[error("the file is larger than 16 MiB")]
    TooLarge,
    /// The file contains no certificate.
    #[error("no certificate found: expected a \"BEGIN CERTIFICATE\" block")]
    NoCertificate,
    /// The file contains no private key.
    #[error("no private key found: expected a \"BEGIN PRIVATE KEY\" block")]
    NoKey,
    /// The private key is encrypted with a passphrase.
    #[error(
        "encrypted private keys are not supported: decrypt it with openssl pkey -in KEY -out \
         PLAIN-KEY && chmod 600 PLAIN-KEY"
    )]
    EncryptedKey,
    /// The secret is readable by every user of this machine.
    #[error(
        "every user of this machine can read this secret (mode {mode:04o}): run chmod 600 {path}, or \
         mount it into the container with mode 0400 (Kubernetes: defaultMode: 0400, and fsGroup \
         unless the program runs as root; Docker, Podman: mode=0400 and uid=)",
        path = escape::path(.path)
    )]
    Exposed {
        /// Permission bits of the file.
        mode: u32,
        /// Path of the file.
        path: PathBuf,
    },
    /// The file has a byte order mark or an encoding that hides its content from PEM readers.
    #[error("{0}")]
    NotPem(&'static str),
    /// The key is of an unsupported kind.
    #[error("{0}")]
    UnsupportedKey(String),
    /// The certificate is of a kind that clients refuse.
    #[error("{0}")]
    UnsupportedCertificate(String),
    /// The server's own certificate isn't the first; holds its position, counted from 1.
    #[error(
        "the server's own certificate is number {0} in the file: it must be the first, followed by \
         those that signed it, in order"
    )]
    ServerCertificateNotFirst(usize),
    /// The key doesn't match the certificate, which is in the file given here.
    #[error("the private key doesn't match the certificate in {}", escape::path(.0))]
    KeyMismatch(PathBuf),
    /// The certificate has expired.
    #[error("the certificate expired {0} ago: install a new one")]
    Expired(humantime::FormattedDuration),
    /// The certificate isn't valid yet.
    #[error("the certificate becomes valid in {0}; check this machine's clock")]
    NotYetValid(humantime::FormattedDuration),
    /// The file contains no revocation list.
    #[error("no revocation list found: expected a \"BEGIN X509 CRL\" block")]
    NoRevocationList,
    /// The revocation list can't be parsed. Without it, revoked clients would be admitted.
    #[error("invalid revocation list: {0}")]
    BrokenRevocationList(String),
    /// The revocation list is of version 1, which has no CRL number and no key identifier.
    #[error(
        "revocation lists of version 1 are not supported: create one of version 2 with a number \
         (openssl ca -gencrl -crlexts SECTION, with authorityKeyIdentifier=keyid and a crlnumber \
         file)"
    )]
    RevocationListV1,
    /// The revocation list bears the name of a known CA, but isn't signed by its key.
    #[error(
        "the revocation list of {0} is signed by none of the client CAs of that name: add the \
         certificate of the CA that signed it, or remove the list"
    )]
    RevocationListNotSigned(String),
    /// The revocation lists belong to more keys than can be tried for each client.
    #[error(
        "the revocation lists belong to too many keys, for example of {0}: remove those of keys that \
         are no longer in use"
    )]
    TooManyRevocationKeys(String),
    /// The revocation list has expired, so later revocations are unknown.
    #[error(
        "the revocation list expired {0} ago, so no client could be authenticated: install a new one"
    )]
    ExpiredRevocationList(humantime::FormattedDuration),
    /// The file contains no certificate that can vouch for clients.
    #[error("no usable CA certificate found: {0}")]
    NoUsableCa(String),
    /// Any other error reported by rustls.
    #[error("can't be used: {0}")]
    Unusable(rustls::Error),
}

impl TlsFileProblem {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Io(_) => "tls_file_unreadable",
            Self::TooLarge => "tls_file_too_large",
            Self::NoCertificate => "no_certificate_in_file",
            Self::NoKey => "no_key_in_file",
            Self::EncryptedKey => "encrypted_key",
            Self::Exposed { .. } => "secret_exposed",
            Self::NotPem(_) => "not_pem",
            Self::UnsupportedKey(_) => "unsupported_key",
            Self::UnsupportedCertificate(_) => "unsupported_certificate",
            Self::ServerCertificateNotFirst(_) => "server_certificate_not_first",
            Self::KeyMismatch(_) => "key_mismatch",
            Self::Expired(_) => "certificate_expired",
            Self::NotYetValid(_) => "certificate_not_yet_valid",
            Self::NoRevocationList => "no_revocation_list_in_file",
            Self::BrokenRevocationList(_) => "invalid_revocation_list",
            Self::RevocationListV1 => "revocation_list_version_1",
            Self::RevocationListNotSigned(_) => "revocation_list_not_signed",
            Self::TooManyRevocationKeys(_) => "too_many_revocation_keys",
            Self::ExpiredRevocationList(_) => "revocation_list_expired",
            Self::NoUsableCa(_) => "no_usable_ca",
            Self::Unusable(_) => "tls_file_unusable",
        }
    }
}
