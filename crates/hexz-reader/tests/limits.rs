//! Hostile headers and indexes: refused before memory is allocated for them.

use hexz_reader::limits::{
    MAX_BLOCK, MAX_DICTIONARY, MAX_KDF_ITERATIONS, MAX_STORED_BLOCK, MAX_STREAM, max_stored,
};
use hexz_reader::{ErrorKind, Layout, StreamKind};

use crate::archive_writer::{
    ArchiveWriter, PASSWORD, Piece, Written, block_entry, page_entry, text,
};
use crate::support::{STREAMS, invalid, open, problem_of_first_byte, read, too_large};

/// Three pages of two blocks of 1000 bytes.
fn three_pages() -> Written {
    let writer = ArchiveWriter::of_image(&text(1, 6000), 1000);
    ArchiveWriter { blocks_per_page: 2, ..writer }.write()
}

#[track_caller]
fn assert_refused(archive: &Written, what: &str, expected: fn(&ErrorKind) -> bool) {
    match open(archive) {
        Ok(_) => panic!("{what}: it is opened"),
        Err(error) => assert!(expected(&error.kind), "{what}: {error}"),
    }
}

fn ends_within(kind: &ErrorKind) -> bool {
    matches!(kind, ErrorKind::Truncated(_))
}

/// libnbd CVE-2023-5215 | sizes of 2^63 and more look negative
#[test]
fn sizes_of_2_to_the_63_are_refused() {
    for field in ["main size", "auxiliary size"] {
        for size in [1 << 63, (1 << 63) + 6000, u64::MAX] {
            let mut archive = three_pages();
            archive.set(field, &size.to_le_bytes());
            assert_refused(&archive, field, too_large);
        }
    }
    let mut largest = ArchiveWriter::default().write();
    largest.set("main size", &MAX_STREAM.to_le_bytes());
    let snapshot = open(&largest).unwrap();
    assert_eq!(snapshot.size(StreamKind::Main), i64::MAX as u64);
    for at in [0, 1 << 40, MAX_STREAM - 1, MAX_STREAM, u64::MAX] {
        let error = read(&snapshot, StreamKind::Main, at, 1).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Uncovered { .. }), "{error}");
    }
}

#[test]
fn other_versions_and_numbers_without_a_meaning_are_refused() {
    for version in [0_u32, 2, u32::MAX] {
        let mut archive = three_pages();
        archive.set("version", &version.to_le_bytes());
        assert!(
            matches!(open(&archive).unwrap_err().kind, ErrorKind::UnknownVersion(v) if v == version)
        );
    }
    for compression in [2_u32, 256, u32::MAX] {
        let mut archive = three_pages();
        archive.set("compression", &compression.to_le_bytes());
        assert_refused(&archive, "compression", invalid);
    }
    for features in [[2, 0, 0], [1, 255, 0], [1, 0, 3]] {
        let mut archive = three_pages();
        archive.set("features", &features);
        assert_refused(&archive, "features", invalid);
    }
    let mut archive = three_pages();
    archive.put(4095, &[1]);
    assert_refused(&archive, "padding", invalid);
}

#[test]
fn counts_and_lengths_of_parents_are_bounded() {
    let with_parent =
        || ArchiveWriter { parents: vec!["base.hxz".into()], ..ArchiveWriter::default() }.write();
    for count in [1 << 60, u64::MAX, 600] {
        let mut archive = with_parent();
        archive.set("parent count", &count.to_le_bytes());
        assert_refused(&archive, "parent count", invalid);
    }
    for length in [1 << 60, u64::MAX, 4096] {
        let mut archive = with_parent();
        archive.set("parent length", &u64::to_le_bytes(length));
        assert_refused(&archive, "parent length", ends_within);
    }
    let mut archive = with_parent();
    archive.set("parent", b"base\xff\xfe\xfd\xfc");
    assert_refused(&archive, "a name that is no text", invalid);
}

