//! What is so in every mode: simple replies, structured replies, extended headers.

use std::path::Path;

use super::{BASE, servers};
use crate::archive_writer::{ArchiveWriter, Piece};
use crate::support::client::{
    BLOCK_STATUS_PAYLOAD, CMD_BLOCK_STATUS, CMD_CACHE, CMD_FLUSH, CMD_TRIM, CMD_WRITE,
    CMD_WRITE_ZEROES, EINVAL, EOVERFLOW, EPERM, OPT_INFO, SEND_DF, TRANSMISSION_FLAGS, info_data,
};
use crate::support::server::Server;
use crate::support::structured::{CMD_FLAG_DF, CMD_FLAG_PAYLOAD_LEN, Mode, Question};
use crate::support::{IMAGE_SIZE, Random, image};

const MIB: u64 = 1 << 20;

/// An archive of 64 MiB, of which the first block and the last are data.
pub fn large(folder: &Path) -> Server {
    let mut main = vec![Piece::Zeros(MIB as u32); 62];
    main.insert(0, Piece::Data(image()[..MIB as usize].to_vec()));
    main.push(Piece::Data(image()[..MIB as usize].to_vec()));
    let path = folder.join("large.hxz");
    ArchiveWriter { main, ..ArchiveWriter::default() }.write().save(&path);
    Server::builder().arg(path).start()
}

/// "Transmission flags": "The server MUST NOT set the flag for features it does not
/// support." `NBD_FLAG_SEND_DF`: "MUST leave this flag clear if neither structured replies
/// nor extended headers have been negotiated." `NBD_FLAG_BLOCK_STATUS_PAYLOAD`: "MUST NOT
/// advertise this bit unless the client successfully negotiates extended headers …, and
/// SHOULD NOT … if the client does not negotiate metacontexts".
#[test]
fn flags_are_those_that_work() {
    const CONTEXTS: &[&str] = &["base:allocation"];
    let always = TRANSMISSION_FLAGS;
    for server in servers(BASE) {
        for (mode, contexts, flags) in [
            (Mode::Simple, &[][..], always),
            (Mode::Structured, &[], always | SEND_DF),
            (Mode::Structured, CONTEXTS, always | SEND_DF),
            (Mode::Extended, &[], always | SEND_DF),
            (Mode::Extended, CONTEXTS, always | SEND_DF | BLOCK_STATUS_PAYLOAD),
        ] {
            let mut peer = server.peer(mode, BASE, contexts);
            assert_eq!(peer.export.flags, flags, "{mode:?}");
            let mut works = |question| peer.ask(question).number() == 0;
            assert!(works(Question::new(CMD_FLUSH, 0, 0)));
            assert!(works(Question::new(CMD_CACHE, 0, 4096)));
            assert_eq!(works(Question::read(0, 512).flags(CMD_FLAG_DF)), flags & SEND_DF != 0);
            assert_eq!(works(Question::status(0, 4096)), !contexts.is_empty());
            // FUA, TRIM and WRITE_ZEROES aren't offered.
            assert!(!works(Question::read(0, 512).flags(1)));
            assert!(!works(Question::new(CMD_TRIM, 0, 4096)));
            assert!(!works(Question::new(CMD_WRITE_ZEROES, 0, 4096)));
        }
    }
}

/// The flags for contexts are those of the name that they were selected for.
#[test]
fn info_offers_the_payload_for_the_name_with_contexts() {
    let server = super::base();
    let mut client = server.greeted();
    Mode::Extended.negotiate(&mut client);
    let mut flags = |name: &str| {
        let replies = client.option(OPT_INFO, &info_data(name.as_bytes(), &[]));
        u16::from_be_bytes(replies[0].data[10..].try_into().unwrap())
    };
    assert_eq!(flags(BASE) & BLOCK_STATUS_PAYLOAD, 0);
    client.set_contexts(BASE, &["base:allocation"]);
    let mut flags = |name: &str| {
        let replies = client.option(OPT_INFO, &info_data(name.as_bytes(), &[]));
        u16::from_be_bytes(replies[0].data[10..].try_into().unwrap())
    };
    assert_ne!(flags(BASE) & BLOCK_STATUS_PAYLOAD, 0);
    assert_eq!(flags("") & BLOCK_STATUS_PAYLOAD, 0);
}

