//! Damaged archives: an error or the right bytes, never wrong ones.
//!
//! What protects what: a stored block has its CRC-32, its authentication tag or its BLAKE3,
//! and its length; index pages and the master index have no checksum, but they have to fit
//! together without a gap.
//!
//! Nothing protects the following, so it is left out below:
//!
//! - the dictionary of an archive whose blocks have no hash: layouts A and X, encrypted archives;
//! - a page's offset where it comes to name another page of the same number of blocks and the
//!   same length;
//! - which file the parent of references by offset is: they mean whatever the parent has there;
//! - lengths of zeros on the last page of a stream whose size isn't stated: they move the blocks
//!   behind them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use hexz_reader::{Compression, ErrorKind, Layout, OpenOptions, Snapshot, StreamKind};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::{STREAMS, open, open_bytes, read, read_whole, with_password};
use crate::archive_writer::{
    ArchiveWriter, HEADER_REGION, PASSWORD, Piece, Written, WrittenPage, block_entry, image, noise,
    tar_metadata, text,
};

/// One byte's damage: a bit at either end, and all of them.
const FLIPS: [u8; 3] = [0x01, 0x80, 0xff];

/// An archive, what it reads as, and where it is to be opened.
pub(crate) struct Specimen {
    writer: ArchiveWriter,
    pub(crate) written: Written,
    pub(crate) folder: tempfile::TempDir,
}

impl Specimen {
    fn new(writer: ArchiveWriter) -> Self {
        let written = writer.write();
        Self { writer, written, folder: tempfile::tempdir().unwrap() }
    }

    fn parent(&self) -> PathBuf {
        self.folder.path().join("parent.hxz")
    }

    /// Panics if anything can be read that was not packed.
    #[track_caller]
    fn examine(&self, bytes: &[u8], what: &str) {
        let path = self.folder.path().join("damaged.hxz");
        let Ok(snapshot) = open_bytes(bytes, &path) else { return };
        for (stream, pieces) in STREAMS.into_iter().zip([&self.writer.main, &self.writer.auxiliary])
        {
            // Each block by itself: an error at one must not hide wrong bytes of another.
            let mut at = 0;
            for piece in pieces {
                let expected = piece.bytes();
                if let Ok(bytes) = read(&snapshot, stream, at, expected.len()) {
                    assert!(
                        bytes == expected,
                        "{what}: wrong bytes at {at} of the {stream} stream"
                    );
                }
                at += expected.len() as u64;
            }
            let largest = 1 << 20;
            if snapshot.size(stream) <= largest
                && let Ok(bytes) = read_whole(&snapshot, stream)
            {
                assert!(bytes == image(pieces), "{what}: the {stream} stream has another size");
            }
        }
    }

    /// Damages every byte but those in `spared`.
    #[track_caller]
    fn damage_each_byte(&self, spared: &[Range<usize>]) {
        self.examine(&self.written.bytes, "undamaged");
        // Most of the header's region is padding, all of which is looked at alike.
        let padding = 300..HEADER_REGION - 10;
        for at in 0..self.written.bytes.len() {
            let dull = padding.contains(&at) && !at.is_multiple_of(89);
            if dull || spared.iter().any(|range| range.contains(&at)) {
                continue;
            }
            for flip in FLIPS {
                let mut bytes = self.written.bytes.clone();
                bytes[at] ^= flip;
                self.examine(&bytes, &format!("byte {at} ^ {flip:#04x}"));
            }
        }
    }

    #[track_caller]
    fn truncate(&self) {
        let length = self.written.bytes.len();
        for to in (0..HEADER_REGION).step_by(61).chain(HEADER_REGION..length) {
            let bytes = &self.written.bytes[..to];
            let path = self.folder.path().join("damaged.hxz");
            assert!(open_bytes(bytes, &path).is_err(), "{length} bytes cut to {to} are opened");
        }
    }
}

/// A bit of everything: fresh and repeated blocks, both sorts of zeros.
fn pieces() -> Vec<Piece> {
    vec![
        Piece::Data(text(1, 700)),
        Piece::Data(noise(2, 150)),
        Piece::Zeros(500),
        Piece::Data(text(1, 700)),
        Piece::Data(vec![0; 900]),
        Piece::Data(text(3, 333)),
        Piece::Zeros(77),
        Piece::Data(noise(4, 60)),
    ]
}

