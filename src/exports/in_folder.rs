//! The snapshots of a folder: few are kept open, and what LIST says of the others is
//! remembered.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{self, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::reach::{self, FolderError, FolderFault, FolderId};
use super::slot::Slot;
use super::source::{Folder, Missing};
use crate::escape;
use crate::limited::RateLimit;
use crate::nbd::Listing;
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
    /// What LIST said of a file as it was then.
    listed: HashMap<String, (Option<FileStamp>, Vec<Listing>)>,
}

impl Places {
    fn forget(&mut self, name: &str) {
        self.slots.remove(name);
        self.listed.remove(name);
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

    /// The names of its archives, in order.
    ///
    /// # Errors
    /// The folder can't be read, which the log says.
    pub(super) async fn names(&self) -> Result<Vec<String>, FolderError> {
        let (folder, at_start) = (self.folder.clone(), self.at_start);
        let listed = spawn_blocking(move || {
            folder.content().map_err(|error| reach::explain(folder.path(), at_start, error))
        });
        let listed = match listed.await {
            Ok(listed) => listed,
            // The program is ending.
            Err(error) => {
                let (path, error) = (self.path().to_owned(), io::Error::other(error));
                return Err(FolderError { path, cause: FolderFault::Unreadable, error });
            }
        };
        self.note_fault(listed.as_ref().err());
        let content = listed?;
        self.note_unserved(content.unserved);
        let names = content.names;
        let mut places = self.places.lock().await;
        let there: HashSet<&String> = names.iter().collect();
        let gone: Vec<String> =
            places.slots.keys().filter(|name| !there.contains(name)).cloned().collect();
        gone.iter().for_each(|name| places.forget(name));
        Ok(names)
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

    /// What LIST says of a file: what it said the last time, or what `make` finds out.
    pub(super) async fn listing(
        &self,
        name: &str,
        make: impl AsyncFnOnce(&Slot) -> Vec<Listing>,
    ) -> Vec<Listing> {
        let known = {
            let places = self.places.lock().await;
            places.slots.get(name).cloned().zip(places.listed.get(name).cloned())
        };
        if let Some((slot, (stamp, listings))) = known
            && slot.stamp().await == stamp
        {
            return listings;
        }
        let Ok(slot) = self.slot(name).await else { return Vec::new() };
        let stamp = slot.stamp().await;
        let listings = make(&slot).await;
        // What can't be opened now may be later, though the file is the same.
        if !listings.is_empty() {
            let listed = (stamp, listings.clone());
            self.places.lock().await.listed.insert(name.to_owned(), listed);
        }
        listings
    }

    /// Whether the file at `path` is what clients get here under `name`, or they get
    /// nothing under it.
    pub(super) async fn agrees(&self, name: &str, path: PathBuf) -> bool {
        let here = self.folder.path().join(name);
        let agrees = spawn_blocking(move || {
            FileStamp::of(&here).is_none_or(|stamp| Some(stamp) == FileStamp::of(&path))
        });
        agrees.await.unwrap_or(false)
    }
}
