//! `--skip-hashes`: a hash that an index states and that nobody compares with the bytes. It must
//! not make the bytes of one block stand for another's.

use std::path::{Path, PathBuf};

use super::digests::BLOCK;
use crate::archive_writer::{ArchiveWriter, Piece, noise};
use crate::monitor::metrics;
use crate::support::client::{Client, Duplex, EIO};
use crate::support::server::{Server, run};
use crate::support::structured::{Extent, Mode};

const HONEST: &str = "honest.hxz";
const LYING: &str = "lying.hxz";

/// A stored block, with the hash of other bytes.
fn lie(bytes: &[u8], claimed: &[u8]) -> Piece {
    let stored = zstd::bulk::compress(bytes, 3).unwrap();
    Piece::Raw { stored, length: bytes.len() as u32, hash: *blake3::hash(claimed).as_bytes() }
}

fn data(seed: u64) -> Piece {
    Piece::Data(noise(seed, BLOCK))
}

/// Two archives whose indexes state the same hashes, which are those of the first one's blocks.
struct Pair {
    folder: tempfile::TempDir,
}

impl Pair {
    fn new() -> Self {
        let pair = Self { folder: tempfile::tempdir().unwrap() };
        pair.save(HONEST, vec![data(1), data(2), data(3)]);
        let lies = [(11, 1), (12, 2), (11, 3)];
        let lies = lies.map(|(seed, claimed)| lie(&noise(seed, BLOCK), &noise(claimed, BLOCK)));
        pair.save(LYING, lies.to_vec());
        pair
    }

    fn save(&self, name: &str, main: Vec<Piece>) {
        ArchiveWriter { main, ..ArchiveWriter::default() }.write().save(&self.path(name));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&self, options: &[&str]) -> Server {
        Server::builder()
            .args(["--monitor", "0"])
            .args(options.iter().copied())
            .arg(self.path(HONEST))
            .arg(self.path(LYING))
            .start()
    }
}

/// The seeds of the blocks of an archive of the pair.
fn seeds(name: &str) -> [u64; 3] {
    if name == HONEST { [1, 2, 3] } else { [11, 12, 11] }
}

fn read(client: &mut Client<impl Duplex>, block: usize) -> Result<Vec<u8>, u32> {
    client.read((block * BLOCK) as u64, BLOCK as u32)
}

#[test]
fn archives_that_state_the_same_hash_read_as_their_own_bytes() {
    let pair = Pair::new();
    for order in [[HONEST, LYING], [LYING, HONEST]] {
        let server = pair.serve(&["--skip-hashes"]);
        // Twice, so that the second time they come from the cache.
        for name in [order, order].concat() {
            let mut client = server.go(name);
            for (block, seed) in seeds(name).into_iter().enumerate() {
                let bytes = read(&mut client, block).unwrap();
                assert!(bytes == noise(seed, BLOCK), "block {block} of {name}, {order:?}");
            }
        }
        let hits = metrics(&server)["hexz_nbd_cache_hits_total"];
        assert!(hits >= 6.0, "{hits}");
    }
}

#[test]
fn blocks_of_one_archive_that_state_the_same_hash_read_as_their_own_bytes() {
    let pair = Pair::new();
    let claimed = noise(1, BLOCK);
    let lie = |seed| lie(&noise(seed, BLOCK), &claimed);
    pair.save(LYING, vec![lie(21), data(1), lie(22), lie(23)]);
    let server = pair.serve(&["--skip-hashes"]);
    let expected = [21, 1, 22, 23].map(|seed| noise(seed, BLOCK));
    for order in [[0, 1, 2, 3], [3, 2, 1, 0]] {
        let mut client = server.go(LYING);
        for block in order {
            assert!(read(&mut client, block).unwrap() == expected[block], "block {block}");
        }
    }
    assert_eq!(server.go(LYING).read_ok(0, 4 * BLOCK as u32), expected.concat());
}

/// The other way round: hashes that are verified are what archives share their blocks by.
#[test]
fn blocks_are_shared_by_their_hash_only_where_it_is_verified() {
    let pair = Pair::new();
    pair.save(LYING, vec![data(3), data(1), data(2)]);
    for (options, decoded) in [(&[][..], 3.0), (&["--skip-hashes"], 6.0)] {
        let server = pair.serve(options);
        // Opening has read the first block of each to see what kind of disk it is.
        for name in [HONEST, LYING] {
            let mut client = server.go(name);
            (0..3).for_each(|block| drop(read(&mut client, block).unwrap()));
        }
        let numbers = metrics(&server);
        let asked = ["hits", "misses"].map(|of| numbers[&format!("hexz_nbd_cache_{of}_total")]);
        assert_eq!(asked.iter().sum::<f64>(), 6.0);
        assert_eq!(numbers["hexz_nbd_decoded_blocks_total"], decoded, "{options:?}");
    }
}

