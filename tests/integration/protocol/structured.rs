//! "Structured reply chunk message", `NBD_OPT_STRUCTURED_REPLY`.

use std::os::unix::fs::FileExt;

use super::{BASE, base, servers};
use crate::support::client::{
    CMD_CACHE, CMD_FLUSH, CMD_TRIM, CMD_WRITE, Client, EINVAL, EIO, EPERM, FLAGS, INFO_EXPORT,
    OPT_GO, OPT_INFO, OPT_STRUCTURED_REPLY, REP_ERR_INVALID, Request, SEND_DF, Session,
    TRANSMISSION_FLAGS, ack, info_data,
};
use crate::support::server::Server;
use crate::support::structured::{CMD_FLAG_DF, Mode, Question};
use crate::support::{IMAGE_SIZE, Random, archive, image};

/// A client that has negotiated structured replies and chosen an export.
fn structured(server: &Server) -> Client<Session> {
    let mut client = server.greeted();
    assert_eq!(client.option(OPT_STRUCTURED_REPLY, b""), [ack()]);
    client.go("");
    client
}

/// `NBD_OPT_STRUCTURED_REPLY`: "the server SHOULD reject a request that includes data with
/// `NBD_REP_ERR_INVALID`."
#[test]
fn asking_for_them_with_data_is_invalid() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        client.refused(OPT_STRUCTURED_REPLY, b"x", REP_ERR_INVALID);
        // They are not negotiated by that.
        client.go("");
        assert_eq!(client.read_ok(0, 10), image()[..10]);
    }
}

/// `NBD_FLAG_SEND_DF`: "MUST leave this flag clear if structured replies have not been
/// negotiated."
#[test]
fn with_them_comes_the_flag_for_unfragmented_reads() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        let mut flags = |number| {
            let replies = client.option(number, &info_data(b"", &[]));
            assert!(replies[0].data.starts_with(&INFO_EXPORT.to_be_bytes()));
            let flags = u16::from_be_bytes(replies[0].data[10..].try_into().unwrap());
            if number == OPT_INFO {
                assert_eq!(client.option(OPT_STRUCTURED_REPLY, b""), [ack()]);
            }
            flags
        };
        assert_eq!(flags(OPT_INFO), TRANSMISSION_FLAGS);
        assert_eq!(flags(OPT_GO), TRANSMISSION_FLAGS | SEND_DF);
    }
}

/// nbdkit CVE-2021-3716 | structured replies negotiated in plaintext survive STARTTLS: the
/// counterpart to the test of the leg in clear; each connection begins anew.
#[test]
fn they_are_not_remembered_for_the_next_connection() {
    let server = base();
    structured(&server).send_request(Request::disc());
    assert_eq!(server.go("").read_ok(0, 10), image()[..10]);
    let mut client = server.connect();
    client.greet(FLAGS);
    client.go("");
    assert_eq!(client.read_ok(0, 10), image()[..10]);
}

/// `NBD_CMD_READ`: every range is covered, once, by chunks of data and holes.
#[test]
fn reads_of_every_kind() {
    for archive in [BASE, "sparse-zstd.hxz"] {
        for server in servers(archive) {
            let mut client = structured(&server);
            let mut random = Random::new(21);
            let mut ranges = vec![(0, IMAGE_SIZE), (0, 1), (IMAGE_SIZE - 1, 1), (5, 0)];
            for _ in 0..100 {
                let offset = random.below(IMAGE_SIZE);
                ranges.push((offset, random.below((IMAGE_SIZE - offset).min(500_000)) + 1));
            }
            for (offset, length) in ranges {
                for flags in [0, CMD_FLAG_DF] {
                    let request = Request { flags, ..Request::read(7, offset, length as u32) };
                    let outcome = client.ask(request);
                    if flags == CMD_FLAG_DF {
                        // "the server MUST send at most one content chunk"
                        assert!(outcome.contents.len() <= 1);
                    }
                    let from = offset as usize;
                    assert!(outcome.ok() == image()[from..from + length as usize]);
                }
            }
        }
    }
}