/// `NBD_CMD_READ`: the same bytes in every mode, whole and in pieces, one after another and
/// all at once.
#[test]
fn reads_are_the_same() {
    for server in servers("sparse-zstd.hxz") {
        for mode in Mode::ALL {
            let mut peer = server.peer(mode, "", &[]);
            let mut random = Random::new(77);
            let questions: Vec<Question> = (0..60)
                .map(|cookie| {
                    let offset = random.below(IMAGE_SIZE);
                    let length = random.below((IMAGE_SIZE - offset).min(300_000)) + 1;
                    let flags =
                        if cookie % 3 == 0 && mode != Mode::Simple { CMD_FLAG_DF } else { 0 };
                    Question::read(offset, length).flags(flags).cookie(u64::MAX - cookie)
                })
                .collect();
            let mut outcomes = peer.ask_all(&questions);
            for question in &questions {
                let data = outcomes.remove(&question.cookie).unwrap().ok();
                assert!(data == image()[question.offset as usize..][..question.length as usize]);
            }
            assert!(peer.read(0, IMAGE_SIZE) == image());
            peer.disconnect();
        }
    }
}

/// Of requests of length 0: "the behavior of a server on such a request is unspecified
/// although the server SHOULD NOT disconnect."
#[test]
fn empty_requests_are_answered() {
    for server in servers(BASE) {
        for mode in Mode::ALL {
            let mut peer = server.peer(mode, "", &[]);
            for offset in [0, 5, IMAGE_SIZE] {
                let outcome = peer.ask(Question::read(offset, 0));
                assert!(outcome.contents.is_empty());
                assert_eq!(outcome.ok(), b"");
            }
            for command in [CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS] {
                peer.ask(Question::new(command, 0, 0));
            }
            assert_eq!(peer.read(0, 10), image()[..10]);
        }
    }
}

/// "`NBD_EINVAL` if it receives a read … request including one or more sectors beyond the
/// size of the device"; whichever of offset and length is absurd.
#[test]
fn beyond_the_end() {
    for server in servers(BASE) {
        for mode in Mode::ALL {
            let contexts = if mode == Mode::Simple { &[][..] } else { &["base:allocation"] };
            let mut peer = server.peer(mode, "", contexts);
            let mut ranges = vec![
                (IMAGE_SIZE, 1),
                (IMAGE_SIZE - 1, 2),
                (IMAGE_SIZE + 1, 1),
                (1 << 63, 512),
                (u64::MAX, 1),
                (u64::MAX - 511, 512),
                (u64::MAX - 511, 513),
                // nbdkit CVE-2025-47711, -47712
                (0, 0xffff_ffff),
                (0, 0xffff_f000),
                (512, 0xffff_ffff),
            ];
            if mode == Mode::Extended {
                ranges.extend([
                    (0, 1 << 32),
                    (0, (1 << 32) + 512),
                    (0, 1 << 63),
                    (1, (1 << 63) - 1),
                    (0, u64::MAX),
                    (1, u64::MAX),
                    (u64::MAX, u64::MAX),
                ]);
            }
            for (offset, length) in ranges {
                for command in [0, CMD_CACHE, CMD_BLOCK_STATUS] {
                    let question = Question::new(command, offset, length);
                    assert_eq!(peer.ask(question).number(), EINVAL, "{mode:?} {question:?}");
                }
            }
            assert_eq!(peer.read(IMAGE_SIZE - 1, 1), image()[IMAGE_SIZE as usize - 1..]);
        }
        server.assert_alive();
    }
}

/// "The server SHOULD NOT return `NBD_EOVERFLOW` except as documented in response to
/// `NBD_CMD_READ` when `NBD_CMD_FLAG_DF` is supported, or when a command without payload
/// requests a length larger than an advertised maximum payload length."
#[test]
fn longer_than_the_maximum_payload() {
    let folder = tempfile::tempdir().unwrap();
    let server = large(folder.path());
    for mode in Mode::ALL {
        let error = if mode == Mode::Simple { EINVAL } else { EOVERFLOW };
        let mut peer = server.peer(mode, "", &[]);
        for (offset, length) in [(0, 32 * MIB + 1), (0, 64 * MIB), (31 * MIB, 33 * MIB)] {
            assert_eq!(peer.ask(Question::read(offset, length)).number(), error);
        }
        // The largest one is served, also unfragmented.
        for flags in [0, CMD_FLAG_DF] {
            let whole = peer.ask(Question::read(0, 32 * MIB).flags(flags));
            if mode == Mode::Simple && flags != 0 {
                assert_eq!(whole.number(), EINVAL);
                continue;
            }
            match (mode, flags) {
                (Mode::Simple, _) => {}
                (_, 0) => assert!(whole.contents.len() > 1),
                _ => assert_eq!(whole.contents.len(), 1),
            }
            let data = whole.ok();
            assert!(data[..MIB as usize] == image()[..MIB as usize]);
            assert!(data[MIB as usize..].iter().all(|&byte| byte == 0));
        }
        // Nothing is sent for a cache request, so it may be as long as the export.
        assert_eq!(peer.ask(Question::new(CMD_CACHE, 0, 64 * MIB)).number(), 0);
        peer.disconnect();
    }
}

