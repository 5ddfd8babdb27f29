//! An open object: one version of its bytes.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::fetcher::{FetchError, ObjectState, View};
use crate::store::{Store, Version};

/// Importance of a read. Requests for more important ones are sent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for the bytes.
    Demand,
    /// The bytes will probably be needed soon.
    Ahead,
    /// Nobody waits for the bytes.
    Background,
}

impl Priority {
    /// Returns the stable label for logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Ahead => "ahead",
            Self::Background => "background",
        }
    }
}

/// Identifies one version of an object, across processes and restarts.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId([u8; 16]);

impl ObjectId {
    /// Returns the identity of a version of the object `key` in `store`.
    pub fn new(store: &dyn Store, key: &str, version: &Version) -> Self {
        Self::of(store.label(), key, version)
    }

    /// Returns the identity of a version of the object `key` in the store with this label.
    pub(crate) fn of(store: &str, key: &str, version: &Version) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("object-reader 2026-11 object identity");
        let texts = [
            Some(store),
            Some(key),
            version.etag.as_deref(),
            version.version_id.as_deref(),
            version.last_modified.as_deref(),
        ];
        hasher.update(&version.length.to_le_bytes());
        for text in texts {
            // No other texts have the same encoding.
            let length = text.map_or(u64::MAX, |text| text.len() as u64);
            hasher.update(&length.to_le_bytes());
            hasher.update(text.unwrap_or_default().as_bytes());
        }
        Self::from_hash(&hasher)
    }

    /// Returns the namespace of this object's chunks that a verifier has checked.
    pub(crate) fn verified_by(&self, verifier: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("object-reader 2026-11 verified chunks");
        hasher.update(&self.0).update(verifier);
        Self::from_hash(&hasher)
    }

    fn from_hash(hasher: &blake3::Hasher) -> Self {
        let mut id = [0; 16];
        hasher.finalize_xof().fill(&mut id);
        Self(id)
    }

    /// Returns the identity that consists of these bytes.
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ObjectId({self})")
    }
}

/// Checks chunks against hashes that are trusted.
pub trait ChunkVerifier: fmt::Debug + Send + Sync {
    /// Returns true if `bytes` are those of the chunk with this number. Chunks have 256 KiB, the
    /// last one may have less. Called on threads of the runtime.
    fn matches(&self, chunk: u64, bytes: &[u8]) -> bool;

    /// Returns what the verifier compares with, such as the hash of the whole object. Verifiers of
    /// the same object with equal identities share cached chunks; those without share nothing.
    fn identity(&self) -> Option<[u8; 32]> {
        None
    }
}

/// One version of an object, open for reading. Clones are cheap and share everything.
///
/// All bytes are of that version. If the object is replaced, its chunks in memory remain readable,
/// and reads of others fail.
#[derive(Clone)]
pub struct Object {
    view: Arc<View>,
}

impl Object {
    pub(crate) fn new(view: Arc<View>) -> Self {
        Self { view }
    }

    fn state(&self) -> &ObjectState {
        &self.view.object
    }

    /// Returns the identity of this version.
    pub fn id(&self) -> ObjectId {
        self.state().id
    }

    /// Returns the length, in bytes.
    pub fn length(&self) -> u64 {
        self.state().version.length
    }

    /// Returns the version.
    pub fn version(&self) -> &Version {
        &self.state().version
    }

    /// Returns the label of the store and the key, for messages. It contains no secrets.
    pub fn name(&self) -> &str {
        &self.state().name
    }

    /// Reads exactly the bytes of `range`.
    ///
    /// Bytes within one chunk aren't copied, and keep only that chunk in memory. Other reads are
    /// assembled, and up to 16 MiB of them may be waiting besides the result.
    ///
    /// Cancellation: a dropped future cancels requests that haven't been sent and that nobody else
    /// waits for.
    ///
    /// # Errors
    /// Transient failures of the store are retried until [`store_timeout`]; others are returned at
    /// once. See [`FetchError`].
    ///
    /// [`store_timeout`]: crate::FetcherConfig::store_timeout
    pub async fn read(&self, range: Range<u64>, priority: Priority) -> Result<Bytes, FetchError> {
        self.view.read(range, priority).await
    }

