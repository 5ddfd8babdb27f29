//! What a check says can't be read, against what reading block by block comes to.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;

use hexz_reader::{
    ErrorKind, Fault, Layout, OpenOptions, Snapshot, StreamKind, VerifyProgress, VerifyStats,
};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::archive_writer::{
    ArchiveWriter, HEADER_REGION, Piece, Written, block_entry, noise, page_entry, text,
};
use crate::snapshot::damage::{child, specimens};
use crate::snapshot::property::{file_name, plan, write_chain};
use crate::snapshot::{STREAMS, open_bytes, with_password};

fn check_on(threads: usize, snapshot: &Snapshot) -> (VerifyStats, Vec<Fault>) {
    let mut faults = Vec::new();
    let threads = NonZeroUsize::new(threads).unwrap();
    let summary = snapshot.verify(threads, &VerifyProgress::default(), |fault| faults.push(fault));
    (summary, faults)
}

fn check(written: &Written) -> (VerifyStats, Vec<Fault>) {
    check_on(3, &open_bytes(&written.bytes, Path::new("alone.hxz")).unwrap())
}

fn one(range: Range<u64>) -> Vec<Range<u64>> {
    std::iter::once(range).collect()
}

fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            Some(last) => {
                assert!(last.end < range.start, "{last:?} and {range:?} overlap");
                merged.push(range);
            }
            None => merged.push(range),
        }
    }
    merged
}

/// Where a stream can't be read, found out by reading every block of it.
fn unreadable(snapshot: &Snapshot, stream: StreamKind) -> Vec<Range<u64>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < snapshot.size(stream) {
        match snapshot.locate(stream, at) {
            Ok(block) => {
                assert_eq!(block.start(), at);
                if snapshot.read_block(&block).is_err() {
                    ranges.push(at..block.end());
                }
                at = block.end();
            }
            Err(_) => {
                ranges.push(at..at + 1);
                at += 1;
            }
        }
    }
    merged(ranges)
}

/// Checks on one thread and on several, and compares with what reading comes to.
#[track_caller]
pub(crate) fn compare(open: impl Fn() -> Snapshot, what: &str) {
    for threads in [1, 3] {
        let (summary, faults) = check_on(threads, &open());
        let snapshot = open();
        assert!(summary.is_complete);
        let size: u64 = STREAMS.iter().map(|&stream| snapshot.size(stream)).sum();
        assert_eq!(summary.bytes, size, "{what}");
        assert_eq!(summary.faults, faults.len() as u64);
        assert_eq!(summary.unreadable, faults.iter().map(Fault::bytes).sum::<u64>());
        let start = |fault: &Fault| (fault.stream, fault.ranges[0].start);
        assert!(faults.is_sorted_by_key(start), "{what}");
        for stream in STREAMS {
            let of_stream = faults.iter().filter(|fault| fault.stream == stream);
            for fault in of_stream.clone() {
                assert_eq!(merged(fault.ranges.clone()), fault.ranges, "{what}");
            }
            let said = merged(of_stream.flat_map(|fault| fault.ranges.clone()).collect());
            assert_eq!(said, unreadable(&snapshot, stream), "{what}: the {stream} stream");
        }
    }
}

/// Every archive that the Hexz tools wrote.
#[test]
fn real_archives_are_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/archives");
    let options = OpenOptions { raw: true, ..with_password() };
    let mut count = 0;
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "hxz") {
            continue;
        }
        count += 1;
        let snapshot = Snapshot::open(&path, &options).unwrap();
        for threads in [1, 4] {
            let (summary, faults) = check_on(threads, &snapshot);
            assert!(faults.is_empty(), "{}: {}", path.display(), faults[0].error);
            assert!(summary.is_complete);
            let size: u64 = STREAMS.iter().map(|&stream| snapshot.size(stream)).sum();
            assert_eq!(summary.bytes, size);
        }
    }
    assert_eq!(count, 13);
}

