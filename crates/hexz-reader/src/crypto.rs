//! AES-256-GCM decryption of blocks, with a key derived from a password.

use std::fmt;
use std::num::NonZeroU32;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::pbkdf2;
use zeroize::Zeroizing;

use super::Password;
use super::error::ErrorKind;
use super::header::KeyDerivation;

/// Key of one encrypted archive.
pub(super) struct BlockKey(LessSafeKey);

impl fmt::Debug for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockKey(…)")
    }
}

impl BlockKey {
    /// Derives the key, which is slow by design (PBKDF2).
    pub(super) fn derive(password: &Password, from: &KeyDerivation) -> Result<Self, ErrorKind> {
        let iterations =
            NonZeroU32::new(from.iterations).ok_or(ErrorKind::Invalid("the iteration count"))?;
        let mut key = Zeroizing::new([0; 32]);
        let algorithm = pbkdf2::PBKDF2_HMAC_SHA256;
        pbkdf2::derive(algorithm, iterations, &from.salt, password.bytes(), key.as_mut());
        UnboundKey::new(&AES_256_GCM, key.as_ref())
            .map(|key| Self(LessSafeKey::new(key)))
            .map_err(|_| ErrorKind::Invalid("the key"))
    }

    /// Decrypts block `number` in place. Returns the plaintext without the tag.
    pub(super) fn open<'a>(
        &self,
        number: u64,
        stored: &'a mut [u8],
    ) -> Result<&'a mut [u8], ErrorKind> {
        let mut nonce = [0; NONCE_LEN];
        if let Some(counter) = nonce.last_chunk_mut() {
            *counter = number.to_be_bytes();
        }
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.0.open_in_place(nonce, Aad::empty(), stored).map_err(|_| ErrorKind::AuthenticationTag)
    }
}
