//! `NBD_CMD_BLOCK_STATUS`, `base:allocation`.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{BASE, base, servers};
use crate::archive_writer::{ArchiveWriter, Piece};
use crate::support::client::EINVAL;
use crate::support::server::Server;
use crate::support::structured::{
    CMD_FLAG_PAYLOAD_LEN, CMD_FLAG_REQ_ONE, Extent, HOLE, Mode, Peer, Question,
};
use crate::support::{IMAGE_SIZE, Random, image};

const ALLOCATION: &[&str] = &["base:allocation"];
const GRANDCHILD: &str = "grandchild-zstd.hxz";
const THREE: &[&str] =
    &["base:allocation", "hexz:changed:child-zstd.hxz", "qemu:dirty-bitmap:base-zstd.hxz"];

const EIO: u32 = 5;

/// The bytes of the grandchild.
fn grandchild() -> Vec<u8> {
    let server = Server::builder().archive(GRANDCHILD).start();
    server.go("").read_ok(0, IMAGE_SIZE as u32)
}

fn ids(outcome: &crate::support::structured::Outcome) -> Vec<u32> {
    assert_eq!(outcome.error, None);
    outcome.status.iter().map(|(id, _)| *id).collect()
}

/// The payload of a request: the effect length, and numbers of contexts.
fn payload(length: u64, ids: &[u32]) -> Vec<u8> {
    let mut bytes = length.to_be_bytes().to_vec();
    ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
    bytes
}

fn with_payload(
    peer: &mut Peer,
    offset: u64,
    payload: &[u8],
) -> crate::support::structured::Outcome {
    let question = Question::status(offset, payload.len() as u64).flags(CMD_FLAG_PAYLOAD_LEN);
    peer.ask_with(question, payload)
}

/// Extents have other neighbours where that is feasible, and borders that are aligned: "The
/// server SHOULD use different status values between consecutive descriptors where
/// feasible"; "SHOULD use descriptor lengths that are an integer multiple of 512 bytes where
/// possible (the first and last descriptor of an unaligned query being the most obvious
/// places for an exception)".
#[track_caller]
fn assert_tidy(extents: &[Extent], offset: u64, length: u64) {
    let mut at = offset;
    for pair in extents.windows(2) {
        assert_ne!(pair[0].flags, pair[1].flags, "at {at}");
        at += pair[0].length;
        assert_eq!(at % 512, 0);
    }
    at += extents.last().unwrap().length;
    assert!(at.is_multiple_of(512) || at == offset + length);
}

/// "On success, the server MUST respond with one structured reply chunk … per metadata
/// context"; `NBD_STATE_ZERO`: "if set, the block contents read as all zeroes". The scripted
/// client checks each chunk; here what they say is held against the bytes.
#[test]
fn extents_agree_with_the_bytes() {
    for archive in [BASE, "sparse-zstd.hxz", "fixed-4k-zstd.hxz", GRANDCHILD, "base-lz4.hxz"] {
        let server = Server::builder().archive(archive).start();
        let bytes = if archive == GRANDCHILD { &grandchild() } else { image() };
        for mode in Mode::CHUNKED {
            let mut peer = server.peer(mode, "", ALLOCATION);
            let mut random = Random::new(5);
            let mut ranges = vec![(0, IMAGE_SIZE), (0, 1), (IMAGE_SIZE - 1, 1), (513, 1 << 20)];
            for _ in 0..40 {
                let offset = random.below(IMAGE_SIZE);
                ranges.push((offset, random.below(IMAGE_SIZE - offset) + 1));
            }
            for (offset, length) in ranges {
                let outcome = peer.ask(Question::status(offset, length));
                assert_eq!(ids(&outcome), peer.ids);
                let extents = outcome.extents(peer.ids[0]);
                assert_tidy(extents, offset, length);
                let mut at = offset as usize;
                for extent in extents {
                    let part = &bytes[at..at + extent.length as usize];
                    // "Servers SHOULD set [the remainder] to all-zero"
                    assert!([0, HOLE].contains(&extent.flags));
                    let zeros = part.iter().all(|&byte| byte == 0);
                    assert!(extent.flags == 0 || zeros, "{extent:?} at {at}");
                    at += extent.length as usize;
                }
                // So small an index is looked through whole.
                assert_eq!(at as u64, offset + length);
            }
            let holes: u64 = peer
                .map(0, IMAGE_SIZE)
                .iter()
                .filter(|extent| extent.flags == HOLE)
                .map(|extent| extent.length)
                .sum();
            assert!(holes > IMAGE_SIZE / 4, "{archive}: {holes} bytes of holes");
        }
    }
}

