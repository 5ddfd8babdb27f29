//! Names to exports: which archives are served, under which names, found when a client
//! asks for them.
//!
//! An archive that has been replaced on disk is opened anew for the next client; those
//! that read the old one go on reading it.

mod reader;
mod snapshot;
mod source;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::nbd::Exports;
use crate::snapshot::{OpenOptions, Snapshot, StreamKind};
pub use reader::BlockReader;
pub use snapshot::{STATE_CHANGED, SnapshotExport};
use source::Source;
pub use source::{Folder, Named, NamedError};

/// What is added to a snapshot's name for its auxiliary stream.
const AUXILIARY: &str = "/aux";

/// Snapshots of a folder that are kept open, at most: each takes some descriptors.
const MAX_OPEN_IN_FOLDER: usize = 128;

/// When an archive that couldn't be opened is tried again though its own file hasn't
/// changed: its parent may have come. Clients can't make it more often than that.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Why a catalogue can't be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CatalogError {
    /// Two archives of the same name.
    #[error("two archives would be the export \"{0}\": give one of them another name, NAME=PATH")]
    SameName(String),
    /// The default export isn't among those that were named.
    #[error("the default export \"{0}\" is none of those that are served")]
    NoSuchDefault(String),
}

/// The snapshots that are served.
#[derive(Debug)]
pub struct Catalog {
    named: Vec<(String, Slot)>,
    folder: Option<Folder>,
    in_folder: Mutex<HashMap<String, Slot>>,
    default: Option<String>,
    options: OpenOptions,
    reader: Arc<BlockReader>,
}

/// A place for a snapshot. It is opened by one client at a time; the others wait for it,
/// but not for those of other names.
#[derive(Debug, Clone)]
struct Slot {
    source: Arc<Source>,
    opened: Arc<Mutex<Opened>>,
    /// The snapshot in `opened`, for those who only compare with it: they don't wait while
    /// it is looked at, or opened anew, for somebody else.
    latest: Arc<RwLock<Option<Arc<Snapshot>>>>,
}

#[derive(Debug, Default)]
enum Opened {
    #[default]
    NotYet,
    Open(Arc<Snapshot>),
    /// It could not be opened.
    Failed(Failed),
}

#[derive(Debug)]
struct Failed {
    /// What its file was like.
    stamp: source::Stamp,
    at: Instant,
    reason: String,
}

impl Slot {
    fn new(source: Source) -> Self {
        Self { source: Arc::new(source), opened: Arc::default(), latest: Arc::default() }
    }

