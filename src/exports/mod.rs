//! Names to exports: which archives are served, under which names, found when a client
//! asks for them.
//!
//! An archive that has been replaced on disk is opened anew for the next client; those
//! that read the old one go on reading it.

mod blocks;
mod comparisons;
mod decoders;
mod files;
mod in_folder;
mod listing;
mod named;
mod reach;
mod reader;
mod seen;
mod slot;
mod snapshot;
mod source;
mod striped;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::escape;
use crate::limited::RateLimit;
use crate::snapshot::{OpenOptions, Snapshot, StreamKind};
use files::{Files, LatestFiles, Looked};
use in_folder::InFolder;
use listing::Looks;
use named::NamedSlots;
pub use reach::{FolderError, FolderFault};
pub use reader::{BlockReader, Figures, UNREADABLE};
pub use seen::Seen;
use slot::{Slot, Unavailable};
pub use snapshot::{STATE_CHANGED, SnapshotExport};
pub use source::{Choice, Folder, Named, NamedError};
use source::{Missing, Source};

/// What is added to a snapshot's name for its auxiliary stream.
const AUXILIARY: &str = "/aux";

/// Why a catalogue can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// Two archives of the same name.
    #[error(
        "two archives would be the export {:?}: give one of them another name, NAME=PATH",
        escape::name(.0)
    )]
    SameName(String),
    /// The default export isn't among those that were named.
    #[error("the default export {:?} is none of those that are served", escape::name(.0))]
    NoSuchDefault(String),
}

/// The snapshots that are served.
#[derive(Debug)]
pub struct Catalog {
    named: NamedSlots,
    folder: Option<Arc<InFolder>>,
    default: Option<String>,
    options: OpenOptions,
    reader: Arc<BlockReader>,
    files: LatestFiles,
    looks: Arc<Looks>,
    /// Log lines about archives that can't be served; clients can cause them.
    failures: RateLimit,
}

impl Catalog {
    /// A catalogue of these archives. Nothing is opened yet.
    ///
    /// # Errors
    /// See [`CatalogError`].
    pub fn new(
        choice: Choice,
        options: OpenOptions,
        reader: Arc<BlockReader>,
    ) -> Result<Self, CatalogError> {
        let Choice { named, folder, default } = choice;
        let mut slots = NamedSlots::default();
        for Named { name, path } in named {
            slots.push(name, Slot::new(Source::Path(path)))?;
        }
        let default = match (default, &folder) {
            (None, None) if slots.len() == 1 => slots.get(0).map(|(only, _)| only.to_owned()),
            (Some(name), None) if slots.find(&name).is_none() => {
                return Err(CatalogError::NoSuchDefault(name));
            }
            (default, _) => default,
        };
        let folder = folder.map(InFolder::new).map(Arc::new);
        let options = OpenOptions { reads: Arc::clone(reader.reads()), ..options };
        Ok(Self {
            named: slots,
            folder,
            default,
            options,
            reader,
            files: LatestFiles::default(),
            looks: Arc::new(Looks::new()),
            failures: failures(),
        })
    }

    /// A catalogue of one snapshot that is open already.
    pub fn of_one(name: &str, snapshot: Snapshot, reader: Arc<BlockReader>) -> Self {
        let mut named = NamedSlots::default();
        // It is the only one, so none has its name.
        named.push(name.to_owned(), Slot::of(snapshot)).unwrap_or_default();
        Self {
            named,
            folder: None,
            default: Some(name.to_owned()),
            options: OpenOptions::default(),
            reader,
            files: LatestFiles::default(),
            looks: Arc::new(Looks::new()),
            failures: failures(),
        }
    }

    /// A catalogue of other archives, opened in the same way. Those that are in both stay as
    /// they are: what is open isn't opened anew. Blocks and index pages are kept where these
    /// ones are.
    ///
    /// # Errors
    /// See [`CatalogError`].
    pub fn choosing(&self, choice: Choice) -> Result<Self, CatalogError> {
        let mut chosen = Self::new(choice, self.options.clone(), Arc::clone(&self.reader))?;
        let known: HashMap<&Path, &Slot> =
            self.named.iter().map(|(_, slot)| (slot.path(), slot)).collect();
        for slot in chosen.named.slots_mut() {
            if let Some(known) = known.get(slot.path()) {
                *slot = (*known).clone();
            }
        }
        if let (Some(folder), Some(known)) = (&mut chosen.folder, &self.folder)
            && folder.path() == known.path()
        {
            *folder = Arc::clone(known);
        }
        chosen.looks = Arc::clone(&self.looks);
        Ok(chosen)
    }

