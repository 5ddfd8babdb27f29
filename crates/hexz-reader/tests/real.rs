//! Archives that the Hexz tools wrote.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use hexz_reader::{Compression, ErrorKind, OpenOptions, Snapshot, StreamKind};

use crate::support::{STREAMS, read, read_whole, with_password};

const BASE: &str = "f678f7a8470339469d914c44f299df0d5ea6e06704b62be9c1b526bcf39ef67c";
const CHILD: &str = "bdfb933e575594c1e7909a1d8cac0836966fad767893806bd8303d0b2ce7c8d1";
const GRANDCHILD: &str = "b2bc3711e3005be4f34b835d6b3375c64674ad995ac3eb4065575e3ea8764433";
const TEXT: &str = "c12f9f46eb3393106b75ecbd89218fe2cca06d9d636d42dcc6ffeea1eeea015d";
const AUXILIARY: &str = "5a42555d1241e69065fc93ebac465c5ba48699ba1cb1fe8d81778da49e6b270d";

fn archive(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/archives").join(name)
}

fn open(name: &str) -> Snapshot {
    let options = OpenOptions { raw: true, ..with_password() };
    Snapshot::open(&archive(name), &options).unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads the main stream whole, and again in pieces that keep to no block's bounds.
#[track_caller]
fn assert_reads(name: &str, size: usize, expected: &str) {
    let snapshot = open(name);
    let whole = read_whole(&snapshot, StreamKind::Main).unwrap();
    assert_eq!(whole.len(), size, "{name}");
    assert_eq!(sha256(&whole), expected, "{name}");

    let mut random = size;
    for _ in 0..20 {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let start = (random >> 20) % size;
        let length = ((random >> 8) % 300_000).min(size - start);
        let piece = read(&snapshot, StreamKind::Main, start as u64, length).unwrap();
        assert!(piece == whole[start..start + length], "{name}: {length} bytes at {start}");
    }
    assert_blocks_follow_one_another(&snapshot, &whole);
}

/// Blocks have no gaps between them, and those said to be zeros are.
#[track_caller]
fn assert_blocks_follow_one_another(snapshot: &Snapshot, whole: &[u8]) {
    let mut at = 0;
    while at < whole.len() as u64 {
        let block = snapshot.locate(StreamKind::Main, at).unwrap();
        assert_eq!(block.start(), at);
        let bytes = &whole[at as usize..block.end() as usize];
        assert!(!block.is_zeros() || bytes.iter().all(|&byte| byte == 0), "zeros at {at}");
        at = block.end();
    }
    assert_eq!(at, whole.len() as u64);
}

#[test]
fn every_compression_and_block_size_reads_the_same() {
    for name in [
        "base-zstd.hxz",
        "base-lz4.hxz",
        "sparse-zstd.hxz",
        "fixed-64k-zstd.hxz",
        "fixed-4k-zstd.hxz",
        "signed-zstd.hxz",
    ] {
        assert_reads(name, 8_388_608, BASE);
    }
    assert_eq!(open("base-zstd.hxz").compression(), Compression::Zstd);
    assert_eq!(open("base-lz4.hxz").compression(), Compression::Lz4);
    assert_reads("text-dict-zstd.hxz", 700_000, TEXT);
}

#[test]
fn encrypted_archives_read_with_their_password() {
    for name in ["encrypted-zstd.hxz", "encrypted-lz4.hxz"] {
        assert_reads(name, 8_388_608, BASE);
        assert!(open(name).is_encrypted());
        let refused = Snapshot::open(&archive(name), &OpenOptions::default()).unwrap_err();
        assert!(matches!(refused.kind, ErrorKind::PasswordNeeded), "{refused}");
    }
}

#[test]
fn thin_archives_find_their_ancestors_beside_them() {
    assert_reads("child-zstd.hxz", 8_388_608, CHILD);
    assert_reads("grandchild-zstd.hxz", 8_388_608, GRANDCHILD);
    let grandchild = open("grandchild-zstd.hxz");
    let parents: Vec<_> = grandchild.parents().collect();
    assert_eq!(parents, [archive("child-zstd.hxz"), archive("base-zstd.hxz")]);
}

#[test]
fn zero_runs_are_known_however_they_are_stored() {
    for name in
        ["base-zstd.hxz", "base-lz4.hxz", "sparse-zstd.hxz", "encrypted-zstd.hxz", "child-zstd.hxz"]
    {
        let snapshot = open(name);
        let (mut at, mut zeros) = (0, 0);
        while at < snapshot.size(StreamKind::Main) {
            let block = snapshot.locate(StreamKind::Main, at).unwrap();
            zeros += if block.is_zeros() { u64::from(block.length()) } else { 0 };
            at = block.end();
        }
        assert!(zeros > 4 << 20, "{name}: only {zeros} bytes are known to be zeros");
    }
}

#[test]
fn a_packed_directory_is_served_only_raw() {
    let refused = Snapshot::open(&archive("tree.hxz"), &OpenOptions::default()).unwrap_err();
    assert!(matches!(refused.kind, ErrorKind::DirectoryArchive), "{refused}");

    let tree = read_whole(&open("tree.hxz"), StreamKind::Main).unwrap();
    assert_eq!(tree.len(), 288_662);
    assert!(tree.starts_with(b"hello from a hexz snapshot\n"));
    // The base image is a file system with the same files.
    let disk = read_whole(&open("base-zstd.hxz"), StreamKind::Main).unwrap();
    let sectors: HashSet<_> = disk.chunks(1024).collect();
    for (offset, size) in files_of_tree() {
        let file = &tree[offset..offset + size];
        assert!(file.chunks_exact(1024).all(|part| sectors.contains(part)), "file at {offset}");
    }
}

/// Offset and size of each file, from the manifest.
fn files_of_tree() -> Vec<(usize, usize)> {
    let bytes = std::fs::read(archive("tree.hxz")).unwrap();
    let start = bytes.windows(10).position(|window| window == b"{\"files\":[").unwrap();
    let manifest = String::from_utf8_lossy(&bytes[start..]);
    let number = |text: &str| {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    let files: Vec<_> = manifest
        .split("\"offset\":")
        .skip(1)
        .map(|file| (number(file), number(file.split("\"size\":").nth(1).unwrap())))
        .collect();
    assert_eq!(files.iter().map(|(_, size)| size).sum::<usize>(), 288_662);
    files
}

#[test]
fn an_auxiliary_stream_is_beside_the_main_one() {
    let snapshot = open("aux-lz4.hxz");
    assert_eq!(read_whole(&snapshot, StreamKind::Main).unwrap(), b"hello from a hexz snapshot\n");
    let auxiliary = read_whole(&snapshot, StreamKind::Auxiliary).unwrap();
    assert_eq!(auxiliary.len(), 70_000);
    assert_eq!(sha256(&auxiliary), AUXILIARY);
}

#[test]
fn nothing_is_read_beyond_the_end() {
    let snapshot = open("aux-lz4.hxz");
    for (stream, size) in STREAMS.into_iter().zip([27, 70_000]) {
        for (at, length) in
            [(size, 1), (size - 1, 2), (size + 1, 1), (u64::MAX, 1), (0, size as usize + 1)]
        {
            let error = read(&snapshot, stream, at, length).unwrap_err();
            assert!(matches!(error.kind, ErrorKind::Uncovered { .. }), "{error}");
        }
    }
}
