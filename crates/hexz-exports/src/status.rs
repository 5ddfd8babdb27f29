//! Status of the archives, for monitoring. It is collected without opening or reading anything.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use tokio::task::spawn_blocking;

use super::catalog::Catalog;
use super::folder_access::FolderFault;
use super::slot::SnapshotSlot;
use hexz_reader::storage::is_url;

/// Maximum number of archives in [`CatalogStatus::unavailable`].
const MAX_UNAVAILABLE: usize = 100;

/// Maximum number of archives in [`FolderStatus::contents`].
pub(super) const MAX_CONTENTS: usize = 100;

/// Status of the archives in a catalog.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CatalogStatus {
    /// The export folder, if there is one.
    pub folder: Option<FolderStatus>,
    /// Archives that couldn't be opened the last time that this was tried, ordered by name; at most
    /// 100. Those of a folder are opened when a client asks for them.
    pub unavailable: Vec<UnavailableArchive>,
    /// Number of such archives.
    pub unavailable_count: usize,
}

/// Status of an export folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderStatus {
    /// Path of the folder.
    pub path: PathBuf,
    /// Number of archives that were in it when it was last read.
    pub archives: Option<usize>,
    /// The first of these archives by name, at most 100.
    pub contents: Vec<FolderArchive>,
    /// Files that look like archives but aren't served, with the label of the reason.
    pub unserved: Vec<(OsString, &'static str)>,
    /// Reason for which it can't be read, if it can't.
    pub fault: Option<FolderFault>,
}

/// An archive in an export folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderArchive {
    /// Name of its file, and of its export.
    pub name: String,
    /// State of the archive.
    pub state: ArchiveState,
}

/// State of an archive in an export folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ArchiveState {
    /// It is open.
    Open,
    /// It isn't open: no client has asked for it, or it was closed because clients asked for many
    /// others.
    Closed,
    /// It couldn't be opened the last time that this was tried. The label is that of
    /// [`UnavailableArchive::reason`].
    Unavailable(&'static str),
    /// An archive with an export name of its own is served instead.
    Hidden,
}

/// An archive that couldn't be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnavailableArchive {
    /// Name of its export.
    pub name: String,
    /// Stable label of the reason.
    pub reason: &'static str,
    /// Description of the reason, with the path of the file.
    pub message: String,
}

impl Catalog {
    /// Returns the status of the archives, as far as it is known.
    pub fn status(&self) -> CatalogStatus {
        let mut failed = BTreeMap::new();
        for (path, reason, message) in self.inspections.failures() {
            if let Some(name) = self.name_of(&path) {
                failed.insert(name, (reason, message));
            }
        }
        let mut open = HashSet::new();
        for (name, slot) in self.all_slots() {
            if let Some(failure) = slot.failure() {
                failed.insert(name, failure);
            } else if slot.latest().is_some() {
                open.insert(name);
            }
        }
        let state_of = |name: &str| match failed.get(name) {
            _ if self.named.contains(name) => ArchiveState::Hidden,
            Some((reason, _)) => ArchiveState::Unavailable(reason),
            None if open.contains(name) => ArchiveState::Open,
            None => ArchiveState::Closed,
        };
        let folder = self.folder.as_ref().map(|folder| folder.status(state_of));
        let unavailable_count = failed.len();
        let unavailable = failed.into_iter().take(MAX_UNAVAILABLE);
        let unavailable = unavailable
            .map(|(name, (reason, message))| UnavailableArchive { name, reason, message })
            .collect();
        CatalogStatus { folder, unavailable, unavailable_count }
    }

    /// Forgets why archives couldn't be opened if their files have changed since.
    pub(super) async fn forget_outdated_failures(&self) {
        let mut slots: Vec<SnapshotSlot> = self.all_slots().into_iter().map(|(_, it)| it).collect();
        slots.retain(|slot| !is_url(slot.path()) && slot.failure().is_some());
        if slots.is_empty() && self.inspections.failures().is_empty() {
            return;
        }
        let (options, inspections) = (self.options.clone(), self.inspections.clone());
        let forgotten = spawn_blocking(move || {
            slots.iter().for_each(|slot| slot.forget_outdated_failure(&options));
            inspections.forget_outdated_failures(&options);
        });
        // It fails only if the runtime is shutting down.
        forgotten.await.unwrap_or_default();
    }

    fn all_slots(&self) -> Vec<(String, SnapshotSlot)> {
        let mut slots = self.folder.as_ref().map(|folder| folder.slots()).unwrap_or_default();
        slots.retain(|(name, _)| !self.named.contains(name));
        slots.extend(self.named.iter().map(|(name, slot)| (name.to_owned(), slot.clone())));
        slots
    }