    /// The same archives, but opened anew as `options` say, and so judged anew by their keys and
    /// digests. How blocks are verified and reads counted, and where blocks, index pages and hash
    /// trees are kept, stays.
    #[must_use]
    pub fn opened_as(&self, options: OpenOptions) -> Self {
        if let (Some(now), Some(before)) = (&options.digests, &self.options.digests) {
            now.remember(before);
        }
        Self {
            named: self.named.unopened(),
            folder: self.folder.as_ref().map(|folder| Arc::new(folder.unopened())),
            default: self.default.clone(),
            options: OpenOptions {
                verify_hashes: self.options.verify_hashes,
                index_pages: Arc::clone(&self.options.index_pages),
                digest_memory: self.options.digest_memory.clone(),
                reads: Arc::clone(&self.options.reads),
                background: Arc::clone(&self.options.background),
                ..options
            },
            reader: Arc::clone(&self.reader),
            files: LatestFiles::default(),
            looks: Arc::new(Looks::new()),
            failures: failures(),
        }
    }

    /// How archives are opened.
    pub fn options(&self) -> &OpenOptions {
        &self.options
    }

    /// What reads blocks for all exports.
    pub fn reader(&self) -> &Arc<BlockReader> {
        &self.reader
    }

    /// Opens those that were named: the exports that there are then, and for each that
    /// can't be opened why.
    pub async fn open_named(&self) -> (Vec<SnapshotExport>, Vec<crate::snapshot::Error>) {
        let mut failed = Vec::new();
        for (_, slot) in self.named.iter() {
            if let Err(Unavailable(Some(error))) = slot.open(&self.options).await {
                self.reader.count_unopened(&error);
                failed.push(error);
            }
        }
        let mut exports = Vec::new();
        for (name, slot) in self.named.iter() {
            exports.extend(self.exports_of(name, slot).await);
        }
        (exports, failed)
    }

    /// The exports that are open just now.
    pub(super) fn open_now(&self) -> Vec<SnapshotExport> {
        let in_folder = self.folder.as_deref().map(InFolder::slots).unwrap_or_default();
        let in_folder = in_folder.iter().map(|(name, slot)| (name.as_str(), slot));
        let in_folder = in_folder.filter(|(name, _)| !self.named.contains(name));
        let mut exports = Vec::new();
        for (name, slot) in self.named.iter().chain(in_folder) {
            if let Some(snapshot) = slot.latest() {
                exports.extend(self.streams(name, &snapshot));
            }
        }
        exports
    }