#[test]
fn what_is_counted() {
    let pieces = [
        Piece::Data(text(1, 700)),
        Piece::Zeros(500),
        Piece::Data(text(1, 700)),
        Piece::Data(vec![0; 9000]),
        Piece::InParent(text(2, 300)),
        Piece::InParent(text(2, 300)),
    ];
    let folder = tempfile::tempdir().unwrap();
    ArchiveWriter::of_image(&text(2, 300), 300).write().save(&folder.path().join("parent.hxz"));
    let parents = vec!["parent.hxz".into()];
    let child = ArchiveWriter { main: pieces.to_vec(), parents, ..ArchiveWriter::default() };
    let snapshot = open_bytes(&child.write().bytes, &folder.path().join("child.hxz")).unwrap();
    let (summary, faults) = check_on(2, &snapshot);
    assert!(faults.is_empty());
    assert_eq!((summary.blocks, summary.bytes), (6, 11_500));
    assert_eq!((summary.zeros, summary.in_parents, summary.shared), (2, 2, 2));
}

#[test]
fn each_damaged_byte_of_each_archive() {
    for specimen in specimens() {
        let path = specimen.folder.path().join("damaged.hxz");
        let length = specimen.written.bytes.len();
        // Every field of the header and of the index, and a part of the blocks.
        let header = (0..150).step_by(3);
        let index = specimen.written.index_offset()..length;
        let body = (HEADER_REGION..index.start).step_by(5);
        for at in header.chain(body).chain(index.step_by(2)) {
            let mut bytes = specimen.written.bytes.clone();
            bytes[at] ^= 0x41;
            if open_bytes(&bytes, &path).is_ok_and(|snapshot| is_small(&snapshot)) {
                compare(|| open_bytes(&bytes, &path).unwrap(), &format!("byte {at}"));
            }
        }
    }
}

/// A damaged size may be huge, and reading byte by byte would take as long.
fn is_small(snapshot: &Snapshot) -> bool {
    STREAMS.iter().all(|&stream| snapshot.size(stream) < 1 << 20)
}

#[test]
fn each_damaged_byte_of_a_parent() {
    let child = child();
    let path = child.folder.path().join("child.hxz");
    let parent = child.folder.path().join("parent.hxz");
    let sound = std::fs::read(&parent).unwrap();
    for at in (0..150).step_by(7).chain((HEADER_REGION..sound.len()).step_by(3)) {
        let mut damaged = sound.clone();
        damaged[at] ^= 0x41;
        std::fs::write(&parent, damaged).unwrap();
        if open_bytes(&child.written.bytes, &path).is_ok() {
            let open = || open_bytes(&child.written.bytes, &path).unwrap();
            compare(open, &format!("the parent's byte {at}"));
        }
    }
}

/// One block refers by offset to blocks on three pages of the parent, of which one is damaged:
/// what the others have can be read.
#[test]
fn a_damaged_page_under_a_reference_by_offset_hides_its_own_blocks_alone() {
    let folder = tempfile::tempdir().unwrap();
    let main: Vec<_> = (0..6).map(|seed| Piece::Data(text(seed, 100))).collect();
    for layout in [Layout::A, Layout::C] {
        let base = ArchiveWriter { layout, main: main.clone(), ..ArchiveWriter::default() };
        let base = ArchiveWriter { blocks_per_page: 2, ..base };
        let child = ArchiveWriter {
            layout,
            parents: vec!["parent.hxz".into()],
            main: base.referred_by_offset(&base.main, 600),
            ..ArchiveWriter::default()
        };
        let path = folder.path().join("child.hxz");
        child.write().save(&path);
        for page in 0..3 {
            let mut damaged = base.write();
            let entry = damaged.main[page].blocks[0].entry;
            damaged.put(entry + block_entry::LENGTH, &0_u32.to_le_bytes());
            damaged.save(&folder.path().join("parent.hxz"));
            let open = || Snapshot::open(&path, &OpenOptions::default()).unwrap();
            let start = page as u64 * 200;
            // What covers a block's start tells in layout C what the whole block refers to.
            let hidden = if layout == Layout::C && page == 0 { 600 } else { start + 200 };
            assert_eq!(unreadable(&open(), StreamKind::Main), one(start..hidden));
            compare(open, &format!("{layout:?}, page {page}"));
        }
    }
}

