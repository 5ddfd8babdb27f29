//! `NBD_OPT_EXTENDED_HEADERS`, "Extended request message", "Extended reply chunk message".

use super::{BASE, base, servers};
use crate::support::client::{
    CMD_BLOCK_STATUS, CMD_CACHE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
    EINVAL, EPERM, FLAGS, OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_STRUCTURED_REPLY,
    REP_ERR_EXT_HEADER_REQD, REP_ERR_INVALID, REP_ERR_TLS_REQD, Request, ack, option,
};
use crate::support::image;
use crate::support::structured::{
    CMD_FLAG_PAYLOAD_LEN, EXTENDED_REPLY_MAGIC, Mode, Peer, Question,
};

/// "the server SHOULD reject a request that includes data with `NBD_REP_ERR_INVALID`"; what
/// was refused isn't negotiated.
#[test]
fn asking_for_them_with_data_is_invalid() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        for data in [&b"x"[..], &option(OPT_EXTENDED_HEADERS, b"")] {
            client.refused(OPT_EXTENDED_HEADERS, data, REP_ERR_INVALID);
        }
        client.go("");
        assert_eq!(client.read_ok(0, 10), image()[..10]);
    }
}

/// "`NBD_REP_ERR_EXT_HEADER_REQD`: The client has already successfully negotiated extended
/// headers, which takes precedence over this option." The other way round "a client MAY
/// request structured replies first".
#[test]
fn they_take_precedence_over_structured_replies() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        assert_eq!(client.option(OPT_STRUCTURED_REPLY, b""), [ack()]);
        assert_eq!(client.option(OPT_EXTENDED_HEADERS, b""), [ack()]);
        client.refused(OPT_STRUCTURED_REPLY, b"", REP_ERR_EXT_HEADER_REQD);
        client.refused(OPT_STRUCTURED_REPLY, b"x", REP_ERR_INVALID);
        assert_eq!(client.option(OPT_EXTENDED_HEADERS, b""), [ack()]);
        let export = client.go("");
        let mut peer = Peer { client, mode: Mode::Extended, export, ids: Vec::new() };
        assert_eq!(peer.read(0, 10), image()[..10]);
    }
}

/// "Once extended headers are successfully requested, a client MUST NOT use
/// `NBD_OPT_EXPORT_NAME`", which can only be refused by closing.
#[test]
fn export_name_with_them_closes() {
    for server in servers(BASE) {
        let mut client = server.greeted();
        Mode::Extended.negotiate(&mut client);
        client.send(&option(OPT_EXPORT_NAME, BASE.as_bytes()));
        client.expect_closed();
        server.assert_alive();
    }
}

/// "If the client requests `NBD_OPT_STARTTLS` after this option, it MUST renegotiate": in
/// clear they are refused, and inside TLS nothing of it is left.
#[test]
fn they_can_not_be_asked_for_in_clear() {
    let [_, server] = servers(BASE);
    let mut client = server.connect();
    client.greet(FLAGS);
    client.refused(OPT_EXTENDED_HEADERS, b"", REP_ERR_TLS_REQD);
    let mut client = client.starttls(server.pki().client_config());
    client.go("");
    assert_eq!(client.read_ok(0, 10), image()[..10]);
}

/// "Extended reply chunk message", byte for byte: magic, flags, type, cookie, offset, length
/// of the payload.
#[test]
fn golden_bytes() {
    let server = base();
    let mut peer = server.peer(Mode::Extended, "", &[]);
    peer.send(Question::new(CMD_FLUSH, 0, 0).cookie(0x0102_0304_0506_0708));
    peer.client.expect(b"\x6e\x8a\x27\x8c\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08");
    peer.client.expect(&[0; 16]);
    peer.client.send(
        b"\x21\xe4\x1c\x71\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\
          \0\0\0\0\0\0\x04\x38\0\0\0\0\0\0\0\x02",
    );
    peer.client.expect(
        b"\x6e\x8a\x27\x8c\0\x01\0\x01\xff\xff\xff\xff\xff\xff\xff\xff\
          \0\0\0\0\0\0\x04\x38\0\0\0\0\0\0\0\x0a\0\0\0\0\0\0\x04\x38",
    );
    // The magic number of ext2 is there in the image.
    peer.client.expect(b"\x53\xef");
}

/// "the server MUST set … offset": to the request's own, in errors and in replies without
/// data too. The scripted client checks it of each reply.
#[test]
fn every_reply_has_the_requests_offset() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &["base:allocation"]);
        for offset in [0, 1, 4096, 1 << 33, u64::MAX] {
            for command in 0..10 {
                if command == CMD_DISC {
                    continue;
                }
                peer.ask(Question::new(command, offset, 512));
            }
        }
        assert_eq!(peer.read(7, 10), image()[7..17]);
    }
}

