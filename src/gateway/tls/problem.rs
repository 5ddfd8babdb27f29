//! What can be wrong with a file of TLS, and what to do about it.

use std::io;
use std::path::PathBuf;

/// What is wrong with a TLS file, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {problem}", path = .path.display())]
pub struct TlsError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: TlsProblem,
}

/// What can be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsProblem {
    /// The system refused.
    #[error("can't read it: {0}")]
    Io(#[from] io::Error),
    /// Not what a certificate or key is.
    #[error("the file is larger than 16 MiB, which no such file should be")]
    TooLarge,
    /// No certificate in it.
    #[error("there is no certificate in it; it should have a \"BEGIN CERTIFICATE\" block")]
    NoCertificate,
    /// No key in it.
    #[error("there is no private key in it; it should have a \"BEGIN PRIVATE KEY\" block")]
    NoKey,
    /// A key behind a pass phrase.
    #[error(
        "the private key is encrypted, and nobody is here to type its pass phrase; write it \
         without one: openssl pkey -in KEY -out PLAIN-KEY && chmod 600 PLAIN-KEY"
    )]
    EncryptedKey,
    /// Everybody on this machine can read the secret.
    #[error(
        "every user of this machine can read this secret (mode {mode:04o}): chmod 600 {path}; if it \
         is mounted into a container, have it mounted with mode 0400 (Kubernetes: defaultMode: 0400, \
         and fsGroup if the program isn't root; Docker, Podman: mode=0400 and uid=)",
        path = .path.display()
    )]
    Exposed {
        /// The file's permission bits.
        mode: u32,
        /// The file.
        path: PathBuf,
    },
    /// A mark or an encoding that hides what is in the file.
    #[error("{0}")]
    NotPem(&'static str),
    /// A key of a kind that isn't spoken here.
    #[error("{0}")]
    UnsupportedKey(String),
    /// A certificate of a kind that clients refuse.
    #[error("{0}")]
    UnsupportedCertificate(String),
    /// Another certificate is the first one.
    #[error(
        "the server's own certificate has to be the first in the file, and is number {0}: put it \
         first, those that signed it after it in order"
    )]
    OwnNotFirst(usize),
    /// Key and certificate are not a pair.
    #[error("this key doesn't belong to the certificate in {}", .0.display())]
    WrongKey(PathBuf),
    /// Past its end.
    #[error("the certificate expired {0} ago; clients would refuse it, so get a new one")]
    Expired(humantime::FormattedDuration),
    /// Before its beginning.
    #[error("the certificate is not valid yet, for another {0}; is this machine's clock right?")]
    NotYetValid(humantime::FormattedDuration),
    /// No revocation list in it.
    #[error("there is no revocation list in it; it should have a \"BEGIN X509 CRL\" block")]
    NoRevocationList,
    /// A revocation list that can't be read. Without it revoked clients would come in.
    #[error("the revocation list is broken: {0}")]
    BrokenRevocationList(String),
    /// A revocation list without a number and a key identifier.
    #[error(
        "the revocation list is of version 1: have it made of version 2, with a number (openssl ca \
         -gencrl -crlexts SECTION, with authorityKeyIdentifier=keyid and a crlnumber file)"
    )]
    OldRevocationList,
    /// A revocation list that bears the name of a CA, and isn't signed by its key.
    #[error(
        "the revocation list of {0} is signed by none of the CAs of that name in --tls-client-ca: \
         add the certificate of the one that signed it, or take the list away"
    )]
    ForeignRevocationList(String),
    /// More keys than can be tried for each client.
    #[error(
        "there are revocation lists of too many keys, of {0} among others: take away those of keys \
         that are no longer in use"
    )]
    TooManyRevocationLists(String),
    /// Nobody can say any more who has been revoked since.
    #[error(
        "the revocation list ran out {0} ago, so no client could be let in: get a new one from \
         its CA"
    )]
    ExpiredRevocationList(humantime::FormattedDuration),
    /// No certificate in the file can vouch for clients.
    #[error("no certificate in it can vouch for clients: {0}")]
    NoUsableCa(String),
    /// Something else that rustls doesn't like.
    #[error("it can't be used: {0}")]
    Unusable(rustls::Error),
}
