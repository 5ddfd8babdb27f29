//! Verification of all blocks.

use std::num::NonZeroUsize;

use hexz_reader::VerifyProgress;

use crate::archive_writer::{ArchiveWriter, Piece, noise};
use crate::support::open;

#[test]
fn a_stored_copy_that_blocks_share_is_decoded_once() {
    const COPIES: u64 = 5000;
    let copies = || (0..COPIES).map(|number| Piece::Data(noise(number, 8)));
    let main = copies().chain(copies()).collect();
    let archive = ArchiveWriter { main, ..ArchiveWriter::default() }.write();
    let snapshot = open(&archive).unwrap();
    let stats = snapshot.verify(NonZeroUsize::MIN, &VerifyProgress::default(), |fault| {
        panic!("{fault:?}");
    });
    assert!(stats.is_complete);
    assert_eq!((stats.blocks, stats.shared), (2 * COPIES, COPIES));
}
