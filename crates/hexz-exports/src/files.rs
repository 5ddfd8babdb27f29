//! Determines which files are served at a point in time, and under which names.
//!
//! Concurrent requests share one read of the metadata. Only one thread reads at a time, however
//! many clients ask.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::folder_slots::FolderSlots;
use super::named::NamedSlots;
use hexz_reader::OpenOptions;
use hexz_reader::storage::{FileId, Stamp};

/// Timeout for a file system that doesn't respond. After it, exports are listed without
/// descriptions, and comparisons are unavailable.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The files of all served archives at one point in time.
#[derive(Debug)]
pub(super) struct ServedFiles {
    /// Stamps of the named archives, in their order; `None` if there is no file.
    named: Vec<Option<Stamp>>,
    /// Names and stamps of the folder's archives, ordered by name; `None` if the folder can't be
    /// read.
    folder: Option<Vec<(String, Stamp)>>,
    positions: OnceLock<HashMap<FileId, Vec<Position>>>,
}

/// Index of a file among the named archives or the folder's files.
#[derive(Debug, Clone, Copy)]
enum Position {
    Named(usize),
    InFolder(usize),
}

impl ServedFiles {
    /// Reads the metadata of all files. If the folder can't be read, logs why.
    fn look(named: &[PathBuf], folder: Option<&FolderSlots>, options: &OpenOptions) -> Self {
        let named = named.iter().map(|path| options.stamp_of(path)).collect();
        let folder = folder.map_or_else(|| Some(Vec::new()), |folder| folder.read().ok());
        Self { named, folder, positions: OnceLock::new() }
    }

    /// Returns the stamp of the named archive at `position`, if its file exists.
    pub(super) fn named(&self, position: usize) -> Option<Stamp> {
        self.named.get(position).copied().flatten()
    }

    /// Returns true if the folder could be read, so that all files are known.
    pub(super) fn are_known(&self) -> bool {
        self.folder.is_some()
    }

    /// Returns the folder's files, ordered by name.
    pub(super) fn in_folder(&self) -> &[(String, Stamp)] {
        self.folder.as_deref().unwrap_or_default()
    }

    /// Returns the stamp of the folder's file with this name, if it exists.
    pub(super) fn of_name(&self, name: &str) -> Option<Stamp> {
        let files = self.in_folder();
        let found = files.binary_search_by(|(other, _)| other.as_str().cmp(name)).ok()?;
        files.get(found).map(|(_, stamp)| *stamp)
    }

    /// Returns up to `count` of the folder's files that follow `name` in order.
    pub(super) fn behind(&self, name: Option<&str>, count: usize) -> &[(String, Stamp)] {
        let files = self.in_folder();
        let start = name.map_or(0, |name| files.partition_point(|(it, _)| it.as_str() <= name));
        let rest = files.get(start..).unwrap_or_default();
        rest.get(..count).unwrap_or(rest)
    }

    /// Returns the names under which a file is served. A named archive hides a file of the folder
    /// with the same name.
    pub(super) fn names_of<'a>(
        &'a self,
        file: FileId,
        named: &'a NamedSlots,
    ) -> impl Iterator<Item = &'a str> {
        let positions = self.positions.get_or_init(|| self.by_file());
        let positions = positions.get(&file).map(Vec::as_slice).unwrap_or_default();
        positions.iter().filter_map(|position| match *position {
            Position::Named(position) => named.get(position).map(|(name, _)| name),
            Position::InFolder(position) => {
                let (name, _) = self.in_folder().get(position)?;
                (!named.contains(name)).then_some(name.as_str())
            }
        })
    }

    fn by_file(&self) -> HashMap<FileId, Vec<Position>> {
        let mut positions: HashMap<FileId, Vec<Position>> = HashMap::new();
        let named = self.named.iter().enumerate();
        let named =
            named.filter_map(|(at, stamp)| Some((stamp.as_ref()?.id(), Position::Named(at))));
        let in_folder = self.in_folder().iter().enumerate();
        let in_folder = in_folder.map(|(at, (_, stamp))| (stamp.id(), Position::InFolder(at)));
        for (file, position) in named.chain(in_folder) {
            positions.entry(file).or_default().push(position);
        }
        positions
    }
}

/// Outcome of [`ServedFilesCache::look`].
#[derive(Debug, Default)]
pub(super) struct RefreshOutcome {
    /// The files; `None` on a timeout.
    pub(super) files: Option<Arc<ServedFiles>>,
    /// True if this call did the read itself rather than sharing another caller's.
    pub(super) is_leader: bool,
}

/// Cache of the latest [`ServedFiles`], with single flight for reading them.
#[derive(Debug, Default)]
pub(super) struct ServedFilesCache {
    /// Start of the last read. The lock is held during a read.
    begun: Arc<Mutex<Option<Instant>>>,
    latest: Arc<ArcSwapOption<ServedFiles>>,
}

