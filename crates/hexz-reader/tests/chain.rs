//! Chains of parents: where they are found, and what is refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use hexz_reader::limits::MAX_CHAIN;
use hexz_reader::{Error, ErrorKind, OpenOptions, Password, Snapshot, StreamKind};
use tempfile::TempDir;

use crate::archive_writer::{
    ArchiveWriter, PASSWORD, Piece, Written, block_entry, image, noise, text,
};
use crate::support::{read, read_whole, with_password};

/// What the parents of these tests hold, and their children leave to them.
fn shared() -> Vec<u8> {
    text(1, 5000)
}

fn base() -> ArchiveWriter {
    ArchiveWriter { main: vec![Piece::Data(shared())], ..ArchiveWriter::default() }
}

/// A child that takes everything from its parents.
fn child_of(parents: &[&str]) -> ArchiveWriter {
    ArchiveWriter {
        parents: parents.iter().map(|&parent| parent.to_owned()).collect(),
        main: vec![Piece::InParent(shared())],
        ..ArchiveWriter::default()
    }
}

/// A folder of archives; names may lead into folders of it.
fn folder<const N: usize>(archives: [(&str, Written); N]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, archive) in archives {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        archive.save(&path);
    }
    folder
}

fn open(path: PathBuf) -> Result<Snapshot, Error> {
    Snapshot::open(&path, &OpenOptions::default())
}

#[track_caller]
fn refused(path: PathBuf, options: &OpenOptions) -> Error {
    Snapshot::open(&path, options).expect_err("the chain is opened")
}

#[track_caller]
fn assert_reads_shared(path: &Path, options: &OpenOptions) {
    let snapshot = Snapshot::open(path, options).unwrap();
    assert!(read_whole(&snapshot, StreamKind::Main).unwrap() == shared());
}

#[test]
fn a_parent_is_found_beside_or_in_a_parent_directory() {
    let files = folder([
        ("beside/child.hxz", child_of(&["base.hxz"]).write()),
        ("beside/below.hxz", child_of(&["images/base.hxz"]).write()),
        ("beside/base.hxz", base().write()),
        ("alone/child.hxz", child_of(&["base.hxz"]).write()),
        ("alone/below.hxz", child_of(&["images/base.hxz"]).write()),
        ("deeper/images/base.hxz", base().write()),
    ]);
    let at = |name: &str| files.path().join(name);
    assert_reads_shared(&at("beside/child.hxz"), &OpenOptions::default());
    assert_reads_shared(&at("beside/below.hxz"), &OpenOptions::default());

    let error = refused(at("alone/child.hxz"), &OpenOptions::default());
    assert!(matches!(error.kind, ErrorKind::ParentMissing { is_outside: false, .. }), "{error}");
    let in_dir = |dir: &str| OpenOptions {
        parent_dirs: vec![at("nowhere"), at(dir)],
        ..OpenOptions::default()
    };
    assert_reads_shared(&at("alone/child.hxz"), &in_dir("beside"));
    assert_reads_shared(&at("alone/below.hxz"), &in_dir("beside"));
    assert_reads_shared(&at("alone/below.hxz"), &in_dir("deeper"));
}

#[test]
fn the_nearer_file_of_that_name_is_taken() {
    let files = folder([
        ("a/child.hxz", child_of(&["base.hxz"]).write()),
        ("a/base.hxz", base().write()),
        ("b/base.hxz", ArchiveWriter::of_image(b"something else", 100).write()),
    ]);
    let options =
        OpenOptions { parent_dirs: vec![files.path().join("b")], ..OpenOptions::default() };
    assert_reads_shared(&files.path().join("a/child.hxz"), &options);
}

#[test]
fn an_archive_can_not_name_files_elsewhere() {
    let files = folder([("base.hxz", base().write())]);
    let absolute = files.path().join("base.hxz");
    let folder = files.path().join("archives");
    std::fs::create_dir(&folder).unwrap();
    let names = ["../base.hxz", "../archives/../base.hxz", absolute.to_str().unwrap()];
    for name in names {
        let child = folder.join("child.hxz");
        child_of(&[name]).write().save(&child);

        let error = refused(child.clone(), &OpenOptions::default());
        assert!(matches!(error.kind, ErrorKind::ParentMissing { is_outside: true, .. }), "{error}");
        let message = error.to_string();
        for part in [child.to_str().unwrap(), name] {
            assert!(message.contains(part), "\"{part}\" is not in: {message}");
        }
        let anywhere = OpenOptions { allow_parent_anywhere: true, ..OpenOptions::default() };
        assert_reads_shared(&child, &anywhere);
    }
}

