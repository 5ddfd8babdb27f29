//! Answers the LIST option.
//!
//! No archive is opened for it. Open archives are described from memory. For the others, only
//! header and index are read, a few archives at a time, and the result is cached until the file
//! changes. No key is derived and no file is hashed, so an archive may be listed that can't be
//! opened. Archives that can't be inspected in time are listed by name alone.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::Sender;
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::timeout;

use super::files::PATIENCE;
use super::slot::{RETRY_AFTER, Slot};
use super::snapshot::describe;
use super::source::Source;
use super::{Catalog, auxiliary, failures, reach};
use hexz_reader::storage::FileStamp;
use hexz_reader::{Error, OpenOptions, Snapshot, StreamKind};
use nbd_server::{AccessFilter, ListEntry};
use nbd_telemetry::RateLimit;
use nbd_telemetry::escape;

/// Number of archives that are described together, which bounds the memory held for a client that
/// doesn't read.
const PAGE: usize = 32;

/// Maximum number of archives that are inspected concurrently, over all clients: each may have an
/// index of [`MAX_MASTER_INDEX`](hexz_reader::limits::MAX_MASTER_INDEX), and so may its
/// parents.
const LOOKS_AT_ONCE: u32 = 4;

/// Time budget of one LIST for inspecting archives.
const TIME_TO_LOOK: Duration = Duration::from_secs(2);

/// Descriptions of an archive's streams.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Streams {
    main: Arc<str>,
    auxiliary: Option<Arc<str>>,
}

impl Streams {
    fn of(snapshot: &Snapshot) -> Self {
        let of = |stream| Arc::from(describe(snapshot, stream));
        let has_auxiliary = snapshot.size(StreamKind::Auxiliary) > 0;
        Self {
            main: of(StreamKind::Main),
            auxiliary: has_auxiliary.then(|| of(StreamKind::Auxiliary)),
        }
    }
}

/// Result of inspecting an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    Streams(Streams),
    /// The file doesn't exist, or can't be served.
    Unservable,
    Unknown,
}

/// An archive to be listed.
#[derive(Debug)]
struct Entry {
    name: String,
    source: Arc<Source>,
    /// Slot of the archive, if a client has asked for it.
    slot: Option<Slot>,
    /// Stamp of the file, if it exists.
    stamp: Option<FileStamp>,
}

/// Cache of inspection results, including failures.
#[derive(Debug)]
pub(super) struct Looks {
    remembered: Mutex<HashMap<PathBuf, Look>>,
    permits: Arc<Semaphore>,
    failures: RateLimit,
}

#[derive(Debug)]
struct Look {
    stamp: FileStamp,
    at: Instant,
    /// Descriptions of its streams, or the reason for which it can't be served.
    found: Result<Streams, String>,
}

impl Looks {
    pub(super) fn new() -> Self {
        Self {
            remembered: Mutex::default(),
            permits: Arc::new(Semaphore::new(LOOKS_AT_ONCE as usize)),
            failures: failures(),
        }
    }