    fn latest(&self) -> Option<Arc<Snapshot>> {
        self.latest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_latest(&self, snapshot: Option<Arc<Snapshot>>) {
        *self.latest.write().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

impl Catalog {
    /// A catalogue of the archives that were `named`, and of those that are in `folder`
    /// when they are asked for. Nothing is opened yet.
    ///
    /// `default` names the default export. Without it there is one only where there is
    /// one snapshot.
    ///
    /// # Errors
    /// See [`CatalogError`].
    pub fn new(
        named: Vec<Named>,
        folder: Option<Folder>,
        default: Option<String>,
        options: OpenOptions,
        reader: Arc<BlockReader>,
    ) -> Result<Self, CatalogError> {
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
        let in_folder = Mutex::default();
        Ok(Self { named: slots, folder, in_folder, default, options, reader })
    }

    /// A catalogue of one snapshot that is open already.
    pub fn of_one(name: &str, snapshot: Snapshot, reader: Arc<BlockReader>) -> Self {
        let snapshot = Arc::new(snapshot);
        let slot = Slot {
            source: Arc::new(Source::Path(snapshot.path().to_owned())),
            opened: Arc::new(Mutex::new(Opened::Open(Arc::clone(&snapshot)))),
            latest: Arc::new(RwLock::new(Some(snapshot))),
        };
        Self {
            named: vec![(name.to_owned(), slot)],
            folder: None,
            in_folder: Mutex::default(),
            default: Some(name.to_owned()),
            options: OpenOptions::default(),
            reader,
        }
    }

    /// Opens those that were named: the exports that there are then, and for each that
    /// can't be opened why.
    pub async fn open_named(&self) -> (Vec<Arc<SnapshotExport>>, Vec<crate::snapshot::Error>) {
        let mut failed = Vec::new();
        for (_, slot) in &self.named {
            if let Err(Some(error)) = self.open(slot).await {
                failed.push(error);
            }
        }
        let mut exports = Vec::new();
        for (name, slot) in &self.named {
            exports.extend(self.exports_of(name, slot).await);
        }
        (exports, failed)
    }

    /// The snapshot of a place, opened if it isn't, or isn't current. A failure is given
    /// with its reason once, and without until the file or the reason has changed.
    async fn open(&self, slot: &Slot) -> Result<Arc<Snapshot>, Option<crate::snapshot::Error>> {
        let mut opened = slot.opened.lock().await;
        let stamp = slot.source.stamp();
        let known_reason = match &*opened {
            Opened::Open(snapshot) if snapshot.is_current() => return Ok(Arc::clone(snapshot)),
            Opened::Failed(failed) if failed.stamp == stamp => {
                if failed.at.elapsed() < RETRY_AFTER {
                    return Err(None);
                }
                Some(failed.reason.clone())
            }
            _ => None,
        };
        let (source, options) = (Arc::clone(&slot.source), self.options.clone());
        let result = tokio::task::spawn_blocking(move || source.open(&options)).await;
        match result {
            Ok(Ok(snapshot)) => {
                let snapshot = Arc::new(snapshot);
                *opened = Opened::Open(Arc::clone(&snapshot));
                slot.set_latest(Some(Arc::clone(&snapshot)));
                Ok(snapshot)
            }
            Ok(Err(error)) => {
                let reason = error.to_string();
                let is_new = known_reason.is_none_or(|known| known != reason);
                *opened = Opened::Failed(Failed { stamp, at: Instant::now(), reason });
                slot.set_latest(None);
                Err(is_new.then_some(error))
            }
            // The program is ending, or opening panicked.
            Err(_) => Err(None),
        }
    }

    /// The same, with the reason of a failure in the log.
    async fn open_or_log(&self, name: &str, slot: &Slot) -> Option<Arc<Snapshot>> {
        match self.open(slot).await {
            Ok(snapshot) => Some(snapshot),
            Err(Some(error)) => {
                tracing::error!("the export {name:?} can't be served: {error}");
                None
            }
            Err(None) => None,
        }
    }

    /// The place for a name in the folder, if there is such a file.
    async fn slot_in_folder(&self, name: &str) -> Option<Slot> {
        let source = self.folder.as_ref()?.find(name)?;
        let mut slots = self.in_folder.lock().await;
        if slots.len() >= MAX_OPEN_IN_FOLDER && !slots.contains_key(name) {
            // Whoever reads one of them goes on; it is opened anew for others.
            slots.clear();
        }
        Some(slots.entry(name.to_owned()).or_insert_with(|| Slot::new(source)).clone())
    }

    /// The exports of one place: its main stream, and the auxiliary one if it has one.
    async fn exports_of(&self, name: &str, slot: &Slot) -> Vec<Arc<SnapshotExport>> {
        let Some(snapshot) = self.open_or_log(name, slot).await else { return Vec::new() };
        let mut exports = vec![self.export(name, &snapshot, StreamKind::Main)];
        if snapshot.size(StreamKind::Auxiliary) > 0 {
            exports.push(self.export(name, &snapshot, StreamKind::Auxiliary));
        }
        exports
    }

    fn export(
        &self,
        name: &str,
        snapshot: &Arc<Snapshot>,
        stream: StreamKind,
    ) -> Arc<SnapshotExport> {
        let full_name = match stream {
            StreamKind::Main => name.to_owned(),
            StreamKind::Auxiliary => format!("{name}{AUXILIARY}"),
        };
        let reader = Arc::clone(&self.reader);
        let mut export = SnapshotExport::new(full_name, Arc::clone(snapshot), stream, reader);
        for (parent, reference) in snapshot.parents().zip(snapshot.references().iter().skip(1)) {
            export = export.comparable_with(&file_name(parent), reference);
        }
        // Any other archive that was named can be compared with as well.
        for (other, slot) in self.named.iter().filter(|(other, _)| other != name) {
            if let Some(snapshot) = slot.latest()
                && let Some(reference) = snapshot.references().first()
            {
                export = export.comparable_with(other, reference);
            }
        }
        Arc::new(export)
    }

    async fn find_named(&self, name: &str) -> Option<Arc<SnapshotExport>> {
        for (slot_name, slot) in &self.named {
            if let Some(stream) = stream_of(name, slot_name) {
                return self.find_stream(slot_name, slot, stream).await;
            }
        }
        for (base, stream) in
            [(Some(name), StreamKind::Main), (name.strip_suffix(AUXILIARY), StreamKind::Auxiliary)]
        {
            if let Some(base) = base
                && let Some(slot) = self.slot_in_folder(base).await
            {
                return self.find_stream(base, &slot, stream).await;
            }
        }
        None
    }

    async fn find_stream(
        &self,
        name: &str,
        slot: &Slot,
        stream: StreamKind,
    ) -> Option<Arc<SnapshotExport>> {
        let snapshot = self.open_or_log(name, slot).await?;
        let is_there = stream == StreamKind::Main || snapshot.size(stream) > 0;
        is_there.then(|| self.export(name, &snapshot, stream))
    }
}

/// Which stream of the snapshot `snapshot` the export `name` is, if any.
fn stream_of(name: &str, snapshot: &str) -> Option<StreamKind> {
    match name.strip_prefix(snapshot)? {
        "" => Some(StreamKind::Main),
        AUXILIARY => Some(StreamKind::Auxiliary),
        _ => None,
    }
}

/// A path's last part, as it is shown to clients.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

impl Exports for Catalog {
    type Export = SnapshotExport;

    async fn find(&self, name: &[u8]) -> Option<Arc<SnapshotExport>> {
        let name = match name {
            [] => self.default.as_deref()?,
            // Names that are no text are nobody's.
            name => str::from_utf8(name).ok()?,
        };
        self.find_named(name).await
    }

    async fn list(&self) -> Vec<Arc<SnapshotExport>> {
        let mut exports = Vec::new();
        for (name, slot) in &self.named {
            exports.extend(self.exports_of(name, slot).await);
        }
        let names = match self.folder.clone() {
            Some(folder) => tokio::task::spawn_blocking(move || folder.names()).await,
            None => Ok(Vec::new()),
        };
        for name in names.unwrap_or_default() {
            if !self.named.iter().any(|(named, _)| *named == name)
                && let Some(slot) = self.slot_in_folder(&name).await
            {
                exports.extend(self.exports_of(&name, &slot).await);
            }
        }
        exports
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "every archive in {}", self.path().display())
    }
}
