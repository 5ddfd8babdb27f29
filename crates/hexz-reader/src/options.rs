//! Options for opening a snapshot.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::background::BackgroundExecutor;
use super::digest::{DigestMemory, Digests};
use super::limits;
use super::log_limit::LogLimit;
use super::page_cache::IndexPageCache;
use super::password::PasswordSource;
use super::reference_choice::ReferenceChoice;
use super::signature::VerifyKey;
use crate::storage::{
    FetchPriority, FileStamp, FileStorage, ReadCounters, RemoteError, RemoteSource, Stamp, Storage,
    is_url,
};

/// Options for opening a snapshot.
///
/// ```
/// use hexz_reader::{OpenOptions, Password};
///
/// let options = OpenOptions {
///     parent_dirs: vec!["/srv/base".into()],
///     password: Some(Password::new(b"secret".to_vec()).into()),
///     ..OpenOptions::default()
/// };
/// ```
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Directories that are searched for parents, in addition to the archive's own directory.
    pub parent_dirs: Vec<PathBuf>,
    /// Source of archives whose paths are URLs; `None` if only files can be opened.
    pub remote: Option<Arc<dyn RemoteSource>>,
    /// True if the archive may name parents anywhere on this machine.
    pub allow_parent_anywhere: bool,
    /// Source of the password for encrypted archives of the chain. The password is wiped once their
    /// keys have been derived.
    pub password: Option<PasswordSource>,
    /// Maximum number of key derivation iterations that an encrypted archive may request.
    pub max_key_iterations: u32,
    /// Worker that derives keys. Snapshots opened with the same worker derive their keys one at a
    /// time.
    pub background: Arc<BackgroundExecutor>,
    /// Set to true once the caller no longer waits for the snapshot. A key derivation that is
    /// still queued is skipped, and opening fails with
    /// [`ErrorKind::Abandoned`](crate::ErrorKind::Abandoned).
    pub is_abandoned: Arc<AtomicBool>,
    /// True to open a directory archive as its bare stream.
    pub raw: bool,
    /// Decisions for references to parents that can be read by offset or by hash, with different
    /// bytes. Without a decision, reading such a block is an error.
    pub reference_choices: Arc<[ReferenceChoice]>,
    /// True to read ranges that no block covers as zeros instead of failing.
    pub zero_uncovered: bool,
    /// True to compare each decoded block with its BLAKE3 hash. Without that, damage to stored
    /// bytes is still detected (CRC-32), but an index entry that points to another block of the
    /// same length is not. Blocks of encrypted archives have no hash in any case.
    pub verify_hashes: bool,
    /// Keys for required signatures. Unless empty, each archive of the chain must have a valid
    /// signature by one of these keys. The signature covers the master index and the metadata, but
    /// not the header, the index pages or the blocks.
    pub verify_keys: Arc<[VerifyKey]>,
    /// Required digests. If given, the digest of each archive of the chain must be among them.
    /// Opening an archive then reads all of it; later reads are verified against the resulting hash
    /// tree.
    pub digests: Option<Arc<Digests>>,
    /// Memory for digest verification, shared with other snapshots.
    pub digest_memory: DigestMemory,
    /// Cache of index pages, shared with other snapshots.
    pub index_pages: Arc<IndexPageCache>,
    /// Read counters, shared with other snapshots.
    pub read_counters: Arc<ReadCounters>,
    /// Rate limit for log lines, shared with other snapshots.
    pub log_limit: Arc<LogLimit>,
}

impl OpenOptions {
    /// Opens the file or object at `path`.
    ///
    /// # Errors
    /// It doesn't exist ([`io::ErrorKind::NotFound`]) or can't be opened, or is an object and there
    /// is no [`remote`](Self::remote) source.
    pub fn open_storage(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        match (&self.remote, is_url(path)) {
            (_, false) => Ok(Arc::new(FileStorage::open(path)?)),
            (Some(remote), true) => remote.open(path),
            (None, true) => {
                let message = "no store was given at the start: restart, with a build that \
                               supports stores";
                Err(io::Error::other(RemoteError {
                    label: "store_unsupported",
                    message: message.to_owned(),
                    is_transient: false,
                    is_outage: false,
                }))
            }
        }
    }

    /// Opens a small file or object that belongs to an archive, and is read as a whole.
    ///
    /// # Errors
    /// As for [`open_storage`](Self::open_storage).
    pub fn open_side_file(
        &self,
        path: &Path,
        priority: FetchPriority,
    ) -> io::Result<Arc<dyn Storage>> {
        match &self.remote {
            Some(remote) if is_url(path) => remote.open_side_file(path, priority),
            _ => self.open_storage(path),
        }
    }

    /// Returns true unless opening `path` takes a store.
    pub(super) fn is_known(&self, path: &Path) -> bool {
        !is_url(path) || self.remote.as_ref().is_some_and(|remote| remote.is_known(path))
    }

    /// Returns the stamp of the file or object at `path`; `None` if there is none. The stamp of an
    /// object is what is known of it without a request.
    pub fn stamp_of(&self, path: &Path) -> Option<Stamp> {
        match is_url(path) {
            false => FileStamp::of(path).map(Stamp::File),
            true => self.remote.as_ref()?.stamp(path),
        }
    }
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            parent_dirs: Vec::new(),
            remote: None,
            allow_parent_anywhere: false,
            password: None,
            max_key_iterations: limits::DEFAULT_KDF_ITERATIONS,
            background: Arc::default(),
            is_abandoned: Arc::default(),
            raw: false,
            reference_choices: Arc::default(),
            zero_uncovered: false,
            verify_hashes: true,
            verify_keys: Arc::default(),
            digests: None,
            digest_memory: DigestMemory::default(),
            index_pages: IndexPageCache::new(limits::DEFAULT_INDEX_BUDGET),
            read_counters: Arc::default(),
            log_limit: Arc::default(),
        }
    }
}