#[test]
fn a_missing_parent_is_named_with_the_paths_that_were_tried() {
    let files = folder([("child.hxz", child_of(&["base.hxz"]).write())]);
    for allow_parent_anywhere in [false, true] {
        let options = OpenOptions { allow_parent_anywhere, ..OpenOptions::default() };
        let error = refused(files.path().join("child.hxz"), &options);
        let ErrorKind::ParentMissing { name, tried, is_outside } = &error.kind else {
            panic!("{error}")
        };
        assert_eq!(name, "base.hxz");
        assert!(tried.contains(&files.path().join("base.hxz")));
        assert!(!is_outside);
        assert!(error.to_string().contains("child.hxz"), "{error}");
    }
    // The same for a grandparent, which the parent misses.
    child_of(&["gone.hxz"]).write().save(&files.path().join("base.hxz"));
    let error = refused(files.path().join("child.hxz"), &OpenOptions::default());
    assert_eq!(*error.path, *files.path().join("base.hxz"));
    assert!(error.to_string().contains("gone.hxz"), "{error}");
}

#[test]
fn circles_are_refused() {
    let files = folder([
        ("self.hxz", child_of(&["self.hxz"]).write()),
        ("a.hxz", child_of(&["b.hxz"]).write()),
        ("b.hxz", child_of(&["a.hxz"]).write()),
        ("linked.hxz", child_of(&["link.hxz"]).write()),
    ]);
    std::os::unix::fs::symlink("linked.hxz", files.path().join("link.hxz")).unwrap();
    for name in ["self.hxz", "a.hxz", "b.hxz", "linked.hxz"] {
        let error = refused(files.path().join(name), &OpenOptions::default());
        assert!(matches!(error.kind, ErrorKind::ParentCycle(_)), "{error}");
    }
}

#[test]
fn chains_have_a_greatest_depth() {
    let files = tempfile::tempdir().unwrap();
    let at = |number: usize| files.path().join(format!("{number}.hxz"));
    base().write().save(&at(0));
    for number in 1..=MAX_CHAIN {
        child_of(&[&format!("{}.hxz", number - 1)]).write().save(&at(number));
    }
    assert_reads_shared(&at(MAX_CHAIN - 1), &OpenOptions::default());
    let error = refused(at(MAX_CHAIN), &OpenOptions::default());
    assert!(matches!(error.kind, ErrorKind::ChainTooDeep(MAX_CHAIN)), "{error}");
    assert_eq!(*error.path, *at(MAX_CHAIN));
}

#[test]
fn every_encrypted_archive_of_a_chain_needs_the_password() {
    let encrypted = |writer| ArchiveWriter { password: Some(PASSWORD), ..writer };
    let files = folder([
        ("top.hxz", encrypted(base()).write()),
        // Only the middle of the chain is encrypted.
        ("child.hxz", child_of(&["middle.hxz"]).write()),
        (
            "middle.hxz",
            encrypted(ArchiveWriter { parents: vec!["base.hxz".into()], ..base() }).write(),
        ),
        ("base.hxz", base().write()),
    ]);
    for (name, encrypted) in [("top.hxz", "top.hxz"), ("child.hxz", "middle.hxz")] {
        let path = files.path().join(name);
        assert_reads_shared(&path, &with_password());
        let error = refused(path.clone(), &OpenOptions::default());
        assert!(matches!(error.kind, ErrorKind::PasswordNeeded), "{error}");
        assert_eq!(*error.path, *files.path().join(encrypted));
        for wrong in ["", "correct horse battery stapl", "correct horse battery staple\n"] {
            let password = Some(Password::new(wrong.into()));
            let error = refused(
                path.clone(),
                &OpenOptions { password: password.map(Into::into), ..OpenOptions::default() },
            );
            assert!(matches!(error.kind, ErrorKind::WrongPassword), "{error}");
            assert_eq!(*error.path, *files.path().join(encrypted));
        }
    }
}

#[test]
fn a_parent_has_to_be_an_archive() {
    let files = folder([("child.hxz", child_of(&["parent.hxz"]).write())]);
    let parent = files.path().join("parent.hxz");
    let refused = || refused(files.path().join("child.hxz"), &OpenOptions::default());

    std::fs::write(&parent, b"not at all").unwrap();
    let error = refused();
    assert!(matches!(error.kind, ErrorKind::NotHexz), "{error}");
    assert_eq!(*error.path, *parent);

    std::fs::write(&parent, &base().write().bytes[..4000]).unwrap();
    assert!(matches!(refused().kind, ErrorKind::Truncated(_)));

    std::fs::remove_file(&parent).unwrap();
    std::fs::create_dir(&parent).unwrap();
    assert!(matches!(refused().kind, ErrorKind::Io(..)));

    // Neither are devices that never end.
    std::fs::remove_dir(&parent).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &parent).unwrap();
    assert!(matches!(refused().kind, ErrorKind::Io(..)));
}

