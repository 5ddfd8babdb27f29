//! The cache below a fetcher: restarts, outages, verifiers.

use tempfile::TempDir;

use super::*;
use crate::fetcher::testing::{Action, ScriptedStore};
use crate::fetcher::{FetchError, Fetcher, FetcherConfig};
use crate::object::{ChunkVerifier, Object};
use crate::store::{ByteRange, StoreErrorKind};

const MIB: u64 = 1 << 20;
const LENGTH: u64 = 8 * MIB + 100;

/// A gateway's worth of state, which can be restarted.
struct Reader {
    folder: TempDir,
    store: Arc<ScriptedStore>,
    fetcher: Arc<Fetcher>,
    disk: Arc<DiskCache>,
}

impl Reader {
    fn new() -> Self {
        let folder = temporary_folder();
        let disk = open(folder.path(), 128);
        let fetcher = fetcher(&disk);
        Self { folder, store: ScriptedStore::new(LENGTH), fetcher, disk }
    }

    fn restart(self) -> Self {
        settle(&self.disk);
        self.fetcher.shutdown();
        close(&self.disk);
        let disk = open(self.folder.path(), 128);
        let fetcher = fetcher(&disk);
        self.store.received();
        self.store.checks();
        Self { fetcher, disk, ..self }
    }

    async fn open(&self) -> Result<Object, FetchError> {
        self.fetcher.open(Arc::clone(&self.store) as _, "key").await
    }

    /// Returns the numbers of requests for data, and of checks, since the last call.
    fn requests(&self) -> (usize, usize) {
        let checks = self.store.checks();
        // A check counts as a request without bytes.
        let is_data = |received: &crate::fetcher::testing::Received| {
            received.request.range != ByteRange::Suffix(0)
        };
        (self.store.received().iter().filter(|received| is_data(received)).count(), checks)
    }

    fn go_down(&self) {
        self.store.script(|_, _| Action::Fail(StoreErrorKind::Unreachable));
    }

    fn come_up(&self) {
        self.store.script(|_, _| Action::Respond);
    }
}

fn fetcher(disk: &Arc<DiskCache>) -> Arc<Fetcher> {
    Fetcher::new(FetcherConfig {
        memory: 32 << 20,
        store_timeout: Duration::from_millis(1000),
        disk_cache: Some(Arc::clone(disk)),
        ..FetcherConfig::default()
    })
}

async fn read(object: &Object, start: u64, end: u64) -> Result<(), FetchError> {
    read_revision(object, 1, start, end).await
}

async fn read_revision(object: &Object, n: u64, start: u64, end: u64) -> Result<(), FetchError> {
    let bytes = object.read(start..end, Priority::Demand).await?;
    assert!(bytes == content(n, start, end), "wrong bytes from {start} to {end}");
    Ok(())
}

#[tokio::test]
async fn what_was_read_is_not_requested_again_after_a_restart() {
    let reader = Reader::new();
    let object = reader.open().await.unwrap();
    read(&object, 0, 3 * MIB).await.unwrap();
    let bytes = reader.disk.stats().bytes;
    let reader = reader.restart();
    let object = reader.open().await.unwrap();
    assert_eq!(reader.requests(), (0, 1));
    assert!(object.is_confirmed() && object.is_current().await.unwrap());
    read(&object, LENGTH - 1000, LENGTH).await.unwrap();
    for start in [MIB, 0, 2 * MIB] {
        read(&object, start, start + MIB).await.unwrap();
    }
    assert_eq!(reader.requests(), (0, 0));
    let stats = reader.fetcher.stats().disk_cache.unwrap();
    assert_eq!((stats.hits, stats.misses, stats.bad), (14, 0, 0));
    assert!(stats.bytes >= bytes && stats.bytes >= 3 * MIB);
    // The rest is requested, and only that.
    read(&object, 2 * MIB, 5 * MIB).await.unwrap();
    let starts = |received: crate::fetcher::testing::Received| match received.request.range {
        ByteRange::Bounded(range) => range.start,
        ByteRange::Suffix(_) => 0,
    };
    assert!(reader.store.received().into_iter().map(starts).all(|start| start >= 3 * MIB));
}

#[tokio::test]
async fn a_copy_of_the_object_is_read_from_disk_after_a_restart() {
    let reader = Reader::new();
    let copy = async |object: &Object| {
        for start in (0..LENGTH).step_by(64 << 10) {
            read(object, start, LENGTH.min(start + (64 << 10))).await.unwrap();
        }
    };
    copy(&reader.open().await.unwrap()).await;
    let reader = reader.restart();
    copy(&reader.open().await.unwrap()).await;
    assert_eq!(reader.requests(), (0, 1));
}

