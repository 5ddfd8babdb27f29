//! Reads over small blocks, of which many are read in one job of the decoders.

use std::ops::Range;
use std::sync::Arc;

use hexz_exports::{BlockReader, SnapshotExport};
use hexz_reader::{Compression, OpenOptions, Snapshot};
use nbd_server::ReadError;

use crate::archive_writer::{ArchiveWriter, Piece, image, noise};
use crate::support::{export, open, read};

/// Maximum number of blocks in one read.
const MAX_BLOCKS: u64 = 65_536;
/// Maximum number of small blocks that are read together.
const MAX_RUN: u64 = 256;

fn export_of(snapshot: Snapshot, cache: u64) -> SnapshotExport {
    export(&Arc::new(snapshot), &BlockReader::new(cache))
}

/// Returns data and zeros in blocks of 1 to 4095 bytes, in runs of different lengths, with some
/// larger blocks between them.
fn mixed() -> Vec<Piece> {
    let choices = noise(1, 4 * 400);
    choices
        .chunks(4)
        .enumerate()
        .map(|(number, choice)| {
            let length = 1 + (usize::from(choice[0]) * 256 + usize::from(choice[1])) % 4095;
            match (number / 5 % 3, choice[2]) {
                (_, 0..8) => Piece::Data(noise(number as u64, 4096 + length)),
                (0, _) => Piece::Zeros(length as u32),
                (1, _) => Piece::Data(noise(number as u64, length)),
                (_, 8..128) => Piece::Zeros(1 + length as u32 % 9),
                _ => Piece::Data(noise(number as u64, 1 + length % 9)),
            }
        })
        .collect()
}

