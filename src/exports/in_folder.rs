//! The snapshots of a folder, of which few are kept open.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::{self, Arc, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::files::Files;
use super::reach::{self, FolderError, FolderFault, FolderId};
use super::slot::Slot;
use super::source::{Folder, Missing, Source};
use crate::escape;
use crate::limited::RateLimit;
use crate::storage::FileStamp;

/// Snapshots that are kept open, at most: each takes some descriptors.
pub(super) const MAX_OPEN: usize = 128;

/// A folder's places for snapshots.
#[derive(Debug)]
pub(super) struct InFolder {
    folder: Folder,
    /// The folder as it was at the start, which is what the sandbox admits.
    at_start: Option<FolderId>,
    /// Cause for which it couldn't be read the last time, if it couldn't.
    fault: sync::Mutex<Option<FolderFault>>,
    places: Mutex<Places>,
    /// Files that the log has named as not being served.
    unserved: sync::Mutex<Vec<(OsString, Missing)>>,
    /// Log lines about them.
    notes: RateLimit,
}

#[derive(Debug, Default)]
struct Places {
    slots: HashMap<String, Slot>,
    /// Names of those that may be open, the one that was asked for last at the end.
    open: VecDeque<String>,
}

impl Places {
    fn forget(&mut self, name: &str) {
        self.slots.remove(name);
        self.open.retain(|other| other != name);
    }

    /// Makes `name` the one that was asked for last. The one that nobody has asked for the
    /// longest is closed if there are too many; whoever reads it goes on.
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

impl InFolder {
    pub(super) fn new(folder: Folder) -> Self {
        let at_start = FolderId::of(folder.path());
        Self::with(folder, at_start)
    }

    fn with(folder: Folder, at_start: Option<FolderId>) -> Self {
        Self {
            folder,
            at_start,
            fault: sync::Mutex::default(),
            places: Mutex::default(),
            unserved: sync::Mutex::default(),
            notes: RateLimit::new(5, Duration::from_secs(60)),
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The file of that name, which is known to be there.
    pub(super) fn source(&self, name: &str) -> Source {
        self.folder.source(name)
    }

    /// The same folder, of which nothing has been opened.
    pub(super) fn unopened(&self) -> Self {
        Self::with(self.folder.clone(), self.at_start)
    }

    /// Looks whether the folder can be read. The log says when that changes.
    pub(super) async fn check(&self) {
        let (path, at_start) = (self.path().to_owned(), self.at_start);
        match spawn_blocking(move || reach::open(&path, at_start)).await {
            Ok(Ok(())) => self.note_fault(None),
            Ok(Err(error)) => self.note_fault(Some(&error)),
            // The program is ending.
            Err(_) => {}
        }
    }

    /// Cause for which it couldn't be read the last time, if it couldn't.
    pub(super) fn fault(&self) -> Option<FolderFault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_fault(&self, error: Option<&FolderError>) {
        let now = error.map(|error| error.cause);
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *fault, now);
        drop(fault);
        match error {
            _ if before == now => {}
            Some(error) => tracing::error!(reason = error.cause.label(), "{error}"),
            None => {
                let path = escape::name(self.path());
                tracing::info!("the export folder {path} can be read again");
            }
        }
    }

    /// Returns the place for a name, if there is such a file.
    ///
    /// # Errors
    /// [`Missing`], for the operator.
    pub(super) async fn slot(&self, name: &str) -> Result<Slot, Missing> {
        let (folder, wanted) = (self.folder.clone(), name.to_owned());
        let found = spawn_blocking(move || folder.find(&wanted)).await;
        let found = found.unwrap_or(Err(Missing::Unavailable));
        let mut places = self.places.lock().await;
        let source = found.inspect_err(|_| places.forget(name))?;
        places.touch(name);
        Ok(places.slots.entry(name.to_owned()).or_insert_with(|| Slot::new(source)).clone())
    }

    /// Reads the folder once, however long that takes.
    ///
    /// # Errors
    /// See [`read`](Self::read).
    pub(super) async fn look(self: &Arc<Self>) -> Result<(), FolderError> {
        let folder = Arc::clone(self);
        match spawn_blocking(move || folder.read()).await {
            Ok(read) => read.map(|_| ()),
            // The program is ending.
            Err(error) => {
                let (path, error) = (self.path().to_owned(), io::Error::other(error));
                Err(FolderError { path, cause: FolderFault::Unreadable, error })
            }
        }
    }

    /// Returns names and stamps of its archives, ordered by name. It blocks. The log says which
    /// files aren't served.
    ///
    /// # Errors
    /// The folder can't be read, which the log says.
    pub(super) fn read(&self) -> Result<Vec<(String, FileStamp)>, FolderError> {
        let content = self.folder.content();
        let content = content.map_err(|error| reach::explain(self.path(), self.at_start, error));
        self.note_fault(content.as_ref().err());
        let content = content?;
        self.note_unserved(content.unserved);
        Ok(content.files)
    }

    /// Forgets places whose files aren't there any more.
    pub(super) async fn forget_others_than(&self, files: &Files) {
        let mut places = self.places.lock().await;
        let names = places.slots.keys();
        let gone: Vec<String> =
            names.filter(|name| files.of_name(name).is_none()).cloned().collect();
        gone.iter().for_each(|name| places.forget(name));
    }

    /// Adds to some files the places of those that have been asked for.
    pub(super) async fn with_slots(
        &self,
        files: impl Iterator<Item = (String, FileStamp)>,
    ) -> Vec<(String, FileStamp, Option<Slot>)> {
        let places = self.places.lock().await;
        files
            .map(|(name, stamp)| {
                let slot = places.slots.get(&name).cloned();
                (name, stamp, slot)
            })
            .collect()
    }

    /// Logs which files aren't served though they are called like archives, whenever others are.
    fn note_unserved(&self, unserved: Vec<(OsString, Missing)>) {
        /// Files that a line names.
        const NAMED: usize = 10;
        let mut known = self.unserved.lock().unwrap_or_else(PoisonError::into_inner);
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
                held_back = held_back.field(),
                files = unserved.len(),
                "the export folder {} has files that aren't served: {}{more}",
                escape::name(self.path()),
                names.join(", "),
            );
        }
        *known = unserved;
    }

    /// Places that have been asked for, by name; none if somebody is changing them just now.
    pub(super) fn slots(&self) -> Vec<(String, Slot)> {
        let Ok(places) = self.places.try_lock() else { return Vec::new() };
        let mut slots: Vec<_> =
            places.slots.iter().map(|(name, slot)| (name.clone(), slot.clone())).collect();
        slots.sort_by(|(one, _), (other, _)| one.cmp(other));
        slots
    }
}
