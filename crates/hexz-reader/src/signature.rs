//! Ed25519 signatures of archives. A signature is raw and covers the SHA-256 of everything from the
//! master index up to the signature.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{Context, SHA256};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use nbd_telemetry::Hex;
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;

use super::archive_file::ArchiveFile;
use super::error::{Error, ErrorKind, printable};
use super::header::Header;

/// Length of a signature, in bytes.
const SIGNATURE_LEN: usize = 64;
/// Length of a public key, in bytes.
const KEY_LEN: usize = 32;
/// Prefix of a SubjectPublicKeyInfo that precedes the 32 bytes of an Ed25519 key (RFC 8410).
const SPKI_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Number of bytes that are read at a time.
const BUFFER_LEN: u64 = 256 * 1024;

/// Public key for verifying signatures of archives.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VerifyKey([u8; KEY_LEN]);

/// Reason why a text or file isn't an Ed25519 public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyKeyError {
    /// The format isn't recognized.
    #[error(
        "not an Ed25519 public key: expected 32 bytes, 64 hexadecimal digits or a PEM \
         \"PUBLIC KEY\""
    )]
    UnknownFormat,
    /// The key is a private key, which must not be given to the gateway.
    #[error("a private key: expected the public key that belongs to it")]
    PrivateKey,
    /// The key is a public key of another algorithm (RSA, ECDSA and so on).
    #[error("a public key of another algorithm: expected Ed25519")]
    OtherAlgorithm,
}

impl VerifyKeyError {
    /// Returns a stable label for logs and programs.
    pub fn label(self) -> &'static str {
        match self {
            Self::UnknownFormat => "key_format",
            Self::PrivateKey => "private_key",
            Self::OtherAlgorithm => "key_algorithm",
        }
    }
}

impl VerifyKey {
    /// Parses the content of a key file: 32 raw bytes, as the Hexz tools write them, 64 hexadecimal
    /// digits, or PEM.
    ///
    /// # Errors
    /// See [`VerifyKeyError`].
    pub fn from_file_content(content: &[u8]) -> Result<Self, VerifyKeyError> {
        if let Ok(key) = content.try_into() {
            return Ok(Self(key));
        }
        let text = str::from_utf8(content).map_err(|_| VerifyKeyError::UnknownFormat)?.trim();
        text.parse().or_else(|_| Self::from_pem(text))
    }

    fn from_pem(text: &str) -> Result<Self, VerifyKeyError> {
        if text.contains("PRIVATE KEY") {
            return Err(VerifyKeyError::PrivateKey);
        }
        let spki = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes())
            .map_err(|_| VerifyKeyError::UnknownFormat)?;
        spki.strip_prefix(&SPKI_PREFIX)
            .and_then(|key| key.try_into().ok())
            .map(Self)
            .ok_or(VerifyKeyError::OtherAlgorithm)
    }

    fn has_signed(&self, digest: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.0).verify(digest, signature).is_ok()
    }
}

impl FromStr for VerifyKey {
    type Err = VerifyKeyError;

    /// Parses 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`VerifyKeyError::UnknownFormat`] for any other text.
    fn from_str(text: &str) -> Result<Self, VerifyKeyError> {
        blake3::Hash::from_hex(text)
            .map(|key| Self(*key.as_bytes()))
            .map_err(|_| VerifyKeyError::UnknownFormat)
    }
}

impl fmt::Display for VerifyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Hex(&self.0).fmt(f)
    }
}

impl fmt::Debug for VerifyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Signed bytes that have already been read.
pub(super) struct SignedBytes<'a> {
    /// Bytes of the master index.
    pub(super) index: &'a [u8],
    /// First bytes behind the master index, possibly none.
    pub(super) trailer: &'a [u8],
}