#[test]
fn iteration_counts_are_bounded() {
    let encrypted = ArchiveWriter { password: Some(PASSWORD), ..ArchiveWriter::default() }.write();
    for iterations in [MAX_KDF_ITERATIONS + 1, u32::MAX] {
        let mut archive = encrypted.clone();
        archive.set("iterations", &iterations.to_le_bytes());
        assert_refused(&archive, "iterations", too_large);
    }
    let mut archive = encrypted;
    archive.set("iterations", &[0; 4]);
    assert_refused(&archive, "no iterations", invalid);
}

#[test]
fn places_in_the_header_lie_within_the_file() {
    let writer = ArchiveWriter {
        dictionary: text(1, 500),
        metadata: Some(b"{}".to_vec()),
        signature: Some([1; 64]),
        ..ArchiveWriter::of_image(&text(2, 3000), 1000)
    };
    let written = writer.write();
    let length = written.bytes.len() as u64;
    let index = written.index_offset() as u64;
    let with = |field, value: u64| {
        let mut archive = written.clone();
        let bytes = value.to_le_bytes();
        archive.set(field, &bytes[..written.field(field).len()]);
        archive
    };
    for offset in [0, 1, 4095, length, 1 << 63, u64::MAX] {
        let mut archive = three_pages();
        archive.set("index offset", &offset.to_le_bytes());
        assert_refused(&archive, &format!("an index at {offset}"), ends_within);
    }
    for offset in [0, 4095, index - 499, length, u64::MAX - 499, u64::MAX] {
        assert_refused(&with("dictionary offset", offset), "dictionary offset", invalid);
    }
    let long = u64::from(MAX_DICTIONARY) + 1;
    assert_refused(&with("dictionary length", long), "dictionary length", too_large);
    assert_refused(&with("dictionary length", u32::MAX.into()), "dictionary length", too_large);
    let behind = u64::from(MAX_DICTIONARY);
    assert_refused(&with("dictionary length", behind), "dictionary behind the end", invalid);
    for field in ["metadata offset", "signature offset"] {
        for offset in [0, 4096, index - 1] {
            assert_refused(&with(field, offset), field, invalid);
        }
        assert_refused(&with(field, length), field, ends_within);
        assert_refused(&with(field, u64::MAX), field, invalid);
    }
    for field in ["metadata length", "signature length"] {
        assert_refused(&with(field, u32::MAX.into()), field, ends_within);
    }
    assert!(open(&written).is_ok());
}

#[test]
fn page_counts_are_bounded_by_the_master_index() {
    for field in ["main page count", "auxiliary page count"] {
        for count in [4, 1 << 32, 1 << 60, u64::MAX] {
            let mut archive = three_pages();
            archive.set(field, &u64::to_le_bytes(count));
            assert_refused(&archive, field, ends_within);
        }
    }
    // Fewer pages than there are leave bytes that nobody asked for.
    for count in [0_u64, 1, 2] {
        let mut archive = three_pages();
        archive.set("main page count", &count.to_le_bytes());
        assert!(open(&archive).is_err());
    }
}

#[test]
fn pages_lie_in_front_of_the_master_index() {
    let written = three_pages();
    let entry = written.main[1].entry;
    let index = written.index_offset() as u64;
    for offset in [0, 4095, index - 111, index, u64::MAX - 111, u64::MAX] {
        let mut archive = written.clone();
        archive.put(entry + page_entry::OFFSET, &offset.to_le_bytes());
        assert_refused(&archive, &format!("a page at {offset}"), invalid);
    }
    for length in [0, 7, 8, 111, 113, 8 + 52 * 4097, u32::MAX] {
        let mut archive = written.clone();
        archive.put(entry + page_entry::LENGTH, &u32::to_le_bytes(length));
        assert_refused(&archive, &format!("a page of {length} bytes"), invalid);
    }
}