/// What block status calls holes is what reads send as holes.
#[test]
fn holes_are_the_same_for_reads_and_for_status() {
    let server = Server::builder().archive("sparse-zstd.hxz").start();
    for mode in Mode::CHUNKED {
        let mut peer = server.peer(mode, "", ALLOCATION);
        let map = peer.map(0, IMAGE_SIZE);
        let mut contents = peer.ask(Question::read(0, IMAGE_SIZE)).contents;
        contents.sort_by_key(|content| content.offset);
        // Chunks of data may be cut where they were ready.
        let mut read: Vec<Extent> = Vec::new();
        for content in contents {
            let flags = if content.is_hole { HOLE } else { 0 };
            match read.last_mut() {
                Some(last) if last.flags == flags => last.length += content.length,
                _ => read.push(Extent { length: content.length, flags }),
            }
        }
        assert_eq!(read, map);
    }
}

/// `NBD_CMD_FLAG_REQ_ONE`: "every reply chunk MUST contain exactly one descriptor, and that
/// descriptor MUST NOT exceed the length of the original request": the first of those that
/// come without the flag.
#[test]
fn one_extent() {
    let server = Server::builder().archive(GRANDCHILD).start();
    for mode in Mode::CHUNKED {
        let mut peer = server.peer(mode, "", THREE);
        let mut random = Random::new(9);
        for number in 0..60 {
            let offset = random.below(IMAGE_SIZE);
            let length = match number % 3 {
                0 => 1 + random.below(3),
                1 => IMAGE_SIZE - offset,
                _ => 1 + random.below(IMAGE_SIZE - offset),
            }
            .min(IMAGE_SIZE - offset);
            let all = peer.ask(Question::status(offset, length));
            let one = peer.ask(Question::status(offset, length).flags(CMD_FLAG_REQ_ONE));
            assert_eq!(ids(&one), ids(&all));
            for id in peer.ids.clone() {
                let [one] = one.extents(id) else { panic!("{:?}", one.status) };
                assert_eq!(one, &all.extents(id)[0], "{length} at {offset}");
            }
        }
    }
}

/// "A successful block status request MUST have exactly one status chunk per negotiated
/// metadata context ID", the last of them with `NBD_REPLY_FLAG_DONE`.
#[test]
fn several_contexts() {
    for server in servers(GRANDCHILD) {
        for mode in Mode::CHUNKED {
            let mut peer = server.peer(mode, "", THREE);
            let questions: Vec<Question> =
                (0..40).map(|number| Question::status(number * 200_000, 200_000)).collect();
            for (_, outcome) in peer.ask_all(&questions) {
                let mut seen = ids(&outcome);
                seen.sort_unstable();
                let mut expected = peer.ids.clone();
                expected.sort_unstable();
                assert_eq!(seen, expected);
            }
            peer.disconnect();
        }
    }
}

/// Mixed with reads and with what is refused, many at once.
#[test]
fn status_between_other_requests() {
    for server in servers("fixed-4k-zstd.hxz") {
        for mode in Mode::CHUNKED {
            let mut peer = server.peer(mode, "", ALLOCATION);
            let questions: Vec<Question> = (0..150)
                .map(|number| {
                    let offset = number * 50_000;
                    match number % 4 {
                        0 => Question::status(offset, IMAGE_SIZE - offset),
                        1 => Question::status(offset, IMAGE_SIZE),
                        _ => Question::read(offset, 60_000),
                    }
                })
                .collect();
            let outcomes = peer.ask_all(&questions);
            for question in &questions {
                let outcome = outcomes[&question.cookie].clone();
                let from = question.offset as usize;
                match question.command {
                    0 => assert!(outcome.ok() == image()[from..from + 60_000]),
                    _ if question.length == IMAGE_SIZE && from > 0 => {
                        assert_eq!(outcome.failed(), EINVAL);
                    }
                    _ => assert_eq!(ids(&outcome), peer.ids),
                }
            }
        }
    }
}

/// "Servers SHOULD reply with `NBD_EINVAL` to clients sending `NBD_CMD_BLOCK_STATUS` without
/// selecting at least one metadata context"; an empty range: "the server SHOULD NOT
/// disconnect".
#[test]
fn without_a_context_or_a_range() {
    for server in servers(BASE) {
        for mode in Mode::ALL {
            let mut peer = server.peer(mode, "", &[]);
            for (offset, length) in [(0, 0), (0, 512), (0, 0xffff_ffff), (IMAGE_SIZE, 1)] {
                for flags in [0, CMD_FLAG_REQ_ONE] {
                    let outcome = peer.ask(Question::status(offset, length).flags(flags));
                    assert_eq!(outcome.number(), EINVAL);
                }
            }
            assert_eq!(peer.read(0, 10), image()[..10]);
        }
        for mode in Mode::CHUNKED {
            let mut peer = server.peer(mode, "", ALLOCATION);
            for offset in [0, 512, IMAGE_SIZE, u64::MAX] {
                for flags in [0, CMD_FLAG_REQ_ONE] {
                    let outcome = peer.ask(Question::status(offset, 0).flags(flags));
                    assert_eq!(outcome.failed(), EINVAL);
                }
            }
            assert_eq!(ids(&peer.ask(Question::status(0, 512))), peer.ids);
        }
    }
}

