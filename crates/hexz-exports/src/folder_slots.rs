//! Manages the slots of the archives in an export folder, and limits how many stay open.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::files::ServedFiles;
use super::folder_access::{self, FolderError, FolderFault, FolderId};
use super::slot::SnapshotSlot;
use super::source::{ArchiveSource, ExportFolder, NotFoundReason};
use super::status::FolderStatus;
use hexz_reader::storage::{RemoteSource, Stamp, is_url};
use nbd_telemetry::RateLimit;
use nbd_telemetry::escape;

/// Maximum number of snapshots that are kept open; each takes several descriptors.
pub(super) const MAX_OPEN: usize = 128;

/// An export folder and the slots of its archives.
#[derive(Debug)]
pub(super) struct FolderSlots {
    folder: ExportFolder,
    /// Source of the objects, if the folder is in a store.
    remote: Option<Arc<dyn RemoteSource>>,
    /// Identity of the folder at startup; the sandbox permits only this folder.
    at_start: Option<FolderId>,
    /// Fault of the last attempt to read the folder, if it failed.
    fault: parking_lot::Mutex<Option<FolderFault>>,
    places: Mutex<SlotTable>,
    /// Contents when the folder was last read.
    listing: parking_lot::Mutex<Option<Listing>>,
    /// Files that the log has reported as not served.
    unserved: parking_lot::Mutex<Vec<(OsString, NotFoundReason)>>,
    /// Rate limit for the log lines about them.
    notes: RateLimit,
}

/// Contents of the folder when it was read.
#[derive(Debug)]
struct Listing {
    /// Number of archives.
    archives: usize,
    /// Files that look like archives but aren't served.
    unserved: Vec<(OsString, NotFoundReason)>,
    /// Time of the folder's last change; `None` if it may have changed afterwards.
    modified: Option<SystemTime>,
}

#[derive(Debug, Default)]
struct SlotTable {
    slots: HashMap<String, SnapshotSlot>,
    /// Names of the slots that may be open, least recently used first.
    open: VecDeque<String>,
}

impl SlotTable {
    fn forget(&mut self, name: &str) {
        self.slots.remove(name);
        self.open.retain(|other| other != name);
    }

    /// Marks `name` as most recently used. Beyond [`MAX_OPEN`], closes the least recently used
    /// slot; sessions that read its snapshot continue.
    fn touch(&mut self, name: &str) {
        self.open.retain(|other| other != name);
        self.open.push_back(name.to_owned());
        if self.open.len() > MAX_OPEN
            && let Some(oldest) = self.open.pop_front()
            && let Some(slot) = self.slots.get(&oldest)
        {
            slot.close();
        }
    }
}

impl FolderSlots {
    pub(super) fn new(folder: ExportFolder, remote: Option<Arc<dyn RemoteSource>>) -> Self {
        let at_start = FolderId::of(folder.path());
        Self::with(folder, remote, at_start)
    }

    fn with(
        folder: ExportFolder,
        remote: Option<Arc<dyn RemoteSource>>,
        at_start: Option<FolderId>,
    ) -> Self {
        Self {
            folder,
            remote,
            at_start,
            fault: parking_lot::Mutex::default(),
            places: Mutex::default(),
            listing: parking_lot::Mutex::default(),
            unserved: parking_lot::Mutex::default(),
            notes: RateLimit::new(5, Duration::from_secs(60)),
        }
    }

    /// Returns the path of the folder.
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Returns true if the folder is in a store.
    pub(super) fn is_remote(&self) -> bool {
        is_url(self.path())
    }

    /// Returns the source for a file that is known to exist.
    pub(super) fn source(&self, name: &str) -> ArchiveSource {
        self.folder.source(name)
    }

    /// Returns the same folder, with no archive opened.
    pub(super) fn unopened(&self) -> Self {
        Self::with(self.folder.clone(), self.remote.clone(), self.at_start)
    }

    /// Checks that the folder can be read, and reads it if it has changed. Logs changes of the
    /// result. A folder in a store is checked when it is listed.
    pub(super) async fn check(self: &Arc<Self>) {
        if self.is_remote() {
            return;
        }
        let folder = Arc::clone(self);
        let checked = spawn_blocking(move || {
            match folder_access::open(folder.path(), folder.at_start) {
                // This notes a fault, too.
                Ok(()) if folder.has_changed() => drop(folder.read()),
                Ok(()) => folder.note_fault(None, log_fault),
                Err(error) => folder.note_fault(Some(&error), log_fault),
            }
        });
        // It fails only if the runtime is shutting down.
        checked.await.unwrap_or_default();
    }

    /// Returns true if the folder may have changed since it was last read. Blocking.
    fn has_changed(&self) -> bool {
        let before = self.listing.lock().as_ref().and_then(|listing| listing.modified);
        before.is_none() || before != modification_time(self.path())
    }

    /// Returns what is known about the folder without reading it.
    pub(super) fn status(&self) -> FolderStatus {
        let listing = self.listing.lock();
        let unserved = listing.iter().flat_map(|listing| &listing.unserved);
        FolderStatus {
            path: self.path().to_owned(),
            archives: listing.as_ref().map(|listing| listing.archives),
            unserved: unserved.map(|(name, why)| (name.clone(), why.label())).collect(),
            fault: self.fault(),
        }
    }

    /// Returns the fault of the last attempt to read the folder, if it failed.
    pub(super) fn fault(&self) -> Option<FolderFault> {
        *self.fault.lock()
    }

