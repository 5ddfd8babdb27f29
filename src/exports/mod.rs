//! Names to exports: which archives are served, under which names, found when a client
//! asks for them.
//!
//! An archive that has been replaced on disk is opened anew for the next client; those
//! that read the old one go on reading it.

mod blocks;
mod decoders;
mod in_folder;
mod reach;
mod reader;
mod seen;
mod slot;
mod snapshot;
mod source;
mod striped;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::escape;
use crate::limited::RateLimit;
use crate::nbd::{Export, Listing, MayOpen};
use crate::snapshot::{OpenOptions, Reference, Snapshot, StreamKind};
use in_folder::InFolder;
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
    named: Vec<(String, Slot)>,
    folder: Option<Arc<InFolder>>,
    default: Option<String>,
    options: OpenOptions,
    reader: Arc<BlockReader>,
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
        let mut slots: Vec<(String, Slot)> = Vec::with_capacity(named.len());
        for Named { name, path } in named {
            for (other, _) in &slots {
                // The one's auxiliary stream may be what the other one is called.
                if stream_of(&name, other).is_some() {
                    return Err(CatalogError::SameName(name));
                }
                if stream_of(other, &name).is_some() {
                    return Err(CatalogError::SameName(other.clone()));
                }
            }
            slots.push((name, Slot::new(Source::Path(path))));
        }
        let default = match (default, slots.as_slice(), &folder) {
            (None, [(only, _)], None) => Some(only.clone()),
            (Some(name), slots, None)
                if !slots.iter().any(|(slot, _)| stream_of(&name, slot).is_some()) =>
            {
                return Err(CatalogError::NoSuchDefault(name));
            }
            (default, ..) => default,
        };
        let folder = folder.map(InFolder::new).map(Arc::new);
        let options = OpenOptions { reads: Arc::clone(reader.reads()), ..options };
        Ok(Self { named: slots, folder, default, options, reader, failures: failures() })
    }

    /// A catalogue of one snapshot that is open already.
    pub fn of_one(name: &str, snapshot: Snapshot, reader: Arc<BlockReader>) -> Self {
        Self {
            named: vec![(name.to_owned(), Slot::of(snapshot))],
            folder: None,
            default: Some(name.to_owned()),
            options: OpenOptions::default(),
            reader,
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
        for (_, slot) in &mut chosen.named {
            if let Some(known) = known.get(slot.path()) {
                *slot = (*known).clone();
            }
        }
        if let (Some(folder), Some(known)) = (&mut chosen.folder, &self.folder)
            && folder.path() == known.path()
        {
            *folder = Arc::clone(known);
        }
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
        let again = |(name, slot): &(String, Slot)| (name.clone(), slot.unopened());
        Self {
            named: self.named.iter().map(again).collect(),
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
        for (_, slot) in &self.named {
            if let Err(Unavailable(Some(error))) = slot.open(&self.options).await {
                self.reader.count_unopened(&error);
                failed.push(error);
            }
        }
        let mut exports = Vec::new();
        for (name, slot) in &self.named {
            exports.extend(self.exports_of(name, slot).await);
        }
        (exports, failed)
    }

    /// The exports that are open just now.
    pub(super) fn open_now(&self) -> Vec<SnapshotExport> {
        let in_folder = self.folder.as_deref().map(InFolder::slots).unwrap_or_default();
        let is_named = |name: &String| self.named.iter().any(|(named, _)| named == name);
        let in_folder = in_folder.into_iter().filter(|(name, _)| !is_named(name));
        let mut exports = Vec::new();
        for (name, slot) in self.named.iter().cloned().chain(in_folder) {
            if let Some(snapshot) = slot.latest() {
                exports.extend(self.streams(&name, &snapshot));
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
            Some(folder) => folder.names().await.map(|_| ()),
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

    /// What LIST says, in its order, of the exports that may be opened.
    async fn list(&self, may_open: &MayOpen) -> Vec<Listing> {
        let listings = async |name: &str, slot: &Slot| {
            let exports = self.exports_of(name, slot).await;
            exports.iter().map(SnapshotExport::listing).collect::<Vec<_>>()
        };
        let sees = |name: &str| may_open.allows(name) || may_open.allows(&auxiliary(name));
        let mut all = Vec::new();
        for (name, slot) in self.named.iter().filter(|(name, _)| sees(name)) {
            all.extend(listings(name, slot).await);
        }
        if let Some(folder) = &self.folder {
            // The log says why it can't be read.
            let names = folder.names().await.unwrap_or_default();
            let is_named = |name: &String| self.named.iter().any(|(named, _)| named == name);
            for name in names.into_iter().filter(|name| !is_named(name) && sees(name)) {
                let make = async |slot: &Slot| listings(&name, slot).await;
                all.extend(folder.listing(&name, make).await);
            }
        }
        all.retain(|listing| may_open.allows(&listing.name));
        all
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
        let name = match stream {
            StreamKind::Main => name.to_owned(),
            StreamKind::Auxiliary => auxiliary(name),
        };
        SnapshotExport::new(name, Arc::clone(snapshot), stream, Arc::clone(&self.reader))
    }

    /// What an export can be compared with, by names that mean the same to clients when they
    /// ask for an export. What a client may not open it can't compare with either.
    async fn references(
        &self,
        export: &SnapshotExport,
        may_open: &MayOpen,
    ) -> Vec<(String, Reference)> {
        let snapshot = export.snapshot();
        let is_itself = |name: &str| stream_of(export.name(), name).is_some();
        let mut references = Vec::new();
        let others = self.named.iter().filter(|(other, _)| !is_itself(other));
        for (other, slot) in others.filter(|(other, _)| may_open.allows(other)) {
            if let Some(snapshot) = slot.current().await {
                let itself = snapshot.references().into_iter().next();
                references.extend(itself.map(|reference| (other.clone(), reference)));
            }
        }
        for (path, reference) in snapshot.parents().zip(snapshot.references().into_iter().skip(1)) {
            let parent = file_name(path);
            if !may_open.allows(&parent) {
                continue;
            }
            // Another archive may be served under the parent's name.
            let is_free = !self.named.iter().any(|(named, _)| *named == parent)
                && match &self.folder {
                    Some(folder) => folder.agrees(&parent, path.to_owned()).await,
                    None => true,
                };
            if is_free {
                references.push((parent, reference));
            }
        }
        references
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
        for (slot_name, slot) in &self.named {
            if let Some(stream) = stream_of(name, slot_name) {
                return self.find_stream(slot_name, slot, stream).await;
            }
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

/// A path's last part, as it is shown to clients.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}