#[tokio::test]
async fn a_store_that_is_down_at_the_start_serves_what_is_cached() {
    let reader = Reader::new();
    read(&reader.open().await.unwrap(), 0, 2 * MIB).await.unwrap();
    let reader = reader.restart();
    reader.go_down();
    let object = reader.open().await.unwrap();
    assert!(!object.is_confirmed());
    read(&object, 0, 2 * MIB).await.unwrap();
    read(&object, LENGTH - 100, LENGTH).await.unwrap();
    assert_eq!(object.is_current().await.unwrap_err().label(), "down");
    assert_eq!(read(&object, 5 * MIB, 6 * MIB).await.unwrap_err().label(), "down");
    reader.come_up();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(object.is_current().await.unwrap() && object.is_confirmed());
    read(&object, 5 * MIB, 6 * MIB).await.unwrap();
    // What is unknown can't be opened.
    reader.go_down();
    let other = reader.fetcher.open(Arc::clone(&reader.store) as _, "other").await;
    assert_eq!(other.unwrap_err().label(), "down");
}

#[tokio::test]
async fn a_store_that_rejects_requests_at_the_start_serves_what_is_cached() {
    use StoreErrorKind as Kind;
    for kind in [Kind::Denied, Kind::CredentialsExpired, Kind::ClockSkew, Kind::Unsupported] {
        for has_ends in [true, false] {
            let reader = Reader::new();
            let object = reader.open().await.unwrap();
            read(&object, 2 * MIB, 3 * MIB).await.unwrap();
            settle(&reader.disk);
            if !has_ends {
                reader.disk.reject(&DiskKey::new(object.id(), 0).unwrap());
            }
            let reader = reader.restart();
            reader.store.script(move |_, _| Action::Fail(kind));
            let object = reader.open().await.unwrap();
            assert!(!object.is_confirmed());
            read(&object, 2 * MIB, 3 * MIB).await.unwrap();
            assert!(object.is_current().await.unwrap_err().is_inconclusive());
            let other = reader.fetcher.open(Arc::clone(&reader.store) as _, "other").await;
            assert_eq!(other.unwrap_err().label(), kind.label());
        }
    }
}

#[tokio::test]
async fn a_known_version_is_opened_when_its_ends_are_gone_and_the_store_is_down() {
    let reader = Reader::new();
    let object = reader.open().await.unwrap();
    read(&object, 2 * MIB, 3 * MIB).await.unwrap();
    settle(&reader.disk);
    reader.disk.reject(&DiskKey::new(object.id(), 0).unwrap());
    let reader = reader.restart();
    reader.go_down();
    let object = reader.open().await.unwrap();
    assert!(!object.is_confirmed());
    read(&object, 2 * MIB, 3 * MIB).await.unwrap();
}

#[tokio::test]
async fn a_known_version_is_opened_without_a_request() {
    let reader = Reader::new();
    read(&reader.open().await.unwrap(), 0, MIB).await.unwrap();
    let reader = reader.restart();
    let store: Arc<dyn crate::store::Store> = Arc::clone(&reader.store) as _;
    assert!(reader.fetcher.open_known(Arc::clone(&store), "other").is_none());
    assert!(reader.fetcher.open_cached(Arc::clone(&store), "other").is_none());
    assert!(reader.fetcher.open_cached(Arc::clone(&store), "key").is_some());
    assert!(reader.fetcher.is_known(&*store, "key") && !reader.fetcher.is_known(&*store, "other"));
    let known = reader.fetcher.known_objects(&*store, "");
    assert_eq!(known.iter().map(|object| object.name.as_str()).collect::<Vec<_>>(), ["key"]);
    assert_eq!(reader.fetcher.known_objects(&*store, "v7/"), []);
    let object = reader.fetcher.open_known(store, "key").unwrap();
    read(&object, 0, MIB).await.unwrap();
    assert_eq!(reader.requests(), (0, 0));
    assert!(!object.is_confirmed());
    // Misses are requested in the known version.
    read(&object, 4 * MIB, 5 * MIB).await.unwrap();
    assert!(reader.store.received().iter().all(|received| received.request.version.is_some()));
    assert!(object.is_current().await.unwrap() && object.is_confirmed());
}

