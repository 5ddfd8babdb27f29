//! Maps export names to archives.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use super::files::{RefreshOutcome, ServedFiles, ServedFilesCache};
use super::folder_access::{FolderError, FolderFault};
use super::folder_slots::{self, FolderSlots};
use super::inspection::Inspections;
use super::named::NamedSlots;
use super::reader::BlockReader;
use super::slot::{OpenError, SlotUnavailable, SnapshotSlot};
use super::snapshot::SnapshotExport;
use super::source::{ArchiveSource, ExportSelection, NamedArchive, NotFoundReason};
use hexz_reader::storage::is_url;
use hexz_reader::{OpenOptions, Snapshot, StreamKind};
use nbd_telemetry::RateLimit;
use nbd_telemetry::escape;

/// Maximum number of archives that are opened concurrently at start, if some are remote.
const MAX_CONCURRENT_OPENS: usize = 16;

/// Suffix of a snapshot's name that selects its auxiliary stream.
pub(super) const AUXILIARY_SUFFIX: &str = "/aux";

/// Reason for which a catalog can't be created.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// Two archives have the same export name.
    #[error(
        "two archives have the export name {:?}: give one of them another one (NAME=PATH)",
        escape::name(.0)
    )]
    SameName(String),
    /// The default export isn't one of the named archives.
    #[error("the default export {:?} isn't among the served exports", escape::name(.0))]
    NoSuchDefault(String),
}

impl CatalogError {
    /// Returns a stable label for logs and programs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::SameName(_) => "duplicate_export",
            Self::NoSuchDefault(_) => "unknown_default_export",
        }
    }
}

/// Result of opening each archive of a folder.
#[derive(Debug, Default)]
pub struct FolderTrial {
    /// Number of archives.
    pub archives: usize,
    /// Names of the archives that can't be opened, with the errors, in order.
    pub failed: Vec<(String, hexz_reader::Error)>,
}

/// The registry of served snapshots.
///
/// ```no_run
/// use std::sync::Arc;
///
/// use hexz_exports::{BlockReader, Catalog, ExportFolder, ExportSelection};
/// use hexz_reader::OpenOptions;
/// use nbd_server::{AccessFilter, ExportCatalog, Exports};
///
/// # async fn example() -> Result<(), hexz_exports::CatalogError> {
/// let folder = Some(ExportFolder::new("/srv/archives".into()));
/// let selection = ExportSelection { folder, ..ExportSelection::default() };
/// let reader = BlockReader::new(512 << 20);
/// let catalog = Arc::new(Catalog::new(selection, OpenOptions::default(), reader)?);
/// // Each client gets a view of the exports that it may open.
/// let exports = catalog.view_for(AccessFilter::allow_all());
/// let disk = exports.find(b"disk.hxz").await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Catalog {
    pub(super) named: NamedSlots,
    pub(super) folder: Option<Arc<FolderSlots>>,
    pub(super) default: Option<String>,
    pub(super) options: OpenOptions,
    pub(super) reader: Arc<BlockReader>,
    pub(super) files: ServedFilesCache,
    pub(super) inspections: Arc<Inspections>,
    /// Rate limit for log lines about archives that can't be served, since clients can cause
    /// them.
    pub(super) failure_log_limit: RateLimit,
}

impl Catalog {
    /// Creates a catalog of the chosen archives without opening any.
    ///
    /// # Errors
    /// See [`CatalogError`].
    pub fn new(
        choice: ExportSelection,
        options: OpenOptions,
        reader: Arc<BlockReader>,
    ) -> Result<Self, CatalogError> {
        let ExportSelection { named, folder, default } = choice;
        let mut slots = NamedSlots::default();
        for NamedArchive { name, path } in named {
            slots.push(name, SnapshotSlot::new(ArchiveSource::Path(path)))?;
        }
        let default = match (default, &folder) {
            (None, None) if slots.len() == 1 => slots.get(0).map(|(only, _)| only.to_owned()),
            (Some(name), None) if slots.find(&name).is_none() => {
                return Err(CatalogError::NoSuchDefault(name));
            }
            (default, _) => default,
        };
        let folder =
            folder.map(|folder| Arc::new(FolderSlots::new(folder, options.remote.clone())));
        let options = OpenOptions { read_counters: Arc::clone(reader.reads()), ..options };
        Ok(Self::of(slots, folder, default, options, reader))
    }