/// What the archive has no bytes for isn't sent; "the server SHOULD use chunks with lengths
/// and offsets as an integer multiple of 512 bytes, where possible".
#[test]
fn holes_are_sent_as_holes() {
    let server = Server::builder().archive("sparse-zstd.hxz").start();
    let outcome = structured(&server).ask(Request::read(1, 0, IMAGE_SIZE as u32));
    let holes: u64 =
        outcome.contents.iter().filter(|part| part.is_hole).map(|part| part.length).sum();
    assert!(holes > IMAGE_SIZE / 4, "{holes} bytes of holes");
    for part in &outcome.contents {
        assert_eq!((part.offset % 512, part.length % 512), (0, 0), "{part:?}");
    }
    assert!(outcome.ok() == image());
}

/// "MUST NOT use a simple reply for `NBD_CMD_READ` (even for the case of an early
/// `NBD_EINVAL` due to bad flags)"; "The server SHOULD prefer sending errors via a
/// structured reply".
#[test]
fn errors_are_structured_and_have_words() {
    for server in servers(BASE) {
        let mut client = structured(&server);
        let read = |offset, length| Request::read(1, offset, length);
        for request in [
            read(IMAGE_SIZE, 1),
            read(IMAGE_SIZE - 1, 2),
            read(u64::MAX, 1),
            read(0, (32 << 20) + 1),
            Request { flags: 1, ..read(0, 1) },
            Request { flags: 1 << 15, ..read(0, 1) },
            Request { flags: CMD_FLAG_DF, command: CMD_FLUSH, ..Request::default() },
            Request { command: 99, ..Request::default() },
        ] {
            assert_eq!(client.ask(request).failed(), EINVAL, "{request:?}");
        }
        assert_eq!(client.ask(Request { command: CMD_TRIM, ..read(0, 512) }).failed(), EPERM);
        let write = Request { command: CMD_WRITE, length: 1000, ..Request::default() };
        client.send(&[write.encode(), vec![0x25; 1000]].concat());
        let outcome = client.outcomes(&[write]).remove(&0).unwrap();
        assert_eq!(outcome.failed(), EPERM);
        let flush = Request { command: CMD_FLUSH, ..Request::default() };
        assert_eq!(client.ask(flush).error, None);
        assert_eq!(client.ask(read(0, 10)).ok(), image()[..10]);
        client.disconnect();
    }
}

/// Many at once: their chunks may come interleaved, each reply is whole in the end, and
/// none is lost to DISC.
#[test]
fn many_requests_at_once() {
    for server in servers("sparse-zstd.hxz") {
        let mut random = Random::new(22);
        let requests: Vec<Request> = (0..300)
            .map(|cookie| {
                let flags = if random.below(2) == 0 { 0 } else { CMD_FLAG_DF };
                let offset = random.below(IMAGE_SIZE - 200_000);
                let length = random.below(200_000) as u32;
                Request { flags, ..Request::read(u64::MAX - cookie, offset, length) }
            })
            .collect();
        let mut bytes: Vec<u8> = requests.iter().flat_map(|request| request.encode()).collect();
        bytes.extend(Request::disc().encode());
        let mut client = structured(&server);
        client.send(&bytes);
        let mut outcomes = client.outcomes(&requests);
        for request in &requests {
            let data = outcomes.remove(&request.cookie).unwrap().ok();
            let from = request.offset as usize;
            assert!(data == image()[from..from + data.len()]);
        }
        client.expect_end();
    }
}