    /// Fetches those chunks of `range` that are neither in memory nor in the disk cache, and no
    /// others. Reads with a higher priority pass it. Returns the number of bytes that were fetched.
    ///
    /// The caller knows what will be needed: for the next 5 s, other reads of this object fetch only
    /// what they need, unless they are sequential for several MiB. An empty range has that effect,
    /// too.
    ///
    /// If there is a disk cache that is slower than the store, waits for it, so that all chunks are
    /// written to it.
    ///
    /// Cancellation: as for [`read`](Self::read).
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub async fn prefetch(&self, range: Range<u64>) -> Result<u64, FetchError> {
        self.view.prefetch(range).await
    }

    /// Returns true if all bytes of `range` are in memory, so that a read doesn't wait.
    pub fn is_in_memory(&self, range: Range<u64>) -> bool {
        self.view.is_in_memory(&range)
    }

    /// Copies bytes from `offset` on into `buffer`, if all of them are in memory. Never waits.
    pub fn try_read(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.view.try_read(offset, buffer)
    }

    /// Returns true if this is the current version of the object, as far as known: that is checked
    /// again if the last check was longer ago than [`fresh_for`].
    ///
    /// Concurrent callers share one request, which isn't repeated if it fails.
    ///
    /// # Errors
    /// The object doesn't exist any more ([`FetchError::Gone`]), or the store can't tell; see
    /// [`FetchError::is_inconclusive`].
    ///
    /// [`fresh_for`]: crate::FetcherConfig::fresh_for
    pub async fn is_current(&self) -> Result<bool, FetchError> {
        self.state().is_current().await
    }

    /// Returns true if the store has returned or confirmed this version. Others were opened from
    /// the disk cache; [`is_current`](Self::is_current) checks them.
    pub fn is_confirmed(&self) -> bool {
        self.state().is_confirmed()
    }

    /// Returns this object if it is current, or else opens the current version, without verifier.
    ///
    /// # Errors
    /// Those of [`is_current`](Self::is_current) and [`Fetcher::open`].
    ///
    /// [`Fetcher::open`]: crate::Fetcher::open
    pub async fn latest(&self) -> Result<Self, FetchError> {
        if self.is_current().await? {
            return Ok(self.clone());
        }
        let state = self.state();
        state.fetcher.open(Arc::clone(&state.store), &state.key).await
    }

    /// Returns the same object, with every chunk checked before it is cached or used.
    ///
    /// A chunk that doesn't match is fetched once more, past all caches. If it doesn't match
    /// either, reads of it fail with [`FetchError::Corrupt`].
    #[must_use]
    pub fn verified_by(&self, verifier: Arc<dyn ChunkVerifier>) -> Self {
        Self { view: View::verified(&self.view, verifier) }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object")
            .field("name", &self.name())
            .field("version", self.version())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetcher::testing::ScriptedStore;

    #[test]
    fn identities_differ_by_key_and_version() {
        let store = ScriptedStore::new(100);
        let version = store.version();
        let id = ObjectId::new(&*store, "key", &version);
        assert_eq!(id, ObjectId::new(&*store, "key", &version));
        assert_ne!(id, ObjectId::new(&*store, "other", &version));
        let etag = version.etag.clone();
        let moved = Version { etag: None, version_id: etag, ..version.clone() };
        assert_ne!(id, ObjectId::new(&*store, "key", &moved));
        let longer = Version { length: 101, ..version };
        assert_ne!(id, ObjectId::new(&*store, "key", &longer));
        assert_ne!(id.verified_by(&[1]), id.verified_by(&[2]));
        assert_eq!(id.to_string().len(), 32);
    }
}