impl ServedFilesCache {
    /// Returns the latest files without waiting.
    ///
    /// Holding the result keeps the names of all files in memory, so it mustn't be held while
    /// waiting for a client.
    pub(super) fn latest(&self) -> Option<Arc<ServedFiles>> {
        self.latest.load_full()
    }

    /// Returns the files as of now or later; concurrent callers share one read.
    pub(super) async fn look(
        &self,
        named: &NamedSlots,
        folder: Option<&Arc<FolderSlots>>,
        options: &OpenOptions,
    ) -> RefreshOutcome {
        let asked = Instant::now();
        let looking = async {
            let mut begun = Arc::clone(&self.begun).lock_owned().await;
            // Another caller's read started after this call did, so it is fresh enough.
            if begun.is_some_and(|begun| begun >= asked) {
                return RefreshOutcome { files: self.latest(), ..RefreshOutcome::default() };
            }
            let latest = Arc::clone(&self.latest);
            let paths: Vec<PathBuf> = named.iter().map(|(_, slot)| slot.path().into()).collect();
            let (folder, options) = (folder.cloned(), options.clone());
            // Not canceled when the caller is dropped, so that two reads never run at once.
            let look = spawn_blocking(move || {
                let now = Instant::now();
                let files = Arc::new(ServedFiles::look(&paths, folder.as_deref(), &options));
                latest.store(Some(Arc::clone(&files)));
                *begun = Some(now);
                RefreshOutcome { files: Some(files), is_leader: true }
            });
            look.await.unwrap_or_default()
        };
        timeout(PATIENCE, looking).await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::FolderFault;
    use super::super::slot::SnapshotSlot;
    use super::super::source::{ArchiveSource, ExportFolder};
    use super::*;

    fn in_folder(path: PathBuf) -> Arc<FolderSlots> {
        Arc::new(FolderSlots::new(ExportFolder::new(path), None))
    }

    #[tokio::test]
    async fn a_file_has_all_names_under_which_it_is_served() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("a.hxz"), "1").unwrap();
        std::fs::hard_link(path("a.hxz"), path("b.hxz")).unwrap();
        std::fs::write(path("c.hxz"), "2").unwrap();
        std::os::unix::fs::symlink(path("a.hxz"), path("link")).unwrap();
        let mut named = NamedSlots::default();
        // The last one hides the folder's file of that name.
        for (name, path) in [("x", path("link")), ("y", path("none")), ("b.hxz", path("c.hxz"))] {
            named.push(name.to_owned(), SnapshotSlot::new(ArchiveSource::Path(path))).unwrap();
        }
        let latest = ServedFilesCache::default();
        let looked = latest
            .look(&named, Some(&in_folder(folder.path().to_owned())), &OpenOptions::default())
            .await;
        let files = looked.files.unwrap();
        assert!(looked.is_leader && files.are_known());
        let names = |name: &str| {
            let file = files.of_name(name).unwrap().id();
            files.names_of(file, &named).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(names("a.hxz"), ["x", "a.hxz"]);
        assert_eq!(names("c.hxz"), ["b.hxz", "c.hxz"]);
        assert!(files.named(1).is_none() && files.of_name("d.hxz").is_none());
        let behind = |name, count| {
            let files = files.behind(name, count).iter();
            files.map(|(name, _)| name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(behind(None, 2), ["a.hxz", "b.hxz"]);
        assert_eq!(behind(Some("b.hxz"), 9), ["c.hxz"]);
        assert_eq!(behind(Some("bb"), 9), ["c.hxz"]);
        assert!(behind(Some("c.hxz"), 9).is_empty());
    }

    #[tokio::test]
    async fn an_unreadable_folder_is_not_treated_as_empty() {
        let folder = tempfile::tempdir().unwrap();
        let gone = in_folder(folder.path().join("gone"));
        let looked = ServedFilesCache::default()
            .look(&NamedSlots::default(), Some(&gone), &OpenOptions::default())
            .await;
        assert!(!looked.files.unwrap().are_known());
        assert_eq!(gone.fault(), Some(FolderFault::Missing));
    }

    /// Callers that arrive during a read share one that starts later.
    #[tokio::test]
    async fn waiting_callers_share_the_next_read() {
        let options = OpenOptions::default();
        let latest = ServedFilesCache::default();
        let named = NamedSlots::default();
        let held = Arc::clone(&latest.begun).lock_owned().await;
        let mut asking: Vec<_> =
            (0..10).map(|_| Box::pin(latest.look(&named, None, &options))).collect();
        for one in &mut asking {
            let pending = std::future::poll_fn(|context| {
                std::task::Poll::Ready(one.as_mut().poll(context).is_pending())
            });
            assert!(pending.await);
        }
        drop(held);
        let mut own = 0;
        for one in asking {
            let looked = one.await;
            assert!(looked.files.is_some());
            own += usize::from(looked.is_leader);
        }
        assert_eq!(own, 1);
        assert!(latest.look(&named, None, &OpenOptions::default()).await.is_leader);
    }
}
