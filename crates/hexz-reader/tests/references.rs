//! References to parents by offset and by hash, and what an operator decides about them.

use std::path::Path;

use hexz_reader::{ErrorKind, Layout, OpenOptions, Snapshot, StreamKind};
use tempfile::TempDir;

use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, image, noise, text};
use crate::support::{read, read_whole, with_password};

/// Length of most blocks of these tests, in bytes.
const BLOCK: usize = 300;

fn block(seed: u64) -> Piece {
    Piece::Data(text(seed, BLOCK))
}

fn in_parent(seed: u64) -> Piece {
    Piece::InParent(text(seed, BLOCK))
}

/// A short block, and three of one length behind it.
fn shifted() -> Vec<Piece> {
    vec![Piece::Data(text(10, 100)), block(11), block(12), block(13)]
}

/// An archive whose parent is `parent`, if it has one.
fn archive(layout: Layout, parent: Option<&str>, main: Vec<Piece>) -> ArchiveWriter {
    let parents = parent.map(str::to_owned).into_iter().collect();
    ArchiveWriter { layout, parents, main, ..ArchiveWriter::default() }
}

/// Pieces of a thin archive over `base` that `merge_overlay` would write.
fn overlay(base: &ArchiveWriter, block: usize) -> Vec<Piece> {
    base.referred_by_offset(&base.main, block)
}

fn folder<const N: usize>(archives: [(&str, &ArchiveWriter); N]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, archive) in archives {
        archive.write().save(&folder.path().join(name));
    }
    folder
}

fn open(folder: &TempDir, name: &str, choices: &[&str]) -> Snapshot {
    let reference_choices = choices.iter().map(|choice| choice.parse().unwrap()).collect();
    let options = OpenOptions { reference_choices, ..with_password() };
    Snapshot::open(&folder.path().join(name), &options).unwrap()
}

fn read_main(folder: &TempDir, name: &str, choices: &[&str]) -> Result<Vec<u8>, ErrorKind> {
    let snapshot = open(folder, name, choices);
    read_whole(&snapshot, StreamKind::Main).map_err(|error| error.kind)
}

#[track_caller]
fn assert_ambiguous(result: Result<Vec<u8>, ErrorKind>) {
    assert!(matches!(result, Err(ErrorKind::Ambiguous(_))), "{:?}", result.map(|_| "bytes"));
}

#[test]
fn a_reference_by_offset_means_the_bytes_whatever_the_parents_blocks_are() {
    for layout in [Layout::A, Layout::B, Layout::C] {
        for password in [None, Some(PASSWORD)] {
            let main = vec![block(1), Piece::Zeros(500), Piece::Data(noise(2, 700)), block(1)];
            let base = ArchiveWriter { password, ..archive(layout, None, main) };
            for size in [1, 77, 250, 1000, 5000] {
                let child = archive(layout, Some("base.hxz"), overlay(&base, size));
                let files = folder([("base.hxz", &base), ("child.hxz", &child)]);
                for choices in [&[][..], &["offset"], &["hash"]] {
                    let bytes = read_main(&files, "child.hxz", choices).unwrap();
                    assert!(bytes == image(&base.main), "{layout:?} {size} {choices:?}");
                }
            }
        }
    }
}

/// The parent's block at the place of the reference has the reference's hash, but begins
/// elsewhere.
#[test]
fn what_means_two_things_is_an_error_until_it_is_decided() {
    for layout in [Layout::B, Layout::C] {
        let base = archive(layout, None, shifted());
        let child = archive(layout, Some("base.hxz"), overlay(&base, BLOCK));
        let files = folder([("base.hxz", &base), ("child.hxz", &child)]);
        let snapshot = open(&files, "child.hxz", &[]);
        // The first is the short block's hash, which has another length.
        let at = BLOCK as u64;
        assert_eq!(read(&snapshot, StreamKind::Main, 0, BLOCK).unwrap(), image(&base.main)[..300]);
        let error = read(&snapshot, StreamKind::Main, at + 10, 1).unwrap_err();
        let ErrorKind::Ambiguous(found) = &error.kind else { panic!("{error}") };
        assert_eq!((found.stream, found.at), (StreamKind::Main, at));
        assert_eq!(found.length, BLOCK as u32);
        assert_eq!(found.hash.0, base.entry_hash(&block(11)));
        let base_path = files.path().join("base.hxz");
        assert_eq!((&found.parent, &found.holder), (&base_path, &base_path));
        assert_eq!(found.holder_at, 100);
        // What it means isn't known to be what the hash says.
        assert_eq!(snapshot.locate(StreamKind::Main, at).unwrap().hash(), None);

        for choices in [&["offset"][..], &["child.hxz=offset"], &["hash", "child.hxz=offset"]] {
            assert!(read_main(&files, "child.hxz", choices).unwrap() == image(&base.main));
        }
        let by_hash = [&image(&base.main)[..300], &text(11, 300), &text(12, 300)].concat();
        for choices in [&["hash"][..], &["offset", "child.hxz=hash"]] {
            let snapshot = open(&files, "child.hxz", choices);
            assert!(read(&snapshot, StreamKind::Main, 0, 900).unwrap() == by_hash);
        }
        assert_ambiguous(read_main(&files, "child.hxz", &["base.hxz=offset", "other.hxz=hash"]));
    }
}

