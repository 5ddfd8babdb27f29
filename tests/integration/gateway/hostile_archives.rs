//! Archives that were made to hurt, behind the real server.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use crate::archive_writer::{
    ArchiveWriter, PASSWORD, Piece, Written, block_entry, noise, page_entry, text,
};
use crate::support::client::{EIO, Request};
use crate::support::server::{Builder, Server};

const BLOCK: u32 = 65_536;

fn saved(archives: &[(&str, &Written)]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    for (name, archive) in archives {
        archive.save(&folder.path().join(name));
    }
    let first = folder.path().join(archives[0].0);
    (folder, first)
}

/// It gave the child zeros, and whoever else asked for the block with that hash.
#[test]
fn a_parents_zeros_with_another_hash_are_an_error_and_not_cached() {
    let block = text(1, BLOCK as usize);
    let hash = *blake3::hash(&block).as_bytes();
    let mut parent =
        ArchiveWriter { main: vec![Piece::Zeros(BLOCK)], ..ArchiveWriter::default() }.write();
    parent.put(parent.main[0].blocks[0].entry + block_entry::HASH, &hash);
    let child = ArchiveWriter {
        parents: vec!["parent.hxz".into()],
        main: vec![Piece::InParent(block.clone())],
        ..ArchiveWriter::default()
    };
    let honest = ArchiveWriter::of_image(&block, BLOCK as usize).write();
    let (folder, child) =
        saved(&[("child.hxz", &child.write()), ("parent.hxz", &parent), ("honest.hxz", &honest)]);
    let server = Server::start([child, folder.path().join("honest.hxz")]);
    let mut client = server.go("child.hxz");
    for _ in 0..2 {
        assert_eq!(client.read(0, BLOCK), Err(EIO));
        assert_eq!(client.read(100, 16), Err(EIO));
    }
    let mut other = server.go("honest.hxz");
    assert!(other.read_ok(0, BLOCK) == block);
    // What the honest archive has put into the cache is right for the child as well.
    assert!(matches!(client.read(0, BLOCK), Ok(data) if data == block));
}

/// 8192 references to one page of 4096 blocks made 32 million blocks out of 450 kB.
#[test]
fn pages_that_share_bytes_are_refused() {
    let main = vec![Piece::Data(b"A".to_vec()); 40];
    let written = ArchiveWriter { main, blocks_per_page: 10, ..ArchiveWriter::default() }.write();
    let (_folder, path) = saved(&[("shared.hxz", &written)]);
    Server::start([&path]).assert_alive();
    let first = written.main[0].place.start;
    for offset in [first, first + 1, first + written.main[0].place.len() - 1] {
        let mut shared = written.clone();
        for page in &written.main[1..] {
            let at = page.entry + page_entry::OFFSET;
            shared.put(at, &(offset as u64).to_le_bytes());
        }
        shared.save(&path);
        let (code, stderr) = Server::builder().arg(&path).fail();
        assert_eq!(code, 3);
        assert!(stderr.contains("\"invalid\""), "{stderr}");
    }
}

/// So many blocks of so many bytes, on pages of their own.
fn tiny_blocks(count: usize, size: impl Fn(usize) -> usize) -> Vec<Piece> {
    (0..count).map(|number| Piece::Data(vec![number as u8 | 1; size(number)])).collect()
}

/// Says that a thread has ended, be it by a failure.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A read of 8 MiB took 12 GB, and all the time of the decoders.
#[test]
fn reads_over_tiny_blocks_are_bounded_and_others_are_served_meanwhile() {
    const GROWTH_KIB: u64 = 150 * 1024;
    let bytes = tiny_blocks(200_000, |number| number % 64 + 1);
    let image = crate::archive_writer::image(&bytes);
    let zeros: Vec<_> = (0..200_000).map(|number| Piece::Zeros(number % 64 + 1)).collect();
    let archive =
        ArchiveWriter { main: bytes, auxiliary: zeros, hashed: false, ..ArchiveWriter::default() };
    let other = ArchiveWriter::of_image(&noise(3, 40 * BLOCK as usize), BLOCK as usize);
    let (folder, path) = saved(&[("tiny.hxz", &archive.write()), ("other.hxz", &other.write())]);
    let server = Server::start([path, folder.path().join("other.hxz")]);
    let before = server.peak_rss_kib();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _done = SetOnDrop(&done);
            let mut reader = server.go("tiny.hxz");
            // More blocks than one read need have, twice; then as many as it may.
            for _ in 0..2 {
                match reader.read(0, image.len() as u32) {
                    Ok(data) => assert!(data == image),
                    Err(error) => assert_eq!(error, EIO),
                }
            }
            for at in [0, image.len() / 2] {
                let part = 40_000 * 32;
                assert!(reader.read_ok(at as u64, part as u32) == image[at..at + part]);
            }
            // Many at once.
            let requests: Vec<u8> = (0..8)
                .flat_map(|cookie| Request::read(cookie, 7 * cookie, 200_000).encode())
                .collect();
            reader.send(&requests);
            for _ in 0..8 {
                let reply = reader.simple_reply();
                assert_eq!(reply.error, 0);
                let from = 7 * reply.cookie as usize;
                assert!(reader.receive(200_000) == image[from..from + 200_000]);
            }
            let mut zeros = server.go("tiny.hxz/aux");
            match zeros.read(0, image.len() as u32) {
                Ok(data) => assert!(data.iter().all(|byte| *byte == 0)),
                Err(error) => assert_eq!(error, EIO),
            }
        });
        let mut client = server.go("other.hxz");
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) || rounds < 4 {
            let at = rounds % 40 * BLOCK as usize;
            assert!(
                client.read_ok(at as u64, BLOCK) == noise(3, 40 * BLOCK as usize)[at..][..65_536]
            );
            rounds += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let growth = server.peak_rss_kib().saturating_sub(before);
    assert!(growth < GROWTH_KIB, "{growth} KiB");
}

/// What it takes to try a password on an archive whose own blocks come late.
fn encrypted(pages: usize) -> Builder {
    let mut main = vec![Piece::Zeros(1); pages];
    main.push(Piece::Data(text(5, 1000)));
    let archive = ArchiveWriter {
        password: Some(PASSWORD),
        main,
        blocks_per_page: 1,
        ..ArchiveWriter::default()
    };
    let (folder, path) = saved(&[("late.hxz", &archive.write())]);
    // It is opened once, at the start.
    let _ = folder.keep();
    Server::builder().arg(path)
}

/// Nothing was said, and all reads failed.
#[test]
fn a_password_that_could_not_be_tried_is_warned_of() {
    const SEARCHED: usize = 256;
    let warned = "password_not_verified";
    let server = encrypted(SEARCHED).env("HEXZ_PASSWORD", "wrong").start();
    assert_eq!(server.wait_for_reason(warned).json["level"], "WARN");
    assert_eq!(server.go("").read(SEARCHED as u64, 10), Err(EIO));
    // A block that is just near enough is tried.
    let (code, stderr) = encrypted(SEARCHED - 1).env("HEXZ_PASSWORD", "wrong").fail();
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("password"), "{stderr}");
    let server = encrypted(SEARCHED - 1).env("HEXZ_PASSWORD", PASSWORD).start();
    assert!(server.go("").read_ok(SEARCHED as u64 - 1, 1000) == text(5, 1000));
    assert!(!server.log_text().contains(warned));
}
