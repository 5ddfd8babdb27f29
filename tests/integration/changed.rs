//! Changed blocks, against a comparison of the images byte by byte: nothing that differs is
//! missed, and what is reported beyond it is the rest of a block that a difference touches.

use std::collections::HashMap;

use hexz_reader::{OpenOptions, Password, Snapshot, StreamKind};

use crate::archive_writer::{ArchiveWriter, Piece, noise};
use crate::support::server::Server;
use crate::support::structured::{Extent, Mode, Peer, Question};
use crate::support::{IMAGE_SIZE, PASSWORD, archive};

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";
const GRANDCHILD: &str = "grandchild-zstd.hxz";
const SECTOR: usize = 512;

/// An archive as the library sees it.
struct Image {
    bytes: Vec<u8>,
    /// Where its blocks begin and end.
    blocks: Vec<(usize, usize)>,
}

impl Image {
    fn of(snapshot: &Snapshot) -> Self {
        let size = snapshot.size(StreamKind::Main);
        let mut bytes = vec![0; size as usize];
        snapshot.read_exact_at(StreamKind::Main, &mut bytes, 0).unwrap();
        let mut blocks = Vec::new();
        let mut at = 0;
        while at < size {
            let block = snapshot.locate(StreamKind::Main, at).unwrap();
            blocks.push((block.start() as usize, block.end() as usize));
            at = block.end();
        }
        Self { bytes, blocks }
    }

    fn open(name: &str) -> Self {
        let password = Some(Password::new(PASSWORD.as_bytes().to_vec()));
        let options = OpenOptions { password: password.map(Into::into), ..OpenOptions::default() };
        Self::of(&Snapshot::open(&archive(name), &options).unwrap())
    }

    /// Those of its bytes, of which there may be fewer.
    fn part(&self, start: usize, end: usize) -> &[u8] {
        let size = self.bytes.len();
        &self.bytes[start.min(size)..end.min(size)]
    }
}

/// For each sector of `newer` whether it may be reported: a block of either image reaches
/// into it in which the images differ.
fn may_be_reported(newer: &Image, older: &Image) -> Vec<bool> {
    let mut may = vec![false; newer.bytes.len().div_ceil(SECTOR)];
    let end_of_newer = newer.bytes.len();
    for &(start, end) in newer.blocks.iter().chain(&older.blocks) {
        let end = end.min(end_of_newer);
        if newer.part(start, end) != older.part(start, end) {
            may[start / SECTOR..end.div_ceil(SECTOR)].fill(true);
        }
    }
    may
}

fn differing_bytes(newer: &Image, older: &Image) -> usize {
    newer.bytes.iter().zip(&older.bytes).filter(|(new, old)| new != old).count()
}

/// Holds a map against the images; how many bytes it says have changed.
#[track_caller]
fn check(map: &[Extent], newer: &Image, older: &Image, is_tight: bool) -> usize {
    let may = may_be_reported(newer, older);
    let (mut at, mut changed) = (0, 0);
    for extent in map {
        let end = at + extent.length as usize;
        match extent.flags {
            0 => {
                let same = newer.part(at, end) == older.part(at, end);
                assert!(same, "something is missed in {extent:?} at {at}");
            }
            1 => {
                changed += end - at;
                let needless = (at / SECTOR..end.div_ceil(SECTOR)).find(|&sector| !may[sector]);
                assert!(
                    !is_tight || needless.is_none(),
                    "sector {needless:?} of {extent:?} at {at}"
                );
            }
            _ => panic!("{extent:?}"),
        }
        at = end;
    }
    assert_eq!(at, newer.bytes.len());
    changed
}

fn map(server: &Server, mode: Mode, newer: &str, context: &str) -> Vec<Extent> {
    let mut peer: Peer = server.peer(mode, newer, &[context]);
    let size = peer.export.size;
    let map = peer.map(0, size);
    peer.disconnect();
    map
}

#[test]
fn parents_and_grandparents() {
    let server = Server::builder().archive(GRANDCHILD).archive(CHILD).start();
    let images: HashMap<&str, Image> =
        [BASE, CHILD, GRANDCHILD].into_iter().map(|name| (name, Image::open(name))).collect();
    for (newer, older) in [(CHILD, BASE), (GRANDCHILD, CHILD), (GRANDCHILD, BASE)] {
        let (new, old) = (&images[newer], &images[older]);
        let expected = map(&server, Mode::Extended, newer, &format!("hexz:changed:{older}"));
        let changed = check(&expected, new, old, true);
        let differing = differing_bytes(new, old);
        assert!(differing > 0 && changed >= differing);
        assert!(changed < IMAGE_SIZE as usize / 2, "{newer} against {older}: {changed} bytes");
        // The other namespace and the other mode say the same.
        for mode in Mode::CHUNKED {
            for namespace in ["hexz:changed", "qemu:dirty-bitmap"] {
                let context = format!("{namespace}:{older}");
                assert_eq!(map(&server, mode, newer, &context), expected, "{mode:?} {context}");
            }
        }
    }
}

