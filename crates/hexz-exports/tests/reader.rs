//! The block cache that exports share, and what a reader counts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use hexz_exports::{BlockReader, Catalog, ExportSelection, NamedArchive, SnapshotExport};
use hexz_reader::{Compression, OpenOptions};
use nbd_server::{Export, ReadError};

use crate::archive_writer::{ArchiveWriter, Piece, Written, image, noise};
use crate::support::{self, open_storage, span, whole};

/// Length of a block, in bytes: more than that of blocks that are read together.
const BLOCK: usize = 10_000;
const CACHE: u64 = 64 << 20;

fn block(seed: u64) -> Piece {
    Piece::Data(noise(seed, BLOCK))
}

fn written(main: &[Piece]) -> Written {
    let compression = Compression::Lz4;
    ArchiveWriter { main: main.to_vec(), compression, ..ArchiveWriter::default() }.write()
}

fn export(archive: &Written, options: &OpenOptions, reader: &Arc<BlockReader>) -> SnapshotExport {
    let storage = Arc::new(Arc::<[u8]>::from(archive.bytes.as_slice()));
    support::export(&Arc::new(open_storage(storage, options)), reader)
}

async fn read_whole(export: &SnapshotExport) -> Result<Vec<u8>, ReadError> {
    support::read(export, whole(export)).await
}

/// Returns the numbers of hits, misses and decoded blocks.
fn counts(reader: &BlockReader) -> [u64; 3] {
    let stats = reader.stats();
    [stats.hits, stats.misses, stats.decoded]
}

#[tokio::test(flavor = "multi_thread")]
async fn hits_misses_and_decoded_blocks_are_counted() {
    let main = [block(1), block(2), Piece::Zeros(5000), block(3)];
    let reader = BlockReader::new(CACHE);
    let export = export(&written(&main), &OpenOptions::default(), &reader);
    assert!(read_whole(&export).await.unwrap() == image(&main));
    // Blocks of zeros count as neither.
    assert_eq!(counts(&reader), [0, 3, 3]);
    let stats = reader.stats();
    assert_eq!((stats.decoded_bytes, reader.decoded()), (3 * BLOCK as u64, 3));
    assert!(!stats.decode_time.is_zero());
    assert!(stats.cached >= 3 * BLOCK as u64 && stats.cached <= stats.capacity);

    assert!(read_whole(&export).await.unwrap() == image(&main));
    assert_eq!(counts(&reader), [3, 3, 3]);
    // A read that doesn't wait counts, too.
    assert!(export.read_now(span(&whole(&export)), &mut Vec::new()));
    assert_eq!(counts(&reader), [6, 3, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn read_ahead_fills_the_cache_and_counts_no_misses() {
    let main = [block(1), block(2), block(3)];
    let reader = BlockReader::new(CACHE);
    let export = export(&written(&main), &OpenOptions::default(), &reader);
    // Nothing is prefetched unless a decoder is idle, and the first one starts with the first job.
    let prefetch = async {
        while reader.decoded() < 3 {
            assert!(reader.is_alive().await);
            export.read_ahead(span(&whole(&export))).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), prefetch).await.unwrap();
    assert_eq!(counts(&reader), [0, 0, 3]);
    assert!(read_whole(&export).await.unwrap() == image(&main));
    assert_eq!(counts(&reader), [3, 0, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn verified_blocks_are_shared_between_archives() {
    let reader = BlockReader::new(CACHE);
    let [one, other] = [[block(1), block(2)], [block(2), block(1)]];
    for (main, expected) in [(one, [0, 2, 2]), (other, [2, 2, 2])] {
        let export = export(&written(&main), &OpenOptions::default(), &reader);
        assert!(read_whole(&export).await.unwrap() == image(&main));
        assert_eq!(counts(&reader), expected);
    }
}

/// An index may give a block the hash of another archive's block.
#[tokio::test(flavor = "multi_thread")]
async fn unverified_blocks_are_not_shared_between_archives() {
    let (forged, honest) = (noise(1, BLOCK), noise(2, BLOCK));
    let piece = Piece::Raw {
        stored: lz4_flex::block::compress_prepend_size(&forged),
        length: BLOCK as u32,
        hash: *blake3::hash(&honest).as_bytes(),
    };
    let reader = BlockReader::new(CACHE);
    let unverified = OpenOptions { verify_hashes: false, ..OpenOptions::default() };
    let forging = export(&written(&[piece]), &unverified, &reader);
    assert!(read_whole(&forging).await.unwrap() == forged);
    let victim = export(&written(&[block(2)]), &OpenOptions::default(), &reader);
    assert!(read_whole(&victim).await.unwrap() == honest);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_counted_by_label() {
    let reader = BlockReader::new(CACHE);
    let mut damaged = written(&[block(1)]);
    let last = damaged.main[0].blocks[0].stored.end - 1;
    let byte = damaged.bytes[last];
    damaged.put(last, &[byte ^ 1]);
    let export = export(&damaged, &OpenOptions::default(), &reader);
    assert_eq!(read_whole(&export).await, Err(ReadError::Unreadable(0)));
    assert_eq!(reader.stats().read_failures.0, BTreeMap::from([("crc", 1)]));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    std::fs::write(&path, "no archive").unwrap();
    let named = vec![NamedArchive { name: "disk".into(), path }];
    let selection = ExportSelection { named, ..ExportSelection::default() };
    let catalog = Catalog::new(selection, OpenOptions::default(), Arc::clone(&reader)).unwrap();
    let (exports, errors) = catalog.open_named().await;
    assert_eq!((exports.len(), errors.len()), (0, 1));
    assert_eq!(reader.stats().open_failures.0, BTreeMap::from([("not_hexz", 1)]));
}