/// A reference by offset leads to an archive whose blocks refer further by offset, except for one.
/// That one can be read, whatever is wrong below the others.
#[test]
fn a_fault_below_a_parents_reference_hides_no_more_than_that_reference() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let blocks: Vec<Vec<u8>> = (0..6).map(|seed| text(seed, 100)).collect();
    let by_offset = |bytes: &[u8]| Piece::ByOffset { bytes: bytes.to_vec(), hash: [0; 32] };
    let of = |main: Vec<Piece>, parents: &[&str]| ArchiveWriter {
        layout: Layout::A,
        main,
        parents: parents.iter().map(ToString::to_string).collect(),
        blocks_per_page: 3,
        ..ArchiveWriter::default()
    };
    let mut parent: Vec<Piece> = blocks.iter().map(|block| by_offset(block)).collect();
    parent[4] = Piece::Data(noise(1, 100));
    of(parent, &["base.hxz"]).write().save(&path("parent.hxz"));
    of(vec![by_offset(&blocks.concat())], &["parent.hxz"]).write().save(&path("child.hxz"));
    let data = |blocks: &[Vec<u8>]| blocks.iter().cloned().map(Piece::Data).collect::<Vec<_>>();
    let mut damaged = of(data(&blocks), &[]).write();
    let entry = damaged.main[1].blocks[0].entry;
    damaged.put(entry + block_entry::LENGTH, &0_u32.to_le_bytes());
    let short = of(data(&blocks[..3]), &[]).write();
    for (base, what) in [(damaged, "a damaged page"), (short, "no block")] {
        base.save(&path("base.hxz"));
        let open = || Snapshot::open(&path("child.hxz"), &OpenOptions::default()).unwrap();
        assert_eq!(unreadable(&open(), StreamKind::Main), [300..400, 500..600], "{what}");
        compare(open, what);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn rubbish_anywhere_in_a_chain(
        plans in vec(plan(), 1..=4),
        rubbish in vec((any::<Index>(), any::<Index>(), vec(any::<u8>(), 1..40)), 1..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let chain = write_chain(&plans, folder.path());
        for (file, at, rubbish) in rubbish {
            let path = folder.path().join(file_name(file.index(chain.len())));
            let mut bytes = std::fs::read(&path).unwrap();
            let at = HEADER_REGION + at.index(bytes.len() - HEADER_REGION);
            let end = bytes.len().min(at + rubbish.len());
            bytes[at..end].copy_from_slice(&rubbish[..end - at]);
            std::fs::write(&path, bytes).unwrap();
        }
        let options = OpenOptions { raw: true, ..with_password() };
        for number in 0..chain.len() {
            let path = folder.path().join(file_name(number));
            if Snapshot::open(&path, &options).is_ok_and(|snapshot| is_small(&snapshot)) {
                compare(|| Snapshot::open(&path, &options).unwrap(), &file_name(number));
            }
        }
    }
}

#[test]
fn a_shared_copy_is_one_fault_with_all_its_ranges() {
    let [a, b] = [text(1, 600), noise(2, 400)];
    let main = [&a, &a, &b, &a, &b].map(|bytes| Piece::Data(bytes.clone())).to_vec();
    let writer = ArchiveWriter { main, blocks_per_page: 2, ..ArchiveWriter::default() };
    let mut written = writer.write();
    let stored = written.main[0].blocks[0].stored.clone();
    written.bytes[stored.start] ^= 1;
    let (summary, faults) = check(&written);
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].ranges, [0..1200, 1600..2200]);
    assert_eq!((faults[0].blocks, faults[0].bytes()), (3, 1800));
    assert_eq!(faults[0].error.offset, Some(stored.start as u64));
    assert_eq!((summary.shared, summary.unreadable), (3, 1800));
}

