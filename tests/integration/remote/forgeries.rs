//! Stores, caches and mirrors that serve other bytes than they should.

use object_server::{Behavior, ObjectServer, Rule, Script};

use super::{
    BLOCK, MIB, Sample, WEB, gateway, gateway_of, noise, other_sample, sample, store, tree_of,
};
use crate::archive_writer::{ArchiveWriter, Piece};
use crate::support::client::EIO;
use crate::support::server::{Builder, Server};

/// A server with the sample and its tree, and a gateway that knows the digest.
fn with_digest() -> (ObjectServer, Builder) {
    let store = store();
    store.put("images/web.hxz.tree", tree_of(sample()));
    let builder = gateway_of(&store).arg("--digest").arg(sample().digest("web.hxz"));
    (store, builder.args(["--store-timeout", "5s"]))
}

/// Where a block is stored in the sample's archive.
fn stored_at(block: usize) -> u64 {
    sample().archive.main[0].blocks[block].stored.start as u64 + 9
}

/// Checks that each block is read right, or not at all. Returns how many aren't read.
fn unreadable(server: &Server) -> usize {
    unreadable_of(server, BLOCK)
}

/// The same of a block in each `step` bytes.
fn unreadable_of(server: &Server, step: u64) -> usize {
    let mut client = server.go("");
    let offsets = (0..sample().image.len() as u64).step_by(step as usize);
    let failed = offsets.filter(|&offset| match client.read(offset, BLOCK as u32) {
        Ok(bytes) => {
            assert!(bytes == sample().part(offset, BLOCK), "wrong bytes at {offset}");
            false
        }
        Err(error) => {
            assert_eq!(error, EIO);
            true
        }
    });
    failed.count()
}

/// Without a digest, each block's checksum and hash are checked against the index.
#[test]
fn a_forged_block_without_a_digest() {
    let store = store();
    store.set_script(Script::always(Behavior::new().flip_bit(stored_at(70))));
    let server = gateway_of(&store).start();
    assert_eq!(unreadable(&server), 1);
    server.wait_for_reason("crc");
}

/// The checksum is right, since whoever forges the block forges that too.
#[test]
fn a_forged_block_with_its_checksum() {
    let image = noise(9, 4 * BLOCK as usize);
    let mut writer = ArchiveWriter::of_image(&image, BLOCK as usize);
    let other = noise(10, BLOCK as usize);
    writer.main[2] = Piece::Raw {
        stored: zstd::bulk::compress(&other, 3).unwrap(),
        length: BLOCK as u32,
        hash: *blake3::hash(&image[2 * BLOCK as usize..3 * BLOCK as usize]).as_bytes(),
    };
    let store = ObjectServer::builder().start().unwrap();
    store.put(WEB, writer.write().bytes);
    let server = gateway_of(&store).start();
    let mut client = server.go("");
    assert_eq!(client.read(2 * BLOCK, 512), Err(EIO));
    server.wait_for_reason("hash");
    assert!(client.read_ok(BLOCK, 512) == image[BLOCK as usize..][..512]);
}

#[test]
fn a_digest_and_a_tree_need_few_requests() {
    let (store, builder) = with_digest();
    let server = builder.start();
    let totals = store.log().totals();
    // The ends of the archive, and the whole tree.
    assert!(totals.data_bytes < MIB, "{totals:?}");
    assert_eq!(totals.requests, 3, "{:#?}", store.log().entries());
    assert_eq!(unreadable(&server), 0);
    assert!(!server.has_reason("tree_unusable"));
}

#[test]
fn a_flipped_bit_in_a_block() {
    let (store, builder) = with_digest();
    store.set_script(Script::always(Behavior::new().flip_bit(stored_at(70))));
    let server = builder.start();
    let failed = unreadable(&server);
    // All that overlap with the chunk of 256 KiB.
    assert!((1..=6).contains(&failed), "{failed}");
    server.wait_for_reason("changed");
    // It was fetched once more, past caches.
    let requests = store.log().entries_for("web.hxz");
    let bypasses = requests.iter().filter(|request| request.header("cache-control").is_some());
    assert!(bypasses.count() >= 1);
}

/// It stays wrong: that must cost neither traffic nor a log line for each read.
#[test]
fn reads_of_a_wrong_part_are_few_requests_and_log_lines() {
    let (store, builder) = with_digest();
    let server = builder.start();
    store.set_script(Script::always(Behavior::new().flip_bit(stored_at(70))));
    let mut client = server.go("");
    store.log().clear();
    let begin = std::time::Instant::now();
    for _ in 0..500 {
        assert_eq!(client.read(70 * BLOCK, 512), Err(EIO));
    }
    // Two requests each time that it is tried.
    let tries = begin.elapsed().as_secs() / 10 + 1;
    let requests = store.log().totals().requests as u64;
    assert!((2..=2 * tries).contains(&requests), "{requests} in {:?}", begin.elapsed());
    let lines = server.log().iter().filter(|line| line.reason() == "wrong_bytes").count() as u64;
    assert!((1..=tries).contains(&lines), "{lines}");
}

#[test]
fn a_flipped_bit_in_an_index_page() {
    let (store, builder) = with_digest();
    let page = &sample().archive.main[0];
    store.set_script(Script::always(Behavior::new().flip_bit(page.blocks[70].entry as u64)));
    // The page is in the chunk of the master index, so the archive can't be opened.
    builder.arg("--strict").fails_with(3, "changed");
}