/// Pages of three blocks, whose lengths in the stream differ.
fn writer() -> ArchiveWriter {
    let auxiliary = vec![Piece::Data(text(5, 400)), Piece::Zeros(31), Piece::Data(noise(6, 40))];
    ArchiveWriter { blocks_per_page: 3, main: pieces(), auxiliary, ..ArchiveWriter::default() }
}

pub(crate) fn specimens() -> Vec<Specimen> {
    [
        latest_layout(),
        older_layouts(),
        thin_by_offset(),
        without_stated_size(),
        tar_and_signed_twice(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn latest_layout() -> Vec<Specimen> {
    let encrypted = ArchiveWriter { password: Some(PASSWORD), deduplicated: false, ..writer() };
    let lz4 = Compression::Lz4;
    let mut specimens: Vec<_> = [
        ArchiveWriter { compression: lz4, ..writer() },
        ArchiveWriter { dictionary: text(1, 300), ..writer() },
        ArchiveWriter { hashed: false, ..writer() },
        ArchiveWriter { compression: lz4, hashed: false, ..writer() },
        ArchiveWriter { compression: lz4, ..encrypted.clone() },
        encrypted,
        ArchiveWriter {
            metadata: Some(br#"{"files":[]}"#.to_vec()),
            signature: Some([9; 64]),
            ..writer()
        },
    ]
    .into_iter()
    .map(Specimen::new)
    .collect();
    specimens.push(child());
    specimens
}

/// Archives of the layouts before D, and X.
fn older_layouts() -> Vec<Specimen> {
    let lz4 = Compression::Lz4;
    let alone = [
        ArchiveWriter { layout: Layout::A, compression: lz4, ..writer() },
        ArchiveWriter { layout: Layout::A, ..writer() },
        ArchiveWriter { layout: Layout::B, ..writer() },
        ArchiveWriter { layout: Layout::C, ..writer() },
        ArchiveWriter { layout: Layout::X, compression: lz4, ..writer() },
        // 13 short entries or 5 long ones: the count tells, and one bit is between the two.
        ArchiveWriter {
            layout: Layout::A,
            main: (0..13).map(|seed| Piece::Data(text(seed, 90))).collect(),
            blocks_per_page: 13,
            ..writer()
        },
    ];
    alone.into_iter().map(Specimen::new).collect()
}

/// Thin archives of layouts A, B and C that refer to their parents by offset.
pub(crate) fn thin_by_offset() -> Vec<Specimen> {
    let mut specimens = Vec::new();
    for layout in [Layout::A, Layout::B, Layout::C] {
        let base = ArchiveWriter { layout, main: pieces(), blocks_per_page: 2, ..writer() };
        let same_ranges = base
            .main
            .iter()
            .map(|piece| Piece::ByOffset { bytes: piece.bytes(), hash: base.entry_hash(piece) });
        specimens.push(over(&base, same_ranges.collect()));
        specimens.push(over(&base, base.referred_by_offset(&base.main, 256)));
    }
    // Blocks as long as those of the parent, but elsewhere: their references are ambiguous.
    let base = ArchiveWriter { layout: Layout::C, main: shifted(), ..writer() };
    specimens.push(over(&base, base.referred_by_offset(&base.main, 300)));
    let base = ArchiveWriter { password: Some(PASSWORD), deduplicated: false, ..base };
    specimens.push(over(&base, base.referred_by_offset(&base.main, 300)));
    specimens
}

/// A short block, and blocks of one length behind it.
fn shifted() -> Vec<Piece> {
    let lead = Piece::Data(text(20, 100));
    std::iter::once(lead).chain((21..25).map(|seed| Piece::Data(text(seed, 300)))).collect()
}

/// An archive of these references by offset, of which one is replaced, with `base` as its parent
/// beside it.
fn over(base: &ArchiveWriter, mut main: Vec<Piece>) -> Specimen {
    let replaced = Piece::Data(text(9, main[1].length() as usize));
    main[1] = replaced;
    let specimen = Specimen::new(ArchiveWriter {
        layout: base.layout,
        parents: vec!["parent.hxz".into()],
        main,
        ..writer()
    });
    base.write().save(&specimen.parent());
    specimen
}

/// Packed pipes: the master index states 0 bytes.
fn without_stated_size() -> Vec<Specimen> {
    [3, 4096]
        .map(|blocks_per_page| ArchiveWriter {
            stated_main_size: Some(0),
            blocks_per_page,
            ..writer()
        })
        .map(Specimen::new)
        .into()
}

fn tar_and_signed_twice() -> Vec<Specimen> {
    let size = image(&pieces()).len() as u64;
    [
        ArchiveWriter { signature: Some([9; 64]), old_signatures: 1, ..writer() },
        ArchiveWriter {
            metadata: Some(tar_metadata(size)),
            stated_main_size: Some(size + 2000),
            ..writer()
        },
    ]
    .map(Specimen::new)
    .into()
}

/// A thin archive with its parent beside it.
pub(crate) fn child() -> Specimen {
    let parent = ArchiveWriter { main: pieces(), blocks_per_page: 2, ..ArchiveWriter::default() };
    let child = Specimen::new(ArchiveWriter {
        parents: vec!["parent.hxz".into()],
        main: vec![
            Piece::InParent(text(1, 700)),
            Piece::Data(text(8, 200)),
            Piece::InParent(text(3, 333)),
            Piece::InParent(vec![0; 900]),
            Piece::InParent(noise(2, 150)),
        ],
        ..writer()
    });
    parent.write().save(&child.parent());
    child
}

#[test]
fn no_damaged_byte_is_ever_served() {
    for specimen in latest_layout() {
        specimen.damage_each_byte(&[]);
    }
}

#[test]
fn no_damaged_byte_of_an_older_layout_is_ever_served() {
    for specimen in older_layouts() {
        specimen.damage_each_byte(&[]);
    }
}

#[test]
fn no_damaged_byte_of_a_thin_archive_by_offset_is_ever_served() {
    for specimen in thin_by_offset() {
        specimen.damage_each_byte(&[]);
    }
}

/// The size of the stream is the sum of what the blocks of the last page say. Of those that are
/// stored their content says the same; of zeros nothing does.
#[test]
fn no_damaged_byte_of_an_archive_without_a_stated_size_is_ever_served() {
    for specimen in without_stated_size() {
        let lengths_of_zeros = |page: &WrittenPage| {
            let zeros = page.blocks.iter().filter(|block| block.stored.is_empty());
            let length = |entry| entry + block_entry::LENGTH..entry + block_entry::CHECKSUM;
            zeros.map(|block| length(block.entry)).collect::<Vec<_>>()
        };
        let spared = specimen.written.main.last().map(lengths_of_zeros);
        specimen.damage_each_byte(&spared.unwrap());
    }
}

#[test]
fn no_damaged_byte_of_a_tar_archive_or_one_signed_twice_is_ever_served() {
    for specimen in tar_and_signed_twice() {
        specimen.damage_each_byte(&[]);
    }
}

/// A block's hash tells that the dictionary was another. Where there is no hash, nothing
/// does, but all else is protected.
#[test]
fn without_hashes_all_but_the_dictionary_is_protected() {
    let dictionary = text(1, 300);
    for writer in [
        ArchiveWriter { hashed: false, ..writer() },
        ArchiveWriter { password: Some(PASSWORD), deduplicated: false, ..writer() },
        ArchiveWriter { layout: Layout::A, ..writer() },
    ] {
        let specimen = Specimen::new(ArchiveWriter { dictionary: dictionary.clone(), ..writer });
        let field = |name| specimen.written.field(name);
        let content = HEADER_REGION..HEADER_REGION + dictionary.len();
        specimen.damage_each_byte(&[
            content,
            field("dictionary offset"),
            field("dictionary length"),
        ]);
    }
}

#[test]
fn no_truncated_archive_is_opened() {
    specimens().iter().for_each(Specimen::truncate);
}

/// The parent is damaged, the child is read.
#[test]
fn no_damaged_byte_of_a_parent_is_served() {
    for child in thin_by_offset().into_iter().chain([child()]) {
        let path = child.parent();
        let parent = std::fs::read(&path).unwrap();
        for at in (0..300).chain(HEADER_REGION..parent.len()) {
            let mut damaged = parent.clone();
            damaged[at] ^= 0xff;
            std::fs::write(&path, damaged).unwrap();
            child.examine(&child.written.bytes, &format!("the parent's byte {at}"));
        }
    }
}

/// The fewer entries are too long by far, whatever they say.
#[test]
fn a_page_of_thirteen_short_entries_is_not_taken_for_five_long_ones() {
    let main = (0..13).map(|seed| Piece::Data(text(seed, 90))).collect();
    let writer = ArchiveWriter { layout: Layout::A, main, ..ArchiveWriter::default() };
    let mut written = writer.write();
    let page = &written.main[0];
    assert_eq!(page.place.len(), 268);
    written.bytes[page.place.start] = 5;
    let kind = match open(&written) {
        Ok(snapshot) => read_whole(&snapshot, StreamKind::Main).unwrap_err().kind,
        Err(error) => error.kind,
    };
    assert!(matches!(kind, ErrorKind::Invalid(_) | ErrorKind::TooLarge { .. }), "{kind}");
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_rubbish_is_ever_served(
        places in vec((any::<Index>(), vec(any::<u8>(), 1..60)), 1..4),
        header in any::<bool>(),
    ) {
        for specimen in specimens() {
            let mut bytes = specimen.written.bytes.clone();
            for (at, rubbish) in &places {
                // The padding of the header is no target worth half of the attempts.
                let at = if header { at.index(120) } else { at.index(bytes.len() - 4096) + 4096 };
                let end = bytes.len().min(at + rubbish.len());
                bytes[at..end].copy_from_slice(&rubbish[..end - at]);
            }
            specimen.examine(&bytes, &format!("{places:?}"));
        }
    }
}

#[test]
fn a_damaged_block_leaves_the_others_readable() {
    let writer = ArchiveWriter { deduplicated: false, ..writer() };
    let mut damaged = writer.write();
    let block = damaged.main[0].blocks[1].stored.clone();
    damaged.bytes[block.start + 5] ^= 1;
    let snapshot = open(&damaged).unwrap();
    let error = read_whole(&snapshot, StreamKind::Main).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::ChecksumMismatch { .. }), "{error}");
    assert_eq!(error.offset, Some(block.start as u64));
    let expected = image(&writer.main);
    assert_eq!(read(&snapshot, StreamKind::Main, 0, 700).unwrap(), expected[..700]);
    assert_eq!(read(&snapshot, StreamKind::Main, 850, 3000 - 850).unwrap(), expected[850..3000]);
}

/// The checksum is put right, so that only what lies behind it can tell.
#[test]
fn damage_with_a_matching_checksum_is_found_by_tag_length_or_hash() {
    for writer in [
        ArchiveWriter { compression: Compression::Lz4, ..writer() },
        writer(),
        ArchiveWriter { password: Some(PASSWORD), ..writer() },
    ] {
        let specimen = Specimen::new(writer);
        let pages = specimen.written.main.iter().chain(&specimen.written.auxiliary);
        for block in pages.flat_map(|page| &page.blocks) {
            for at in block.stored.clone() {
                let mut damaged = specimen.written.clone();
                damaged.bytes[at] ^= 0x10;
                let checksum = crc32fast::hash(&damaged.bytes[block.stored.clone()]);
                damaged.put(block.entry + block_entry::CHECKSUM, &checksum.to_le_bytes());
                specimen.examine(&damaged.bytes, &format!("byte {at}"));
            }
        }
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_open_gives_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    let writer = writer();
    let written = writer.write();
    written.save(&path);
    // One snapshot has its pages in memory by then, the other has nothing.
    let warm = Snapshot::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(read_whole(&warm, StreamKind::Main).unwrap(), image(&writer.main));
    let cold = Snapshot::open(&path, &OpenOptions::default()).unwrap();
    let end_of_first = written.main[0].blocks[0].stored.end as u64;
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(end_of_first).unwrap();

    assert_eq!(read(&warm, StreamKind::Main, 0, 700).unwrap(), text(1, 700));
    for snapshot in [warm, cold] {
        let error = read(&snapshot, StreamKind::Main, 700, 10).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Io(..)), "{error}");
        assert!(error.path.ends_with("disk.hxz"), "{error}");
    }
}

#[test]
fn something_behind_the_last_part_is_refused() {
    let mut written = writer().write();
    written.bytes.push(0);
    assert!(matches!(open(&written).unwrap_err().kind, ErrorKind::Invalid(_)));
}

#[test]
fn other_files_are_no_archives() {
    let none = with_password();
    for bytes in [vec![], b"HEX".to_vec(), vec![0; 10_000], noise(1, 5000)] {
        let storage = std::sync::Arc::new(std::sync::Arc::<[u8]>::from(bytes));
        let error = Snapshot::from_storage(Path::new("x"), storage, &none).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::NotHexz), "{error}");
    }
}