/// Whichever way round: a snapshot that was named can be compared with the newer ones too.
#[test]
fn any_snapshot_that_was_named() {
    let names = [BASE, CHILD, GRANDCHILD, "sparse-zstd.hxz", "base-lz4.hxz", "signed-zstd.hxz"];
    let server =
        names.iter().fold(Server::builder(), |builder, name| builder.archive(name)).start();
    let images: HashMap<&str, Image> =
        names.into_iter().map(|name| (name, Image::open(name))).collect();
    for newer in names {
        for older in names {
            if newer == older {
                continue;
            }
            let map = map(&server, Mode::Extended, newer, &format!("hexz:changed:{older}"));
            check(&map, &images[newer], &images[older], true);
        }
    }
    // The same content, packed by another compression, has the same hashes.
    for (newer, older) in
        [(BASE, "base-lz4.hxz"), ("base-lz4.hxz", BASE), (BASE, "signed-zstd.hxz")]
    {
        let map = map(&server, Mode::Structured, newer, &format!("hexz:changed:{older}"));
        assert_eq!(map, [Extent { length: IMAGE_SIZE, flags: 0 }]);
    }
}

/// Other borders, or no hashes: changed where in doubt, never unchanged.
#[test]
fn what_can_not_be_known_is_changed() {
    let names = [BASE, "fixed-4k-zstd.hxz", "fixed-64k-zstd.hxz", "encrypted-zstd.hxz", GRANDCHILD];
    let server = names
        .iter()
        .fold(Server::builder(), |builder, name| builder.archive(name))
        .archive("text-dict-zstd.hxz")
        .env("HEXZ_PASSWORD", PASSWORD)
        .start();
    let images: HashMap<&str, Image> =
        names.into_iter().map(|name| (name, Image::open(name))).collect();
    for newer in names {
        for older in names.into_iter().filter(|older| *older != newer) {
            let map = map(&server, Mode::Structured, newer, &format!("hexz:changed:{older}"));
            check(&map, &images[newer], &images[older], false);
            // Zeros are known without hashes and whatever the borders.
            assert!(map.iter().any(|extent| extent.flags == 0), "{newer} {older}");
        }
    }
    // A smaller one: what it has nothing of has changed.
    let text = Image::open("text-dict-zstd.hxz");
    let map = map(&server, Mode::Extended, BASE, "hexz:changed:text-dict-zstd.hxz");
    check(&map, &images[BASE], &text, false);
    assert_eq!(map.last().unwrap().flags, 1);
}

/// Blocks that are nobody's multiple of anything: borders move outwards to sectors.
#[test]
fn odd_blocks() {
    let block = |seed, length| Piece::Data(noise(seed, length));
    let lengths = [1, 511, 512, 513, 700, 3000, 77, 4096, 1, 1, 5000, 999];
    let base: Vec<Piece> = (0..).zip(lengths).map(|(seed, length)| block(seed, length)).collect();
    for changed in 0..lengths.len() {
        let folder = tempfile::tempdir().unwrap();
        let main: Vec<Piece> = base
            .iter()
            .enumerate()
            .map(|(number, piece)| match number {
                number if number == changed => block(100, lengths[number]),
                _ => Piece::InParent(piece.bytes()),
            })
            .collect();
        let parent = ArchiveWriter { main: base.clone(), blocks_per_page: 3, ..Default::default() };
        parent.write().save(&folder.path().join("parent.hxz"));
        let child = ArchiveWriter {
            main,
            blocks_per_page: 5,
            parents: vec!["parent.hxz".into()],
            ..Default::default()
        };
        let path = folder.path().join("child.hxz");
        child.write().save(&path);
        let open = |name: &str| {
            Image::of(&Snapshot::open(&folder.path().join(name), &OpenOptions::default()).unwrap())
        };
        let server = Server::builder().arg(&path).start();
        let map = map(&server, Mode::Structured, "", "hexz:changed:parent.hxz");
        let reported = check(&map, &open("child.hxz"), &open("parent.hxz"), true);
        assert!(reported < lengths[changed] + 2 * SECTOR);

        // Asked for from any byte on, nothing becomes untrue.
        let mut peer = server.peer(Mode::Extended, "", &["hexz:changed:parent.hxz"]);
        let size = peer.export.size as usize;
        let start: usize = lengths[..changed].iter().sum();
        for at in [0, 1, start, start + lengths[changed] - 1, size - 1] {
            let outcome = peer.ask(Question::status(at as u64, (size - at) as u64));
            let mut end = at;
            for extent in outcome.extents(peer.ids[0]) {
                let begin = end;
                end += extent.length as usize;
                let touches = begin < start + lengths[changed] && start < end;
                assert!(extent.flags == 1 || !touches, "{extent:?} at {begin}");
            }
        }
    }
}

/// The auxiliary stream is compared with the other's auxiliary stream.
#[test]
fn auxiliary_streams() {
    let folder = tempfile::tempdir().unwrap();
    let piece = |seed| Piece::Data(noise(seed, 4096));
    let older = ArchiveWriter {
        main: vec![piece(1), piece(2)],
        auxiliary: vec![piece(3), piece(4)],
        ..Default::default()
    };
    let newer = ArchiveWriter {
        main: vec![piece(1), piece(5)],
        auxiliary: vec![piece(6), piece(4)],
        ..Default::default()
    };
    let paths = ["newer.hxz", "older.hxz"].map(|name| folder.path().join(name));
    newer.write().save(&paths[0]);
    older.write().save(&paths[1]);
    let server = Server::start(paths);
    let extent = |flags| Extent { length: 4096, flags };
    let map = |name: &str| map(&server, Mode::Extended, name, "hexz:changed:older.hxz");
    assert_eq!(map("newer.hxz"), [extent(0), extent(1)]);
    assert_eq!(map("newer.hxz/aux"), [extent(1), extent(0)]);
}