#[test]
fn what_means_the_same_either_way_is_read() {
    // Another block covers the place, and has the same bytes as those at the place.
    let same = vec![0xaa; 2 * BLOCK];
    let mut main: Vec<Piece> = vec![Piece::Data(same[..100].to_vec())];
    main.extend(same.chunks(BLOCK).map(|chunk| Piece::Data(chunk.to_vec())));
    let base = archive(Layout::C, None, main);
    let child = archive(Layout::C, Some("base.hxz"), overlay(&base, BLOCK));
    let files = folder([("base.hxz", &base), ("child.hxz", &child)]);
    assert!(read_main(&files, "child.hxz", &[]).unwrap() == image(&base.main));
}

#[test]
fn with_several_parents_references_are_by_hash() {
    let base = archive(Layout::C, None, shifted());
    let other = archive(Layout::C, None, vec![block(30)]);
    let main = vec![block(31), in_parent(11), in_parent(30)];
    let mut child = archive(Layout::C, Some("base.hxz"), main);
    child.parents.push("other.hxz".into());
    let files = folder([("base.hxz", &base), ("other.hxz", &other), ("child.hxz", &child)]);
    assert!(read_main(&files, "child.hxz", &[]).unwrap() == image(&child.main));
    // Without a hash, it isn't known which parent is meant.
    child.main = vec![Piece::ByOffset { bytes: text(10, 100), hash: [0; 32] }];
    child.write().save(&files.path().join("child.hxz"));
    let result = read_main(&files, "child.hxz", &[]);
    assert!(matches!(result, Err(ErrorKind::NoParentToRead { parents: 2, .. })), "{result:?}");
}

/// By offset nothing could be meant, since the parent ends before.
#[test]
fn a_reference_that_reaches_beyond_the_parents_end_is_by_hash() {
    let base = archive(Layout::C, None, vec![block(1), block(2)]);
    let main = vec![block(3), Piece::Data(text(4, 100)), in_parent(2)];
    let child = archive(Layout::C, Some("base.hxz"), main);
    let files = folder([("base.hxz", &base), ("child.hxz", &child)]);
    assert!(read_main(&files, "child.hxz", &["child.hxz=hash"]).unwrap() == image(&child.main));
    match read_main(&files, "child.hxz", &[]) {
        Ok(bytes) => assert!(bytes == image(&child.main)),
        result @ Err(_) => assert_ambiguous(result),
    }
}

/// The parent's own reference has that range and hash, but means other bytes: it is by offset.
#[test]
fn a_reference_by_hash_is_no_matter_of_what_the_parents_reference_means() {
    let base = archive(Layout::C, None, shifted());
    let parent = archive(Layout::C, Some("base.hxz"), overlay(&base, BLOCK));
    let child = archive(Layout::C, Some("parent.hxz"), vec![block(1), in_parent(11)]);
    let files = folder([("base.hxz", &base), ("parent.hxz", &parent), ("child.hxz", &child)]);
    assert_ambiguous(read_main(&files, "child.hxz", &[]));
    assert_ambiguous(read_main(&files, "child.hxz", &["parent.hxz=offset"]));
    let decided = ["parent.hxz=offset", "child.hxz=hash"];
    assert!(read_main(&files, "child.hxz", &decided).unwrap() == image(&child.main));
}

/// The grandparent has the block at the very place, the parent has it elsewhere: by offset the
/// parent's bytes are meant.
#[test]
fn a_grandparents_block_does_not_decide_what_is_at_an_offset_of_the_parent() {
    let base = archive(Layout::C, None, vec![block(1), block(2)]);
    let main = vec![Piece::Data(text(3, 250)), in_parent(2), Piece::Data(text(4, 50))];
    let parent = archive(Layout::C, Some("base.hxz"), main);
    let child = archive(Layout::C, Some("parent.hxz"), overlay(&parent, BLOCK));
    let files = folder([("base.hxz", &base), ("parent.hxz", &parent), ("child.hxz", &child)]);
    match read_main(&files, "child.hxz", &[]) {
        Ok(bytes) => assert!(bytes == image(&child.main), "wrong bytes"),
        result @ Err(_) => assert_ambiguous(result),
    }
    let decided = ["parent.hxz=hash", "child.hxz=offset"];
    assert!(read_main(&files, "child.hxz", &decided).unwrap() == image(&child.main), "decided");
}

