//! Exports of archives in a store.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use hexz_exports::BlockReader;
use hexz_reader::storage::{
    Fetch, FetchPriority, FileId, ObjectStamp, RemoteError, RemoteSource, Stamp, Storage,
};
use hexz_reader::{OpenOptions, Password, Snapshot, StreamKind};
use nbd_server::{Export, ReadError};

use crate::support::{export, read, whole};

const CACHE: u64 = 64 << 20;

/// A store of the test archives, `s3://archives/NAME`.
#[derive(Debug, Default)]
struct TestStore {
    state: Arc<StoreState>,
}

#[derive(Debug, Default)]
struct StoreState {
    is_down: AtomicBool,
    fetches: AtomicU64,
}

impl StoreState {
    fn check(&self) -> io::Result<()> {
        match self.is_down.load(Relaxed) {
            true => Err(io::Error::other(RemoteError {
                label: "store_down",
                message: "down".into(),
                is_transient: true,
                is_outage: true,
            })),
            false => Ok(()),
        }
    }
}

/// An archive in the store. Fails the test if a decoder thread reads it in a way that may wait.
#[derive(Debug)]
struct TestObject {
    bytes: Arc<[u8]>,
    id: [u8; 16],
    state: Arc<StoreState>,
}

impl RemoteSource for TestStore {
    fn open(&self, url: &Path) -> io::Result<Arc<dyn Storage>> {
        self.state.check()?;
        let name = url.strip_prefix("s3://archives").unwrap();
        let bytes = std::fs::read(archive(name.to_str().unwrap()))?.into();
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(name);
        let id = u128::from(hash).to_be_bytes();
        Ok(Arc::new(TestObject { bytes, id, state: Arc::clone(&self.state) }))
    }

    fn stamp(&self, _: &Path) -> Option<Stamp> {
        Some(Stamp::Object(ObjectStamp { url: [0; 16], version: None }))
    }

    fn list(&self, _: &Path) -> io::Result<Vec<(String, Stamp)>> {
        Ok(Vec::new())
    }
}

impl Storage for TestObject {
    fn length(&self) -> u64 {
        self.bytes.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let thread = std::thread::current();
        let is_decoder = thread.name().is_some_and(|name| name.starts_with("decoder"));
        assert!(!is_decoder, "a decoder waits for a store");
        self.state.check()?;
        self.bytes.read_exact_at(buffer, offset)
    }

    fn stamp(&self) -> Option<Stamp> {
        Some(Stamp::Object(ObjectStamp { url: self.id, version: Some([0; 16]) }))
    }

    fn file_id(&self) -> Option<FileId> {
        Some(FileId::Object(self.id))
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn fetch(&self, range: Range<u64>, _: FetchPriority) -> Option<Fetch> {
        let (bytes, state) = (Arc::clone(&self.bytes), Arc::clone(&self.state));
        Some(Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            state.check()?;
            state.fetches.fetch_add(1, Relaxed);
            Ok(Bytes::copy_from_slice(&bytes[range.start as usize..range.end as usize]))
        }))
    }
}

fn archive(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/archives").join(name)
}

fn options() -> OpenOptions {
    let password = Password::new(b"open sesame".to_vec());
    OpenOptions { password: Some(password.into()), ..OpenOptions::default() }
}

fn open(name: &str, store: &Arc<TestStore>) -> Arc<Snapshot> {
    let remote = Arc::clone(store) as Arc<dyn RemoteSource>;
    let options = OpenOptions { remote: Some(remote), ..options() };
    let url = format!("s3://archives/{name}");
    Arc::new(Snapshot::open(url.as_ref(), &options).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_of_all_kinds_are_read() {
    for name in [
        "base-zstd.hxz",
        "child-zstd.hxz",
        "grandchild-zstd.hxz",
        "fixed-4k-zstd.hxz",
        "text-dict-zstd.hxz",
        "versions/0.4.5-thin2.hxz",
        "versions/0.5.1-13blocks.hxz",
    ] {
        let local = Snapshot::open(&archive(name), &options()).unwrap();
        let mut expected = vec![0; local.size(StreamKind::Main) as usize];
        local.read_exact_at(StreamKind::Main, &mut expected, 0).unwrap();

        let store = Arc::new(TestStore::default());
        let snapshot = open(name, &store);
        assert!(snapshot.is_remote());
        let client = export(&snapshot, &BlockReader::new(CACHE));
        for range in [0..1, expected.len() as u64 / 3..expected.len() as u64 / 2, whole(&client)] {
            let bytes = read(&client, range.clone()).await.unwrap();
            let range = range.start as usize..range.end as usize;
            assert!(bytes == expected[range.clone()], "{name} {range:?}");
        }
        // A second client finds everything in memory.
        let fetched = store.state.fetches.load(Relaxed);
        assert!(fetched > 0);
        read(&client, whole(&client)).await.unwrap();
        assert_eq!(store.state.fetches.load(Relaxed), fetched, "{name}");
        let extents = client.extents(0, 0, client.size(), 1000).await.unwrap();
        assert!(extents.iter().map(|extent| extent.length).sum::<u64>() > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_fails_only_reads_of_what_is_not_cached() {
    let store = Arc::new(TestStore::default());
    let snapshot = open("fixed-64k-zstd.hxz", &store);
    let reader = BlockReader::new(CACHE);
    let client = export(&snapshot, &reader);
    let known = read(&client, 0..65_536).await.unwrap();
    let blocks = (1..128).map(|number| number * 65_536);
    let is_stored = |at: &u64| !snapshot.locate(StreamKind::Main, *at).unwrap().is_zeros();
    let other = blocks.rev().find(is_stored).unwrap();
    store.state.is_down.store(true, Relaxed);
    assert_eq!(read(&client, 0..65_536).await.unwrap(), known);
    assert_eq!(read(&client, other..other + 10).await, Err(ReadError::Unreadable(other)));
    let failures = reader.stats().read_failures;
    assert!(failures.0.iter().any(|(label, count)| *label == "store_down" && *count == 1));
    assert!(tokio::time::timeout(Duration::from_secs(5), reader.is_alive()).await.unwrap());
    store.state.is_down.store(false, Relaxed);
    assert!(read(&client, other..other + 10).await.is_ok());
}

/// An index of parents without the pages of an outage would never find their blocks.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_leaves_no_incomplete_index_of_parents() {
    let store = Arc::new(TestStore::default());
    let snapshot = open("grandchild-zstd.hxz", &store);
    store.state.is_down.store(true, Relaxed);
    assert_eq!(snapshot.build_parent_index().unwrap_err().label(), "store_down");
    assert!(!snapshot.has_parent_index());
    store.state.is_down.store(false, Relaxed);
    snapshot.build_parent_index().unwrap();
    assert!(snapshot.has_parent_index());
}
