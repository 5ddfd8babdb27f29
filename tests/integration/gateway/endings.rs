//! The end of a session, and replies that are still on their way then.

use std::time::Duration;

use super::{plain, tls};
use crate::support::client::{Client, Request, SIMPLE_REPLY_MAGIC, Session};
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, PATIENCE, image};

const ESHUTDOWN: u32 = 108;
const PIECE: u32 = 1 << 20;

/// How many replies came to reads of `PIECE` bytes at 4096 times the cookie, and how many
/// of them were data. Whatever comes has to be whole; `rest` ends with the last reply.
fn count(mut rest: &[u8]) -> (usize, usize) {
    let (mut replies, mut with_data) = (0, 0);
    while let Some((head, behind)) = rest.split_first_chunk::<16>() {
        assert_eq!(head[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        rest = behind;
        replies += 1;
        if error == 0 {
            let (data, behind) = rest.split_at(PIECE as usize);
            let from = cookie as usize * 4096;
            assert!(data == &image()[from..from + PIECE as usize]);
            rest = behind;
            with_data += 1;
        } else {
            assert_eq!(error, ESHUTDOWN);
        }
    }
    assert!(rest.is_empty(), "a reply was cut");
    (replies, with_data)
}

fn reads(number: u64) -> Vec<u8> {
    (0..number).flat_map(|cookie| Request::read(cookie, cookie * 4096, PIECE).encode()).collect()
}

/// Reads to the end, with a pause now and then.
fn read_slowly(client: &mut Client<Session>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut piece = vec![0; 256 * 1024];
    loop {
        match client.stream.read(&mut piece) {
            Ok(0) => return bytes,
            Ok(length) => bytes.extend(&piece[..length]),
            // A reset, or an end without close_notify, would have lost something.
            Err(error) => panic!("{error} after {} bytes", bytes.len()),
        }
        if bytes.len() % 7 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Closing while something was unread reset the connection; replies that the client had
/// not read yet were lost.
#[test]
fn replies_outlive_disc_and_close_notify() {
    for server in [plain().start(), tls().start()] {
        // With DISC and without; close_notify, or in clear a FIN, before anything is read.
        for disc in [true, false] {
            let mut client = server.connect();
            client.greet(crate::support::client::FLAGS);
            let mut requests = reads(12);
            if disc {
                requests.extend(Request::disc().encode());
            }
            let mut client = if server.has_tls() {
                let mut client = client.starttls(server.pki().client_config());
                client.go("");
                client.send(&requests);
                std::thread::sleep(Duration::from_millis(200));
                client.stream.conn.send_close_notify();
                client.stream.conn.write_tls(&mut client.stream.sock).unwrap();
                client.boxed()
            } else {
                client.go("");
                client.send(&requests);
                std::thread::sleep(Duration::from_millis(200));
                client.stream.shutdown(std::net::Shutdown::Write);
                client.boxed()
            };
            assert_eq!(count(&read_slowly(&mut client)), (12, 12));
        }
        server.assert_alive();
    }
}

/// Bytes behind a DISC, more than the server's buffer holds, were unread when it closed.
#[test]
fn bytes_behind_disc_take_no_reply_away() {
    for server in [plain().start(), tls().start()] {
        let mut client = server.go("");
        let requests = [reads(12), Request::disc().encode(), vec![0x55; 20_000]].concat();
        client.send(&requests);
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(count(&read_slowly(&mut client)), (12, 12));
    }
}

/// Sends many requests, and reads none of the replies before the server has been told to
/// end.
fn told_to_end_behind(server: &Server, requests: &[u8]) -> Client<Session> {
    let mut client = server.go("");
    client.send(requests);
    std::thread::sleep(Duration::from_millis(500));
    server.signal("TERM");
    server.wait_for_message("told to end: answering");
    client
}

/// "NBD_ESHUTDOWN": those that had arrived were closed upon, be they in the program's own
/// buffer or still in the socket.
#[test]
fn what_was_not_begun_is_refused_with_eshutdown() {
    // The buffer has room for some 140 requests.
    const REQUESTS: u64 = 600;
    for server in [plain(), tls()] {
        let mut server = server.args(["--shutdown-timeout", "10min"]).start();
        let mut client = told_to_end_behind(&server, &reads(REQUESTS));
        let (replies, with_data) = count(&read_slowly(&mut client));
        assert_eq!(replies, REQUESTS as usize);
        assert!((1..300).contains(&with_data), "{with_data}");
        assert_eq!(server.wait().code(), Some(0));
    }
}

/// The refusal of a write is no reason to leave what follows it without an answer; nor may
/// a payload that never comes delay the end.
#[test]
fn refusals_at_the_end_go_on_behind_payloads() {
    // More than are worked on at once.
    const READS: u64 = 300;
    for whole in [true, false] {
        let mut server = plain().args(["--shutdown-timeout", "10min"]).start();
        let write = Request { command: 1, cookie: READS, length: 5000, ..Request::default() };
        let payload = vec![0; if whole { 5000 } else { 10 }];
        let mut requests = [reads(READS), write.encode(), payload].concat();
        if whole {
            requests.extend(reads(3));
        }
        let mut client = told_to_end_behind(&server, &requests);
        let (replies, _) = count(&read_slowly(&mut client));
        assert_eq!(replies as u64, if whole { READS + 4 } else { READS + 1 });
        assert_eq!(server.wait().code(), Some(0));
    }
}

/// Ten seconds were the end whatever --shutdown-timeout said.
#[test]
fn a_slow_reader_may_have_all_of_the_shutdown_timeout() {
    const PATIENT: Duration = Duration::from_secs(13);
    let mut server = plain().args(["--shutdown-timeout", "1min"]).start();
    let mut client = server.go("");
    // More than the socket has room for, however much that is.
    let requests: Vec<u8> =
        (0..4).flat_map(|cookie| Request::read(cookie, 0, IMAGE_SIZE as u32).encode()).collect();
    client.send(&requests);
    client.receive(1);
    server.signal("TERM");
    let started = std::time::Instant::now();
    let length = 4 * (16 + IMAGE_SIZE as usize) - 1;
    let mut left = length;
    while left > 0 {
        let now = left.min(64 * 1024);
        client.receive(now);
        left -= now;
        let due = PATIENT.mul_f64((length - left) as f64 / length as f64);
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    client.expect_end();
    assert!(started.elapsed() > Duration::from_secs(11) && started.elapsed() < PATIENCE);
    assert_eq!(server.wait().code(), Some(0));
    assert!(!server.log_text().contains("still busy"));
}