/// Returns ranges that begin and end within blocks and at their borders.
fn ranges(pieces: &[Piece]) -> Vec<Range<u64>> {
    let mut borders = vec![0];
    for piece in pieces {
        borders.push(borders[borders.len() - 1] + u64::from(piece.length()));
    }
    let end = borders[borders.len() - 1];
    let mut ranges = vec![0..end, 1..end - 1];
    for (number, &border) in borders.iter().enumerate().step_by(7) {
        let far = borders[(number + 50).min(borders.len() - 1)];
        ranges.extend([
            border..far,
            border.saturating_sub(1)..far,
            border..(far + 1).min(end),
            border..(border + 1).min(end),
            border + 1..(far + 2500).min(end),
        ]);
    }
    ranges.retain(|range| range.start < range.end);
    ranges
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_small_blocks_read_as_they_were_packed() {
    let pieces = mixed();
    let expected = image(&pieces);
    for hashed in [true, false] {
        for blocks_per_page in [7, 4096] {
            let writer = ArchiveWriter {
                main: pieces.clone(),
                compression: Compression::Lz4,
                hashed,
                blocks_per_page,
                ..ArchiveWriter::default()
            };
            let written = writer.write();
            // Without a cache, each read decodes its blocks again.
            for cache in [0, 64 << 20] {
                let export = export_of(open(&written), cache);
                for range in ranges(&pieces) {
                    let read = read(&export, range.clone()).await.unwrap();
                    let expected = &expected[range.start as usize..range.end as usize];
                    assert!(read == expected, "{range:?} {hashed} {blocks_per_page} {cache}");
                }
            }
        }
    }
}

/// No block is where the parent has it, so the index of the parent's hashes is needed.
#[tokio::test(flavor = "multi_thread")]
async fn small_blocks_of_a_parent_are_found_by_the_index_of_its_hashes() {
    let folder = tempfile::tempdir().unwrap();
    let blocks: Vec<Vec<u8>> =
        (0..600).map(|number| noise(number, 1 + (number as usize * 37) % 4095)).collect();
    let data = |block: &Vec<u8>| Piece::Data(block.clone());
    let parent = ArchiveWriter {
        main: blocks.iter().map(data).collect(),
        compression: Compression::Lz4,
        blocks_per_page: 50,
        ..ArchiveWriter::default()
    };
    parent.write().save(&folder.path().join("parent.hxz"));
    let main: Vec<Piece> = blocks
        .iter()
        .rev()
        .enumerate()
        .flat_map(|(number, block)| {
            let own = (number % 40 == 20).then(|| Piece::Data(noise(9000 + number as u64, 100)));
            let zeros = (number % 40 == 30).then_some(Piece::Zeros(100));
            own.into_iter().chain(zeros).chain([Piece::InParent(block.clone())])
        })
        .collect();
    let child = ArchiveWriter {
        parents: vec!["parent.hxz".to_owned()],
        main: main.clone(),
        compression: Compression::Lz4,
        ..ArchiveWriter::default()
    };
    let path = folder.path().join("child.hxz");
    child.write().save(&path);

    let expected = image(&main);
    let snapshot = Arc::new(Snapshot::open(&path, &OpenOptions::default()).unwrap());
    assert!(!snapshot.has_parent_index());
    let export = export(&snapshot, &BlockReader::new(64 << 20));
    let whole = 0..expected.len() as u64;
    // Several clients need the index at the same time.
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (export, whole) = (export.clone(), whole.clone());
            tokio::spawn(async move { read(&export, whole).await.unwrap() })
        })
        .collect();
    for client in clients {
        assert!(client.await.unwrap() == expected);
    }
    assert!(snapshot.has_parent_index());
    for range in ranges(&main) {
        let read = read(&export, range.clone()).await.unwrap();
        assert!(read == expected[range.start as usize..range.end as usize], "{range:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_small_block_is_an_error_at_its_offset_and_its_neighbors_are_read() {
    const LENGTH: u64 = 100;
    const BLOCKS: u64 = 600;
    let main: Vec<Piece> =
        (0..BLOCKS).map(|number| Piece::Data(noise(number, LENGTH as usize))).collect();
    let expected = image(&main);
    let written = ArchiveWriter { main, ..ArchiveWriter::default() }.write();
    let end = BLOCKS * LENGTH;
    // The first of a read, within a run, the first and the last of a full run, and the last of all.
    for damaged in [0, 1, 77, MAX_RUN - 1, MAX_RUN, BLOCKS - 1] {
        let mut archive = written.clone();
        let stored = archive.main[0].blocks[damaged as usize].stored.clone();
        let last = archive.bytes[stored.end - 1];
        archive.put(stored.end - 1, &[last ^ 1]);
        let export = export_of(open(&archive), 64 << 20);
        let block = damaged * LENGTH..(damaged + 1) * LENGTH;

        // A read that touches it fails at its offset, or at that of the read if it begins within.
        for range in [0..end, block.start..end, 0..block.end, block.clone()] {
            let error = read(&export, range.clone()).await.unwrap_err();
            assert_eq!(error, ReadError::Unreadable(block.start), "{range:?} {damaged}");
        }
        let within = block.start + 10;
        let error = read(&export, within..(within + 1000).min(end)).await.unwrap_err();
        assert_eq!(error, ReadError::Unreadable(within), "{damaged}");

        for range in [0..block.start, block.end..end] {
            if range.is_empty() {
                continue;
            }
            let read = read(&export, range.clone()).await.unwrap();
            assert!(read == expected[range.start as usize..range.end as usize], "{range:?}");
        }
        // The failure isn't cached as data.
        assert!(read(&export, 0..end).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_blocks_of_a_read_is_limited() {
    let blocks = MAX_BLOCKS + 2 * MAX_RUN;
    let data = |number: u64| Piece::Data(vec![number as u8 | 1]);
    for main in [(0..blocks).map(data).collect::<Vec<_>>(), vec![Piece::Zeros(1); blocks as usize]]
    {
        let expected = image(&main);
        let writer =
            ArchiveWriter { main, compression: Compression::Lz4, ..ArchiveWriter::default() };
        let export = export_of(open(&writer.write()), 64 << 20);
        // Runs may end early, so the limit takes effect at most one run later.
        let error = read(&export, 0..blocks).await.unwrap_err();
        let ReadError::Unreadable(at) = error else { panic!("{error:?}") };
        assert!((MAX_BLOCKS..MAX_BLOCKS + MAX_RUN).contains(&at), "{at}");
        // The limit is of one read, and the rest can be read by another one.
        for range in [0..MAX_BLOCKS, MAX_BLOCKS..blocks, 5..MAX_BLOCKS + 5] {
            let read = read(&export, range.clone()).await.unwrap();
            assert!(read == expected[range.start as usize..range.end as usize], "{range:?}");
        }
    }
}
