//! Archives that don't state the size of the main stream, as `hexz pack` writes them for a pipe.
//! The lengths of the blocks on the last page are the only record of it.

use hexz_reader::limits::{MAX_BLOCK, MAX_PROBED_BYTES};
use hexz_reader::{Compression, StreamKind};

use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, Written, block_entry, text};
use crate::support::{open, read, read_whole};

const BLOCK: usize = 1000;

/// Two pages of two blocks each.
fn two_pages(compression: Compression, password: Option<&'static str>) -> ArchiveWriter {
    ArchiveWriter {
        compression,
        password,
        stated_main_size: Some(0),
        blocks_per_page: 2,
        ..ArchiveWriter::of_image(&text(1, 4 * BLOCK), BLOCK)
    }
}

fn damage_length(archive: &Written, page: usize, block: usize) -> Written {
    let mut damaged = archive.clone();
    let entry = archive.main[page].blocks[block].entry;
    damaged.put(entry + block_entry::LENGTH, &(BLOCK as u32 + 1).to_le_bytes());
    damaged
}

#[test]
fn damaged_length_on_the_last_page_is_detected_at_opening() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        // Encrypted blocks are decoded, others state their length.
        for password in [None, Some(PASSWORD)] {
            let archive = two_pages(compression, password).write();
            let snapshot = open(&archive).unwrap();
            assert!(read_whole(&snapshot, StreamKind::Main).unwrap() == text(1, 4 * BLOCK));
            for block in [0, 1] {
                let error = open(&damage_length(&archive, 1, block)).unwrap_err();
                let stored = archive.main[1].blocks[block].stored.start as u64;
                assert_eq!((error.kind.label(), error.offset), ("length", Some(stored)));
            }
        }
    }
    // A frame of unknown length is decoded, too.
    let frame = zstd::stream::encode_all(&text(1, BLOCK)[..], 3).unwrap();
    let piece = Piece::Raw { stored: frame, length: BLOCK as u32, hash: [0; 32] };
    let main = vec![piece.clone(), piece];
    let archive = ArchiveWriter { main, ..two_pages(Compression::Zstd, None) }.write();
    assert!(open(&archive).is_ok());
    let error = open(&damage_length(&archive, 0, 1)).unwrap_err();
    assert_eq!(error.kind.label(), "length");
}

#[test]
fn blocks_that_state_their_length_are_not_decoded_at_opening() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut archive = two_pages(compression, None).write();
        let last = archive.main[1].blocks[1].stored.end - 1;
        let byte = archive.bytes[last];
        archive.put(last, &[byte ^ 1]);
        let snapshot = open(&archive).unwrap();
        let error = read(&snapshot, StreamKind::Main, 3 * BLOCK as u64, 1).unwrap_err();
        assert_eq!(error.kind.label(), "crc");
    }
}

#[test]
fn decoding_at_opening_is_limited() {
    let frame = zstd::stream::encode_all(&vec![0; MAX_BLOCK as usize][..], 1).unwrap();
    let piece = Piece::Raw { stored: frame, length: MAX_BLOCK, hash: [0; 32] };
    let allowed = (MAX_PROBED_BYTES / u64::from(MAX_BLOCK)) as usize;
    let archive = |count| {
        let main = vec![piece.clone(); count];
        ArchiveWriter { main, stated_main_size: Some(0), ..ArchiveWriter::default() }.write()
    };
    let snapshot = open(&archive(allowed)).unwrap();
    assert_eq!(snapshot.size(StreamKind::Main), MAX_PROBED_BYTES);
    let error = open(&archive(allowed + 1)).unwrap_err();
    assert_eq!(error.kind.label(), "too_large");
}
