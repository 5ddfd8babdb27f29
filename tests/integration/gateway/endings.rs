//! The end of a session, and replies that are still on their way then.

use std::time::Duration;

use super::{plain, tls};
use crate::support::client::{Client, Request, SIMPLE_REPLY_MAGIC, Session};
use crate::support::{IMAGE_SIZE, PATIENCE, image};

const PIECE: u32 = 1 << 20;

/// The cookies of replies to reads of `PIECE` bytes at 4096 times the cookie, in order. Each has
/// to be whole and no error; `rest` ends with the last one.
fn answered(mut rest: &[u8]) -> Vec<u64> {
    let mut cookies = Vec::new();
    while let Some((head, behind)) = rest.split_first_chunk::<16>() {
        assert_eq!(head[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        assert_eq!(error, 0);
        let (data, behind) = behind.split_at(PIECE as usize);
        let from = cookie as usize * 4096;
        assert!(data == &image()[from..from + PIECE as usize]);
        rest = behind;
        cookies.push(cookie);
    }
    assert!(rest.is_empty(), "a reply was cut");
    cookies.sort_unstable();
    cookies
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
            let (first, mut client) = if server.has_tls() {
                let mut client = client.starttls(server.pki().client_config());
                client.go("");
                client.send(&requests);
                // The first reply is on its way, and with it more than a socket holds.
                let first = client.receive(1);
                client.stream.conn.send_close_notify();
                client.stream.conn.write_tls(&mut client.stream.sock).unwrap();
                (first, client.boxed())
            } else {
                client.go("");
                client.send(&requests);
                let first = client.receive(1);
                client.stream.shutdown(std::net::Shutdown::Write);
                (first, client.boxed())
            };
            let replies = [first, read_slowly(&mut client)].concat();
            assert!(answered(&replies).into_iter().eq(0..12));
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
        let first = client.receive(1);
        let replies = [first, read_slowly(&mut client)].concat();
        assert!(answered(&replies).into_iter().eq(0..12));
    }
}

/// Requests that had arrived got NBD_ESHUTDOWN, which clients that reconnect hand to their users.
#[test]
fn what_was_not_accepted_gets_no_reply() {
    // More than the server takes in while nobody reads its replies.
    const REQUESTS: u64 = 1200;
    for server in [plain(), tls()] {
        let mut server = server.args(["--shutdown-timeout", "10min"]).start();
        let mut client = server.go("");
        client.send(&reads(REQUESTS));
        // By now some have been accepted, and more has to be sent than a socket holds.
        let first = client.receive(1);
        server.signal("TERM");
        server.wait_for_log("it shuts down", |line| line.json["signal"].is_string());
        let answered = answered(&[first, read_slowly(&mut client)].concat());
        let count = answered.len() as u64;
        assert!((1..REQUESTS / 2).contains(&count), "{count}");
        // Nobody was passed over.
        assert!(answered.into_iter().eq(0..count));
        assert_eq!(server.wait().code(), Some(0));
        let line = server.wait_for_log("a session ended", |line| !line.json["how"].is_null());
        assert_eq!(
            (&line.json["how"], &line.json["requests"]),
            (&"shutting_down".into(), &count.into())
        );
    }
}

/// Nor may a payload that never comes delay the end.
#[test]
fn a_payload_that_never_comes_does_not_delay_the_end() {
    const EPERM: u32 = 1;
    for server in [plain(), tls()] {
        let mut server = server.args(["--shutdown-timeout", "10min"]).start();
        let mut client = server.go("");
        let write = Request { command: 1, cookie: 1, length: 5000, ..Request::default() };
        client.send(&[write.encode().to_vec(), vec![0; 10]].concat());
        assert_eq!(client.simple_reply().error, EPERM);
        server.signal("TERM");
        client.expect_end();
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
    assert!(!server.log_text().contains("\"shutdown_deadline\""));
}
