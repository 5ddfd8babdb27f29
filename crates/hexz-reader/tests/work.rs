//! Work that an archive may cause: in proportion to what is read of it.

use hexz_reader::limits::{DEFAULT_KDF_ITERATIONS, max_stored};
use hexz_reader::{ErrorKind, OpenOptions, Snapshot, StreamKind};

use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, noise};
use crate::support::{open, read, with_password};

/// A block of one byte whose stored frame is long: whoever reads it would have all of the
/// frame read, checked and decoded.
#[test]
fn a_stored_block_out_of_proportion_is_refused() {
    let piece =
        |stored: usize, length: u32| Piece::Raw { stored: noise(1, stored), length, hash: [0; 32] };
    for length in [1, 4096, 65_536] {
        let limit = max_stored(length) as usize;
        for (stored, is_refused) in [(limit, false), (limit + 1, true), (limit + 100_000, true)] {
            let main = vec![piece(stored, length)];
            let archive = ArchiveWriter { main, ..ArchiveWriter::default() }.write();
            let snapshot = open(&archive).unwrap();
            let error = read(&snapshot, StreamKind::Main, 0, 1).unwrap_err();
            let refused = matches!(error.kind, ErrorKind::TooLarge { .. });
            assert_eq!(refused, is_refused, "{stored} for {length}: {error}");
        }
    }
}

#[test]
fn key_derivation_is_limited_unless_more_is_allowed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("slow.hxz");
    let iterations = DEFAULT_KDF_ITERATIONS + 1;
    let writer = ArchiveWriter {
        password: Some(PASSWORD),
        iterations,
        ..ArchiveWriter::of_image(b"something", 100)
    };
    writer.write().save(&path);
    let error = Snapshot::open(&path, &with_password()).unwrap_err();
    let ErrorKind::KeyIterations { got, limit } = error.kind else { panic!("{error}") };
    assert_eq!((got, limit), (iterations, DEFAULT_KDF_ITERATIONS));
    let allowed = OpenOptions { max_key_iterations: iterations, ..with_password() };
    let snapshot = Snapshot::open(&path, &allowed).unwrap();
    assert_eq!(read(&snapshot, StreamKind::Main, 0, 9).unwrap(), b"something");
}