    /// Reason for which nothing can be opened: the folder couldn't be read the last time, and of
    /// the archives that were named none could be opened.
    pub(super) fn unready(&self) -> Option<&'static str> {
        if self.named.iter().any(|(_, slot)| !slot.has_failed()) {
            return None;
        }
        match &self.folder {
            Some(folder) => folder.fault().map(FolderFault::unready),
            None => Some("no export can be opened"),
        }
    }

    /// Number of descriptors that archives may take at once, not counting their parents.
    pub fn descriptors(&self) -> usize {
        self.named.len() + if self.folder.is_some() { in_folder::MAX_OPEN } else { 0 }
    }

    /// Looks whether the folder can be read, and which of its files aren't served. The log says
    /// so.
    ///
    /// # Errors
    /// It can't be read.
    pub async fn look_into_folder(&self) -> Result<(), FolderError> {
        match &self.folder {
            Some(folder) => folder.look().await,
            None => Ok(()),
        }
    }

    /// Looks whether the folder can be read, for [`Offer::unready`](crate::nbd::Offer::unready).
    /// The log says when that changes. Where the file system hangs, so does this.
    pub async fn check_folder(&self) {
        if let Some(folder) = &self.folder {
            folder.check().await;
        }
    }

    /// Whether there is an export of that canonical name just now.
    pub async fn has(&self, name: &str) -> bool {
        self.find_named(name).await.is_ok()
    }

    /// The snapshot of a place. Why there is none goes to the log.
    async fn open(&self, name: &str, slot: &Slot) -> Option<Arc<Snapshot>> {
        match slot.open(&self.options).await {
            Ok(snapshot) => Some(snapshot),
            Err(Unavailable(reason)) => {
                if let Some(error) = reason {
                    self.reader.count_unopened(&error);
                    if let Some(held_back) = self.failures.allow() {
                        let held_back = held_back.field();
                        let name = escape::name(name);
                        let (error, hint) = reach::with_hint(error).await;
                        tracing::error!(
                            held_back,
                            "the export {name:?} can't be served: {error}{hint}"
                        );
                    }
                }
                None
            }
        }
    }

    /// The files of all archives as they are now; `None` if they can't be looked at in time.
    async fn look(&self) -> Option<Arc<Files>> {
        let Looked { files, is_own } = self.files.look(&self.named, self.folder.as_ref()).await;
        // The log says why a folder can't be read. What is in it may be there all the same.
        if let Some(files) = files.as_ref().filter(|files| is_own && files.are_known()) {
            self.forget_others_than(files).await;
        }
        files
    }

    /// Lets go what is known of files that aren't there any more.
    async fn forget_others_than(&self, files: &Files) {
        let folder = self.folder.as_deref();
        if let Some(folder) = folder {
            folder.forget_others_than(files).await;
        }
        if self.looks.count() <= self.named.len() + files.in_folder().len() {
            return;
        }
        let named: HashSet<&Path> = self.named.iter().map(|(_, slot)| slot.path()).collect();
        let is_in_folder = |path: &Path| {
            let name = path.file_name().and_then(OsStr::to_str);
            path.parent() == folder.map(InFolder::path)
                && name.is_some_and(|name| files.of_name(name).is_some())
        };
        self.looks.forget(|path| named.contains(path) || is_in_folder(path));
    }

    /// The exports of one place: its main stream, and the auxiliary one if it has one.
    async fn exports_of(&self, name: &str, slot: &Slot) -> Vec<SnapshotExport> {
        match self.open(name, slot).await {
            Some(snapshot) => self.streams(name, &snapshot),
            None => Vec::new(),
        }
    }

    fn streams(&self, name: &str, snapshot: &Arc<Snapshot>) -> Vec<SnapshotExport> {
        let mut exports = vec![self.export(name, snapshot, StreamKind::Main)];
        if snapshot.size(StreamKind::Auxiliary) > 0 {
            exports.push(self.export(name, snapshot, StreamKind::Auxiliary));
        }
        exports
    }

    fn export(&self, name: &str, snapshot: &Arc<Snapshot>, stream: StreamKind) -> SnapshotExport {
        let name = stream_name(name, stream);
        SnapshotExport::new(name, Arc::clone(snapshot), stream, Arc::clone(&self.reader))
    }

    /// The export that a client calls `name`, or by no name.
    fn resolve<'a>(&'a self, name: &'a [u8]) -> Result<&'a str, Missing> {
        match name {
            [] => self.default.as_deref().ok_or(Missing::NoDefault),
            // Names that are no text are nobody's.
            name => str::from_utf8(name).map_err(|_| Missing::NotUtf8),
        }
    }

    async fn find_named(&self, name: &str) -> Result<SnapshotExport, Missing> {
        if let Some((name, slot, stream)) = self.named.find(name) {
            return self.find_stream(name, slot, stream).await;
        }
        let folder = self.folder.as_ref().ok_or(Missing::UnknownName)?;
        let missing = match folder.slot(name).await {
            Ok(slot) => return self.find_stream(name, &slot, StreamKind::Main).await,
            Err(missing) => missing,
        };
        let base = name.strip_suffix(AUXILIARY).ok_or(missing)?;
        let slot = folder.slot(base).await?;
        self.find_stream(base, &slot, StreamKind::Auxiliary).await
    }

    async fn find_stream(
        &self,
        name: &str,
        slot: &Slot,
        stream: StreamKind,
    ) -> Result<SnapshotExport, Missing> {
        let snapshot = self.open(name, slot).await.ok_or(Missing::Unavailable)?;
        if stream == StreamKind::Auxiliary && snapshot.size(stream) == 0 {
            return Err(Missing::NoAuxiliary);
        }
        Ok(self.export(name, &snapshot, stream))
    }
}

/// Enough to see what is wrong; clients can ask for what is broken as often as they like.
fn failures() -> RateLimit {
    RateLimit::new(100, Duration::from_secs(1))
}

/// Which stream of the snapshot `snapshot` the export `name` is, if any.
fn stream_of(name: &str, snapshot: &str) -> Option<StreamKind> {
    match name.strip_prefix(snapshot)? {
        "" => Some(StreamKind::Main),
        AUXILIARY => Some(StreamKind::Auxiliary),
        _ => None,
    }
}

/// What the auxiliary stream of a snapshot is called.
fn auxiliary(snapshot: &str) -> String {
    format!("{snapshot}{AUXILIARY}")
}

/// Name of a snapshot's stream as an export.
fn stream_name(snapshot: &str, stream: StreamKind) -> String {
    match stream {
        StreamKind::Main => snapshot.to_owned(),
        StreamKind::Auxiliary => auxiliary(snapshot),
    }
}

/// A path's last part, as it is shown to clients.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