#[test]
fn a_page_has_at_most_4096_blocks() {
    let of = |count| {
        let main = vec![Piece::Zeros(1); count];
        ArchiveWriter { main, blocks_per_page: count, ..ArchiveWriter::default() }.write()
    };
    assert!(open(&of(4096)).is_ok());
    assert_refused(&of(4097), "4097 blocks", invalid);
    for count in [0, 1, 3, 1 << 61, u64::MAX] {
        // The first page tells the form of all entries.
        let mut archive = three_pages();
        archive.put(archive.main[0].place.start, &u64::to_le_bytes(count));
        assert_refused(&archive, &format!("{count} blocks on the first page"), invalid);
        let mut archive = three_pages();
        archive.put(archive.main[1].place.start, &u64::to_le_bytes(count));
        let snapshot = open(&archive).unwrap();
        let error = read(&snapshot, StreamKind::Main, 2000, 1).unwrap_err();
        assert!(invalid(&error.kind), "{count} blocks: {error}");
        assert!(read(&snapshot, StreamKind::Main, 0, 2000).is_ok());
    }
}

#[test]
fn pages_are_in_order() {
    let written = three_pages();
    for starts in [
        [2000, 0, 4000],
        [0, 4000, 2000],
        [0, 0, 4000],
        [0, 2000, 2000],
        [0, 2000, 6000],
        [0, 2000, u64::MAX],
        [u64::MAX, 2000, 4000],
    ] {
        let mut archive = written.clone();
        for (page, start) in written.main.iter().zip(starts) {
            archive.put(page.entry + page_entry::START_LOGICAL, &start.to_le_bytes());
        }
        assert_refused(&archive, &format!("pages at {starts:?}"), invalid);
    }
}

#[test]
fn block_numbers_do_not_overflow() {
    for password in [None, Some(PASSWORD)] {
        let writer = ArchiveWriter { password, ..ArchiveWriter::of_image(&text(1, 3000), 1000) };
        let mut archive = writer.write();
        let entry = archive.main[0].entry;
        archive.put(entry + page_entry::START_BLOCK, &u64::MAX.to_le_bytes());
        if let Ok(snapshot) = open(&archive) {
            assert_eq!(password, None);
            assert!(read(&snapshot, StreamKind::Main, 1000, 1).is_err());
        }
    }
}

#[test]
fn ranges_that_no_block_covers_are_errors() {
    let mut empty = ArchiveWriter::default().write();
    empty.set("main size", &100_u64.to_le_bytes());
    assert!(matches!(
        problem_of_first_byte(&empty),
        ErrorKind::Uncovered { stream: StreamKind::Main, at: 0 }
    ));
    // The first page begins late.
    let mut late = ArchiveWriter::of_image(&text(1, 3000), 1000).write();
    late.put(late.main[0].entry + page_entry::START_LOGICAL, &10_u64.to_le_bytes());
    late.set("main size", &3010_u64.to_le_bytes());
    assert!(matches!(problem_of_first_byte(&late), ErrorKind::Uncovered { at: 0, .. }));
}

/// A gap may as well be a damaged length, by which all blocks behind it would be moved.
#[test]
fn pages_reach_from_one_to_the_next() {
    let reads_each_page = |archive: &Written| {
        let snapshot = open(archive).unwrap();
        [0, 1999, 2100, 3999, 4100, 5999]
            .map(|at| read(&snapshot, StreamKind::Main, at, 1).map_err(|error| error.kind))
            .map(|outcome| outcome.map_or_else(|kind| !invalid(&kind), |_| true))
    };
    for start in [1999_u64, 2001] {
        let mut moved = three_pages();
        let entry = moved.main[1].entry;
        moved.put(entry + page_entry::START_LOGICAL, &start.to_le_bytes());
        assert_eq!(reads_each_page(&moved), [false, false, false, false, true, true], "{start}");
    }
    for size in [5999_u64, 6001] {
        let mut cut = three_pages();
        cut.set("main size", &size.to_le_bytes());
        assert_eq!(reads_each_page(&cut)[..5], [true, true, true, true, false], "{size}");
    }
}

