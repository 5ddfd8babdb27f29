//! Archives with a part that can't be trusted.

use std::os::unix::fs::FileExt;

use crate::support::client::{EIO, Request};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};
use crate::support::{IMAGE_SIZE, archive, image};

const BLOCK: u32 = 65_536;

/// A copy of an archive, with one byte changed among the stored blocks.
fn damaged(folder: &tempfile::TempDir) -> Builder {
    /// Where the blocks begin: behind the header.
    const BLOCKS: u64 = 4096;
    let path = folder.path().join("damaged.hxz");
    std::fs::copy(archive("fixed-64k-zstd.hxz"), &path).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    let at = BLOCKS + 30;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    Server::builder().arg(path)
}

/// libnbd CVE-2022-0485 | copying ignores read errors: the server's part is an error reply,
/// and a stream that stays in step
/// hexz-server 0.8.2 | payload sent behind an error reply
#[test]
fn an_unreadable_block_is_an_error_and_the_others_are_read() {
    let folder = tempfile::tempdir().unwrap();
    for server in [damaged(&folder).start(), damaged(&folder).tls(Pki::new()).start()] {
        let mut client = server.go("");
        let mut bad = Vec::new();
        for offset in (0..IMAGE_SIZE).step_by(BLOCK as usize) {
            // Another reply, or a payload behind this one, would be out of step.
            match client.read(offset, BLOCK) {
                Ok(data) => assert!(data == image()[offset as usize..][..BLOCK as usize]),
                Err(error) => {
                    assert_eq!(error, EIO);
                    bad.push(offset);
                }
            }
        }
        assert_eq!(bad.len(), 1, "one block was damaged: {bad:?}");
        // Also as a part of a longer request, and again: never zeros, never what was read
        // before the fault was found.
        for _ in 0..2 {
            assert_eq!(client.read(0, IMAGE_SIZE as u32), Err(EIO));
            assert_eq!(client.read(bad[0] + 1, 1), Err(EIO));
            assert_eq!(client.read(bad[0], 0), Ok(Vec::new()));
        }
        let line = server.wait_for_reason("crc");
        assert_eq!(line.json["level"], "ERROR");
        assert!(line.text.contains("damaged.hxz"), "{}", line.text);
        client.disconnect();
    }
}

/// Good and bad ones in flight together.
#[test]
fn errors_and_data_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let server = damaged(&folder).start();
    let mut client = server.go("");
    let blocks = IMAGE_SIZE / u64::from(BLOCK);
    let requests: Vec<u8> = (0..blocks)
        .flat_map(|block| Request::read(block, block * u64::from(BLOCK), BLOCK).encode())
        .collect();
    client.send(&requests);
    let mut bad = 0;
    for _ in 0..blocks {
        let reply = client.simple_reply();
        if reply.error == 0 {
            let from = reply.cookie as usize * BLOCK as usize;
            assert!(client.receive(BLOCK as usize) == image()[from..from + BLOCK as usize]);
        } else {
            assert_eq!(reply.error, EIO);
            bad += 1;
        }
    }
    assert_eq!(bad, 1);
    client.disconnect();
}

/// What a client can cause at will must not fill the disk with our log.
#[test]
fn the_log_does_not_grow_with_every_failed_read() {
    let folder = tempfile::tempdir().unwrap();
    let server = damaged(&folder).start();
    let mut client = server.go("");
    for _ in 0..200 {
        assert_eq!(client.read(0, IMAGE_SIZE as u32), Err(EIO));
    }
    let lines = server.log().len();
    assert!(lines < 100, "{lines} lines");
}
