//! What metadata contexts say of archives of every version, as nbdinfo gets it, against the
//! images byte by byte.

use std::collections::HashMap;

use hexz_reader::{Snapshot, StreamKind};

use super::{DECISIONS, Entry, all, decided, folder, kit, read_whole};
use crate::clients;
use crate::support::server::Server;
use crate::support::structured::HOLE;

const SECTOR: usize = 512;

/// Start, length and type of each extent, which follow one another over `size` bytes.
fn map(server: &Server, export: &str, context: &str, size: u64) -> Vec<(usize, usize, u64)> {
    let uri = format!("nbd://127.0.0.1:{}/{export}", server.port());
    let said = clients::run("nbdinfo", &["--json", &format!("--map={context}"), &uri]).ok();
    let map: serde_json::Value = serde_json::from_str(&said).unwrap();
    let mut at = 0;
    let extents = map.as_array().unwrap().iter().map(|extent| {
        let number = |field: &str| extent[field].as_u64().unwrap();
        assert_eq!(number("offset"), at, "{export} {context}");
        at += number("length");
        (number("offset") as usize, number("length") as usize, number("type"))
    });
    let extents = extents.collect();
    assert_eq!(at, size, "{export} {context}");
    extents
}

fn image(file: &str) -> Vec<u8> {
    let snapshot = Snapshot::open(&folder().join(file), &decided()).unwrap();
    read_whole(&snapshot, StreamKind::Main).unwrap()
}

/// Bytes that a map marks with `flags`, for each byte of the stream.
fn marked(map: &[(usize, usize, u64)], flags: u64, size: usize) -> Vec<bool> {
    let mut marked = vec![false; size];
    for (start, length, _) in map.iter().filter(|(_, _, kind)| *kind == flags) {
        marked[*start..*start + *length].fill(true);
    }
    marked
}

#[test]
fn holes_are_zeros_in_every_archive() {
    let (undecided, decided) = (all().start(), all().args(DECISIONS).start());
    for entry in kit().iter().filter(|entry| entry.main_len > 0) {
        let bytes = image(&entry.file);
        let server = if entry.is_whole() { &undecided } else { &decided };
        let map = map(server, &entry.file, "base:allocation", entry.main_len);
        assert!(map.iter().all(|(_, _, kind)| [0, HOLE].contains(kind)), "{}", entry.file);
        let holes = marked(&map, HOLE, bytes.len());
        let wrong = bytes.iter().zip(&holes).position(|(byte, hole)| *hole && *byte != 0);
        assert_eq!(wrong, None, "{}", entry.file);
        if entry.file.ends_with("-zeros.hxz") {
            assert_eq!(map, [(0, entry.main_len as usize, HOLE)], "{}", entry.file);
        }
    }
}

/// What has changed against a parent, by export.
fn changed(server: &Server, entry: &Entry, parent: &str) -> Vec<bool> {
    let context = format!("hexz:changed:{parent}");
    let map = map(server, &entry.file, &context, entry.main_len);
    assert!(map.iter().all(|(_, _, kind)| [0, 1].contains(kind)), "{}", entry.file);
    marked(&map, 1, entry.main_len as usize)
}

#[test]
fn nothing_that_differs_from_a_parent_is_reported_as_unchanged() {
    let server = all().args(DECISIONS).start();
    let mut compared = 0;
    for entry in kit().iter().filter(|entry| entry.parent.is_some()) {
        let newer = image(&entry.file);
        for parent in entry.parent.iter().flat_map(|parents| parents.split(' ')) {
            let older = image(parent);
            let changed = changed(&server, entry, parent);
            let missed =
                (0..newer.len()).find(|&at| !changed[at] && older.get(at) != Some(&newer[at]));
            assert_eq!(missed, None, "{} against {parent}", entry.file);
            compared += 1;
        }
    }
    assert!(compared > 20);
}

/// Blocks that the thin archive leaves to its base are the base's own, so all of them are known
/// to be the same.
#[test]
fn all_that_a_thin_archive_leaves_to_its_base_is_reported_as_unchanged() {
    let server = all().start();
    let by_file: HashMap<String, Entry> =
        kit().into_iter().map(|entry| (entry.file.clone(), entry)).collect();
    for (file, base, block) in [
        ("0.4.5-thin.hxz", "0.4.5-zstd.hxz", 16_384),
        ("0.5.1-thin.hxz", "0.5.1-zstd.hxz", 16_384),
        ("0.5.2-thin.hxz", "0.5.2-zstd.hxz", 16_384),
        ("0.5.5-thin.hxz", "0.5.5-zstd.hxz", 16_384),
        ("0.6.0-thin.hxz", "0.6.0-zstd.hxz", 16_384),
        ("0.7.0-thin.hxz", "0.7.0-zstd.hxz", 16_384),
        ("0.7.0-thin4k.hxz", "0.7.0-zstd.hxz", 4096),
    ] {
        let (newer, older) = (image(file), image(base));
        let changed = changed(&server, &by_file[file], base);
        let mut unchanged_blocks = 0;
        for (number, bytes) in newer.chunks(block).enumerate() {
            let start = number * block;
            let is_same = older.get(start..start + bytes.len()) == Some(bytes);
            let says_changed = changed[start..start + bytes.len()].contains(&true);
            assert_eq!(says_changed, !is_same, "{file}: block {number}");
            unchanged_blocks += usize::from(is_same);
        }
        assert!(unchanged_blocks > 0, "{file}");
    }
}

/// A child that was packed against its parent has its first blocks where the parent has them.
#[test]
fn a_block_found_by_hash_at_the_same_place_is_unchanged() {
    let server = all().start();
    for entry in kit().iter().filter(|entry| entry.file.ends_with("-child.hxz")) {
        let parent = entry.parent.as_ref().unwrap();
        let changed = changed(&server, entry, parent);
        let unchanged = changed.chunks(SECTOR).filter(|sector| !sector.contains(&true)).count();
        assert!(unchanged > 0, "{}", entry.file);
    }
}
