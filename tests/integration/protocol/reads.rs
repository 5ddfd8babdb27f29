//! `NBD_CMD_READ`: every kind of range.

use super::{BASE, base, servers};
use crate::support::client::{CMD_FLUSH, EINVAL, Request};
use crate::support::server::Server;
use crate::support::{IMAGE_SHA256, IMAGE_SIZE, Random, image, sha256};

const END: u64 = IMAGE_SIZE;

/// "the server MUST … send … length bytes of data".
#[test]
fn ranges_of_every_kind() {
    for server in servers(BASE) {
        let mut client = server.go("");
        let image = image();
        let mut check = |offset: u64, length: u32| {
            let (from, to) = (offset as usize, offset as usize + length as usize);
            assert!(client.read_ok(offset, length) == image[from..to], "{length} at {offset}");
        };
        for (offset, length) in [(0, 1), (END - 1, 1), (0, 512), (END - 512, 512), (1, 4095)] {
            check(offset, length);
        }
        check(0, END as u32);
        let mut random = Random::new(1);
        for _ in 0..200 {
            let offset = random.below(END);
            let length = random.below((END - offset).min(300_000)) + 1;
            check(offset, length as u32);
        }
    }
}

/// Every flavour of archive reads as the image that was packed.
#[test]
fn the_whole_of_every_flavour() {
    for archive in ["base-lz4.hxz", "sparse-zstd.hxz", "fixed-64k-zstd.hxz", "signed-zstd.hxz"] {
        let server = Server::builder().archive(archive).start();
        let bytes = server.go("").read_ok(0, END as u32);
        assert_eq!(sha256(&bytes), IMAGE_SHA256, "{archive}");
    }
}

/// A read that crosses from one block into the next, with blocks of a known size.
#[test]
fn across_the_borders_of_blocks() {
    let server = Server::builder().archive("fixed-64k-zstd.hxz").start();
    let mut client = server.go("");
    let image = image();
    for border in (65_536..END).step_by(65_536) {
        let from = (border - 3) as usize;
        assert!(client.read_ok(border - 3, 7) == image[from..from + 7], "{border}");
    }
}

/// "The client SHOULD NOT request a read length of 0; the behavior of a server on such a
/// request is unspecified although the server SHOULD NOT disconnect."
#[test]
fn of_nothing() {
    for server in servers(BASE) {
        let mut client = server.go("");
        for offset in [0, 1, END - 1, END] {
            assert_eq!(client.read(offset, 0), Ok(Vec::new()));
        }
        assert_eq!(client.read(END + 1, 0), Err(EINVAL));
        client.read_ok(0, 1);
    }
}

/// "Error values": "The server SHOULD return `NBD_EINVAL` if it receives … a read or trim
/// request including one or more sectors beyond the size of the device."
#[test]
fn beyond_the_end() {
    for server in servers(BASE) {
        let mut client = server.go("");
        for (offset, length) in [
            (END, 1),
            (END - 1, 2),
            (0, END as u32 + 1),
            (END + 1, 1),
            (1 << 62, 4096),
            (1 << 63, 4096),
            (u64::MAX, 1),
            (u64::MAX - 511, 512),
            (u64::MAX - 511, 513),
            (u64::MAX, u32::MAX),
        ] {
            assert_eq!(client.read(offset, length), Err(EINVAL), "{length} at {offset}");
            assert_eq!(client.read_ok(END - 1, 1), image()[END as usize - 1..]);
        }
    }
}

/// "Size constraints": a request "larger than the maximum payload" gets `NBD_EINVAL` (or
/// `NBD_EOVERFLOW`), whatever the export's size.
#[test]
fn longer_than_the_maximum_payload() {
    let server = base();
    let mut client = server.go("");
    for length in [32 * 1024 * 1024 + 1, 1 << 30, u32::MAX] {
        assert_eq!(client.read(0, length), Err(EINVAL));
    }
    client.read_ok(0, 1);
}

/// "Command flags": "The server SHOULD return `NBD_EINVAL` if it receives an unknown
/// command flag", and for a flag whose feature was not negotiated.
#[test]
fn with_flags() {
    let server = base();
    let mut client = server.go("");
    for bit in 0..16 {
        let request = Request { flags: 1 << bit, ..Request::read(bit, 0, 512) };
        assert_eq!(client.request(request), EINVAL, "bit {bit}");
    }
    client.read_ok(0, 1);
}

/// `NBD_CMD_FLUSH`: "length and offset are reserved, and MUST be set to all-zero."
#[test]
fn flush() {
    for server in servers(BASE) {
        let mut client = server.go("");
        let flush = Request { command: CMD_FLUSH, cookie: 7, ..Request::default() };
        assert_eq!(client.request(flush), 0);
        assert_eq!(client.request(Request { offset: 1, ..flush }), EINVAL);
        assert_eq!(client.request(Request { length: 1, ..flush }), EINVAL);
        assert_eq!(client.request(Request { flags: 0x40, ..flush }), EINVAL);
        client.read_ok(0, 1);
    }
}

/// A stream has no packets: where a request is cut makes no difference.
#[test]
fn requests_in_single_bytes() {
    for server in servers(BASE) {
        let mut client = server.go("");
        for cookie in 0..5 {
            for byte in Request::read(cookie, 100 * cookie, 100).encode() {
                client.send(&[byte]);
            }
        }
        // Replies may come in any order; small ones from one block come as they like.
        let mut seen = [false; 5];
        for _ in 0..5 {
            let reply = client.simple_reply();
            assert_eq!(reply.error, 0);
            let from = 100 * reply.cookie as usize;
            assert_eq!(client.receive(100), image()[from..from + 100]);
            assert!(!std::mem::replace(&mut seen[reply.cookie as usize], true));
        }
    }
}