/// `NBD_FLAG_BLOCK_STATUS_PAYLOAD`: "limit its replies to the metacontext id(s) in the
/// client's request payload", in whatever order.
#[test]
fn a_payload_chooses_among_the_contexts() {
    for server in servers(GRANDCHILD) {
        let mut peer = server.peer(Mode::Extended, "", THREE);
        let [a, b, c] = peer.ids[..] else { panic!("{:?}", peer.ids) };
        let all = peer.ask(Question::status(4096, 1 << 20));
        for wanted in [&[a][..], &[b], &[c], &[a, b], &[c, a], &[c, b, a], &[a, b, c]] {
            let outcome = with_payload(&mut peer, 4096, &payload(1 << 20, wanted));
            let mut seen = ids(&outcome);
            seen.sort_unstable();
            let mut expected = wanted.to_vec();
            expected.sort_unstable();
            assert_eq!(seen, expected);
            for id in wanted {
                assert_eq!(outcome.extents(*id), all.extents(*id));
            }
            // With REQ_ONE it is one extent of each.
            let question = Question::status(4096, 8 + 4 * wanted.len() as u64)
                .flags(CMD_FLAG_PAYLOAD_LEN | CMD_FLAG_REQ_ONE);
            let outcome = peer.ask_with(question, &payload(1 << 20, wanted));
            assert_eq!(outcome.extents(wanted[0]), &all.extents(wanted[0])[..1]);
        }
        peer.disconnect();
    }
}

/// "If the server … detects duplicate or unknown metacontext ids in the client's payload,
/// the server MUST gracefully consume the client's payload before failing with
/// `NBD_EINVAL`"; "The payload form MUST occupy 8 + n*4 bytes".
#[test]
fn payloads_that_make_no_sense() {
    for server in servers(GRANDCHILD) {
        let mut peer = server.peer(Mode::Extended, "", THREE);
        let [a, b, c] = peer.ids[..] else { panic!("{:?}", peer.ids) };
        let whole = payload(4096, &[a, b, c]);
        let mut bad: Vec<Vec<u8>> = (0..8).map(|end| whole[..end].to_vec()).collect();
        bad.extend([9, 10, 11, 13, 15, 19].map(|end| whole[..end].to_vec()));
        bad.extend([
            payload(4096, &[a, a]),
            payload(4096, &[a, b, a]),
            payload(4096, &[0]),
            payload(4096, &[c + 1]),
            payload(4096, &[a, u32::MAX]),
            payload(4096, &[a, b, c, a]),
            payload(4096, &[a; 1000]),
            [&whole[..], &Question::read(0, 512).encode(Mode::Extended)].concat(),
            vec![0x21; 1 << 20],
            // A range that isn't there, with contexts that are.
            payload(0, &[a]),
            payload(IMAGE_SIZE + 1, &[a]),
            payload(0xffff_ffff, &[a]),
            payload(1 << 63, &[a]),
            payload(u64::MAX, &[a]),
        ]);
        for payload in &bad {
            assert_eq!(with_payload(&mut peer, 0, payload).failed(), EINVAL, "{payload:?}");
            assert_eq!(ids(&peer.ask(Question::status(0, 512))), peer.ids);
        }
        for offset in [1, IMAGE_SIZE, u64::MAX] {
            let outcome = with_payload(&mut peer, offset, &payload(IMAGE_SIZE, &[a]));
            assert_eq!(outcome.failed(), EINVAL);
        }
        peer.disconnect();
    }
}

/// qemu-nbd 10.0 | BLOCK_STATUS with a payload and no context selected aborts the server
#[test]
fn a_payload_without_a_context() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &[]);
        for payload in [&b""[..], b"x", &payload(4096, &[]), &payload(4096, &[0]), &[0; 9000]] {
            assert_eq!(with_payload(&mut peer, 0, payload).failed(), EINVAL);
            assert_eq!(peer.read(0, 10), image()[..10]);
        }
        server.assert_alive();
    }
}

/// Without extended headers there is no payload: the flag is refused, and what follows is
/// the next request.
#[test]
fn no_payload_in_structured_mode() {
    let server = base();
    let mut peer = server.peer(Mode::Structured, "", ALLOCATION);
    let question = Question::status(0, 12).flags(CMD_FLAG_PAYLOAD_LEN);
    assert_eq!(peer.ask(question).failed(), EINVAL);
    assert_eq!(peer.read(0, 10), image()[..10]);
}