/// Where the size isn't stated, no end of the stream tells that the last page was moved.
#[test]
fn the_last_page_stays_where_it_is_without_a_stated_size() {
    for (blocks_per_page, page, start) in [(2, 2, 4001_u64), (2, 2, 3999), (6, 0, 1)] {
        let writer = ArchiveWriter {
            blocks_per_page,
            stated_main_size: Some(0),
            ..ArchiveWriter::of_image(&text(1, 6000), 1000)
        };
        let mut moved = writer.write();
        let entry = moved.main[page].entry;
        moved.put(entry + page_entry::START_LOGICAL, &start.to_le_bytes());
        if let Ok(snapshot) = open(&moved)
            && let Ok(bytes) = read(&snapshot, StreamKind::Main, 4500, 100)
        {
            assert!(bytes == text(1, 6000)[4500..4600], "page {page} at {start}");
        }
    }
}

/// In older archives padding stands there. With one bit of it set, their references by offset
/// would become references by hash.
#[test]
fn chunking_parameters_of_zeros_are_refused() {
    let writer = ArchiveWriter { layout: Layout::C, ..ArchiveWriter::of_image(&text(1, 50), 50) };
    let mut archive = writer.write();
    archive.set("chunking flag", &[1]);
    assert_refused(&archive, "chunking parameters", invalid);
}

#[test]
fn lengths_of_blocks_are_bounded() {
    let written = three_pages();
    let entry = written.main[0].blocks[0].entry;
    let with = |field: usize, value: u32| {
        let mut archive = written.clone();
        archive.put(entry + field, &value.to_le_bytes());
        problem_of_first_byte(&archive)
    };
    assert!(invalid(&with(block_entry::LENGTH, 0)));
    for length in [MAX_BLOCK + 1, u32::MAX] {
        assert!(too_large(&with(block_entry::LENGTH, length)), "{length}");
    }
    // More than the page has room for.
    assert!(invalid(&with(block_entry::LENGTH, MAX_BLOCK)));
    let at = entry + block_entry::LENGTH;
    let own = u32::from_le_bytes(written.bytes[at..at + 4].try_into().unwrap());
    for length in [max_stored(own) + 1, MAX_STORED_BLOCK + 1, u32::MAX] {
        assert!(too_large(&with(block_entry::STORED_LENGTH, length)), "{length}");
    }
    assert!(invalid(&with(block_entry::STORED_LENGTH, 0)));
    // In proportion, and beyond the end of all blocks.
    let beyond = written.index_offset() as u32 - 4095;
    let kind = with(block_entry::STORED_LENGTH, beyond);
    assert!(if beyond > max_stored(own) { too_large(&kind) } else { invalid(&kind) });
}

#[test]
fn blocks_lie_between_the_header_and_the_master_index() {
    let written = three_pages();
    let block = &written.main[0].blocks[0];
    let index = written.index_offset() as u64;
    let last = index - block.stored.len() as u64;
    for offset in [0, 1, 4095, last + 1, index, u64::MAX - 1, 1 << 63] {
        let mut archive = written.clone();
        archive.put(block.entry + block_entry::OFFSET, &u64::to_le_bytes(offset));
        assert!(invalid(&problem_of_first_byte(&archive)), "a block at {offset}");
    }
}

#[test]
fn an_archive_may_be_empty() {
    let snapshot = open(&ArchiveWriter::default().write()).unwrap();
    for stream in STREAMS {
        assert_eq!(snapshot.size(stream), 0);
        assert!(read(&snapshot, stream, 0, 1).is_err());
        assert!(read(&snapshot, stream, 0, 0).unwrap().is_empty());
    }
}