/// An unreadable block is an error chunk that says where; the stream stays in step.
/// `NBD_REPLY_TYPE_ERROR_OFFSET`: "at a given offset, which MUST lie within the original
/// offset and length of the request"; data chunks before it are right all the same.
#[test]
fn an_unreadable_block() {
    const BLOCK: u64 = 65_536;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.hxz");
    std::fs::copy(archive("fixed-64k-zstd.hxz"), &path).unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&[0x55; 8], 4096 + 30).unwrap();
    let server = Server::builder().arg(path).start();
    for mode in Mode::CHUNKED {
        let mut peer = server.peer(mode, "", &[]);
        let mut bad = Vec::new();
        for offset in (0..IMAGE_SIZE).step_by(BLOCK as usize) {
            let outcome = peer.ask(Question::read(offset, BLOCK));
            if outcome.error.is_some() {
                bad.push(offset);
                assert_eq!(outcome.error_at, Some(offset));
                assert_eq!(outcome.failed(), EIO);
            } else {
                assert!(outcome.data == image()[offset as usize..][..BLOCK as usize]);
            }
        }
        let [bad] = bad[..] else { panic!("{bad:?}") };

        // Where the request begins, if it begins within the block; with DF too.
        for flags in [0, CMD_FLAG_DF] {
            for (offset, length, at) in [
                (bad + 100, 1, bad + 100),
                (bad + BLOCK - 1, 5000, bad + BLOCK - 1),
                (bad, IMAGE_SIZE - bad, bad),
                (0, IMAGE_SIZE, bad),
            ] {
                let outcome = peer.ask(Question::read(offset, length).flags(flags));
                assert_eq!(outcome.error_at, Some(at));
                for part in outcome.contents.iter().filter(|part| !part.is_hole) {
                    let (from, to) = (part.offset, part.offset + part.length);
                    let received = &outcome.data[(from - offset) as usize..(to - offset) as usize];
                    assert!(received == &image()[from as usize..to as usize]);
                }
                assert!(flags == 0 || outcome.contents.is_empty());
                assert_eq!(outcome.failed(), EIO);
            }
        }
        // A cache request says the same.
        let outcome = peer.ask(Question::new(CMD_CACHE, bad + 1, 1000));
        assert_eq!(outcome.error_at, Some(bad + 1));
        assert_eq!(outcome.failed(), EIO);
        peer.disconnect();
    }
}

/// `NBD_CMD_READ`: "the server MUST support unfragmented reads in which the client's request
/// length does not exceed 65,536 bytes": here up to the maximum payload.
#[test]
fn unfragmented_reads_of_any_length() {
    let server = Server::builder().archive("sparse-zstd.hxz").start();
    for mode in Mode::CHUNKED {
        let mut peer = server.peer(mode, "", &[]);
        for length in [1, 512, 65_536, 65_537, 1 << 20, IMAGE_SIZE] {
            let outcome = peer.ask(Question::read(IMAGE_SIZE - length, length).flags(CMD_FLAG_DF));
            assert_eq!(outcome.contents.len(), 1);
            assert!(outcome.ok() == image()[(IMAGE_SIZE - length) as usize..]);
        }
    }
}

/// Content chunks come as blocks are ready, in any order: a large cold read is in several,
/// each of which begins and ends between sectors or where the request does.
#[test]
fn chunks_are_aligned_where_possible() {
    for mode in Mode::CHUNKED {
        for (offset, length) in [(0, IMAGE_SIZE), (1, IMAGE_SIZE - 2), (100_001, 1_000_003)] {
            let server = base();
            let mut peer = server.peer(mode, "", &[]);
            for _cold_then_warm in 0..2 {
                let outcome = peer.ask(Question::read(offset, length));
                assert!(outcome.contents.len() > 1);
                for part in &outcome.contents {
                    let (start, end) = (part.offset, part.offset + part.length);
                    assert!(start.is_multiple_of(512) || start == offset, "{part:?}");
                    assert!(end.is_multiple_of(512) || end == offset + length, "{part:?}");
                }
                assert!(outcome.ok() == image()[offset as usize..][..length as usize]);
            }
        }
    }
}