#[test]
fn two_parents_may_share_a_grandparent() {
    let of_base = |seed| ArchiveWriter {
        parents: vec!["base.hxz".into()],
        main: vec![Piece::Data(text(seed, 900)), Piece::InParent(shared())],
        ..ArchiveWriter::default()
    };
    let top = ArchiveWriter {
        parents: vec!["left.hxz".into(), "right.hxz".into()],
        main: vec![
            Piece::InParent(text(3, 900)),
            Piece::InParent(shared()),
            Piece::InParent(text(2, 900)),
        ],
        ..ArchiveWriter::default()
    };
    let files = folder([
        ("top.hxz", top.write()),
        ("left.hxz", of_base(2).write()),
        ("right.hxz", of_base(3).write()),
        ("base.hxz", base().write()),
    ]);
    let snapshot = open(files.path().join("top.hxz")).unwrap();
    let parents: Vec<_> = snapshot.parents().map(|path| path.file_name().unwrap()).collect();
    assert_eq!(parents, ["left.hxz", "right.hxz", "base.hxz"]);
    assert!(read_whole(&snapshot, StreamKind::Main).unwrap() == image(&top.main));
}

#[track_caller]
fn assert_unresolvable(snapshot: &Snapshot, at: u64, length: usize) {
    let error = read(snapshot, StreamKind::Main, at, length).unwrap_err();
    match error.kind {
        ErrorKind::Unresolvable { stream: StreamKind::Main, at: block, .. } => {
            assert_eq!(block, at);
        }
        _ => panic!("{error}"),
    }
}

#[test]
fn a_block_that_no_parent_has_is_an_error() {
    let mut child = child_of(&["base.hxz"]);
    child.main.push(Piece::InParent(noise(1, 300)));
    child.main.push(Piece::Data(noise(2, 300)));
    let files = folder([("child.hxz", child.write()), ("base.hxz", base().write())]);
    let snapshot = open(files.path().join("child.hxz")).unwrap();
    assert_unresolvable(&snapshot, 5000, 300);
    // The others can be read all the same.
    assert_eq!(read(&snapshot, StreamKind::Main, 5300, 300).unwrap(), noise(2, 300));
    assert_eq!(read(&snapshot, StreamKind::Main, 0, 5000).unwrap(), shared());
}

#[test]
fn without_parents_or_without_a_hash_nothing_is_found() {
    let orphan = child_of(&[]).write();
    let mut nameless = child_of(&["base.hxz"]).write();
    nameless.put(nameless.main[0].blocks[0].entry + block_entry::HASH, &[0; 32]);
    // The parent's block has no hash either, which makes them no more alike.
    let unhashed = ArchiveWriter { hashed: false, ..base() };
    let files = folder([
        ("orphan.hxz", orphan),
        ("nameless.hxz", nameless),
        ("child.hxz", child_of(&["base.hxz"]).write()),
        ("base.hxz", unhashed.write()),
    ]);
    for name in ["orphan.hxz", "nameless.hxz", "child.hxz"] {
        assert_unresolvable(&open(files.path().join(name)).unwrap(), 0, 5000);
    }
}

/// Blocks are looked up by 32 bits of their hash, which others may share.
#[test]
fn hashes_that_begin_alike_are_told_apart() {
    let (one, other) = blocks_with_hashes_that_begin_alike();
    let child = ArchiveWriter {
        main: vec![Piece::Data(noise(1, 100)), Piece::InParent(one.clone())],
        ..child_of(&["base.hxz"])
    };
    // Far from where the child has it, so that it is looked up.
    let base = |blocks: Vec<&Vec<u8>>| ArchiveWriter {
        main: blocks.into_iter().cloned().map(Piece::Data).collect(),
        blocks_per_page: 1,
        ..ArchiveWriter::default()
    };
    let filler = noise(2, 200);
    for found in [false, true] {
        let last = if found { &one } else { &other };
        let base = base(vec![&filler, &other, last]);
        let files = folder([("child.hxz", child.write()), ("base.hxz", base.write())]);
        let snapshot = open(files.path().join("child.hxz")).unwrap();
        if found {
            assert_eq!(read_whole(&snapshot, StreamKind::Main).unwrap(), image(&child.main));
        } else {
            assert_unresolvable(&snapshot, 100, one.len());
        }
    }
}

/// By the birthday paradox, some 80,000 tries are enough.
fn blocks_with_hashes_that_begin_alike() -> (Vec<u8>, Vec<u8>) {
    let mut tried = HashMap::new();
    for number in 0_u64.. {
        let block = number.to_le_bytes().to_vec();
        let beginning = *blake3::hash(&block).as_bytes().first_chunk::<4>().unwrap();
        if let Some(earlier) = tried.insert(beginning, block.clone()) {
            return (block, earlier);
        }
    }
    unreachable!("there are only so many beginnings")
}

