//! Chains across versions, other files under an archive's name, and an index read naively.

use std::fs;
use std::ops::Range;
use std::path::Path;

use hexz_reader::{ErrorKind, Layout, Snapshot, StreamKind};
use tempfile::TempDir;

use super::{decided, folder, inspect, kit, read_whole};
use crate::archive_writer::{ArchiveWriter, PASSWORD, Piece, image, noise};
use crate::support::server::{Server, run};

/// A block of the main stream as its entry has it.
#[derive(Debug)]
pub(super) struct Block {
    /// Where it is stored; 2^64 - 1 if a parent has it.
    pub(super) offset: u64,
    pub(super) range: Range<usize>,
    pub(super) hash: [u8; 32],
}

/// Blocks of the main stream of an archive whose entries have hashes, straight from its bytes.
pub(super) fn blocks(bytes: &[u8]) -> Vec<Block> {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let index = number(12) as usize;
    let mut blocks = Vec::new();
    let mut start = 0;
    for page in 0..number(index) as usize {
        let page = number(index + 8 + 28 * page) as usize;
        for entry in (0..number(page) as usize).map(|block| page + 8 + 52 * block) {
            let length = u32::from_le_bytes(bytes[entry + 12..entry + 16].try_into().unwrap());
            let range = start..start + length as usize;
            start = range.end;
            let hash = bytes[entry + 20..entry + 52].try_into().unwrap();
            blocks.push(Block { offset: number(entry), range, hash });
        }
    }
    blocks
}

/// A folder with copies of archives of the kit.
fn copies(names: &[&str]) -> TempDir {
    let copies = tempfile::tempdir().unwrap();
    for name in names {
        fs::copy(folder().join(name), copies.path().join(name)).unwrap();
    }
    copies
}

/// Pieces of a child of layout D that leaves to its parent whatever has a hash.
fn pieces_over(parent: &Path) -> Vec<Piece> {
    let snapshot = Snapshot::open(parent, &decided()).unwrap();
    let whole = read_whole(&snapshot, StreamKind::Main).unwrap();
    let mut pieces = vec![Piece::Data(noise(1, 3000))];
    let mut at = 0;
    while at < whole.len() as u64 {
        let block = snapshot.locate(StreamKind::Main, at).unwrap();
        let bytes = whole[at as usize..block.end() as usize].to_vec();
        let is_part = block.length() != block.decoded_length();
        pieces.push(match block.hash() {
            Some(_) if !is_part => Piece::InParent(bytes),
            _ => Piece::Data(bytes),
        });
        at = block.end();
    }
    pieces
}

/// Writes the child and reads it, by the library and from a server.
fn assert_child_reads(folder: &Path, parent: &str, ancestors: usize) {
    let main = pieces_over(&folder.join(parent));
    let inherited = main.iter().filter(|piece| matches!(piece, Piece::InParent(_))).count();
    assert!(inherited > 0 && inherited + 1 < main.len(), "{inherited} of {}", main.len());
    let child =
        ArchiveWriter { parents: vec![parent.to_owned()], main, ..ArchiveWriter::default() };
    let path = folder.join("child.hxz");
    child.write().save(&path);
    let expected = image(&child.main);
    let snapshot = Snapshot::open(&path, &crate::snapshot::with_password()).unwrap();
    assert_eq!(snapshot.parents().count(), ancestors);
    assert!(read_whole(&snapshot, StreamKind::Main).unwrap() == expected);
    let server = Server::builder().arg(&path).env("HEXZ_PASSWORD", PASSWORD).start();
    assert!(server.go("").read_ok(0, expected.len() as u32) == expected);
}

#[test]
fn a_child_of_layout_d_over_thin_archives_of_other_versions() {
    for (version, thin) in
        [("0.5.1", "thin"), ("0.5.5", "thin"), ("0.6.0", "thin"), ("0.7.0", "thin4k")]
    {
        let [base, thin] = ["zstd", thin].map(|name| format!("{version}-{name}.hxz"));
        let copies = copies(&[&base, &thin]);
        assert_child_reads(copies.path(), &thin, 2);
    }
}

