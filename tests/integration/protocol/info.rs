//! `NBD_OPT_INFO` and `NBD_OPT_GO`.

use super::{BASE, base, servers};
use crate::support::client::{
    INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT, INFO_NAME, OPT_ABORT, OPT_GO, OPT_INFO,
    OptionReply, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_INFO, TRANSMISSION_FLAGS, ack, info_data,
    option,
};
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, image};

/// Options other than STARTTLS and ABORT have the same answer from INFO and from GO.
const BOTH: [u32; 2] = [OPT_INFO, OPT_GO];

fn kinds(replies: &[OptionReply]) -> Vec<u16> {
    let kind = |reply: &OptionReply| u16::from_be_bytes([reply.data[0], reply.data[1]]);
    replies.iter().filter(|reply| reply.kind == REP_INFO).map(kind).collect()
}

/// "the server MUST send at least one `NBD_REP_INFO`, with an `NBD_INFO_EXPORT`
/// information type." `NBD_INFO_EXPORT`: "64 bits, size of the export in bytes; 16 bits,
/// transmission flags"; "length MUST be 12".
#[test]
fn the_export_is_described_without_being_asked_for() {
    for server in servers(BASE) {
        for number in BOTH {
            for wanted in [&[][..], &[INFO_EXPORT]] {
                let mut client = server.greeted();
                let replies = client.option(number, &info_data(BASE.as_bytes(), wanted));
                let mut data = INFO_EXPORT.to_be_bytes().to_vec();
                data.extend(IMAGE_SIZE.to_be_bytes());
                data.extend(TRANSMISSION_FLAGS.to_be_bytes());
                assert_eq!(replies, [OptionReply { kind: REP_INFO, data }, ack()]);
            }
        }
    }
}

/// `NBD_INFO_NAME`, `NBD_INFO_DESCRIPTION`: "String"; `NBD_INFO_BLOCK_SIZE`: "32 bits,
/// minimum; preferred; maximum".
#[test]
fn each_kind_of_information() {
    let server = base();
    let mut client = server.greeted();
    let mut info = |kind: u16| {
        let replies = client.option(OPT_INFO, &info_data(b"", &[kind]));
        assert_eq!(kinds(&replies), [INFO_EXPORT, kind]);
        assert_eq!(replies[2], ack());
        replies[1].data[2..].to_vec()
    };
    assert_eq!(info(INFO_NAME), BASE.as_bytes());
    let description = String::from_utf8(info(INFO_DESCRIPTION)).unwrap();
    assert!(description.starts_with("main stream, 8.0 MiB, Zstandard"), "{description}");
    assert_eq!(info(INFO_BLOCK_SIZE).len(), 12);
}

/// "Size constraints": the minimum is a power of two, the preferred size a power of two of
/// at least 512, the maximum payload at least as large as both.
#[test]
fn size_constraints_follow_the_archive() {
    for (archive, preferred) in [("fixed-64k-zstd.hxz", 65536_u32), ("fixed-4k-zstd.hxz", 4096)] {
        let server = Server::builder().archive(archive).start();
        let data = info_data(b"", &[INFO_BLOCK_SIZE]);
        let replies = server.greeted().option(OPT_GO, &data);
        let mut expected = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, preferred, 32 * 1024 * 1024] {
            expected.extend(size.to_be_bytes());
        }
        assert_eq!(replies[1].data, expected);
    }
}

/// "The server MUST ignore any information requests it does not understand."
#[test]
fn unknown_information_is_ignored() {
    for server in servers(BASE) {
        for number in BOTH {
            let wanted = [4, INFO_NAME, 99, 0x8000, u16::MAX, INFO_BLOCK_SIZE, INFO_DESCRIPTION];
            let mut client = server.greeted();
            let replies = client.option(number, &info_data(b"", &wanted));
            let mut kinds = kinds(&replies);
            kinds.sort_unstable();
            assert_eq!(kinds, [INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE]);
        }
    }
}

/// "If there are no intervening option requests between a successful `NBD_OPT_INFO` … and
/// an `NBD_OPT_GO` with the same parameters, the server MUST reply with the same set".
#[test]
fn go_says_the_same_as_info() {
    let server = base();
    let mut client = server.greeted();
    let data = info_data(b"", &[INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION]);
    let info = client.option(OPT_INFO, &data);
    assert_eq!(client.option(OPT_GO, &data), info);
    client.read_ok(0, 1);
}

/// "`NBD_REP_ERR_UNKNOWN`: The chosen export does not exist on this server. In this case,
/// the server SHOULD NOT send `NBD_REP_INFO` replies."
#[test]
fn an_unknown_export_is_unknown() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        for number in BOTH {
            for name in ["nothing", "base-zstd.hx", "base-zstd.hxz/", "BASE-ZSTD.HXZ", "/"] {
                let data = info_data(name.as_bytes(), &[INFO_NAME]);
                let text = client.refused(number, &data, REP_ERR_UNKNOWN);
                assert!(text.contains(name), "{text}");
            }
            client.refused(number, &info_data(b"\xff\xfe", &[]), REP_ERR_UNKNOWN);
        }
        client.go(BASE);
        client.read_ok(0, 1);
    }
}

/// The second export is another one: its own size, its own bytes.
#[test]
fn every_export_has_its_name() {
    let server = Server::builder().archive("aux-lz4.hxz").arg("--raw").start();
    for (name, size) in [("", 27), ("aux-lz4.hxz", 27), ("aux-lz4.hxz/aux", 70_000)] {
        let mut client = server.greeted();
        assert_eq!(client.go(name).size, size);
        let bytes = client.read_ok(0, size as u32);
        assert_eq!(bytes == image()[..bytes.len()], name.ends_with("/aux"));
    }
}

/// "32 bits, length of name (unsigned); MUST be no larger than the option data length -
/// 6", and the numbers must add up. `NBD_REP_ERR_INVALID`: "the option sent by the client
/// is known by this server, but was determined by the server to be syntactically or
/// semantically invalid".
///
/// qemu-nbd 7.2, 10.0 | bytes left over … that look like an option abort the server
#[test]
fn malformed_requests_are_invalid() {
    let good = info_data(b"abcd", &[INFO_NAME]);
    let mut malformed: Vec<Vec<u8>> = (0..good.len()).map(|end| good[..end].to_vec()).collect();
    malformed.push([&good[..], b"\0"].concat());
    malformed.push([&good[..], b"\0\x01"].concat());
    // Bytes left over that are themselves an option.
    malformed.push([&good[..], &option(OPT_ABORT, b"")].concat());
    malformed.push([&good[..], &option(OPT_GO, &info_data(b"", &[]))].concat());
    for server in servers(BASE) {
        let mut client = server.greeted();
        for number in BOTH {
            for data in &malformed {
                client.refused(number, data, REP_ERR_INVALID);
            }
        }
        assert_eq!(client.list(), [BASE]);
        client.go(BASE);
    }
}