/// A fault in one place hides none in another.
#[test]
fn a_damaged_page_is_unreadable_as_a_whole() {
    let main: Vec<_> = (0..6).map(|seed| Piece::Data(text(seed, 100))).collect();
    let writer = ArchiveWriter { main, blocks_per_page: 2, ..ArchiveWriter::default() };
    let mut written = writer.write();
    let (page, block) = (&written.main[1], &written.main[2].blocks[1]);
    let (at, page, stored) =
        (page.blocks[0].entry + block_entry::LENGTH, page.place.start, block.stored.start);
    written.put(at, &0_u32.to_le_bytes());
    written.bytes[stored] ^= 1;
    let (summary, faults) = check(&written);
    let said: Vec<_> =
        faults.iter().map(|fault| (fault.error.offset, fault.ranges.clone())).collect();
    assert_eq!(said, [(Some(page as u64), one(200..400)), (Some(stored as u64), one(500..600)),]);
    assert_eq!((summary.blocks, summary.faults, summary.unreadable), (6, 2, 300));
}

#[test]
fn blocks_of_no_parent_and_bytes_of_no_block() {
    let missing = |seed| Piece::InParent(text(seed, 100));
    let main = vec![missing(1), missing(2), Piece::Data(text(3, 50)), missing(4)];
    let written = ArchiveWriter { main, ..ArchiveWriter::default() }.write();
    let (_, faults) = check(&written);
    assert_eq!(faults.len(), 1);
    assert_eq!((faults[0].blocks, faults[0].ranges.clone()), (3, vec![0..200, 250..350]));
    assert!(matches!(faults[0].error.kind, ErrorKind::Unresolvable { .. }));

    // The first page begins behind the stream's beginning.
    let mut gap = written.clone();
    gap.put(gap.main[0].entry + page_entry::START_LOGICAL, &10_u64.to_le_bytes());
    let (_, faults) = check(&gap);
    assert!(matches!(faults[0].error.kind, ErrorKind::Uncovered { at: 0, .. }));
    assert_eq!(faults[0].ranges, one(0..10));
    assert_eq!(faults[1].ranges, one(10..350));

    // Blocks whose number has no 64 bits can't be had.
    let mut numbers = written;
    numbers.put(numbers.main[0].entry + page_entry::START_BLOCK, &(u64::MAX - 1).to_le_bytes());
    compare(|| open_bytes(&numbers.bytes, Path::new("alone.hxz")).unwrap(), "numbers");
}

/// More faults than are gathered at once come in lots, and none is lost.
#[test]
fn very_many_faults() {
    let blocks = 70_000;
    let main: Vec<_> = (0..blocks)
        // The first is no run of zeros: those are known by their hash.
        .flat_map(|number: u32| {
            [Piece::InParent((number + 1).to_le_bytes().to_vec()), Piece::Zeros(1)]
        })
        .collect();
    let (summary, faults) = check(&ArchiveWriter { main, ..ArchiveWriter::default() }.write());
    assert_eq!(faults.len(), 2);
    let ranges: Vec<_> = faults.into_iter().flat_map(|fault| fault.ranges).collect();
    let expected: Vec<_> = (0..u64::from(blocks)).map(|n| n * 5..n * 5 + 4).collect();
    assert!(ranges == expected);
    assert_eq!(summary.unreadable, u64::from(blocks) * 4);
}

#[test]
fn a_check_that_is_stopped_says_so() {
    let written = ArchiveWriter::of_image(&text(1, 100_000), 1000).write();
    let snapshot = open_bytes(&written.bytes, Path::new("alone.hxz")).unwrap();
    let progress = VerifyProgress::default();
    progress.stop();
    let summary = snapshot.verify(NonZeroUsize::MIN, &progress, |_| panic!("a fault"));
    assert_eq!(summary, VerifyStats::default());
}
