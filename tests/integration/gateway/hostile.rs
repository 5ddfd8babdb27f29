//! Clients that send what nobody should.

use super::{BASE, connect, plain, tls, wait_for_descriptors};
use crate::support::Random;
use crate::support::client::{
    CMD_WRITE, Client, Duplex, FLAGS, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO, OPT_LIST,
    OPT_STARTTLS, OPT_STRUCTURED_REPLY, REP_ERR_INVALID, REP_ERR_UNKNOWN, REP_ERR_UNSUP, Request,
    Session, ack, info_data, option, option_head,
};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

fn both() -> [Server; 2] {
    [plain().start(), tls().start()]
}

/// A client inside TLS if need be, whatever the server is still busy with.
fn greeted(server: &Server) -> Client<Session> {
    let mut client = connect(server);
    client.send(&FLAGS.to_be_bytes());
    if server.has_tls() {
        client.starttls(server.pki().client_config()).boxed()
    } else {
        client.boxed()
    }
}

/// Half-closes, and waits until the server has closed too, whatever it sends before.
fn finish<S: Duplex>(client: &mut Client<S>) {
    client.stream.socket().shutdown(std::net::Shutdown::Write);
    client.rest();
}

fn random_option(random: &mut Random) -> (u32, Vec<u8>) {
    let number = match random.below(4) {
        0 => random.number() as u32,
        _ => random.below(13) as u32,
    };
    let length = random.below(40) as usize;
    let data = match random.below(6) {
        0 => Vec::new(),
        1 => random.bytes(length),
        2 => info_data(&random.bytes(length), &[0, 1, 2, 3, 4]),
        3 => info_data(BASE.as_bytes(), &[3, 3, 3]),
        4 => option(OPT_LIST, b""),
        _ => [(length as u32).to_be_bytes().to_vec(), vec![0; length]].concat(),
    };
    (number, data)
}

/// nbdkit CVE-2019-14851 | commands out of order hit an assertion
#[test]
fn random_options_are_each_answered() {
    for server in both() {
        let mut random = Random::new(11);
        for _ in 0..10 {
            let mut client = greeted(&server);
            for _ in 0..60 {
                let (number, data) = random_option(&mut random);
                // These end the negotiation when they succeed.
                if ![OPT_EXPORT_NAME, OPT_ABORT, OPT_GO].contains(&number) {
                    client.option(number, &data);
                }
            }
            assert_eq!(client.list(), [BASE]);
        }
        server.assert_alive();
    }
}

/// The same, without waiting for answers, and whatever comes of it.
#[test]
fn random_options_and_then_random_requests() {
    for server in both() {
        let mut random = Random::new(12);
        for _ in 0..60 {
            let mut bytes = Vec::new();
            for _ in 0..random.below(8) {
                let (number, data) = random_option(&mut random);
                bytes.extend(option(number, &data));
            }
            bytes.extend(option(OPT_GO, &info_data(b"", &[])));
            for _ in 0..random.below(20) {
                let mut request = Request {
                    flags: random.below(4) as u16,
                    command: random.below(10) as u16,
                    cookie: random.number(),
                    offset: random.number() >> random.below(64),
                    length: random.below(100_000) as u32,
                };
                if request.command == CMD_WRITE {
                    request.length %= 100;
                }
                bytes.extend(request.encode());
            }
            let mut client = greeted(&server);
            // It may close before it has read all of this, which is fine.
            let _ = client.try_send(&bytes);
            finish(&mut client);
        }
        server.assert_alive();
    }
}