    /// Creates a catalog of one snapshot that has been opened with `options`. If its file is
    /// replaced, it is reopened with the same options.
    pub fn with_snapshot(
        name: &str,
        snapshot: Snapshot,
        options: OpenOptions,
        reader: Arc<BlockReader>,
    ) -> Self {
        let mut named = NamedSlots::default();
        // This can't fail: no other archive can have the same name.
        named.push(name.to_owned(), SnapshotSlot::of(snapshot)).unwrap_or_default();
        let options = OpenOptions { read_counters: Arc::clone(reader.reads()), ..options };
        Self::of(named, None, Some(name.to_owned()), options, reader)
    }

    fn of(
        named: NamedSlots,
        folder: Option<Arc<FolderSlots>>,
        default: Option<String>,
        options: OpenOptions,
        reader: Arc<BlockReader>,
    ) -> Self {
        Self {
            named,
            folder,
            default,
            options,
            reader,
            files: ServedFilesCache::default(),
            inspections: Arc::new(Inspections::new()),
            failure_log_limit: failure_log_limit(),
        }
    }

    /// Creates a catalog of another choice of archives, with the same open options, block cache
    /// and index page cache. Archives that are in both catalogs keep their slots, so those that
    /// are open stay open.
    ///
    /// # Errors
    /// See [`CatalogError`].
    pub fn with_selection(&self, choice: ExportSelection) -> Result<Self, CatalogError> {
        let mut chosen = Self::new(choice, self.options.clone(), Arc::clone(&self.reader))?;
        let known: HashMap<&Path, &SnapshotSlot> =
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
        chosen.inspections = Arc::clone(&self.inspections);
        Ok(chosen)
    }

    /// Creates a catalog of the same archives that are reopened with `options`, and so checked
    /// again against the keys and digests in `options`. Hash verification, read counters, and the
    /// caches of blocks, index pages and hash trees are kept.
    #[must_use]
    pub fn reopened_with(&self, options: OpenOptions) -> Self {
        if let (Some(now), Some(before)) = (&options.digests, &self.options.digests) {
            now.reuse_hashes_of(before);
        }
        let folder = self.folder.as_ref().map(|folder| Arc::new(folder.unopened()));
        let options = OpenOptions {
            verify_hashes: self.options.verify_hashes,
            index_pages: Arc::clone(&self.options.index_pages),
            digest_memory: self.options.digest_memory.clone(),
            read_counters: Arc::clone(&self.options.read_counters),
            log_limit: Arc::clone(&self.options.log_limit),
            background: Arc::clone(&self.options.background),
            remote: self.options.remote.clone(),
            ..options
        };
        let reader = Arc::clone(&self.reader);
        Self::of(self.named.unopened(), folder, self.default.clone(), options, reader)
    }

    /// Returns the options with which archives are opened.
    pub fn options(&self) -> &OpenOptions {
        &self.options
    }

    /// Returns the block reader shared by all exports.
    pub fn reader(&self) -> &Arc<BlockReader> {
        &self.reader
    }

    /// Opens the named archives. Returns the resulting exports, and an error for each archive
    /// that can't be opened.
    pub async fn open_named(&self) -> (Vec<SnapshotExport>, Vec<hexz_reader::Error>) {
        let slots = self.named.iter().map(|(name, slot)| (name.to_owned(), slot.clone()));
        let failed = self.open_all(slots.collect()).await;
        let failed = failed.into_iter().map(|(_, error)| error);
        let count =
            |error: &hexz_reader::Error| self.reader.counters.open_failures.count(error.label());
        let failed = failed.inspect(count).collect();
        let mut exports = Vec::new();
        for (name, slot) in self.named.iter() {
            exports.extend(self.exports_of(name, slot).await);
        }
        (exports, failed)
    }

    /// Returns the exports of the snapshots that are open, without opening any.
    pub(super) fn open_exports(&self) -> Vec<SnapshotExport> {
        let in_folder = self.folder.as_deref().map(FolderSlots::slots).unwrap_or_default();
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

    /// Returns the reason for which clients are to wait, if there is one: the first archives are
    /// being prefetched, or none can be opened, since no named one could be and the folder couldn't
    /// be read the last time or isn't configured.
    pub(super) fn unready(&self) -> Option<&'static str> {
        if self.reader.prefetcher.as_ref().is_some_and(|prefetcher| prefetcher.is_warming_up()) {
            return Some("warming up");
        }
        if self.named.iter().any(|(_, slot)| !slot.has_failed()) {
            return None;
        }
        match &self.folder {
            Some(folder) => folder.fault().and_then(FolderFault::unready),
            None => Some("no export can be opened"),
        }
    }