/// Verifies that one of `keys` has signed an archive.
///
/// The bytes in `signed` are hashed as they were read, and only the rest is read here. No byte is
/// read twice, since the second read could return another value.
pub(super) fn check(
    file: &ArchiveFile,
    header: &Header,
    signed: SignedBytes<'_>,
    keys: &[VerifyKey],
) -> Result<(), Error> {
    let place = header.signature.ok_or_else(|| file.error(ErrorKind::NotSigned))?;
    if place.length as usize != SIGNATURE_LEN {
        return Err(file.error_at(ErrorKind::Invalid("the signature's length"), place.offset));
    }
    let read = |buffer: &mut [u8], at| file.read_exact_at(buffer, at, "read the signed bytes");
    let mut digest = Context::new(&SHA256);
    digest.update(signed.index);
    let Some(covered) = place.offset.checked_sub(header.index_end) else {
        return Err(file.error_at(ErrorKind::Invalid("the signature's location"), place.offset));
    };
    let covered = usize::try_from(covered).unwrap_or(usize::MAX);
    let trailer = signed.trailer.get(..covered).unwrap_or(signed.trailer);
    digest.update(trailer);
    let mut at = header.index_end + trailer.len() as u64;
    let mut buffer = Vec::new();
    while at < place.offset {
        let length = (place.offset - at).min(BUFFER_LEN);
        buffer.resize(usize::try_from(length).unwrap_or_default(), 0);
        read(&mut buffer, at)?;
        digest.update(&buffer);
        at += length;
    }
    let mut signature = [0; SIGNATURE_LEN];
    read(&mut signature, place.offset)?;

    let digest = digest.finish();
    match keys.iter().find(|key| key.has_signed(digest.as_ref(), &signature)) {
        Some(key) => {
            tracing::debug!(%key, "{}: the signature is valid", printable(&file.path));
            Ok(())
        }
        None => Err(file.error_at(ErrorKind::InvalidSignature, place.offset)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};

    const HEX: &str = "3ebfc4fd8c2484be73524c218d5260fc92dcb080dee526a6be43df65755391da";
    const RAW: [u8; 32] = *b"\x3e\xbf\xc4\xfd\x8c\x24\x84\xbe\x73\x52\x4c\x21\x8d\x52\x60\xfc\
        \x92\xdc\xb0\x80\xde\xe5\x26\xa6\xbe\x43\xdf\x65\x75\x53\x91\xda";
    /// The same key in PEM, written by `openssl pkey -pubin -inform DER`.
    const PEM: &str = "-----BEGIN PUBLIC KEY-----\n\
        MCowBQYDK2VwAyEAPr/E/YwkhL5zUkwhjVJg/JLcsIDe5SamvkPfZXVTkdo=\n\
        -----END PUBLIC KEY-----\n";

    #[test]
    fn keys_are_parsed_in_every_form() {
        let upper = HEX.to_uppercase();
        let lines = format!("{HEX}\n");
        let forms: [&[u8]; 5] =
            [&RAW, HEX.as_bytes(), upper.as_bytes(), lines.as_bytes(), PEM.as_bytes()];
        for form in forms {
            assert_eq!(VerifyKey::from_file_content(form), Ok(VerifyKey(RAW)));
        }
        assert_eq!(VerifyKey(RAW).to_string(), HEX);
    }

    #[test]
    fn other_files_are_rejected() {
        let private = PEM.replace("PUBLIC", "PRIVATE");
        for (content, error) in [
            (&b""[..], VerifyKeyError::UnknownFormat),
            (&RAW[..31], VerifyKeyError::UnknownFormat),
            (&HEX.as_bytes()[1..], VerifyKeyError::UnknownFormat),
            (b"-----BEGIN PUBLIC KEY-----\n", VerifyKeyError::UnknownFormat),
            (private.as_bytes(), VerifyKeyError::PrivateKey),
            // X25519, whose object identifier is one less.
            (PEM.replace("K2Vw", "K2Vu").as_bytes(), VerifyKeyError::OtherAlgorithm),
        ] {
            assert_eq!(VerifyKey::from_file_content(content), Err(error));
        }
    }

    #[test]
    fn signatures_match_one_key_and_digest() {
        let pair = Ed25519KeyPair::generate().unwrap();
        let key = VerifyKey(pair.public_key().as_ref().try_into().unwrap());
        let signature = pair.sign(b"digest");
        assert!(key.has_signed(b"digest", signature.as_ref()));
        assert!(!key.has_signed(b"Digest", signature.as_ref()));
        assert!(!VerifyKey(RAW).has_signed(b"digest", signature.as_ref()));
    }
}
