//! Errors in TLS files, with advice on how to fix them.

use std::io;
use std::path::PathBuf;

/// An error in a TLS file, with advice on how to fix it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}", path = .path.display())]
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
    #[error("can't read it: {0}")]
    Io(#[from] io::Error),
    /// The file is larger than any certificate, key or list should be.
    #[error("the file is larger than 16 MiB, which no such file should be")]
    TooLarge,
    /// The file contains no certificate.
    #[error("there is no certificate in it; it should have a \"BEGIN CERTIFICATE\" block")]
    NoCertificate,
    /// The file contains no private key.
    #[error("there is no private key in it; it should have a \"BEGIN PRIVATE KEY\" block")]
    NoKey,
    /// The private key is encrypted with a passphrase.
    #[error(
        "the private key is encrypted, and nobody is here to type its pass phrase; write it \
         without one: openssl pkey -in KEY -out PLAIN-KEY && chmod 600 PLAIN-KEY"
    )]
    EncryptedKey,
    /// The secret is readable by every user of this machine.
    #[error(
        "every user of this machine can read this secret (mode {mode:04o}): chmod 600 {path}; if it \
         is mounted into a container, have it mounted with mode 0400 (Kubernetes: defaultMode: 0400, \
         and fsGroup if the program isn't root; Docker, Podman: mode=0400 and uid=)",
        path = .path.display()
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
        "the server's own certificate has to be the first in the file, and is number {0}: put it \
         first, those that signed it after it in order"
    )]
    ServerCertificateNotFirst(usize),
    /// The key doesn't match the certificate, which is in the file given here.
    #[error("this key doesn't belong to the certificate in {}", .0.display())]
    KeyMismatch(PathBuf),
    /// The certificate has expired.
    #[error("the certificate expired {0} ago; clients would refuse it, so get a new one")]
    Expired(humantime::FormattedDuration),
    /// The certificate isn't valid yet.
    #[error("the certificate is not valid yet, for another {0}; is this machine's clock right?")]
    NotYetValid(humantime::FormattedDuration),
    /// The file contains no revocation list.
    #[error("there is no revocation list in it; it should have a \"BEGIN X509 CRL\" block")]
    NoRevocationList,
    /// The revocation list can't be parsed. Without it, revoked clients would be admitted.
    #[error("the revocation list is broken: {0}")]
    BrokenRevocationList(String),
    /// The revocation list is of version 1, which has no CRL number and no key identifier.
    #[error(
        "the revocation list is of version 1: have it made of version 2, with a number (openssl ca \
         -gencrl -crlexts SECTION, with authorityKeyIdentifier=keyid and a crlnumber file)"
    )]
    RevocationListV1,
    /// The revocation list bears the name of a known CA, but isn't signed by its key.
    #[error(
        "the revocation list of {0} is signed by none of the CAs of that name in --tls-client-ca: \
         add the certificate of the one that signed it, or take the list away"
    )]
    RevocationListNotSigned(String),
    /// The revocation lists belong to more keys than can be tried for each client.
    #[error(
        "there are revocation lists of too many keys, of {0} among others: take away those of keys \
         that are no longer in use"
    )]
    TooManyRevocationKeys(String),
    /// The revocation list has expired, so later revocations are unknown.
    #[error(
        "the revocation list ran out {0} ago, so no client could be let in: get a new one from \
         its CA"
    )]
    ExpiredRevocationList(humantime::FormattedDuration),
    /// The file contains no certificate that can vouch for clients.
    #[error("no certificate in it can vouch for clients: {0}")]
    NoUsableCa(String),
    /// Any other error reported by rustls.
    #[error("it can't be used: {0}")]
    Unusable(rustls::Error),
}
