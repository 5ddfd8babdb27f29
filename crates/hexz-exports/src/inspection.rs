//! Inspects archives that aren't open, from their header and index, and caches the results.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::catalog::failure_log_limit;
use super::hints::Hints;
use super::slot::RETRY_AFTER;
use super::snapshot::describe;
use super::source::ArchiveSource;
use hexz_reader::storage::{Stamp, is_url};
use hexz_reader::{Error, OpenOptions, Snapshot, StreamKind};
use nbd_telemetry::RateLimit;
use nbd_telemetry::escape;

/// Maximum number of archives that are inspected concurrently, over all clients: each may have an
/// index of [`MAX_MASTER_INDEX`](hexz_reader::limits::MAX_MASTER_INDEX), and so may its
/// parents.
pub(super) const MAX_CONCURRENT_INSPECTIONS: u32 = 4;

/// Descriptions of an archive's streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Streams {
    pub(super) main: Arc<str>,
    pub(super) auxiliary: Option<Arc<str>>,
}

impl Streams {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let of = |stream| Arc::from(describe(snapshot, stream));
        let has_auxiliary = snapshot.size(StreamKind::Auxiliary) > 0;
        Self {
            main: of(StreamKind::Main),
            auxiliary: has_auxiliary.then(|| of(StreamKind::Auxiliary)),
        }
    }
}

/// Result of inspecting an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InspectionResult {
    Streams(Streams),
    /// The file doesn't exist, or can't be served.
    Unservable,
    NotInspected,
}

/// Cache of inspection results, including failures.
#[derive(Debug)]
pub(super) struct Inspections {
    cache: Mutex<HashMap<PathBuf, Inspection>>,
    pub(super) permits: Arc<Semaphore>,
    failure_log_limit: RateLimit,
}

#[derive(Debug)]
struct Inspection {
    stamp: Stamp,
    at: Instant,
    /// Descriptions of its streams, or the reason for which it can't be served: its label and its
    /// description.
    result: Result<Streams, (&'static str, String)>,
}

impl Inspections {
    pub(super) fn new() -> Self {
        Self {
            cache: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_CONCURRENT_INSPECTIONS as usize)),
            failure_log_limit: failure_log_limit(),
        }
    }

    /// Returns the number of cached files.
    pub(super) fn count(&self) -> usize {
        self.cache.lock().len()
    }

    /// Removes the files for which `is_kept` returns false.
    pub(super) fn retain(&self, is_kept: impl Fn(&Path) -> bool) {
        let mut cache = self.cache.lock();
        cache.retain(|path, _| is_kept(path));
    }

    /// Returns the cached result for a file. Failures expire, since a missing parent may have
    /// appeared in the meantime.
    pub(super) fn cached(&self, path: &Path, stamp: Stamp) -> InspectionResult {
        let cache = self.cache.lock();
        match cache.get(path) {
            Some(inspection) if inspection.stamp == stamp => match &inspection.result {
                Ok(streams) => InspectionResult::Streams(streams.clone()),
                Err(_) if inspection.at.elapsed() < RETRY_AFTER => InspectionResult::Unservable,
                Err(_) => InspectionResult::NotInspected,
            },
            _ => InspectionResult::NotInspected,
        }
    }

    /// Returns the files that can't be served, with the label and the description of the reason.
    pub(super) fn failures(&self) -> Vec<(PathBuf, &'static str, String)> {
        let cache = self.cache.lock();
        let failed = cache.iter().filter_map(|(path, inspection)| {
            let (label, message) = inspection.result.as_ref().err()?;
            Some((path.clone(), *label, message.clone()))
        });
        failed.collect()
    }

    /// Forgets why local files can't be served if they have changed since. Blocking.
    pub(super) fn forget_outdated_failures(&self, options: &OpenOptions) {
        let mut stamps: Vec<(PathBuf, Stamp)> = {
            let cache = self.cache.lock();
            let failed = cache.iter().filter(|(path, it)| it.result.is_err() && !is_url(path));
            failed.map(|(path, inspection)| (path.clone(), inspection.stamp)).collect()
        };
        stamps.retain(|(path, stamp)| options.stamp_of(path) != Some(*stamp));
        let mut cache = self.cache.lock();
        for (path, stamp) in stamps {
            if cache.get(&path).is_some_and(|inspection| inspection.stamp == stamp) {
                cache.remove(&path);
            }
        }
    }

    /// Inspects a file and caches the result. Blocking.
    pub(super) fn inspect(
        &self,
        name: &str,
        source: &ArchiveSource,
        stamp: Stamp,
        options: &OpenOptions,
        hints: Hints,
    ) {
        // Another task may have inspected it while this one waited for a permit.
        if self.cached(source.path(), stamp) != InspectionResult::NotInspected {
            return;
        }
        let found = source.open_index(options).map(|snapshot| Streams::of(&snapshot));
        // The error says nothing about the file.
        if found.as_ref().is_err_and(Error::is_transient) {
            return;
        }
        let hint = found.as_ref().err().and_then(|error| hints.for_open_error(error));
        let result = found.map_err(|error| (error.label(), error.to_string()));
        let failure = result.as_ref().err().cloned();
        let inspection = Inspection { stamp, at: Instant::now(), result };
        let mut cache = self.cache.lock();
        let before = cache.insert(source.path().to_owned(), inspection);
        drop(cache);
        let before = before.and_then(|inspection| inspection.result.err());
        if let Some(failure) = failure
            && before.as_ref() != Some(&failure)
            && let Some(held_back) = self.failure_log_limit.allow()
        {
            let (held_back, name) = (held_back.field(), escape::name(name));
            let (label, error) = failure;
            tracing::warn!(reason = label, hint, held_back, "archive {name:?} not listed: {error}");
        }
    }
}
