//! Names to exports: which archives are served, under which names, found when a client
//! asks for them.
//!
//! An archive that has been replaced on disk is opened anew for the next client; those
//! that read the old one go on reading it.

mod reader;
mod slot;
mod snapshot;
mod source;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::nbd::Exports;
use crate::snapshot::{OpenOptions, Snapshot, StreamKind};
pub use reader::BlockReader;
use slot::{Slot, Unavailable};
pub use snapshot::{STATE_CHANGED, SnapshotExport};
use source::Source;
pub use source::{Folder, Named, NamedError};

/// What is added to a snapshot's name for its auxiliary stream.
const AUXILIARY: &str = "/aux";

/// Snapshots of a folder that are kept open, at most: each takes some descriptors.
const MAX_OPEN_IN_FOLDER: usize = 128;

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
        Self {
            named: vec![(name.to_owned(), Slot::of(snapshot))],
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
            if let Err(Unavailable(Some(error))) = slot.open(&self.options).await {
                failed.push(error);
            }
        }
        let mut exports = Vec::new();
        for (name, slot) in &self.named {
            exports.extend(self.exports_of(name, slot).await);
        }
        (exports, failed)
    }

    /// The snapshot of a place. Why there is none goes to the log.
    async fn open(&self, name: &str, slot: &Slot) -> Option<Arc<Snapshot>> {
        match slot.open(&self.options).await {
            Ok(snapshot) => Some(snapshot),
            Err(Unavailable(reason)) => {
                if let Some(error) = reason {
                    tracing::error!("the export {name:?} can't be served: {error}");
                }
                None
            }
        }
    }

    /// The place for a name in the folder, if there is such a file.
    async fn slot_in_folder(&self, name: &str) -> Option<Slot> {
        let (folder, wanted) = (self.folder.clone()?, name.to_owned());
        let source = spawn_blocking(move || folder.find(&wanted)).await.ok()??;
        let mut slots = self.in_folder.lock().await;
        if slots.len() >= MAX_OPEN_IN_FOLDER && !slots.contains_key(name) {
            // Whoever reads one of them goes on; it is opened anew for others.
            slots.clear();
        }
        Some(slots.entry(name.to_owned()).or_insert_with(|| Slot::new(source)).clone())
    }

    /// The exports of one place: its main stream, and the auxiliary one if it has one.
    async fn exports_of(&self, name: &str, slot: &Slot) -> Vec<Arc<SnapshotExport>> {
        let Some(snapshot) = self.open(name, slot).await else { return Vec::new() };
        let mut exports = vec![self.export(name, &snapshot, StreamKind::Main).await];
        if snapshot.size(StreamKind::Auxiliary) > 0 {
            exports.push(self.export(name, &snapshot, StreamKind::Auxiliary).await);
        }
        exports
    }

    async fn export(
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
            if let Some(snapshot) = slot.current().await
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
        let snapshot = self.open(name, slot).await?;
        let is_there = stream == StreamKind::Main || snapshot.size(stream) > 0;
        if is_there { Some(self.export(name, &snapshot, stream).await) } else { None }
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
            Some(folder) => spawn_blocking(move || folder.names()).await,
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