/// The page and a block are forged so that they match. Only the digest can tell.
#[test]
fn a_block_and_its_index_page() {
    let forged = {
        let mut writer = ArchiveWriter::of_image(&sample().image, BLOCK as usize);
        writer.main[70] = Piece::Data(noise(11, BLOCK as usize));
        writer.write().bytes
    };
    let store = store();
    store.set_script(Script::always(Behavior::new().forge(0, forged.clone())));
    let server = gateway_of(&store).start();
    let read = server.go("").read_ok(70 * BLOCK, 512);
    assert!(read != sample().part(70 * BLOCK, 512), "without a digest, the store is trusted");

    let (store, builder) = with_digest();
    store.set_script(Script::new().rule(Rule::new(Behavior::new().forge(0, forged)).skip(4)));
    let server = builder.start();
    assert!(unreadable(&server) > 0);
    server.wait_for_reason("changed");
}

/// Another archive's bytes, or an old version's, of the same length and with the same tag.
#[test]
fn the_bytes_of_another_object() {
    let (store, builder) = with_digest();
    let others = Behavior::new().forge(0, other_sample().bytes());
    store.set_script(Script::new().rule(Rule::new(others.clone()).skip(4)));
    let server = builder.start();
    // The first and the last one were fetched before.
    assert!(unreadable_of(&server, MIB / 2) >= 14);
    server.wait_for_reason("changed");

    let (store, builder) = with_digest();
    store.set_script(Script::new().rule(Rule::new(others).ranged(true)));
    let (code, error) = builder.arg("--strict").fail();
    assert_eq!(code, 3, "{error}");
}

/// The whole object is another one: with the tree of the right one, and with its own.
#[test]
fn another_version() {
    for tree in [tree_of(sample()), tree_of(other_sample())] {
        let (store, builder) = with_digest();
        store.put(WEB, other_sample().bytes());
        store.put("images/web.hxz.tree", tree);
        let (code, error) = builder.arg("--strict").fail();
        assert_eq!(code, 3, "{error}");
        assert!(error.contains("\"digest\"") || error.contains("\"changed\""), "{error}");
    }
}

/// Without a tree, all of the archive is fetched when it is opened.
#[test]
fn a_missing_tree_is_reported() {
    let (store, builder) = with_digest();
    store.remove("images/web.hxz.tree");
    let server = builder.start();
    let line = server.wait_for_reason("tree_missing");
    assert!(line.message().contains("hexz-nbd tree"), "{}", line.text);
    assert_eq!(unreadable(&server), 0);
    let (_store, builder) = with_digest();
    assert!(!builder.start().has_reason("tree_missing"));
}

/// A tree that isn't that of the digest is of no use: the archive is hashed instead.
#[test]
fn a_forged_tree() {
    let mut flipped = tree_of(sample());
    *flipped.last_mut().unwrap() ^= 1;
    let short = tree_of(sample())[..100].to_vec();
    for tree in [flipped, tree_of(other_sample()), short, Vec::new(), vec![0; 100_000]] {
        let (store, builder) = with_digest();
        store.put("images/web.hxz.tree", tree);
        let server = builder.start();
        server.wait_for_reason("tree_unusable");
        assert_eq!(unreadable(&server), 0);
        drop(server);
        // It fits neither, if the archive is forged too.
        let (store, builder) = with_digest();
        store.put("images/web.hxz.tree", "nothing");
        store.set_script(Script::always(Behavior::new().flip_bit(stored_at(70))));
        builder.arg("--strict").fails_with(3, "digest");
    }
}

/// A cache between the gateway and the store has wrong bytes. With `Cache-Control: no-cache`, the
/// store is asked.
#[test]
fn a_bad_cache_is_bypassed() {
    let (store, builder) = with_digest();
    store.set_script(Script::from_fn(|request| {
        let bypasses = request.header("cache-control").is_some_and(|it| it.contains("no-cache"));
        let is_archive = request.path.ends_with(".hxz");
        match is_archive && !bypasses {
            true => Behavior::new().flip_bit(stored_at(20)).flip_bit(stored_at(70)),
            false => Behavior::new(),
        }
    }));
    let server = builder.start();
    assert_eq!(unreadable(&server), 0);
    assert!(
        !server.log().iter().any(|line| line.json["level"] == "ERROR"),
        "{}",
        server.log_text()
    );
}

/// Each of many chunks is forged, one after another, in each of them another way.
#[test]
fn whatever_is_forged_is_noticed() {
    let small = Sample::new(3, MIB);
    let store = ObjectServer::builder().start().unwrap();
    store.put(WEB, small.bytes());
    store.put("images/web.hxz.tree", tree_of(&small));
    let length = small.archive.bytes.len() as u64;
    let mut random = crate::support::Random::new(4);
    for _ in 0..12 {
        let at = random.below(length);
        let forged = Behavior::new().forge(at, random.bytes(1 + (at % 2000) as usize));
        let is_archive = Rule::new(forged).path("web.hxz").skip(random.below(4));
        store.set_script(Script::new().rule(is_archive));
        let digest = small.digest("web.hxz");
        let args = ["--store-timeout", "2s", "--export-dir", &store.url("images/")];
        let server = gateway().args(args).arg("--digest").arg(digest).start();
        if !super::has_export(&server, "web.hxz") {
            continue;
        }
        let mut client = server.go("web.hxz");
        for offset in (0..MIB).step_by(BLOCK as usize) {
            match client.read(offset, BLOCK as u32) {
                Ok(bytes) => assert!(bytes == small.part(offset, BLOCK), "forged at {at}"),
                Err(error) => assert_eq!(error, EIO),
            }
        }
    }
}