    /// Returns the export name of the archive at `path`, if it is served.
    fn name_of(&self, path: &Path) -> Option<String> {
        let named = self.named.iter().find(|(_, slot)| slot.path() == path);
        let in_folder = || {
            let folder = self.folder.as_ref().filter(|it| path.parent() == Some(it.path()))?;
            // A file that was removed is forgotten when the folder is read for a client.
            let is_there = is_url(folder.path()) || path.exists();
            let name = path.file_name().filter(|_| is_there)?.to_str()?;
            (!self.named.contains(name)).then_some(name)
        };
        named.map(|(name, _)| name).or_else(in_folder).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockReader, ExportFolder, ExportSelection, NamedArchive};
    use hexz_reader::OpenOptions;

    fn catalog(folder: &Path) -> Catalog {
        let folder = Some(ExportFolder::new(folder.to_owned()));
        let selection = ExportSelection { folder, ..ExportSelection::default() };
        Catalog::new(selection, OpenOptions::default(), BlockReader::new(1 << 20)).unwrap()
    }

    #[tokio::test]
    async fn archives_that_cannot_be_opened_are_listed_until_their_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("bad.hxz"), "junk").unwrap();
        std::fs::write(path("other.HXZ"), "junk").unwrap();
        let catalog = catalog(folder.path());
        assert_eq!(catalog.status().folder.unwrap().archives, None);
        catalog.read_folder().await.unwrap();
        let status = catalog.status();
        let listed = status.folder.unwrap();
        assert_eq!((listed.archives, listed.fault), (Some(1), None));
        assert_eq!(listed.unserved, [("other.HXZ".into(), "wrong_extension")]);
        // Nobody has asked for it.
        assert_eq!(status.unavailable, []);

        assert!(!catalog.has("bad.hxz").await);
        catalog.check_folder().await;
        let status = catalog.status();
        assert_eq!(status.unavailable_count, 1);
        let bad = &status.unavailable[0];
        assert_eq!((bad.name.as_str(), bad.reason), ("bad.hxz", "not_hexz"));
        assert!(bad.message.contains("bad.hxz"), "{bad:?}");

        std::fs::write(path("new"), "other junk").unwrap();
        std::fs::rename(path("new"), path("bad.hxz")).unwrap();
        catalog.check_folder().await;
        assert_eq!(catalog.status().unavailable, []);
    }

    #[tokio::test]
    async fn the_first_archives_of_a_folder_are_listed_with_their_state() {
        const ARCHIVES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/archives");
        let folder = tempfile::tempdir().unwrap();
        let base = Path::new(ARCHIVES).join("base-zstd.hxz");
        for name in ["a.hxz", "b.hxz", "d.hxz"] {
            std::fs::copy(&base, folder.path().join(name)).unwrap();
        }
        std::fs::write(folder.path().join("c.hxz"), "junk").unwrap();
        let named = NamedArchive::new("d.hxz", base).unwrap();
        let selection = ExportSelection {
            named: vec![named],
            folder: Some(ExportFolder::new(folder.path().to_owned())),
            default: None,
        };
        let options = OpenOptions::default();
        let catalog = Catalog::new(selection, options, BlockReader::new(1 << 20)).unwrap();
        let contents = || {
            let contents = catalog.status().folder.unwrap().contents.into_iter();
            contents.map(|it| (it.name, it.state)).collect::<Vec<_>>()
        };
        assert_eq!(contents(), []);
        catalog.check_folder().await;
        assert!(catalog.has("b.hxz").await && !catalog.has("c.hxz").await);
        let expected = [
            ("a.hxz", ArchiveState::Closed),
            ("b.hxz", ArchiveState::Open),
            ("c.hxz", ArchiveState::Unavailable("not_hexz")),
            ("d.hxz", ArchiveState::Hidden),
        ];
        assert_eq!(contents(), expected.map(|(name, state)| (name.to_owned(), state)));

        for number in 0..MAX_CONTENTS {
            std::fs::write(folder.path().join(format!("{number}.hxz")), "").unwrap();
        }
        catalog.check_folder().await;
        assert_eq!(contents().len(), MAX_CONTENTS);
        assert_eq!(catalog.status().folder.unwrap().archives, Some(MAX_CONTENTS + 4));
    }

    /// Files may be added and removed without any client listing them.
    #[tokio::test]
    async fn the_number_of_archives_follows_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = catalog(folder.path());
        let archives = async || {
            catalog.check_folder().await;
            catalog.status().folder.unwrap().archives
        };
        assert_eq!(archives().await, Some(0));
        std::fs::write(folder.path().join("a.hxz"), "").unwrap();
        assert_eq!(archives().await, Some(1));
        std::fs::remove_file(folder.path().join("a.hxz")).unwrap();
        assert_eq!(archives().await, Some(0));
        std::fs::remove_dir(folder.path()).unwrap();
        assert_eq!(archives().await, Some(0));
        assert_eq!(catalog.status().folder.unwrap().fault, Some(FolderFault::Missing));
    }
}
