//! Stored blocks that aren't what the index says, though their checksum fits.

use hexz_reader::{Compression, ErrorKind};

use crate::archive_writer::{ArchiveWriter, Piece, noise};
use crate::support::problem_of_first_byte;

/// A block that claims to be of 1000 bytes.
fn stored_as(compression: Compression, stored: Vec<u8>) -> ErrorKind {
    let main = vec![Piece::Raw { stored, length: 1000, hash: [0; 32] }];
    problem_of_first_byte(&ArchiveWriter { compression, main, ..ArchiveWriter::default() }.write())
}

#[test]
fn lz4_sizes_are_compared_and_not_trusted() {
    let lz4 = |length| lz4_flex::block::compress_prepend_size(&vec![7; length]);
    for length in [0, 999, 1001, 1 << 18] {
        let kind = stored_as(Compression::Lz4, lz4(length));
        assert!(matches!(kind, ErrorKind::LengthMismatch { expected: 1000, .. }), "{kind}");
    }
    let mut lie = lz4(1000);
    lie[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(stored_as(Compression::Lz4, lie), ErrorKind::LengthMismatch { .. }));
    // The size fits, what follows it doesn't.
    for real in [0, 999, 1001, 1 << 18] {
        let mut lie = lz4(real);
        lie[..4].copy_from_slice(&1000_u32.to_le_bytes());
        let kind = stored_as(Compression::Lz4, lie);
        let found = matches!(kind, ErrorKind::LengthMismatch { .. } | ErrorKind::Decompress(_));
        assert!(found, "{real}: {kind}");
    }
    assert!(matches!(stored_as(Compression::Lz4, vec![1, 2, 3]), ErrorKind::Truncated(_)));
}

#[test]
fn zstd_frames_are_decoded_no_further_than_the_block() {
    let frame = |length| zstd::bulk::compress(&vec![7; length], 3).unwrap();
    let without_size = |length| zstd::stream::encode_all(&vec![7; length][..], 3).unwrap();
    for length in [1001, 32 << 20] {
        for bomb in [frame(length), without_size(length)] {
            let kind = stored_as(Compression::Zstd, bomb);
            assert!(matches!(kind, ErrorKind::Decompress(_)), "{length}: {kind}");
        }
    }
    for length in [999, 1, 0] {
        for short in [frame(length), without_size(length)] {
            let kind = stored_as(Compression::Zstd, short);
            assert!(matches!(kind, ErrorKind::LengthMismatch { .. }), "{length}: {kind}");
        }
    }
}

#[test]
fn a_block_is_one_zstd_frame_and_nothing_more() {
    let frame = |length| zstd::bulk::compress(&vec![7; length], 3).unwrap();
    let skippable = [0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3].to_vec();
    for parts in [
        [frame(600), frame(400)],
        [frame(1000), frame(0)],
        [frame(0), frame(1000)],
        [frame(1000), skippable.clone()],
        [skippable, frame(1000)],
        [frame(1000), vec![0]],
        [noise(1, 10), frame(1000)],
    ] {
        let kind = stored_as(Compression::Zstd, parts.concat());
        assert!(matches!(kind, ErrorKind::Decompress(_)), "{parts:x?}: {kind}");
    }
}
