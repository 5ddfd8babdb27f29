//! Which files are served at one moment, and under which names.
//!
//! They are looked at together, for all who ask at the same time: however many clients ask,
//! one thread looks.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::in_folder::InFolder;
use super::named::NamedSlots;
use crate::storage::{FileId, FileStamp};

/// Time that a client waits for a file system that doesn't answer. Without an answer exports
/// are listed without descriptions, and nothing can be compared.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The files of all archives that are served at one moment.
#[derive(Debug)]
pub(super) struct Files {
    /// Stamps of the named archives, in their order; `None` where there is no file.
    named: Vec<Option<FileStamp>>,
    /// Names and stamps of the folder's archives, ordered by name; `None` if it can't be read.
    folder: Option<Vec<(String, FileStamp)>>,
    positions: OnceLock<HashMap<FileId, Vec<Position>>>,
}

/// Position of a file among those that were named, or those of the folder.
#[derive(Debug, Clone, Copy)]
enum Position {
    Named(usize),
    InFolder(usize),
}

impl Files {
    /// Reads the metadata of all files. The log says why the folder can't be read, if it can't.
    fn look(named: &[PathBuf], folder: Option<&InFolder>) -> Self {
        let named = named.iter().map(|path| FileStamp::of(path)).collect();
        let folder = folder.map_or_else(|| Some(Vec::new()), |folder| folder.read().ok());
        Self { named, folder, positions: OnceLock::new() }
    }

    /// Stamp of the named archive at `position`, if it has a file.
    pub(super) fn named(&self, position: usize) -> Option<FileStamp> {
        self.named.get(position).copied().flatten()
    }

    /// Returns true if the folder could be read, so that all files are known.
    pub(super) fn are_known(&self) -> bool {
        self.folder.is_some()
    }

    /// The files of the folder.
    pub(super) fn in_folder(&self) -> &[(String, FileStamp)] {
        self.folder.as_deref().unwrap_or_default()
    }

    /// Stamp of the folder's file of that name, if there is one.
    pub(super) fn of_name(&self, name: &str) -> Option<FileStamp> {
        let files = self.in_folder();
        let found = files.binary_search_by(|(other, _)| other.as_str().cmp(name)).ok()?;
        files.get(found).map(|(_, stamp)| *stamp)
    }

    /// The folder's files behind `name` in order, `count` at most.
    pub(super) fn behind(&self, name: Option<&str>, count: usize) -> &[(String, FileStamp)] {
        let files = self.in_folder();
        let start = name.map_or(0, |name| files.partition_point(|(it, _)| it.as_str() <= name));
        let rest = files.get(start..).unwrap_or_default();
        rest.get(..count).unwrap_or(rest)
    }

    /// Names under which a file is served. A named archive hides a file of the folder that is
    /// called like it.
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

/// Outcome of [`LatestFiles::look`].
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// The files; `None` if they couldn't be looked at in time.
    pub(super) files: Option<Arc<Files>>,
    /// True if it was made for whoever asked, and not for somebody else at the same time.
    pub(super) is_own: bool,
}

/// The files as they were seen last.
#[derive(Debug, Default)]
pub(super) struct LatestFiles {
    /// When the last look began. Whoever looks holds the lock.
    begun: Arc<Mutex<Option<Instant>>>,
    latest: Arc<ArcSwapOption<Files>>,
}

impl LatestFiles {
    /// The files as they were seen last. It waits for nothing.
    ///
    /// Holding it keeps the names of all files, so it mustn't be held while a client is waited
    /// for.
    pub(super) fn latest(&self) -> Option<Arc<Files>> {
        self.latest.load_full()
    }

    /// Returns the files as they are now or later, and shares the work with all who ask
    /// meanwhile.
    pub(super) async fn look(&self, named: &NamedSlots, folder: Option<&Arc<InFolder>>) -> Looked {
        let asked = Instant::now();
        let looking = async {
            let mut begun = Arc::clone(&self.begun).lock_owned().await;
            // It was made while this one waited, for somebody who asked earlier.
            if begun.is_some_and(|begun| begun >= asked) {
                return Looked { files: self.latest(), ..Looked::default() };
            }
            let latest = Arc::clone(&self.latest);
            let paths: Vec<PathBuf> = named.iter().map(|(_, slot)| slot.path().into()).collect();
            let folder = folder.cloned();
            // It goes on if nobody waits for it any more, so that there are never two of them.
            let look = spawn_blocking(move || {
                let now = Instant::now();
                let files = Arc::new(Files::look(&paths, folder.as_deref()));
                latest.store(Some(Arc::clone(&files)));
                *begun = Some(now);
                Looked { files: Some(files), is_own: true }
            });
            look.await.unwrap_or_default()
        };
        timeout(PATIENCE, looking).await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::FolderFault;
    use super::super::slot::Slot;
    use super::super::source::{Folder, Source};
    use super::*;

    fn in_folder(path: PathBuf) -> Arc<InFolder> {
        Arc::new(InFolder::new(Folder::new(path)))
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
            named.push(name.to_owned(), Slot::new(Source::Path(path))).unwrap();
        }
        let latest = LatestFiles::default();
        let looked = latest.look(&named, Some(&in_folder(folder.path().to_owned()))).await;
        let files = looked.files.unwrap();
        assert!(looked.is_own && files.are_known());
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
    async fn a_folder_that_can_not_be_read_is_not_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        let gone = in_folder(folder.path().join("gone"));
        let looked = LatestFiles::default().look(&NamedSlots::default(), Some(&gone)).await;
        assert!(!looked.files.unwrap().are_known());
        assert_eq!(gone.fault(), Some(FolderFault::Missing));
    }

    /// Whoever asks while somebody looks gets a look that began later, together with the others.
    #[tokio::test]
    async fn those_who_wait_share_the_next_look() {
        let latest = LatestFiles::default();
        let named = NamedSlots::default();
        let held = Arc::clone(&latest.begun).lock_owned().await;
        let mut asking: Vec<_> = (0..10).map(|_| Box::pin(latest.look(&named, None))).collect();
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
            own += usize::from(looked.is_own);
        }
        assert_eq!(own, 1);
        assert!(latest.look(&named, None).await.is_own);
    }
}