#[test]
fn without_it_a_block_with_another_hash_is_an_error() {
    let pair = Pair::new();
    for order in [[HONEST, LYING], [LYING, HONEST]] {
        let server = pair.serve(&[]);
        for name in order {
            let mut client = server.go(name);
            // Whether or not a block with that hash is in the cache: it is one, then.
            let is_cached = name == LYING && order[0] == HONEST;
            for block in 0..3 {
                let bytes = noise([1, 2, 3][block], BLOCK);
                let expected = if name == LYING && !is_cached { Err(EIO) } else { Ok(bytes) };
                assert!(read(&mut client, block) == expected, "block {block} of {name}");
            }
        }
        let failures = metrics(&server)["hexz_nbd_verification_failures_total{reason=\"hash\"}"];
        assert_eq!(failures > 0.0, order[0] == LYING);
    }
    let verified = run(["verify".into(), pair.path(LYING).into_os_string()]);
    assert_eq!(verified.code, Some(1), "{}", verified.stdout);
}

#[test]
fn damage_to_what_is_stored_is_an_error_all_the_same() {
    let pair = Pair::new();
    let mut honest =
        ArchiveWriter { main: vec![data(1), data(2)], ..ArchiveWriter::default() }.write();
    let stored = honest.main[0].blocks[1].stored.clone();
    honest
        .put(stored.start + stored.len() / 2, &[honest.bytes[stored.start + stored.len() / 2] ^ 1]);
    honest.save(&pair.path(HONEST));
    let server = pair.serve(&["--skip-hashes"]);
    let mut client = server.go(HONEST);
    assert!(read(&mut client, 0).unwrap() == noise(1, BLOCK));
    assert_eq!(read(&mut client, 1), Err(EIO));
    assert!(metrics(&server)["hexz_nbd_verification_failures_total{reason=\"crc\"}"] > 0.0);
}

fn changed(server: &Server, newer: &str, older: &str) -> Vec<Extent> {
    let mut peer = server.peer(Mode::Extended, newer, &[&format!("hexz:changed:{older}")]);
    let size = peer.export.size;
    peer.map(0, size)
}

/// What has changed is known by the index alone, so with either setting it is what the index
/// states.
#[test]
fn changes_are_what_the_indexes_state() {
    let pair = Pair::new();
    let claimed = noise(2, BLOCK);
    pair.save(LYING, vec![data(4), lie(&noise(12, BLOCK), &claimed), data(3)]);
    let block = |count: u64, flags| Extent { length: count * BLOCK as u64, flags };
    for options in [&[][..], &["--skip-hashes"]] {
        let server = pair.serve(options);
        let expected = [block(1, 1), block(2, 0)];
        assert_eq!(changed(&server, LYING, HONEST), expected, "{options:?}");
        assert_eq!(changed(&server, HONEST, LYING), expected, "{options:?}");
    }
}

/// The blocks of a thin archive are found in its parents by the hash that the parents state.
#[test]
fn a_parent_that_states_a_wrong_hash() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { Path::join(folder.path(), name) };
    let parent = ArchiveWriter {
        main: vec![data(1), lie(&noise(12, BLOCK), &noise(2, BLOCK))],
        ..ArchiveWriter::default()
    };
    parent.write().save(&path("parent.hxz"));
    let main = [1, 2].map(|seed| Piece::InParent(noise(seed, BLOCK))).to_vec();
    let parents = vec!["parent.hxz".into()];
    let child = ArchiveWriter { main, parents, ..ArchiveWriter::default() };
    child.write().save(&path("child.hxz"));
    for (options, expected) in [(&[][..], Err(EIO)), (&["--skip-hashes"], Ok(noise(12, BLOCK)))] {
        let server = Server::builder().args(options.iter().copied()).arg(path("child.hxz")).start();
        let mut client = server.go("");
        assert!(read(&mut client, 0).unwrap() == noise(1, BLOCK));
        assert!(read(&mut client, 1) == expected, "{options:?}");
    }
}