/// nbd-server CVE-2022-26495, -26496 | name length 0xffffffff; INFO shorter than its fields
/// qemu CVE-2017-15118 | export name over 256 bytes
/// qemu CVE-2020-10761 | long name overflows the error reply (every error text is checked
/// to have at most 4096 bytes)
#[test]
fn name_lengths_of_every_kind() {
    let name = |length: usize| vec![b'n'; length];
    for server in both() {
        let mut client = greeted(&server);
        for number in [OPT_INFO, OPT_GO] {
            let mut cases = vec![
                (info_data(&name(255), &[]), REP_ERR_UNKNOWN),
                (info_data(&name(257), &[]), REP_ERR_UNKNOWN),
                (info_data(&name(4096), &[1, 2, 3]), REP_ERR_UNKNOWN),
                (info_data(&name(4097), &[]), REP_ERR_INVALID),
                (info_data(&name(60_000), &[]), REP_ERR_INVALID),
            ];
            // The name's length doesn't fit: it leaves something over, is too long by one, by all, by overflow.
            for length in [0, 1, 2, 3, 5, 6, 7, 10, 0x7fff_ffff, 0x8000_0000, 0xffff_fffa, u32::MAX]
            {
                let mut data = info_data(&name(4), &[]);
                data[..4].copy_from_slice(&length.to_be_bytes());
                cases.push((data, REP_ERR_INVALID));
            }
            cases.extend((0..6).map(|length| (vec![0; length], REP_ERR_INVALID)));
            // More requests for information than there are, and fewer.
            cases.push(([&info_data(b"", &[])[..4], &[0xff, 0xff]].concat(), REP_ERR_INVALID));
            cases.push((info_data(b"", &[])[..5].to_vec(), REP_ERR_INVALID));
            for (data, error) in cases {
                client.refused(number, &data, error);
                assert_eq!(client.list(), [BASE]);
            }
        }
        client.go("");
        for name in [name(255), name(257), name(4096)] {
            let mut client = greeted(&server);
            client.send(&option(OPT_EXPORT_NAME, &name));
            client.expect_closed();
        }
    }
}

/// qemu CVE-2017-15118 | export name over 256 bytes: those that are served, in every message
/// that has them
#[test]
fn long_names_that_are_served() {
    let archive = crate::support::archive(BASE).display().to_string();
    let names = [255, 256, 257, 4095, 4096].map(|length| "n".repeat(length));
    let serve =
        |server: Builder| server.args(names.iter().map(|name| format!("{name}={archive}"))).start();
    for server in [serve(Server::builder()), serve(Server::builder().tls(Pki::new()))] {
        let mut client = greeted(&server);
        assert_eq!(client.list(), names);
        assert_eq!(client.option(OPT_STRUCTURED_REPLY, b""), [ack()]);
        for name in &names {
            let replies = client.option(OPT_INFO, &info_data(name.as_bytes(), &[1]));
            let told = replies.iter().find(|reply| reply.data.starts_with(&[0, 1])).unwrap();
            assert_eq!(told.data[2..], *name.as_bytes());
            // "A string … MUST NOT be longer than 4096 bytes", those made of names among them.
            for context in client.list_contexts(name, &[]) {
                assert!(context.len() <= 4096, "{}", context.len());
            }
            assert_eq!(client.set_contexts(name, &["base:allocation"]).len(), 1);
        }
        for name in &names {
            let mut client = greeted(&server);
            client.send(&option(OPT_EXPORT_NAME, name.as_bytes()));
            client.receive(10);
            client.read_ok(0, 1);
            let mut client = greeted(&server);
            client.go(name);
            client.read_ok(0, 1);
        }
    }
    let (code, stderr) = Server::builder().arg(format!("{}={archive}", "n".repeat(4097))).fail();
    assert_eq!(code, 2, "{stderr}");
}

/// nbd-server 3.24 | a name cut at a NUL; qemu: the name "\0" is the default export
#[test]
fn names_are_compared_whole() {
    for server in both() {
        let mut client = greeted(&server);
        for name in ["\0", "base-zstd.hxz\0", "base-zstd.hxz\0x", "\0base-zstd.hxz", "base\0"] {
            client.refused(OPT_GO, &info_data(name.as_bytes(), &[]), REP_ERR_UNKNOWN);
        }
        client.go(BASE);
    }
}

/// qemu CVE-2017-15119 | a 4 GiB option drained for ever
#[test]
fn an_oversize_option_closes() {
    for server in both() {
        for (number, length) in [
            (OPT_EXPORT_NAME, 4097),
            (OPT_EXPORT_NAME, u32::MAX),
            (OPT_LIST, 64 * 1024 + 1),
            (OPT_INFO, 64 * 1024 + 1),
            (OPT_GO, u32::MAX),
            (OPT_STARTTLS, u32::MAX),
            (OPT_ABORT, 1 << 31),
            (99, u32::MAX),
        ] {
            // Nothing of the data has been sent: the head alone is judged.
            let mut client = greeted(&server);
            client.send(&option_head(number, length));
            client.expect_closed();
            // In clear, where TLS is still to come, it is the same.
            let mut client = connect(&server);
            client.send(&[&FLAGS.to_be_bytes()[..], &option_head(number, length)].concat());
            client.expect_closed();
        }
        greeted(&server).refused(99, &[0; 64 * 1024], REP_ERR_UNSUP);
    }
}

