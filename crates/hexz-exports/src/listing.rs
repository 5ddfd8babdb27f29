//! Answers the LIST option.
//!
//! No archive is opened for it. Open archives are described from memory. For the others, only
//! header and index are read, a few archives at a time, and the result is cached until the file
//! changes. No key is derived and no file is hashed, so an archive may be listed that can't be
//! opened. Archives that can't be inspected in time are listed by name alone.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::mpsc::Sender;
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::timeout;

use super::Catalog;
use super::catalog::auxiliary_name;
use super::files::PATIENCE;
use super::inspection::{InspectionResult, Streams};
use super::slot::SnapshotSlot;
use super::source::ArchiveSource;
use hexz_reader::Snapshot;
use hexz_reader::storage::{Stamp, is_url};
use nbd_server::{AccessFilter, ListEntry};

/// Number of archives that are described together, which bounds the memory held for a client that
/// doesn't read.
const PAGE_SIZE: usize = 32;

/// Time budget of one LIST for inspecting archives.
const INSPECTION_TIME_BUDGET: Duration = Duration::from_secs(2);

/// An archive to be listed.
#[derive(Debug)]
struct Entry {
    name: String,
    source: Arc<ArchiveSource>,
    /// Slot of the archive, if a client has asked for it.
    slot: Option<SnapshotSlot>,
    /// Stamp of the file, if it exists.
    stamp: Option<Stamp>,
}

impl Catalog {
    /// Sends the listings of all exports that may be opened: named archives first, then those of
    /// the folder, by name.
    pub(super) async fn list(&self, may_open: &AccessFilter, listings: Sender<ListEntry>) {
        let mut page =
            ListWriter { catalog: self, may_open, listings, time: INSPECTION_TIME_BUDGET };
        let is_hung = self.look().await.is_none();
        if is_hung {
            page.time = Duration::ZERO;
        }
        for start in (0..self.named.len()).step_by(PAGE_SIZE) {
            // Dropped before anything is sent; see `ServedFilesCache::latest`.
            let files = self.files.latest();
            let entries = (start..start + PAGE_SIZE).filter_map(|position| {
                let (name, slot) = self.named.get(position)?;
                let stamp = files.as_ref().and_then(|files| files.named(position));
                let (source, slot) = (Arc::clone(slot.source()), Some(slot.clone()));
                Some(Entry { name: name.to_owned(), source, slot, stamp })
            });
            let entries = entries.filter(|entry| page.sees(&entry.name)).collect();
            drop(files);
            if !page.send(entries, is_hung).await {
                return;
            }
        }
        let Some(folder) = &self.folder else { return };
        let mut last = None;
        loop {
            let Some(files) = self.files.latest() else { return };
            let behind = files.behind(last.as_deref(), PAGE_SIZE).to_vec();
            drop(files);
            let Some((name, _)) = behind.last() else { return };
            last = Some(name.clone());
            let seen =
                behind.into_iter().filter(|(it, _)| !self.named.contains(it) && page.sees(it));
            let seen = folder.with_slots(seen).await;
            let entries = seen.into_iter().map(|(name, stamp, slot)| {
                let source = Arc::new(folder.source(&name));
                Entry { name, source, slot, stamp: Some(stamp) }
            });
            if !page.send(entries.collect(), is_hung).await {
                return;
            }
        }
    }
}

/// State of one LIST, which is answered page by page.
struct ListWriter<'a> {
    catalog: &'a Catalog,
    may_open: &'a AccessFilter,
    listings: Sender<ListEntry>,
    /// Remaining time for inspecting archives.
    time: Duration,
}