    /// Returns the maximum number of descriptors that archives take at once, not counting their
    /// parents.
    pub fn descriptors(&self) -> usize {
        self.named.len() + if self.folder.is_some() { folder_slots::MAX_OPEN } else { 0 }
    }

    /// Returns the names of the folder's archives, in order, and logs which of its files aren't
    /// served. Without a folder, there are none.
    ///
    /// # Errors
    /// The folder can't be read.
    pub async fn read_folder(&self) -> Result<Vec<String>, FolderError> {
        match &self.folder {
            Some(folder) => folder.names().await,
            None => Ok(Vec::new()),
        }
    }

    /// Opens each archive of the folder, as a client's request would, and closes it again. Returns
    /// the number of archives that are served, and the name of each that can't be opened with the
    /// error. Takes as long as opening all of them, which includes hashing them if there are
    /// digests.
    ///
    /// # Errors
    /// The folder can't be read.
    pub async fn try_folder(&self) -> Result<FolderTrial, FolderError> {
        let mut names = self.read_folder().await?;
        // A named archive hides a file of its name.
        names.retain(|name| !self.named.contains(name));
        let archives = names.len();
        let Some(folder) = &self.folder else { return Ok(FolderTrial::default()) };
        let slots = names.into_iter().map(|name| {
            let slot = SnapshotSlot::new(folder.source(&name));
            (name, slot)
        });
        Ok(FolderTrial { archives, failed: self.open_all(slots.collect()).await })
    }

    /// Opens each slot. Returns the names of those that can't be opened, with the errors, in order.
    async fn open_all(
        &self,
        slots: Vec<(String, SnapshotSlot)>,
    ) -> Vec<(String, hexz_reader::Error)> {
        // One local archive at a time: hashing one and deriving its key keep all cores busy.
        let has_remote = slots.iter().any(|(_, slot)| is_url(slot.path()));
        let concurrency = if has_remote { MAX_CONCURRENT_OPENS } else { 1 };
        let open = |(name, slot): (String, SnapshotSlot)| {
            let (options, reader) = (self.options.clone(), Arc::clone(&self.reader));
            async move {
                match slot.open(&options, &reader).await {
                    Err(SlotUnavailable(Some(failure))) => Some((name, failure.error)),
                    Ok(_) | Err(SlotUnavailable(None)) => None,
                }
            }
        };
        let opened = futures_util::stream::iter(slots).map(open).buffered(concurrency);
        opened.filter_map(std::future::ready).collect().await
    }

    /// Returns true if an export of this name could exist: it is named, or the folder could have a
    /// file that is called like that.
    pub fn may_have(&self, name: &str) -> bool {
        let base = name.strip_suffix(AUXILIARY_SUFFIX).unwrap_or(name);
        let in_folder = |folder: &Arc<FolderSlots>| folder.may_have(base);
        self.named.find(name).is_some() || self.folder.as_ref().is_some_and(in_folder)
    }

    /// Checks that the folder can be read, for
    /// [`ExportCatalog::unready_reason`](nbd_server::ExportCatalog::unready_reason), reads it if it
    /// has changed, and forgets failures to open files that have changed since.
    /// Logs changes of the result. Blocks for as long as the file system hangs.
    pub async fn check_folder(&self) {
        if let Some(folder) = &self.folder {
            folder.check().await;
        }
        self.forget_outdated_failures().await;
    }

    /// Returns true if an export of this canonical name can be opened.
    pub async fn has(&self, name: &str) -> bool {
        self.find_named(name).await.is_ok()
    }

    /// Opens the snapshot of a slot. Logs why it can't be opened.
    async fn open(&self, name: &str, slot: &SnapshotSlot) -> Option<Arc<Snapshot>> {
        match slot.open(&self.options, &self.reader).await {
            Ok(snapshot) => Some(snapshot),
            Err(SlotUnavailable(reason)) => {
                if let Some(OpenError { error, hint }) = reason {
                    self.reader.counters.open_failures.count(error.label());
                    if let Some(held_back) = self.failure_log_limit.allow() {
                        tracing::error!(
                            reason = error.label(),
                            hint,
                            held_back = held_back.field(),
                            "export {:?} can't be served: {error}",
                            escape::name(name),
                        );
                    }
                }
                None
            }
        }
    }