#[tokio::test]
async fn versions_are_never_mixed() {
    let reader = Reader::new();
    read(&reader.open().await.unwrap(), 0, 2 * MIB).await.unwrap();
    let reader = reader.restart();
    reader.store.replace();
    let store = Arc::clone(&reader.store) as _;
    let old = reader.fetcher.open_known(store, "key").unwrap();
    read(&old, 0, MIB).await.unwrap();
    assert_eq!(read(&old, 5 * MIB, 6 * MIB).await.unwrap_err().label(), "changed");
    // Cached chunks of the old version remain readable.
    read(&old, MIB, 2 * MIB).await.unwrap();
    assert!(!old.is_current().await.unwrap());
    let new = reader.open().await.unwrap();
    assert_ne!(new.id(), old.id());
    read_revision(&new, 2, 0, 2 * MIB).await.unwrap();
    let reader = reader.restart();
    let new = reader.open().await.unwrap();
    read_revision(&new, 2, 0, 2 * MIB).await.unwrap();
    assert_eq!(reader.requests(), (0, 1));
}

/// Accepts only the right chunks.
#[derive(Debug)]
struct Content;

impl ChunkVerifier for Content {
    fn matches(&self, chunk: u64, bytes: &[u8]) -> bool {
        let start = chunk * CHUNK_SIZE;
        bytes == content(1, start, start + bytes.len() as u64)
    }

    fn identity(&self) -> Option<[u8; 32]> {
        Some([1; 32])
    }
}

#[tokio::test]
async fn chunks_from_disk_pass_the_verifier() {
    let reader = Reader::new();
    // A reader without verifier stores wrong bytes.
    reader.store.script(|_, _| Action::Corrupt);
    let object = reader.open().await.unwrap();
    object.read(0..2 * MIB, Priority::Demand).await.unwrap();
    let reader = reader.restart();
    reader.come_up();
    let object = reader.open().await.unwrap();
    assert_eq!(reader.requests(), (0, 1));
    let verified = object.verified_by(Arc::new(Content));
    read(&verified, 0, 2 * MIB).await.unwrap();
    let stats = reader.disk.stats();
    assert_eq!((stats.bad, reader.requests().0), (8, 8));
    // Now they are right, also for others.
    let reader = reader.restart();
    let object = reader.open().await.unwrap();
    read(&object.verified_by(Arc::new(Content)), 0, 2 * MIB).await.unwrap();
    read(&object, 0, 2 * MIB).await.unwrap();
    assert_eq!((reader.requests(), reader.disk.stats().bad), ((0, 1), 0));
}

#[tokio::test]
async fn chunks_that_the_verifier_rejects_are_not_stored() {
    let reader = Reader::new();
    let verified = reader.open().await.unwrap().verified_by(Arc::new(Content));
    settle(&reader.disk);
    let before = reader.disk.stats().bytes;
    reader.store.script(|_, _| Action::Corrupt);
    let error = verified.read(2 * MIB..3 * MIB, Priority::Demand).await.unwrap_err();
    assert_eq!(error.label(), "corrupt");
    settle(&reader.disk);
    assert_eq!(reader.disk.stats().bytes, before);
}

#[tokio::test]
async fn reads_go_on_without_the_disk() {
    let reader = Reader::new();
    read(&reader.open().await.unwrap(), 0, 2 * MIB).await.unwrap();
    let reader = reader.restart();
    let object = reader.open().await.unwrap();
    read(&object, 0, MIB).await.unwrap();
    *reader.disk.shared.files.fault.lock() = Some(std::io::ErrorKind::Other);
    read(&object, MIB, 4 * MIB).await.unwrap();
    assert!(reader.fetcher.stats().disk_cache.unwrap().is_off);
    read(&object, 4 * MIB, 8 * MIB).await.unwrap();
}

/// Memory and disk are much smaller than the object, so that chunks come and go all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn concurrent_readers_with_a_small_cache_read_right_bytes() {
    let folder = temporary_folder();
    let disk = open(folder.path(), 12);
    let fetcher = Fetcher::new(FetcherConfig {
        memory: 2 << 20,
        fetch_size: CHUNK_SIZE,
        disk_cache: Some(Arc::clone(&disk)),
        ..FetcherConfig::default()
    });
    let store = ScriptedStore::new(LENGTH);
    let object = fetcher.open(store as _, "key").await.unwrap();
    let tasks = (0..6_u64).map(|task| {
        let object = match task % 2 {
            0 => object.clone(),
            _ => object.verified_by(Arc::new(Content)),
        };
        tokio::spawn(async move {
            for step in 0..150_u64 {
                // Some go through the object, the others jump.
                let factor = if task < 2 { 1 } else { 7919 * (task + 1) };
                let start = step * factor * 70_000 % (LENGTH - 300_000);
                read(&object, start, start + 300_000).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    settle(&disk);
    let stats = disk.stats();
    assert!(stats.hits > 0 && stats.evicted > 0, "{stats:?}");
    assert_eq!((stats.bad, stats.is_off), (0, false));
}