impl ListWriter<'_> {
    fn sees(&self, name: &str) -> bool {
        self.may_open.allows(name) || self.may_open.allows(&auxiliary_name(name))
    }

    /// Sends the listings of some archives. Returns false if the receiver is gone.
    async fn send(&mut self, entries: Vec<Entry>, is_hung: bool) -> bool {
        let known = match is_hung {
            true => entries.iter().map(|_| InspectionResult::NotInspected).collect(),
            false => self.inspect_all(&entries).await,
        };
        for (Entry { name, .. }, known) in entries.into_iter().zip(known) {
            let (main, second) = match known {
                InspectionResult::Streams(Streams { main, auxiliary }) => (main, auxiliary),
                InspectionResult::NotInspected => (Arc::from(""), None),
                InspectionResult::Unservable => continue,
            };
            let second = second.map(|description| (auxiliary_name(&name), description));
            for (name, description) in [(name, main)].into_iter().chain(second) {
                let listing = ListEntry { description: description.to_string(), name };
                if self.may_open.allows(&listing.name) && self.listings.send(listing).await.is_err()
                {
                    return false;
                }
            }
        }
        yield_now().await;
        true
    }

    /// Returns the results for some archives, after inspecting unknown ones within the time
    /// budget.
    async fn inspect_all(&mut self, entries: &[Entry]) -> Vec<InspectionResult> {
        let open = open_streams(entries).await;
        let inspections = &self.catalog.inspections;
        let recall = |entry: &Entry| match entry.stamp {
            None => InspectionResult::Unservable,
            Some(stamp) if entry.slot.as_ref().is_some_and(|it| it.has_failed_with(stamp)) => {
                InspectionResult::Unservable
            }
            Some(stamp) => inspections.cached(entry.source.path(), stamp),
        };
        let all: Vec<_> = entries.iter().zip(open).collect();
        let unknown: Vec<&Entry> = all
            .iter()
            .filter(|(entry, open)| {
                // Opening objects only to describe them would take requests for each.
                open.is_none()
                    && !is_url(entry.source.path())
                    && recall(entry) == InspectionResult::NotInspected
            })
            .map(|(entry, _)| *entry)
            .collect();
        if !unknown.is_empty() && !self.time.is_zero() {
            let begun = tokio::time::Instant::now();
            let inspecting = unknown.into_iter().map(|entry| inspect(self.catalog, entry));
            // On a timeout, inspections that have started run to completion and are cached for
            // the next client.
            let in_time = timeout(self.time, join_all(inspecting)).await;
            self.time =
                in_time.map_or(Duration::ZERO, |_| self.time.saturating_sub(begun.elapsed()));
        }
        all.into_iter()
            .map(|(entry, open)| open.map_or_else(|| recall(entry), InspectionResult::Streams))
            .collect()
    }
}

/// Returns the streams of archives that are open and whose files haven't changed.
async fn open_streams(entries: &[Entry]) -> Vec<Option<Streams>> {
    let latest = |entry: &Entry| entry.slot.as_ref().and_then(SnapshotSlot::latest);
    let latest: Vec<Option<Arc<Snapshot>>> = entries.iter().map(latest).collect();
    let none = vec![None; entries.len()];
    if latest.iter().all(Option::is_none) {
        return none;
    }
    let streams = spawn_blocking(move || {
        let streams = latest.into_iter().map(|latest| {
            let current = latest.filter(|snapshot| snapshot.is_current())?;
            Some(Streams::of(&current))
        });
        streams.collect()
    });
    match timeout(PATIENCE, streams).await {
        Ok(Ok(streams)) => streams,
        _ => none,
    }
}