/// "It also SHOULD return `NBD_EINVAL` if it receives a request with a flag not explicitly
/// documented as applicable to the given request."
#[test]
fn flags_that_do_not_apply() {
    for server in servers(BASE) {
        for mode in Mode::ALL {
            let contexts = if mode == Mode::Simple { &[][..] } else { &["base:allocation"] };
            let mut peer = server.peer(mode, "", contexts);
            for bit in 0..16 {
                let flag = 1 << bit;
                if flag == CMD_FLAG_PAYLOAD_LEN && mode == Mode::Extended {
                    continue;
                }
                for (command, offset, length) in [
                    (0, 0, 512),
                    (CMD_FLUSH, 0, 0),
                    (CMD_CACHE, 0, 512),
                    (CMD_BLOCK_STATUS, 0, 512),
                ] {
                    let applies = mode != Mode::Simple
                        && matches!((command, bit), (0, 2) | (CMD_BLOCK_STATUS, 3));
                    let question = Question::new(command, offset, length).flags(flag);
                    let expected = if applies { 0 } else { EINVAL };
                    assert_eq!(peer.ask(question).number(), expected, "{mode:?} {question:?}");
                }
            }
            assert_eq!(peer.read(0, 10), image()[..10]);
        }
    }
}

/// `NBD_CMD_CACHE`: "there MUST NOT be any difference in semantics compared to if the client
/// had not used this command"; it reads the archive ahead of the read.
#[test]
fn cache_warms_the_cache() {
    for mode in Mode::ALL {
        let server = super::base();
        // Whatever was read for the start has been read by now.
        let mut peer = server.peer(mode, "", &[]);
        let before = server.file_bytes_read();
        assert_eq!(peer.ask(Question::new(CMD_CACHE, 0, IMAGE_SIZE)).number(), 0);
        let cached = server.file_bytes_read() - before;
        assert!(cached > 100_000, "only {cached} bytes were read");

        let before = server.file_bytes_read();
        assert!(peer.read(0, IMAGE_SIZE) == image());
        let read = server.file_bytes_read() - before;
        assert!(read < 10_000, "{read} bytes were read again");
    }
}

/// "If this flag [`NBD_FLAG_READ_ONLY`] is set, the server MUST error subsequent write
/// operations"; the payload of a write is skipped.
#[test]
fn nothing_is_written() {
    for server in servers(BASE) {
        for mode in Mode::ALL {
            let mut peer = server.peer(mode, "", &[]);
            let flags = if mode == Mode::Extended { CMD_FLAG_PAYLOAD_LEN } else { 0 };
            // What is in the payload must not be taken for a request.
            let payload = Question::read(0, 512).cookie(0xbad).encode(mode).repeat(100);
            let write = Question::new(CMD_WRITE, 0, payload.len() as u64).flags(flags);
            let outcome = peer.ask_with(write, &payload);
            assert_eq!(outcome.number(), EPERM);
            for command in [CMD_TRIM, CMD_WRITE_ZEROES] {
                let long = if mode == Mode::Extended { 1 << 40 } else { 1 << 31 };
                for length in [0, 4096, long] {
                    assert_eq!(peer.ask(Question::new(command, 0, length)).number(), EPERM);
                }
            }
            assert_eq!(peer.read(0, 2000), image()[..2000]);
            peer.disconnect();
        }
    }
}

/// "The server SHOULD return `NBD_EINVAL` if it receives an unknown command."
#[test]
fn unknown_commands() {
    for server in servers(BASE) {
        for mode in Mode::ALL {
            let mut peer = server.peer(mode, "", &[]);
            for command in [8, 9, 99, 0x7fff, u16::MAX] {
                let question = Question::new(command, 0, 4096);
                assert_eq!(peer.ask(question).number(), EINVAL, "{command}");
            }
            assert_eq!(peer.read(0, 10), image()[..10]);
        }
    }
}
