//! Everything that would change the export, and everything that isn't understood.

use super::{BASE, servers};
use crate::support::client::{
    CMD_BLOCK_STATUS, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EINVAL, EPERM, REQUEST_MAGIC, Request,
};
use crate::support::image;

/// "Transmission flags": `NBD_FLAG_READ_ONLY`: "the server MUST error subsequent write
/// operations". Its payload "is on the wire" all the same.
///
/// nbdkit 1.32 | the payload of a refused WRITE is skipped on the raw socket under TLS
#[test]
fn a_write_is_not_permitted_and_its_payload_is_skipped() {
    for server in servers(BASE) {
        let mut client = server.go("");
        for (cookie, length) in [0, 1, 511, 4096, 65_536, 1_000_003].into_iter().enumerate() {
            // A payload that is itself requests: it must not be taken for them.
            let payload = Request::read(0xbad, 0, 512).encode().repeat(length / 28 + 1);
            for flags in [0, 1] {
                let write = Request {
                    command: CMD_WRITE,
                    flags,
                    cookie: cookie as u64,
                    offset: 0,
                    length: length as u32,
                };
                client.send(&[&write.encode(), &payload[..length]].concat());
                let reply = client.simple_reply();
                assert_eq!((reply.error, reply.cookie), (EPERM, cookie as u64));
                assert_eq!(client.read_ok(512, 512), image()[512..1024]);
            }
        }
    }
}

/// The largest payload is skipped too; what is longer isn't worth it, and closes: "If
/// either … detects a violation of a mandatory condition …, it MAY initiate a hard
/// disconnect."
#[test]
fn a_write_beyond_the_maximum_payload_closes() {
    for server in servers(BASE) {
        let mut client = server.go("");
        let mut write = Request { command: CMD_WRITE, length: 32 << 20, ..Request::default() };
        client.send_request(write);
        let piece = [0; 64 * 1024];
        (0..32 << 4).for_each(|_| client.send(&piece));
        assert_eq!(client.simple_reply().error, EPERM);

        write.length += 1;
        client.send_request(write);
        client.expect_closed();
        server.assert_alive();
    }
}

/// "`NBD_EPERM`: … a write request … to a read-only export", with and without flags.
#[test]
fn trim_and_write_zeroes_are_not_permitted() {
    for server in servers(BASE) {
        let mut client = server.go("");
        for command in [CMD_TRIM, CMD_WRITE_ZEROES] {
            for (offset, length) in [(0, 0), (0, 4096), (0, u32::MAX), (u64::MAX, u32::MAX)] {
                let request = Request { command, offset, length, cookie: 9, flags: 0 };
                assert_eq!(client.request(request), EPERM);
            }
        }
        client.read_ok(0, 1);
    }
}

/// "The server SHOULD return `NBD_EINVAL` if it receives an unknown command." BLOCK_STATUS
/// needs a metadata context, which this client has not.
#[test]
fn unknown_commands_are_invalid() {
    for server in servers(BASE) {
        let mut client = server.go("");
        for command in [CMD_BLOCK_STATUS, 8, 9, 99, 0x7fff, u16::MAX] {
            for flags in [0, 1, u16::MAX] {
                let request = Request { flags, command, cookie: u64::MAX, offset: 0, length: 4096 };
                assert_eq!(client.request(request), EINVAL, "{command}");
            }
        }
        client.read_ok(0, 1);
    }
}

/// "Request message": a request begins with its magic number; without it the stream is out
/// of step, and nothing behind it can be trusted.
#[test]
fn a_wrong_request_magic_closes() {
    for server in servers(BASE) {
        for magic in [0, REQUEST_MAGIC ^ 1, REQUEST_MAGIC.swap_bytes(), 0x2560_9514, 0x21e4_1c71] {
            let mut request = Request::read(1, 0, 512).encode();
            request[..4].copy_from_slice(&magic.to_be_bytes());
            let mut client = server.go("");
            client.send(&request);
            client.expect_closed();
        }
        server.assert_alive();
    }
}