/// Eight GiB that are zeros but for a block at their start and one at their end.
fn huge(folder: &Path) -> Server {
    const PIECE: u32 = 32 << 20;
    let data = || Piece::Data(image()[..1 << 20].to_vec());
    let mut main = vec![Piece::Zeros(PIECE); 256];
    main.insert(0, data());
    main.push(data());
    let path = folder.join("huge.hxz");
    // On several index pages.
    ArchiveWriter { main, blocks_per_page: 50, ..ArchiveWriter::default() }.write().save(&path);
    Server::builder().arg(path).start()
}

/// Lengths of 64 bits with extended headers, and of 32 bits without, for the same hole.
///
/// nbdkit CVE-2025-47711, -47712 | block status of the largest length: off by one, 32-bit
/// overflow
#[test]
fn extents_larger_than_four_gigabytes() {
    const DATA: u64 = 1 << 20;
    const ZEROS: u64 = 8 << 30;
    let folder = tempfile::tempdir().unwrap();
    let server = huge(folder.path());
    let size = ZEROS + 2 * DATA;
    let data = Extent { length: DATA, flags: 0 };
    let zeros = |length| Extent { length, flags: HOLE };

    let mut peer = server.peer(Mode::Extended, "", ALLOCATION);
    assert_eq!(peer.export.size, size);
    let id = peer.ids[0];
    let whole = peer.ask(Question::status(0, size));
    assert_eq!(whole.extents(id), [data, zeros(ZEROS), data]);
    let one = peer.ask(Question::status(DATA, size - DATA).flags(CMD_FLAG_REQ_ONE));
    assert_eq!(one.extents(id), [zeros(ZEROS)]);
    let inside = peer.ask(Question::status(DATA, (1 << 32) + 512));
    assert_eq!(inside.extents(id), [zeros((1 << 32) + 512)]);
    let chosen = with_payload(&mut peer, 1, &payload(size - 1, &[id]));
    assert_eq!(chosen.extents(id)[1], zeros(ZEROS));
    for (offset, length) in [(1, size), (0, size + 1), (size, 1), (0, u64::MAX), (2, u64::MAX - 1)]
    {
        assert_eq!(peer.ask(Question::status(offset, length)).failed(), EINVAL);
    }

    let mut peer = server.peer(Mode::Structured, "", ALLOCATION);
    let id = peer.ids[0];
    for length in [0xffff_ffff, 0xffff_fe00, 0xffff_f000, 1 << 31, 512] {
        let outcome = peer.ask(Question::status(DATA, length));
        assert_eq!(outcome.extents(id), [zeros(length)]);
        let outcome = peer.ask(Question::status(0, length));
        if length > DATA {
            assert_eq!(outcome.extents(id), [data, zeros(length - DATA)]);
        } else {
            assert_eq!(outcome.extents(id), [Extent { length, flags: 0 }]);
        }
        let outcome = peer.ask(Question::status(ZEROS + DATA, length));
        let expected = if length > DATA { EINVAL } else { 0 };
        assert_eq!(outcome.number(), expected);
    }
    assert_eq!(peer.map(0, size), [data, zeros(ZEROS), data]);
}

/// An index page that can't be trusted fails the request, and nothing else; where it lies is
/// told: "`NBD_REPLY_TYPE_ERROR_OFFSET` … Valid as a reply to … `NBD_CMD_BLOCK_STATUS`".
#[test]
fn a_damaged_index_page_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.hxz");
    let main: Vec<Piece> =
        image()[..1 << 20].chunks(4096).map(|chunk| Piece::Data(chunk.to_vec())).collect();
    let written = ArchiveWriter { main, blocks_per_page: 64, ..ArchiveWriter::default() }.write();
    written.save(&path);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    // The third of four pages says that it has no blocks.
    let at = written.main[2].place.start as u64;
    let server = Server::builder().arg(&path).start();
    file.write_all_at(&[0; 8], at).unwrap();
    let page = 64 * 4096;
    for mode in Mode::CHUNKED {
        let mut peer = server.peer(mode, "", ALLOCATION);
        assert_eq!(ids(&peer.ask(Question::status(0, 2 * page))), peer.ids);
        let outcome = peer.ask(Question::status(2 * page + 100, 1000));
        assert_eq!(outcome.error_at, Some(2 * page + 100));
        assert_eq!(outcome.failed(), EIO);
        assert_eq!(peer.ask(Question::status(0, 4 * page)).failed(), EIO);
        assert_eq!(ids(&peer.ask(Question::status(3 * page, page))), peer.ids);
        assert_eq!(peer.read(0, 10), image()[..10]);
    }
}