/// Layout D has no references by offset, so nothing is ambiguous.
#[test]
fn in_layout_d_references_are_by_hash() {
    for layout in [Layout::B, Layout::C, Layout::D] {
        let base = archive(layout, None, shifted());
        let main = vec![block(1), in_parent(11), in_parent(13)];
        let child = archive(Layout::D, Some("base.hxz"), main);
        let files = folder([("base.hxz", &base), ("child.hxz", &child)]);
        for choices in [&[][..], &["offset"], &["hash"]] {
            assert!(read_main(&files, "child.hxz", choices).unwrap() == image(&child.main));
        }
    }
}

#[test]
fn a_reference_by_offset_without_a_parent_is_an_error() {
    let main = vec![Piece::ByOffset { bytes: text(1, 100), hash: [0; 32] }, block(2)];
    for layout in [Layout::A, Layout::B, Layout::C, Layout::X] {
        let orphan = archive(layout, None, main.clone()).write();
        let snapshot = crate::support::open_bytes(&orphan.bytes, Path::new("orphan.hxz")).unwrap();
        let kind = read(&snapshot, StreamKind::Main, 0, 1).unwrap_err().kind;
        assert!(matches!(kind, ErrorKind::NoParentToRead { parents: 0, .. }), "{kind}");
        assert_eq!(read(&snapshot, StreamKind::Main, 100, BLOCK).unwrap(), text(2, BLOCK));
    }
}

/// Each archive of a chain is thin by offset over the one before it, in blocks of its own.
#[test]
fn references_by_offset_are_followed_through_a_chain() {
    let layouts = [Layout::A, Layout::A, Layout::B, Layout::C, Layout::C];
    let sizes = [0, 500, 130, 300, 77];
    let files = tempfile::tempdir().unwrap();
    let mut archives: Vec<ArchiveWriter> = Vec::new();
    for (number, (layout, size)) in layouts.into_iter().zip(sizes).enumerate() {
        let name = format!("{number}.hxz");
        let archive = match archives.last() {
            None => archive(layout, None, shifted()),
            Some(parent) => {
                let mut main = overlay(parent, size);
                let replaced = main.len() / 2;
                main[replaced] =
                    Piece::Data(noise(number as u64, main[replaced].length() as usize));
                archive(layout, Some(&format!("{}.hxz", number - 1)), main)
            }
        };
        archive.write().save(&files.path().join(&name));
        let expected = image(&archive.main);
        assert!(read_main(&files, &name, &["offset"]).unwrap() == expected, "{name}");
        archives.push(archive);
    }
}

#[test]
fn a_size_that_is_not_stated_is_that_of_the_blocks() {
    for layout in [Layout::A, Layout::B, Layout::C, Layout::D, Layout::X] {
        for blocks_per_page in [2, 4096] {
            let alone = ArchiveWriter {
                stated_main_size: Some(0),
                blocks_per_page,
                ..archive(layout, None, shifted())
            };
            let files = folder([("pipe.hxz", &alone)]);
            assert!(read_main(&files, "pipe.hxz", &[]).unwrap() == image(&alone.main));
        }
    }
}

/// All references have the range of the block that they mean, so nothing is ambiguous.
#[test]
fn block_that_a_whole_chain_refers_to_is_located_in_the_last_archive() {
    let base = archive(Layout::C, None, vec![block(1), block(2)]);
    let parent = archive(Layout::C, Some("base.hxz"), overlay(&base, BLOCK));
    let child = archive(Layout::C, Some("parent.hxz"), overlay(&parent, BLOCK));
    let files = folder([("base.hxz", &base), ("parent.hxz", &parent), ("child.hxz", &child)]);
    let snapshot = open(&files, "child.hxz", &[]);
    for (at, piece) in [(0, block(1)), (BLOCK as u64, block(2))] {
        let located = snapshot.locate(StreamKind::Main, at).unwrap();
        assert_eq!(located.chain_index(), 2);
        assert_eq!(located.hash().map(|hash| hash.0), Some(base.entry_hash(&piece)));
    }
}

/// Each of them takes a read of its parent, whose bytes are compared with the hash.
#[test]
fn ambiguous_references_one_behind_another_are_limited() {
    const MAX_DEPTH: usize = 8;
    // As `what_means_the_same_either_way_is_read`: the second block begins within a reference.
    let blocks = [100, BLOCK, BLOCK].map(|length| Piece::Data(vec![0xaa; length]));
    let mut chain = vec![archive(Layout::C, None, blocks.to_vec())];
    for number in 0..=MAX_DEPTH {
        let parent = format!("{number}.hxz");
        chain.push(archive(Layout::C, Some(&parent), overlay(&chain[number], BLOCK)));
    }
    let files = tempfile::tempdir().unwrap();
    for (number, archive) in chain.iter().enumerate() {
        archive.write().save(&files.path().join(format!("{number}.hxz")));
    }
    assert!(read_main(&files, "8.hxz", &[]).unwrap() == image(&blocks));
    let error = read_main(&files, "9.hxz", &[]).unwrap_err();
    assert!(matches!(error, ErrorKind::TooLarge { got: 9, limit: 8, .. }), "{error}");
}