/// Blocks of the encrypted base have no hash: those between refer to them by offset.
#[test]
fn a_child_of_layout_d_over_a_thin_archive_over_an_encrypted_one() {
    for base in ["0.1.1-enc.hxz", "0.4.5-enc.hxz", "0.5.5-enc.hxz", "0.6.0-enc.hxz"] {
        let copies = copies(&[base]);
        let snapshot = Snapshot::open(&copies.path().join(base), &decided()).unwrap();
        let whole = read_whole(&snapshot, StreamKind::Main).unwrap();
        let main = whole.chunks(16_384).enumerate().map(|(number, chunk)| match number % 3 {
            0 => Piece::Data(noise(number as u64, chunk.len())),
            _ => Piece::ByOffset { bytes: chunk.to_vec(), hash: [0; 32] },
        });
        let thin = ArchiveWriter {
            layout: Layout::C,
            parents: vec![base.to_owned()],
            main: main.collect(),
            ..ArchiveWriter::default()
        };
        thin.write().save(&copies.path().join("thin.hxz"));
        assert_child_reads(copies.path(), "thin.hxz", 2);
    }
}

#[test]
fn an_image_that_is_no_raw_disk_is_noted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    let qcow2 = [b"QFI\xfb\0\0\0\x03".as_slice(), &noise(1, 5000)].concat();
    for layout in [Layout::A, Layout::D] {
        ArchiveWriter { layout, ..ArchiveWriter::of_image(&qcow2, 1000) }.write().save(&path);
        assert_eq!(inspect(&path)["image"], "qcow2");
        let said = run(["inspect".into(), path.as_os_str().to_owned()]);
        assert_eq!(said.code, Some(0));
        assert!(
            said.stdout.lines().any(|line| line.starts_with("NOTE: ") && line.ends_with("[qcow2]"))
        );
        let server = Server::builder().arg(&path).start();
        assert_eq!(server.go("").read_ok(0, 4), b"QFI\xfb");
        let line = server.wait_for_log("it is an image", |line| line.text.contains("qcow2"));
        assert_eq!(line.json["level"], "WARN", "{}", line.text);
    }
    // None of the kit is.
    for entry in kit() {
        let snapshot = Snapshot::open(&entry.path(), &decided()).unwrap();
        assert_eq!(snapshot.image_format().unwrap().map(|format| format.name()), None);
    }
}

#[test]
fn a_file_that_is_no_archive_is_told_how_to_become_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, noise(1, 10_000)).unwrap();
    let kind = Snapshot::open(&path, &decided()).unwrap_err().kind;
    assert!(matches!(kind, ErrorKind::NotHexz), "{kind}");
    for command in [&["inspect"][..], &["verify"], &["--listen", "127.0.0.1:0"]] {
        let args = command.iter().map(std::ffi::OsString::from).chain([path.clone().into()]);
        let ended = run(args);
        assert_ne!(ended.code, Some(0), "{command:?}");
        assert!(ended.stderr.contains("hexz pack "), "{command:?}: {}", ended.stderr);
    }
}

/// Whatever metadata say, they accompany a disk unless they list files.
#[test]
fn metadata_that_list_no_files_are_no_packed_directory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    for layout in [Layout::A, Layout::B, Layout::C, Layout::D] {
        for metadata in ["a commit message", "", "{}", r#"{"files":["a"]}"#, r#"{"tensors":[]}"#] {
            let writer = ArchiveWriter {
                layout,
                metadata: Some(metadata.as_bytes().to_vec()),
                ..ArchiveWriter::of_image(&noise(2, 3000), 1000)
            };
            writer.write().save(&path);
            let seen = inspect(&path);
            assert_eq!(seen["manifest"], serde_json::Value::Null, "{metadata}");
            assert_eq!(seen["metadata"]["text"], metadata);
            let server = Server::builder().arg(&path).start();
            assert_eq!(server.go("").read_ok(0, 3000), noise(2, 3000));
        }
    }
}