#[test]
fn a_parents_block_has_the_length_that_the_child_expects() {
    let mut child = child_of(&["base.hxz"]);
    child.main.push(Piece::InParent(text(2, 3000)));
    let mut child = child.write();
    // Both lengths are wrong, and add up.
    for (block, length) in [(0, 4000_u32), (1, 4000)] {
        let at = child.main[0].blocks[block].entry + block_entry::LENGTH;
        child.put(at, &length.to_le_bytes());
    }
    let mut base = base();
    base.main.push(Piece::Data(text(2, 3000)));
    let files = folder([("child.hxz", child), ("base.hxz", base.write())]);
    let snapshot = open(files.path().join("child.hxz")).unwrap();
    assert_unresolvable(&snapshot, 0, 10);
    assert_unresolvable(&snapshot, 4000, 10);
}

#[test]
fn another_archive_under_the_parents_name_gives_errors() {
    let replacements = [
        ArchiveWriter::of_image(&text(2, 5000), 5000),
        ArchiveWriter::of_image(&shared(), 1000),
        ArchiveWriter::default(),
        ArchiveWriter { main: vec![Piece::Zeros(5000)], ..ArchiveWriter::default() },
    ];
    for replacement in replacements {
        let files = folder([
            ("child.hxz", child_of(&["base.hxz"]).write()),
            ("base.hxz", replacement.write()),
        ]);
        assert_unresolvable(&open(files.path().join("child.hxz")).unwrap(), 0, 5000);
    }
}

#[test]
fn an_open_chain_keeps_its_files_when_their_names_go_to_others() {
    let files = folder([
        ("child.hxz", child_of(&["base.hxz"]).write()),
        ("base.hxz", base().write()),
        ("other.hxz", ArchiveWriter::of_image(&text(2, 5000), 5000).write()),
    ]);
    let snapshot = open(files.path().join("child.hxz")).unwrap();
    std::fs::rename(files.path().join("other.hxz"), files.path().join("base.hxz")).unwrap();
    assert_eq!(read_whole(&snapshot, StreamKind::Main).unwrap(), shared());
}

/// A parent's index may promise what its blocks don't hold.
#[test]
fn a_parent_that_lies_about_its_hashes_is_found_out() {
    let hash = *blake3::hash(&shared()).as_bytes();
    let mut other = ArchiveWriter::of_image(&text(2, 5000), 5000).write();
    other.put(other.main[0].blocks[0].entry + block_entry::HASH, &hash);
    let zeros = ArchiveWriter { main: vec![Piece::Zeros(5000)], ..ArchiveWriter::default() };
    let mut zeros = zeros.write();
    zeros.put(zeros.main[0].blocks[0].entry + block_entry::HASH, &hash);
    let refused = |parent| {
        let files = folder([("child.hxz", child_of(&["base.hxz"]).write()), ("base.hxz", parent)]);
        let snapshot = open(files.path().join("child.hxz")).unwrap();
        read(&snapshot, StreamKind::Main, 0, 5000).expect_err("wrong bytes")
    };
    let error = refused(other);
    assert!(matches!(error.kind, ErrorKind::HashMismatch { .. }), "{error}");
    assert!(error.path.ends_with("base.hxz"), "{error}");
    // Nobody believes zeros with the hash of something else, so nobody has the block.
    let error = refused(zeros);
    assert!(matches!(error.kind, ErrorKind::Unresolvable { .. }), "{error}");
}

#[test]
fn replaced_and_changed_archives_of_a_chain_are_noticed() {
    for name in ["child.hxz", "base.hxz"] {
        for is_replaced in [false, true] {
            let files = folder([
                ("child.hxz", child_of(&["base.hxz"]).write()),
                ("base.hxz", base().write()),
            ]);
            let snapshot = open(files.path().join("child.hxz")).unwrap();
            assert!(snapshot.is_current());
            let path = files.path().join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            if is_replaced {
                let copy = files.path().join("copy.hxz");
                std::fs::write(&copy, &bytes).unwrap();
                std::fs::rename(&copy, &path).unwrap();
            } else {
                bytes.push(0);
                std::fs::write(&path, &bytes).unwrap();
            }
            assert!(!snapshot.is_current(), "{name} {is_replaced}");
        }
    }
}

#[test]
fn blocks_of_an_encrypted_archive_cannot_be_read_through_its_index_alone() {
    let files = folder([("a.hxz", ArchiveWriter { password: Some(PASSWORD), ..base() }.write())]);
    let path = files.path().join("a.hxz");
    let snapshot = Snapshot::open_index(&path, None, &with_password()).unwrap();
    assert_eq!(snapshot.size(StreamKind::Main), shared().len() as u64);
    let error = read(&snapshot, StreamKind::Main, 0, 1).unwrap_err();
    assert!(matches!(error.kind, ErrorKind::PasswordNeeded), "{error}");
}