    /// Notes the fault, and reports it unless it is the one that is already known.
    fn note_fault(&self, error: Option<&FolderError>, report: impl FnOnce(&FolderError)) {
        let now = error.map(|error| error.cause);
        let mut fault = self.fault.lock();
        let before = std::mem::replace(&mut *fault, now);
        drop(fault);
        match error {
            _ if before == now => {}
            Some(error) => report(error),
            None => {
                let path = escape::name(self.path());
                tracing::info!("export folder {path} is readable again");
            }
        }
    }

    /// Returns the slot of a name, if the file exists.
    ///
    /// # Errors
    /// The reason for which there is none, for the operator.
    pub(super) async fn slot(&self, name: &str) -> Result<SnapshotSlot, NotFoundReason> {
        let (folder, wanted) = (self.folder.clone(), name.to_owned());
        let found = spawn_blocking(move || folder.find(&wanted)).await;
        let found = found.unwrap_or(Err(NotFoundReason::Unavailable));
        let mut places = self.places.lock().await;
        let source = found.inspect_err(|_| places.forget(name))?;
        places.touch(name);
        Ok(places.slots.entry(name.to_owned()).or_insert_with(|| SnapshotSlot::new(source)).clone())
    }

    /// Returns the names of the folder's archives, in order. Reads the folder once, however long it
    /// takes.
    ///
    /// # Errors
    /// The folder can't be read. This isn't logged, now or later: the caller reports it.
    pub(super) async fn names(self: &Arc<Self>) -> Result<Vec<String>, FolderError> {
        let folder = Arc::clone(self);
        match spawn_blocking(move || folder.read_reporting(|_| {})).await {
            Ok(read) => Ok(read?.into_iter().map(|(name, _)| name).collect()),
            // The runtime is shutting down.
            Err(error) => {
                let (path, error) = (self.path().to_owned(), io::Error::other(error));
                Err(FolderError { path, cause: FolderFault::Unreadable, error })
            }
        }
    }

    /// Returns the names and stamps of the folder's archives, ordered by name, and logs which
    /// files aren't served. Blocking.
    ///
    /// # Errors
    /// The folder can't be read; this is logged as well.
    pub(super) fn read(&self) -> Result<Vec<(String, Stamp)>, FolderError> {
        self.read_reporting(log_fault)
    }

    fn read_reporting(
        &self,
        report: impl FnOnce(&FolderError),
    ) -> Result<Vec<(String, Stamp)>, FolderError> {
        let modified = settled_modification_time(self.path());
        let content = self.folder.content(self.remote.as_deref());
        let content =
            content.map_err(|error| folder_access::explain(self.path(), self.at_start, error));
        self.note_fault(content.as_ref().err(), report);
        let content = content?;
        *self.listing.lock() = Some(Listing {
            archives: content.files.len(),
            unserved: content.unserved.clone(),
            modified,
        });
        self.note_unserved(content.unserved);
        Ok(content.files)
    }

    /// Returns true if the folder could have an archive of this name.
    pub(super) fn may_have(&self, name: &str) -> bool {
        self.folder.may_have(name)
    }

    /// Discards the slots of files that no longer exist.
    pub(super) async fn discard_missing(&self, files: &ServedFiles) {
        let mut places = self.places.lock().await;
        let names = places.slots.keys();
        let gone: Vec<String> =
            names.filter(|name| files.of_name(name).is_none()).cloned().collect();
        gone.iter().for_each(|name| places.forget(name));
    }

    /// Pairs each file with its slot, if a client has asked for it.
    pub(super) async fn with_slots(
        &self,
        files: impl Iterator<Item = (String, Stamp)>,
    ) -> Vec<(String, Stamp, Option<SnapshotSlot>)> {
        let places = self.places.lock().await;
        files
            .map(|(name, stamp)| {
                let slot = places.slots.get(&name).cloned();
                (name, stamp, slot)
            })
            .collect()
    }

    /// Logs the files that look like archives but aren't served, whenever their set changes.
    fn note_unserved(&self, unserved: Vec<(OsString, NotFoundReason)>) {
        /// Maximum number of files named in a log line.
        const NAMED: usize = 10;
        let mut known = self.unserved.lock();
        if *known == unserved {
            return;
        }
        let Some(held_back) = self.notes.allow() else { return };
        if !unserved.is_empty() {
            let names = unserved.iter().take(NAMED);
            let names: Vec<String> = names
                .map(|(name, missing)| format!("{} ({})", escape::name(name), missing.label()))
                .collect();
            let more = match unserved.len().saturating_sub(NAMED) {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            tracing::warn!(
                reason = "unserved_files",
                held_back = held_back.field(),
                files = unserved.len(),
                "export folder {} has files that aren't served: {}{more}",
                escape::name(self.path()),
                names.join(", "),
            );
        }
        *known = unserved;
    }

    /// Returns the slots of requested archives, ordered by name; empty if the lock is taken.
    pub(super) fn slots(&self) -> Vec<(String, SnapshotSlot)> {
        let Ok(places) = self.places.try_lock() else { return Vec::new() };
        let mut slots: Vec<_> =
            places.slots.iter().map(|(name, slot)| (name.clone(), slot.clone())).collect();
        slots.sort_by(|(one, _), (other, _)| one.cmp(other));
        slots
    }
}

fn log_fault(error: &FolderError) {
    tracing::error!(reason = error.cause.label(), "{error}");
}

fn modification_time(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|folder| folder.modified()).ok()
}

/// Returns the time of the folder's last change; `None` if another change could still get the same
/// time, since that is as coarse as two seconds on some file systems.
fn settled_modification_time(path: &Path) -> Option<SystemTime> {
    const GRANULARITY: Duration = Duration::from_secs(2);
    let modified = modification_time(path)?;
    modified.elapsed().is_ok_and(|age| age > GRANULARITY).then_some(modified)
}