/// A conversation from the client's flags to its leave.
fn conversation() -> Vec<u8> {
    let write = Request { command: CMD_WRITE, length: 20, ..Request::default() };
    [
        option(OPT_LIST, b""),
        option(OPT_INFO, &info_data(BASE.as_bytes(), &[1, 2, 3])),
        option(99, b"??"),
        option(OPT_GO, &info_data(b"", &[])),
        Request::read(1, 0, 40_000).encode(),
        write.encode(),
        vec![0; 20],
        Request::read(2, 100_000, 1).encode(),
        Request::disc().encode(),
    ]
    .concat()
}

/// nbd-server CVE-2013-7441 | closing in the middle of negotiation kills the server
/// qemu CVE-2017-9524, -7539 | connect and vanish
#[test]
fn cut_at_every_byte_in_clear() {
    let server = plain().start();
    let before = server.fd_count();
    let bytes = [&FLAGS.to_be_bytes()[..], &conversation()].concat();
    for end in 0..=bytes.len() {
        let mut client = connect(&server);
        client.send(&bytes[..end]);
        finish(&mut client);
        let mut client = connect(&server);
        client.send(&bytes[..end]);
        client.reset();
    }
    wait_for_descriptors(&server, before);
    server.assert_alive();
}

#[test]
fn cut_at_every_byte_inside_tls() {
    let server = tls().start();
    let before = server.fd_count();
    let bytes = conversation();
    for end in 0..=bytes.len() {
        let mut client = greeted(&server);
        client.send(&bytes[..end]);
        if end % 2 == 0 {
            finish(&mut client);
        } else {
            client.reset();
        }
    }
    wait_for_descriptors(&server, before);
    server.assert_alive();
}

/// Cuts what a TLS client sends first at every byte of it.
#[test]
fn cut_at_every_byte_of_the_tls_handshake() {
    let server = tls().start();
    let before = server.fd_count();
    let hello = super::tls::client_hello(server.pki().client_config());
    let bytes = [&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b""), &hello].concat();
    for end in 0..=bytes.len() {
        let mut client = connect(&server);
        client.send(&bytes[..end]);
        if end % 2 == 0 {
            finish(&mut client);
        } else {
            client.reset();
        }
    }
    wait_for_descriptors(&server, before);
    server.assert_alive();
}

/// qemu CVE-2017-9524, -7539 | connect and vanish, unexpected data
#[test]
fn garbage_at_every_stage() {
    for server in both() {
        let before = server.fd_count();
        let mut random = Random::new(13);
        for round in 0..150 {
            let length = random.below(300) as usize;
            let garbage = random.bytes(length);
            let mut client = connect(&server);
            // Each stage begins where the one before it was passed.
            let stages = [
                Vec::new(),
                FLAGS.to_be_bytes().to_vec(),
                [&FLAGS.to_be_bytes()[..], b"IHAVEOPT"].concat(),
                [&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat(),
            ];
            client.send(&stages[round % stages.len()]);
            let _ = client.try_send(&garbage);
            finish(&mut client);
        }
        for round in 0..40 {
            let length = random.below(300) as usize + 1;
            let garbage = random.bytes(length);
            let mut client = greeted(&server);
            if round % 2 == 0 {
                client.go("");
            }
            let _ = client.try_send(&garbage);
            finish(&mut client);
        }
        wait_for_descriptors(&server, before);
        server.assert_alive();
    }
}

/// Garbage on the raw socket, in the middle of a TLS session.
#[test]
fn garbage_beside_tls() {
    use std::io::Write;
    let server = tls().start();
    for stage in 0..2 {
        let mut client = connect(&server);
        client.send(&[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat());
        assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
        let mut client = client.handshake(server.pki().client_config()).unwrap();
        if stage == 1 {
            client.go("");
        }
        client.stream.sock.write_all(&option(OPT_LIST, b"")).unwrap();
        let (answer, _) = client.rest();
        assert_eq!(answer, b"");
    }
    server.assert_alive();
}