    /// Returns the number of cached files.
    pub(super) fn count(&self) -> usize {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Removes the files for which `there` returns false.
    pub(super) fn forget(&self, there: impl Fn(&Path) -> bool) {
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.retain(|path, _| there(path));
    }

    /// Returns the cached result for a file. Failures expire, since a missing parent may have
    /// appeared in the meantime.
    fn recall(&self, path: &Path, stamp: FileStamp) -> Known {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        match remembered.get(path) {
            Some(look) if look.stamp == stamp => match &look.found {
                Ok(streams) => Known::Streams(streams.clone()),
                Err(_) if look.at.elapsed() < RETRY_AFTER => Known::Unservable,
                Err(_) => Known::Unknown,
            },
            _ => Known::Unknown,
        }
    }

    /// Inspects a file and caches the result. Blocking.
    fn look(&self, name: &str, source: &Source, stamp: FileStamp, options: &OpenOptions) {
        // Another task may have inspected it while this one waited for a permit.
        if self.recall(source.path(), stamp) != Known::Unknown {
            return;
        }
        let found = source.open_index(options).map(|snapshot| Streams::of(&snapshot));
        // The error says nothing about the file.
        if found.as_ref().is_err_and(Error::is_transient) {
            return;
        }
        let hint = found.as_ref().err().map_or("", reach::hint);
        let found = found.map_err(|error| error.to_string());
        let reason = found.as_ref().err().cloned();
        let look = Look { stamp, at: Instant::now(), found };
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let before = remembered.insert(source.path().to_owned(), look);
        drop(remembered);
        let before = before.and_then(|look| look.found.err());
        if let Some(reason) = reason
            && before.as_ref() != Some(&reason)
            && let Some(held_back) = self.failures.allow()
        {
            let (held_back, name) = (held_back.field(), escape::name(name));
            tracing::warn!(held_back, "the archive {name:?} isn't listed: {reason}{hint}");
        }
    }
}

impl Catalog {
    /// Sends the listings of all exports that may be opened: named archives first, then those of
    /// the folder, by name.
    pub(super) async fn list(&self, may_open: &AccessFilter, listings: Sender<ListEntry>) {
        let mut page = Page { catalog: self, may_open, listings, time: TIME_TO_LOOK };
        let is_hung = self.look().await.is_none();
        if is_hung {
            page.time = Duration::ZERO;
        }
        for start in (0..self.named.len()).step_by(PAGE) {
            // Dropped before anything is sent; see `LatestFiles::latest`.
            let files = self.files.latest();
            let entries = (start..start + PAGE).filter_map(|position| {
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
            let behind = files.behind(last.as_deref(), PAGE).to_vec();
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
struct Page<'a> {
    catalog: &'a Catalog,
    may_open: &'a AccessFilter,
    listings: Sender<ListEntry>,
    /// Remaining time for inspecting archives.
    time: Duration,
}

impl Page<'_> {
    fn sees(&self, name: &str) -> bool {
        self.may_open.allows(name) || self.may_open.allows(&auxiliary(name))
    }

    /// Sends the listings of some archives. Returns false if the receiver is gone.
    async fn send(&mut self, entries: Vec<Entry>, is_hung: bool) -> bool {
        let known = match is_hung {
            true => entries.iter().map(|_| Known::Unknown).collect(),
            false => self.known(&entries).await,
        };
        for (Entry { name, .. }, known) in entries.into_iter().zip(known) {
            let (main, second) = match known {
                Known::Streams(Streams { main, auxiliary }) => (main, auxiliary),
                Known::Unknown => (Arc::from(""), None),
                Known::Unservable => continue,
            };
            let second = second.map(|description| (auxiliary(&name), description));
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
    async fn known(&mut self, entries: &[Entry]) -> Vec<Known> {
        let open = open_streams(entries).await;
        let looks = &self.catalog.looks;
        let recall = |entry: &Entry| match entry.stamp {
            None => Known::Unservable,
            Some(stamp) if entry.slot.as_ref().is_some_and(|it| it.has_failed_as(stamp)) => {
                Known::Unservable
            }
            Some(stamp) => looks.recall(entry.source.path(), stamp),
        };
        let all: Vec<_> = entries.iter().zip(open).collect();
        let unknown: Vec<&Entry> = all
            .iter()
            .filter(|(entry, open)| open.is_none() && recall(entry) == Known::Unknown)
            .map(|(entry, _)| *entry)
            .collect();
        if !unknown.is_empty() && !self.time.is_zero() {
            let begun = tokio::time::Instant::now();
            let looking = unknown.into_iter().map(|entry| look(self.catalog, entry));
            // On a timeout, inspections that have started run to completion and are cached for
            // the next client.
            let in_time = timeout(self.time, join_all(looking)).await;
            self.time =
                in_time.map_or(Duration::ZERO, |_| self.time.saturating_sub(begun.elapsed()));
        }
        all.into_iter()
            .map(|(entry, open)| open.map_or_else(|| recall(entry), Known::Streams))
            .collect()
    }
}

/// Returns the streams of archives that are open and whose files haven't changed.
async fn open_streams(entries: &[Entry]) -> Vec<Option<Streams>> {
    let latest = |entry: &Entry| entry.slot.as_ref().and_then(Slot::latest);
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
async fn look(catalog: &Catalog, entry: &Entry) {
    let Some(stamp) = entry.stamp else { return };
    let Ok(permit) = Arc::clone(&catalog.looks.permits).acquire_owned().await else { return };
    let (looks, options) = (Arc::clone(&catalog.looks), catalog.options.clone());
    let (name, source) = (entry.name.clone(), Arc::clone(&entry.source));
    let looking = spawn_blocking(move || {
        looks.look(&name, &source, stamp, &options);
        drop(permit);
    });
    // If the inspection panics, the archive is listed by name alone.
    looking.await.unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc::channel;

    use super::super::source::Missing;
    use super::super::{BlockReader, ExportFolder, ExportSelection};
    use super::*;
    use hexz_reader::{Digests, Password, PasswordSource};

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
        assert_eq!(catalog.find_named(ALL[3]).await.err(), Some(Missing::Unavailable));
        assert_eq!(catalog.find_named(ALL[1]).await.err(), Some(Missing::Unavailable));
        let names = list(&catalog, &AccessFilter::allow_all()).await;
        let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["aux-lz4.hxz", "aux-lz4.hxz/aux", ALL[2]]);
    }

    #[tokio::test]
    async fn what_header_and_index_show_to_be_broken_is_not_listed() {
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
    async fn archives_that_can_not_be_looked_at_in_time_are_listed_by_name() {
        let folder = folder(&ALL);
        let (_, password) = counted();
        let options = OpenOptions { password: Some(password), raw: true, ..OpenOptions::default() };
        let catalog = catalog(folder.path(), options);
        let permits = Arc::clone(&catalog.looks.permits);
        let all = permits.acquire_many_owned(LOOKS_AT_ONCE).await.unwrap();
        let listed = list(&catalog, &AccessFilter::allow_all()).await;
        let expected = ALL.map(|name| (name.to_owned(), String::new()));
        assert_eq!(listed, expected);
        drop(all);
        let listed = list(&catalog, &AccessFilter::allow_all()).await;
        assert_eq!(listed.len(), ALL.len() + 1);
        assert!(listed.iter().all(|(_, description)| !description.is_empty()), "{listed:?}");
    }

    #[tokio::test]
    async fn nothing_is_looked_at_for_a_client_that_may_not_open_it() {
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
    async fn a_folder_that_can_not_be_read_for_a_while_closes_nothing() {
        let above = tempfile::tempdir().unwrap();
        let (path, aside) = (above.path().join("exports"), above.path().join("aside"));
        std::fs::create_dir(&path).unwrap();
        std::fs::copy(archive(ALL[1]), path.join(ALL[1])).unwrap();
        let catalog = catalog(&path, OpenOptions::default());
        assert!(catalog.find_named(ALL[1]).await.is_ok());
        std::fs::rename(&path, &aside).unwrap();
        assert!(list(&catalog, &AccessFilter::allow_all()).await.is_empty());
        assert!(catalog.unready().is_some_and(|reason| reason.starts_with("folder_missing")));
        assert_eq!(catalog.open_now().len(), 1);
        std::fs::rename(&aside, &path).unwrap();
        assert_eq!(list(&catalog, &AccessFilter::allow_all()).await.len(), 1);
        assert!(catalog.unready().is_none());
    }

    /// A client that doesn't read holds at most a page of listings.
    #[tokio::test]
    async fn a_list_that_nobody_reads_makes_no_more_than_a_page() {
        let folder = folder(&[]);
        for number in 0..10 * PAGE {
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
        assert!(catalog.looks.count() <= PAGE);
        // The names of all files are kept once, independent of the number of clients.
        assert_eq!(Arc::strong_count(&catalog.files.latest().unwrap()), 2);
    }
}