    /// Reads the metadata of all archives' files. Returns `None` on a timeout.
    pub(super) async fn look(&self) -> Option<Arc<ServedFiles>> {
        let RefreshOutcome { files, is_leader } =
            self.files.look(&self.named, self.folder.as_ref(), &self.options).await;
        // The log says why a folder can't be read. Its files may still exist, so nothing is
        // discarded.
        if let Some(files) = files.as_ref().filter(|files| is_leader && files.are_known()) {
            self.discard_missing(files).await;
        }
        files
    }

    /// Discards what is remembered of files that no longer exist.
    async fn discard_missing(&self, files: &ServedFiles) {
        let folder = self.folder.as_deref();
        if let Some(folder) = folder {
            folder.discard_missing(files).await;
        }
        if self.inspections.count() <= self.named.len() + files.in_folder().len() {
            return;
        }
        let named: HashSet<&Path> = self.named.iter().map(|(_, slot)| slot.path()).collect();
        let is_in_folder = |path: &Path| {
            let name = path.file_name().and_then(OsStr::to_str);
            path.parent() == folder.map(FolderSlots::path)
                && name.is_some_and(|name| files.of_name(name).is_some())
        };
        self.inspections.retain(|path| named.contains(path) || is_in_folder(path));
    }

    /// Opens a slot and returns its exports: the main stream, and the auxiliary stream if it
    /// isn't empty.
    async fn exports_of(&self, name: &str, slot: &SnapshotSlot) -> Vec<SnapshotExport> {
        match self.open(name, slot).await {
            Some(snapshot) => self.streams(name, &snapshot),
            None => Vec::new(),
        }
    }

    pub(super) fn streams(&self, name: &str, snapshot: &Arc<Snapshot>) -> Vec<SnapshotExport> {
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

    /// Resolves the name that a client sent; an empty name means the default export.
    pub(super) fn resolve<'a>(&'a self, name: &'a [u8]) -> Result<&'a str, NotFoundReason> {
        match name {
            [] => self.default.as_deref().ok_or(NotFoundReason::NoDefault),
            // Export names are UTF-8, so other bytes can't match one.
            name => str::from_utf8(name).map_err(|_| NotFoundReason::NotUtf8),
        }
    }

    pub(super) async fn find_named(&self, name: &str) -> Result<SnapshotExport, NotFoundReason> {
        if let Some((name, slot, stream)) = self.named.find(name) {
            return self.find_stream(name, slot, stream).await;
        }
        let folder = self.folder.as_ref().ok_or(NotFoundReason::UnknownName)?;
        let missing = match folder.slot(name).await {
            Ok(slot) => return self.find_stream(name, &slot, StreamKind::Main).await,
            Err(missing) => missing,
        };
        let base = name.strip_suffix(AUXILIARY_SUFFIX).ok_or(missing)?;
        let slot = folder.slot(base).await?;
        self.find_stream(base, &slot, StreamKind::Auxiliary).await
    }

    async fn find_stream(
        &self,
        name: &str,
        slot: &SnapshotSlot,
        stream: StreamKind,
    ) -> Result<SnapshotExport, NotFoundReason> {
        let snapshot = self.open(name, slot).await.ok_or(NotFoundReason::Unavailable)?;
        if stream == StreamKind::Auxiliary && snapshot.size(stream) == 0 {
            return Err(NotFoundReason::NoAuxiliary);
        }
        Ok(self.export(name, &snapshot, stream))
    }
}

/// Returns the rate limit for failures: enough to see what is wrong, though clients can ask for a
/// broken archive as often as they like.
pub(super) fn failure_log_limit() -> RateLimit {
    RateLimit::new(100, Duration::from_secs(1))
}

/// Returns the stream of `snapshot` that is served as the export `name`, if any.
pub(super) fn stream_of(name: &str, snapshot: &str) -> Option<StreamKind> {
    match name.strip_prefix(snapshot)? {
        "" => Some(StreamKind::Main),
        AUXILIARY_SUFFIX => Some(StreamKind::Auxiliary),
        _ => None,
    }
}

/// Returns the export name of a snapshot's auxiliary stream.
pub(super) fn auxiliary_name(snapshot: &str) -> String {
    format!("{snapshot}{AUXILIARY_SUFFIX}")
}

/// Returns the export name of a snapshot's stream.
pub(super) fn stream_name(snapshot: &str, stream: StreamKind) -> String {
    match stream {
        StreamKind::Main => snapshot.to_owned(),
        StreamKind::Auxiliary => auxiliary_name(snapshot),
    }
}