/// "Request message": the other mode's magic number is none.
#[test]
fn the_other_modes_requests_close() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &[]);
        peer.client.send(&[Request::read(1, 0, 512).encode(), vec![0; 4]].concat());
        peer.client.expect_closed();
        for mode in [Mode::Simple, Mode::Structured] {
            let mut peer = server.peer(mode, "", &[]);
            peer.client.send(&Question::read(0, 512).encode(Mode::Extended));
            peer.client.expect_closed();
        }
        server.assert_alive();
    }
}

/// `NBD_CMD_FLAG_PAYLOAD_LEN`: "for other commands, the flag will trigger an `NBD_EINVAL`
/// error unless the command documents an optional payload form"; "in all other cases, …
/// gracefully consume length bytes of payload".
#[test]
fn a_payload_for_any_command_is_consumed() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &[]);
        let inner = Question::read(0, 512).cookie(0xbad).encode(Mode::Extended);
        for length in [0, 1, 31, 32, 33, 4096, 100_000] {
            let payload = &inner.repeat(length / inner.len() + 1)[..length];
            for command in
                [0, CMD_FLUSH, CMD_CACHE, CMD_BLOCK_STATUS, CMD_TRIM, CMD_WRITE_ZEROES, 8, 99]
            {
                let question = Question::new(command, 0, length as u64).flags(CMD_FLAG_PAYLOAD_LEN);
                let error = peer.ask_with(question, payload).failed();
                match command {
                    // Nothing else matters to a write.
                    CMD_TRIM | CMD_WRITE_ZEROES => assert_eq!(error, EPERM),
                    _ => assert_eq!(error, EINVAL, "{command}"),
                }
                assert_eq!(peer.read(10, 10), image()[10..20]);
            }
        }
    }
}

/// "With extended headers, the flag MUST be set for `NBD_CMD_WRITE`": without it there is no
/// payload, and the request is wrong.
#[test]
fn writes_with_and_without_the_flag() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &[]);
        for length in [0, 1, 4096, 1 << 20] {
            let write = Question::new(CMD_WRITE, 0, length);
            assert_eq!(peer.ask(write).failed(), EINVAL);
            let error = peer.ask_with(write.flags(CMD_FLAG_PAYLOAD_LEN), &vec![7; length as usize]);
            assert_eq!(error.failed(), if length == 0 { EINVAL } else { EPERM });
        }
        assert_eq!(peer.ask(Question::new(CMD_WRITE, 0, u64::MAX)).failed(), EINVAL);
        assert_eq!(peer.read(0, 512), image()[..512]);
    }
}

/// "a server SHOULD initiate hard disconnect if a client sets the
/// `NBD_CMD_FLAG_PAYLOAD_LEN` flag and uses a length larger than a server's advertised …
/// maximum payload length".
#[test]
fn a_payload_beyond_the_maximum_closes() {
    let server = base();
    for length in [(32 << 20) + 1, 1 << 32, 1 << 63, u64::MAX] {
        for command in [0, CMD_WRITE, CMD_BLOCK_STATUS, 99] {
            let mut peer = server.peer(Mode::Extended, "", &["base:allocation"]);
            peer.send(Question::new(command, 0, length).flags(CMD_FLAG_PAYLOAD_LEN));
            peer.client.expect_closed();
        }
    }
    server.assert_alive();
    // The longest one is drained.
    let mut peer = server.peer(Mode::Extended, "", &[]);
    let write = Question::new(CMD_WRITE, 0, 32 << 20).flags(CMD_FLAG_PAYLOAD_LEN);
    peer.send(write);
    let piece = [0x21; 64 * 1024];
    (0..32 << 4).for_each(|_| peer.client.send(&piece));
    let outcomes = peer.client.outcomes_in(Mode::Extended, &[write]);
    assert_eq!(outcomes[&write.cookie].number(), EPERM);
    assert_eq!(peer.read(0, 512), image()[..512]);
}

/// `NBD_CMD_DISC` is answered by closing, after what was asked before it; whatever flags it
/// has.
#[test]
fn disc_after_requests() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &[]);
        let questions: Vec<Question> =
            (0..50).map(|number| Question::read(number * 50_000, 50_000)).collect();
        let encode = |question: &Question| question.encode(Mode::Extended);
        let mut bytes: Vec<u8> = questions.iter().flat_map(encode).collect();
        bytes.extend(Question::new(CMD_DISC, 0, 0).encode(Mode::Extended));
        peer.client.send(&bytes);
        for (_, outcome) in peer.client.outcomes_in(Mode::Extended, &questions) {
            assert_eq!(outcome.ok().len(), 50_000);
        }
        peer.client.expect_end();
    }
}

/// A stream has no packets: where a request is cut makes no difference.
#[test]
fn requests_in_single_bytes() {
    for server in servers(BASE) {
        let mut peer = server.peer(Mode::Extended, "", &[]);
        for byte in Question::read(0, 100).encode(Mode::Extended) {
            peer.client.send(&[byte]);
        }
        let magic = peer.client.receive(4);
        assert_eq!(magic, EXTENDED_REPLY_MAGIC.to_be_bytes());
        let rest = peer.client.receive(28 + 8 + 100);
        assert_eq!(rest[36..], image()[..100]);
    }
}
