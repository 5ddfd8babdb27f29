//! Ranges of a stream that no block covers.

use std::path::Path;
use std::sync::Arc;

use hexz_reader::{Error, ErrorKind, Layout, OpenOptions, Snapshot, StreamKind};

use crate::archive_writer::{ArchiveWriter, Piece, Written, image, page_entry, tar_metadata, text};
use crate::support::{open, read, read_whole};

/// Maximum length of a block of zeros that replaces an uncovered range, in bytes.
const MAX_LENGTH: u64 = 1 << 20;

fn open_zero_uncovered(archive: &Written) -> Snapshot {
    let storage = Arc::new(Arc::<[u8]>::from(archive.bytes.as_slice()));
    let options = OpenOptions { zero_uncovered: true, ..OpenOptions::default() };
    Snapshot::from_storage(Path::new("alone.hxz"), storage, &options).unwrap()
}

fn uncovered_at(result: Result<Vec<u8>, Error>) -> Option<u64> {
    match result.unwrap_err().kind {
        ErrorKind::Uncovered { stream: StreamKind::Main, at } => Some(at),
        _ => None,
    }
}

/// A converted tar archive, which states a size beyond the end of its blocks.
#[test]
fn stream_beyond_the_blocks_of_a_tar_archive_is_an_error_or_zeros() {
    let main = vec![Piece::Data(text(1, 900)), Piece::Data(text(2, 700))];
    let end = 1600;
    let size = end + 2 * MAX_LENGTH + 5;
    let archive = ArchiveWriter {
        metadata: Some(tar_metadata(end)),
        stated_main_size: Some(size),
        main: main.clone(),
        ..ArchiveWriter::default()
    }
    .write();

    let snapshot = open(&archive).unwrap();
    assert_eq!(read(&snapshot, StreamKind::Main, 0, end as usize).unwrap(), image(&main));
    for at in [end, end + 1, size - 1] {
        let error = read(&snapshot, StreamKind::Main, at, 1).unwrap_err();
        let ErrorKind::EndsEarly { stream, end: found, size: stated } = error.kind else {
            panic!("{error}")
        };
        assert_eq!((stream, found, stated), (StreamKind::Main, end, size));
    }
    assert_eq!(uncovered_at(read(&snapshot, StreamKind::Main, size, 1)), Some(size));

    let snapshot = open_zero_uncovered(&archive);
    let expected = [image(&main), vec![0; (size - end) as usize]].concat();
    assert!(read_whole(&snapshot, StreamKind::Main).unwrap() == expected);
    for (at, length) in [(end, MAX_LENGTH), (end + 7, MAX_LENGTH), (size - 9, 9)] {
        let block = snapshot.locate(StreamKind::Main, at).unwrap();
        assert_eq!((block.start(), u64::from(block.length())), (at, length));
        assert!(block.is_zeros());
    }
    // Nothing is known of bytes beyond the stated size.
    assert_eq!(uncovered_at(read(&snapshot, StreamKind::Main, size, 1)), Some(size));
}

#[test]
fn range_in_front_of_the_first_page_is_an_error_or_zeros() {
    let main = [Piece::Data(text(1, 300))];
    let mut archive = ArchiveWriter { main: main.to_vec(), ..ArchiveWriter::default() }.write();
    let entry = archive.main[0].entry;
    archive.put(entry + page_entry::START_LOGICAL, &10_u64.to_le_bytes());
    archive.set("main size", &310_u64.to_le_bytes());

    let snapshot = open(&archive).unwrap();
    for at in [0, 9] {
        assert_eq!(uncovered_at(read(&snapshot, StreamKind::Main, at, 1)), Some(at));
    }
    assert_eq!(read(&snapshot, StreamKind::Main, 10, 300).unwrap(), image(&main));

    let snapshot = open_zero_uncovered(&archive);
    let expected = [vec![0; 10], image(&main)].concat();
    assert_eq!(read_whole(&snapshot, StreamKind::Main).unwrap(), expected);
    assert_eq!(snapshot.locate(StreamKind::Main, 3).unwrap().end(), 10);
}

/// The child refers to the parent's bytes by offset, and the parent's blocks end before.
#[test]
fn uncovered_range_of_a_parent_is_an_error_or_zeros_of_the_child() {
    let main = vec![Piece::Data(text(1, 300)), Piece::Data(text(2, 300))];
    let folder = tempfile::tempdir().unwrap();
    let parent = ArchiveWriter {
        layout: Layout::C,
        metadata: Some(tar_metadata(600)),
        stated_main_size: Some(2000),
        main: main.clone(),
        ..ArchiveWriter::default()
    };
    parent.write().save(&folder.path().join("parent.hxz"));
    let expected = [image(&main), vec![0; 400]].concat();
    let child = ArchiveWriter {
        layout: Layout::C,
        parents: vec!["parent.hxz".to_owned()],
        main: vec![Piece::ByOffset { bytes: expected.clone(), hash: [0; 32] }],
        ..ArchiveWriter::default()
    };
    let path = folder.path().join("child.hxz");
    child.write().save(&path);

    let snapshot = Snapshot::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(read(&snapshot, StreamKind::Main, 0, 600).unwrap(), image(&main));
    let error = read(&snapshot, StreamKind::Main, 600, 1).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::EndsEarly { end: 600, size: 2000, .. }), "{error}");
    assert!(error.path.ends_with("parent.hxz"));

    let options = OpenOptions { zero_uncovered: true, ..OpenOptions::default() };
    let snapshot = Snapshot::open(&path, &options).unwrap();
    assert_eq!(read_whole(&snapshot, StreamKind::Main).unwrap(), expected);
}

#[test]
fn tar_metadata_that_contradict_the_index_are_ignored() {
    let main = vec![Piece::Data(text(1, 900)), Piece::Data(text(2, 700))];
    // Less than the start of the last page, and more than the stream.
    for total_bytes in [0, 899, 1601, u64::MAX] {
        let archive = ArchiveWriter {
            metadata: Some(tar_metadata(total_bytes)),
            blocks_per_page: 1,
            main: main.clone(),
            ..ArchiveWriter::default()
        };
        let snapshot = open(&archive.write()).unwrap();
        assert!(read_whole(&snapshot, StreamKind::Main).unwrap() == image(&main), "{total_bytes}");
    }
}