/// Inspects an archive on a blocking thread, once it gets a permit.
async fn inspect(catalog: &Catalog, entry: &Entry) {
    let Some(stamp) = entry.stamp else { return };
    let Ok(permit) = Arc::clone(&catalog.inspections.permits).acquire_owned().await else { return };
    let (inspections, options) = (Arc::clone(&catalog.inspections), catalog.options.clone());
    let hints = catalog.reader.hints;
    let (name, source) = (entry.name.clone(), Arc::clone(&entry.source));
    let inspecting = spawn_blocking(move || {
        inspections.inspect(&name, &source, stamp, &options, hints);
        drop(permit);
    });
    // If the inspection panics, the archive is listed by name alone.
    inspecting.await.unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc::channel;

    use super::super::inspection::MAX_CONCURRENT_INSPECTIONS;
    use super::super::source::NotFoundReason;
    use super::super::{BlockReader, ExportFolder, ExportSelection};
    use super::*;
    use hexz_reader::{Digests, OpenOptions, Password, PasswordSource};

    fn archive(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/archives").join(name)
    }

    /// Creates a folder with copies of archives.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::copy(archive(name), folder.path().join(name)).unwrap();
        }
        folder
    }

    fn catalog(folder: &Path, options: OpenOptions) -> Catalog {
        let folder = Some(ExportFolder::new(folder.to_owned()));
        let choice = ExportSelection { folder, ..ExportSelection::default() };
        Catalog::new(choice, options, BlockReader::new(1 << 20)).unwrap()
    }

    async fn list(catalog: &Catalog, may_open: &AccessFilter) -> Vec<(String, String)> {
        let (sender, mut listings) = channel(100);
        catalog.list(may_open, sender).await;
        let mut all = Vec::new();
        while let Some(ListEntry { name, description }) = listings.recv().await {
            all.push((name, description));
        }
        all
    }

    const ALL: [&str; 4] = ["aux-lz4.hxz", "base-zstd.hxz", "child-zstd.hxz", "encrypted-zstd.hxz"];

    /// Returns a password source that counts its calls: one for each key derivation.
    fn counted() -> (Arc<AtomicUsize>, PasswordSource) {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let source = PasswordSource::new(move || {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(Password::new(b"wrong".to_vec()))
        });
        (count, source)
    }

    #[tokio::test]
    async fn archives_are_described_without_deriving_keys_or_hashing_files() {
        let folder = folder(&ALL);
        let (asked, password) = counted();
        let mut digests = Digests::default();
        for name in ALL {
            digests.add_entry(format!("{name}={}", "0".repeat(64)).as_ref()).unwrap();
        }
        let options = OpenOptions {
            password: Some(password),
            digests: Some(Arc::new(digests)),
            raw: true,
            ..OpenOptions::default()
        };
        let catalog = catalog(folder.path(), options);
        let listed = list(&catalog, &AccessFilter::allow_all()).await;
        let names: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["aux-lz4.hxz", "aux-lz4.hxz/aux", ALL[1], ALL[2], ALL[3]]);
        assert!(listed.iter().all(|(_, description)| !description.is_empty()), "{listed:?}");
        assert!(listed[3].1.ends_with("thin over base-zstd.hxz"), "{listed:?}");
        assert!(listed[4].1.ends_with("encrypted"), "{listed:?}");
        assert_eq!(asked.load(Ordering::Relaxed), 0);
        let reads = catalog.reader().reads();
        assert!(reads.bytes() < 60_000, "{} bytes", reads.bytes());

        // Results are cached until a file changes.
        let before = reads.count();
        assert_eq!(list(&catalog, &AccessFilter::allow_all()).await, listed);
        assert_eq!(reads.count(), before);
        std::fs::remove_file(folder.path().join(ALL[1])).unwrap();
        std::fs::copy(archive(ALL[1]), folder.path().join(ALL[1])).unwrap();
        assert_eq!(list(&catalog, &AccessFilter::allow_all()).await, listed);
        assert!(reads.count() > before);

        // All digests and the password are wrong, which shows once the archives have been opened.
        assert_eq!(catalog.find_named(ALL[3]).await.err(), Some(NotFoundReason::Unavailable));
        assert_eq!(catalog.find_named(ALL[1]).await.err(), Some(NotFoundReason::Unavailable));
        let names = list(&catalog, &AccessFilter::allow_all()).await;
        let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["aux-lz4.hxz", "aux-lz4.hxz/aux", ALL[2]]);
    }

    #[tokio::test]
    async fn unservable_archives_are_not_listed() {
        let folder = folder(&["child-zstd.hxz", "encrypted-zstd.hxz", "base-lz4.hxz"]);
        std::fs::write(folder.path().join("broken.hxz"), "no archive").unwrap();
        // The child's parent is missing, and there is no password.
        let mut digests = Digests::default();
        for name in ["child-zstd.hxz", "encrypted-zstd.hxz", "base-lz4.hxz", "broken.hxz"] {
            digests.add_entry(format!("{name}={}", "0".repeat(64)).as_ref()).unwrap();
        }
        let listed = |options| {
            let catalog = catalog(folder.path(), options);
            async move { list(&catalog, &AccessFilter::allow_all()).await }
        };
        let digests = Some(Arc::new(digests));
        let names = listed(OpenOptions { digests, ..OpenOptions::default() }).await;
        assert_eq!(names.len(), 1);
        assert_eq!(names[0].0, "base-lz4.hxz");
        // With an empty set of digests, no archive may be served.
        let digests = Some(Arc::default());
        let names = listed(OpenOptions { digests, ..OpenOptions::default() }).await;
        assert!(names.is_empty(), "{names:?}");
    }

    /// The names are complete, however slowly archives can be inspected.
    #[tokio::test(start_paused = true)]
    async fn archives_not_inspected_in_time_are_listed_by_name() {
        let folder = folder(&ALL);
        let (_, password) = counted();
        let options = OpenOptions { password: Some(password), raw: true, ..OpenOptions::default() };
        let catalog = catalog(folder.path(), options);
        let permits = Arc::clone(&catalog.inspections.permits);
        let all = permits.acquire_many_owned(MAX_CONCURRENT_INSPECTIONS).await.unwrap();
        let listed = list(&catalog, &AccessFilter::allow_all()).await;
        let expected = ALL.map(|name| (name.to_owned(), String::new()));
        assert_eq!(listed, expected);
        drop(all);
        let listed = list(&catalog, &AccessFilter::allow_all()).await;
        assert_eq!(listed.len(), ALL.len() + 1);
        assert!(listed.iter().all(|(_, description)| !description.is_empty()), "{listed:?}");
    }

    #[tokio::test]
    async fn archives_that_a_client_may_not_open_are_not_inspected() {
        let folder = folder(&ALL);
        let catalog = catalog(folder.path(), OpenOptions { raw: true, ..OpenOptions::default() });
        assert!(list(&catalog, &AccessFilter::new(|_| false)).await.is_empty());
        assert_eq!(catalog.reader().reads().count(), 0);
        let auxiliary = AccessFilter::new(|name| name.ends_with("/aux"));
        let listed = list(&catalog, &auxiliary).await;
        assert_eq!(listed.len(), 1);
        assert_eq!(listed[0].0, "aux-lz4.hxz/aux");
    }

    #[tokio::test]
    async fn a_temporarily_unreadable_folder_closes_no_archives() {
        let above = tempfile::tempdir().unwrap();
        let (path, aside) = (above.path().join("exports"), above.path().join("aside"));
        std::fs::create_dir(&path).unwrap();
        std::fs::copy(archive(ALL[1]), path.join(ALL[1])).unwrap();
        let catalog = catalog(&path, OpenOptions::default());
        assert!(catalog.find_named(ALL[1]).await.is_ok());
        std::fs::rename(&path, &aside).unwrap();
        assert!(list(&catalog, &AccessFilter::allow_all()).await.is_empty());
        assert!(catalog.unready().is_some_and(|reason| reason.starts_with("folder_missing")));
        assert_eq!(catalog.open_exports().len(), 1);
        std::fs::rename(&aside, &path).unwrap();
        assert_eq!(list(&catalog, &AccessFilter::allow_all()).await.len(), 1);
        assert!(catalog.unready().is_none());
    }

    /// A client that doesn't read holds at most a page of listings.
    #[tokio::test]
    async fn an_unread_list_buffers_at_most_one_page() {
        let folder = folder(&[]);
        for number in 0..10 * PAGE_SIZE {
            std::fs::copy(archive("aux-lz4.hxz"), folder.path().join(format!("{number:03}.hxz")))
                .unwrap();
        }
        let catalog = catalog(folder.path(), OpenOptions { raw: true, ..OpenOptions::default() });
        let may_open = AccessFilter::allow_all();
        let (sender, mut listings) = channel(1);
        let mut listing = Box::pin(catalog.list(&may_open, sender));
        let first = tokio::select! {
            biased;
            () = &mut listing => None,
            first = listings.recv() => first,
        };
        assert_eq!(first.unwrap().name, "000.hxz");
        let is_pending = tokio::select! {
            biased;
            () = &mut listing => false,
            () = tokio::task::yield_now() => true,
        };
        assert!(is_pending);
        assert!(catalog.inspections.count() <= PAGE_SIZE);
        // The names of all files are kept once, independent of the number of clients.
        assert_eq!(Arc::strong_count(&catalog.files.latest().unwrap()), 2);
    }
}
