//! Where blocks are decoded: on the task that requests them, or on decoder threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hexz_exports::{BlockReader, SnapshotExport};
use hexz_reader::storage::{FileId, Storage};
use hexz_reader::{Compression, OpenOptions, Snapshot};
use nbd_server::{Export, ReadError};

use crate::archive_writer::{ArchiveWriter, Piece, Written, image, noise};
use crate::support::{export, open, open_storage, read, span, whole};

const BLOCK: u64 = 10_000;
const CACHE: u64 = 64 << 20;
/// Time after which a client that was the only one to read is known to be.
const ALONE: Duration = Duration::from_millis(20);

/// Storage in memory that counts reads that may wait, which decoder threads do, and reads that may
/// not.
#[derive(Debug)]
struct ObservedStorage {
    bytes: Arc<[u8]>,
    is_in_memory: AtomicBool,
    waiting: AtomicU64,
    immediate: AtomicU64,
}

impl Storage for ObservedStorage {
    fn length(&self) -> u64 {
        self.bytes.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.waiting.fetch_add(1, Relaxed);
        self.bytes.read_exact_at(buffer, offset)
    }

    fn try_read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<bool> {
        if !self.is_in_memory.load(Relaxed) {
            return Ok(false);
        }
        self.immediate.fetch_add(1, Relaxed);
        self.bytes.read_exact_at(buffer, offset).map(|()| true)
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// An archive of blocks of equal length whose reads are observed.
struct Setting {
    image: Vec<u8>,
    storage: Arc<ObservedStorage>,
    snapshot: Arc<Snapshot>,
    reader: Arc<BlockReader>,
}

fn archive(count: u64, length: u64) -> (Vec<u8>, Written) {
    let main: Vec<_> =
        (0..count).map(|number| Piece::Data(noise(number, length as usize))).collect();
    let expected = image(&main);
    let compression = Compression::Lz4;
    (expected, ArchiveWriter { main, compression, ..ArchiveWriter::default() }.write())
}

impl Setting {
    fn new(count: u64, length: u64) -> Self {
        let (image, archive) = archive(count, length);
        Self::of(image, &archive)
    }

    fn of(image: Vec<u8>, archive: &Written) -> Self {
        let storage = Arc::new(ObservedStorage {
            bytes: Arc::from(archive.bytes.as_slice()),
            is_in_memory: true.into(),
            waiting: 0.into(),
            immediate: 0.into(),
        });
        let source = Arc::<ObservedStorage>::clone(&storage);
        let snapshot = Arc::new(open_storage(source, &OpenOptions::default()));
        Self { image, storage, snapshot, reader: BlockReader::new(CACHE) }
    }

    fn client(&self) -> SnapshotExport {
        export(&self.snapshot, &self.reader)
    }

    /// Reads the blocks `numbers` one by one, and returns how many of the reads of the archive
    /// could wait and how many could not.
    async fn read(&self, client: &SnapshotExport, numbers: std::ops::Range<u64>) -> [u64; 2] {
        let counts = || [&self.storage.waiting, &self.storage.immediate].map(|it| it.load(Relaxed));
        let before = counts();
        let length = self.snapshot.locate(hexz_reader::StreamKind::Main, 0).unwrap().length();
        for number in numbers {
            let range = number * u64::from(length)..(number + 1) * u64::from(length);
            let expected = &self.image[range.start as usize..range.end as usize];
            assert!(read(client, range).await.unwrap() == expected, "{number}");
        }
        let after = counts();
        [after[0] - before[0], after[1] - before[1]]
    }

    /// Lets a client read the first blocks until it is known to be alone.
    async fn lone_client(&self) -> SnapshotExport {
        let client = self.client();
        self.read(&client, 0..1).await;
        tokio::time::sleep(ALONE).await;
        client
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lone_client_needs_no_decoder_for_small_blocks() {
    let setting = Setting::new(100, BLOCK);
    let client = setting.lone_client().await;
    assert_eq!(setting.read(&client, 1..100).await, [0, 99]);
    assert_eq!(setting.reader.decoded(), 100);
    let stats = setting.reader.stats();
    assert_eq!((stats.hits, stats.misses), (0, 100));
    assert!(!stats.decode_time.is_zero());
    // All of them are cached.
    assert_eq!(setting.read(&client, 0..100).await, [0, 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn decoders_read_what_may_have_to_wait_for_the_disk() {
    let setting = Setting::new(20, BLOCK);
    let client = setting.lone_client().await;
    setting.storage.is_in_memory.store(false, Relaxed);
    assert_eq!(setting.read(&client, 1..20).await, [19, 0]);
    assert_eq!(setting.reader.decoded(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn decoders_decode_large_blocks() {
    let setting = Setting::new(8, 400_000);
    let client = setting.lone_client().await;
    assert_eq!(setting.read(&client, 1..8).await, [7, 0]);
}

/// A task that decodes would keep other clients waiting.
#[tokio::test(flavor = "multi_thread")]
async fn decoders_decode_while_other_clients_read() {
    let setting = Setting::new(100, BLOCK);
    let client = setting.lone_client().await;
    let other = setting.client();
    let read_by_other = || {
        for _ in 0..50 {
            assert!(other.read_now(span(&(0..4096)), &mut Vec::new()));
        }
    };
    read_by_other();
    tokio::time::sleep(ALONE).await;
    for number in 1..50 {
        assert_eq!(setting.read(&client, number..number + 1).await, [1, 0], "{number}");
        read_by_other();
    }
    tokio::time::sleep(ALONE).await;
    // It is noticed that the other one has stopped.
    setting.read(&client, 50..51).await;
    tokio::time::sleep(ALONE).await;
    assert_eq!(setting.read(&client, 51..100).await, [0, 49]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_block_fails_wherever_it_is_decoded() {
    let (image, mut archive) = archive(10, BLOCK);
    let last = archive.main[0].blocks[5].stored.end - 1;
    let byte = archive.bytes[last];
    archive.put(last, &[byte ^ 1]);
    let setting = Setting::of(image, &archive);
    let client = setting.lone_client().await;
    let range = 5 * BLOCK..6 * BLOCK;
    for is_in_memory in [true, false, true] {
        setting.storage.is_in_memory.store(is_in_memory, Relaxed);
        let error = read(&client, range.clone()).await.unwrap_err();
        assert_eq!(error, ReadError::Unreadable(range.start));
        let error = read(&client, whole(&client)).await.unwrap_err();
        assert_eq!(error, ReadError::Unreadable(range.start));
    }
    assert_eq!(setting.reader.stats().read_failures.0, [("crc", 6)].into());
    assert_eq!(setting.read(&client, 6..10).await[0], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_decoded_once_for_all_clients() {
    let (expected, archive) = archive(60, BLOCK);
    let (expected, reader) = (Arc::new(expected), BlockReader::new(CACHE));
    let snapshot = Arc::new(open(&archive));
    let clients: Vec<_> = (0..12)
        .map(|number| {
            let (client, expected) = (export(&snapshot, &reader), Arc::clone(&expected));
            // They begin at different blocks, so groups overlap.
            let range = number % 4 * BLOCK + number..whole(&client).end;
            tokio::spawn(async move {
                let bytes = read(&client, range.clone()).await.unwrap();
                assert!(bytes == expected[range.start as usize..]);
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    assert_eq!(reader.decoded(), 60);
}

/// A client that leaves doesn't take blocks with it that others wait for.
#[tokio::test(flavor = "multi_thread")]
async fn others_take_over_from_a_canceled_read() {
    let (expected, archive) = archive(40, BLOCK);
    let snapshot = Arc::new(open(&archive));
    for _ in 0..20 {
        let reader = BlockReader::new(CACHE);
        let [leaving, staying] = [(); 2].map(|()| export(&snapshot, &reader));
        let mut canceled = Box::pin(read(&leaving, whole(&leaving)));
        tokio::select! {
            biased;
            _ = &mut canceled => panic!("decoders take longer than that"),
            () = tokio::task::yield_now() => {}
        }
        let waiting = tokio::spawn(async move { read(&staying, whole(&staying)).await });
        drop(canceled);
        let bytes = tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap();
        assert!(bytes.unwrap().unwrap() == expected);
    }
}
