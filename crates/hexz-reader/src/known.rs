//! Opens remote archives in the versions that are known without a request.
//!
//! Otherwise, each archive of a chain would be compared with its store before its parents are
//! known: one round trip after the other. All are compared at once instead, when the chain is open.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::OpenOptions;
use crate::storage::{FetchPriority, RemoteSource, Stamp, Storage, is_url};

/// A source that prefers known versions to current ones.
#[derive(Debug)]
pub(super) struct KnownVersions {
    source: Arc<dyn RemoteSource>,
    /// True if a version was opened that may not be current.
    is_used: AtomicBool,
}

impl KnownVersions {
    /// Returns the source, if the archive at `path` is remote and known.
    pub(super) fn of(path: &Path, options: &OpenOptions) -> Option<Arc<Self>> {
        let source = options.remote.as_ref().filter(|source| is_url(path) && source.is_known(path));
        source.map(|source| Arc::new(Self { source: Arc::clone(source), is_used: false.into() }))
    }

    /// Returns true if a version was opened that may not be current.
    pub(super) fn is_used(&self) -> bool {
        self.is_used.load(Relaxed)
    }
}

impl RemoteSource for KnownVersions {
    fn open(&self, url: &Path) -> io::Result<Arc<dyn Storage>> {
        match self.open_known(url) {
            Some(known) => {
                self.is_used.store(true, Relaxed);
                Ok(known)
            }
            None => self.source.open(url),
        }
    }

    fn open_known(&self, url: &Path) -> Option<Arc<dyn Storage>> {
        self.source.open_known(url)
    }

    /// Side files are compared with the archive, so that an old one does no harm.
    fn open_side_file(&self, url: &Path, priority: FetchPriority) -> io::Result<Arc<dyn Storage>> {
        self.open_known(url).map_or_else(|| self.source.open_side_file(url, priority), Ok)
    }

    fn stamp(&self, url: &Path) -> Option<Stamp> {
        self.source.stamp(url)
    }

    fn is_known(&self, url: &Path) -> bool {
        self.source.is_known(url)
    }

    fn is_tentative(&self) -> bool {
        self.is_used()
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<(String, Stamp)>> {
        self.source.list(folder)
    }
}
