//! Clients that vanish in the middle of replies, and clients that read none.

use std::time::Duration;

use super::{connect, plain, tls, wait_for_descriptors};
use crate::support::client::{CMD_WRITE, EPERM, FLAGS, Request};
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, image};

/// nbdkit 1.32 | a client that resets the connection in the middle of a reply aborts the
/// server
#[test]
fn a_reset_at_any_byte_of_a_reply() {
    for server in [plain().start(), tls().start()] {
        let before = server.fd_count();
        let requests: Vec<u8> = (0..128)
            .flat_map(|cookie| Request::read(cookie, 60_000 * cookie, 65_536).encode())
            .collect();
        let heads = 0..=17;
        let later = [1000, 65_551, 65_552, 65_553, 65_568, 200_000, 3_000_000];
        for received in heads.chain(later) {
            let mut client = connect(&server);
            client.send(&FLAGS.to_be_bytes());
            let mut client = if server.has_tls() {
                client.starttls(server.pki().client_config()).boxed()
            } else {
                client.boxed()
            };
            client.go("");
            client.send(&requests);
            client.receive(received);
            if received % 2 == 0 {
                client.reset();
            }
        }
        wait_for_descriptors(&server, before);
        server.assert_alive();
        assert!(!server.log_text().contains("panicked"));
    }
}

/// The same, in the middle of a payload that the server skips.
#[test]
fn a_reset_in_the_middle_of_a_refused_write() {
    for server in [plain().start(), tls().start()] {
        let before = server.fd_count();
        for sent in [0, 1, 1000, 100_000] {
            let write = Request { command: CMD_WRITE, length: 1 << 20, ..Request::default() };
            let mut client = server.go("");
            client.send(&[write.encode(), vec![0; sent]].concat());
            client.reset();
        }
        wait_for_descriptors(&server, before);
        server.assert_alive();
    }
}

/// nbdkit, qemu-nbd | a client that requests and never reads makes the server grow by
/// 512 MiB
///
/// Four clients want 80 MiB each in many requests, and four want 8 MiB in one. They get what
/// fits into the sockets; the server takes in no more requests than it can keep answers to,
/// keeps no more than its budget of 32 MiB, serves others meanwhile, and ends who is in
/// their way.
#[test]
fn clients_that_never_read_take_no_more_than_the_budget() {
    // Without a cache every waiting reply has its memory for itself.
    let servers = [plain(), tls()].map(|server| server.args(["--cache-size", "0"]).start());
    std::thread::scope(|scope| {
        for server in &servers {
            scope.spawn(|| never_read(server));
        }
    });
}

fn never_read(server: &Server) {
    const LIMIT_KIB: u64 = 80 * 1024;
    // The longest part of the image without zeros, for which no memory would be needed.
    let part = 589_824..589_824 + 327_680;
    assert!(image()[part.clone()].chunks(65_536).all(|piece| piece.iter().any(|byte| *byte != 0)));
    let mut greedy: Vec<_> = (0..4).map(|_| server.go("")).collect();
    for cookie in 0..250 {
        // One after another: requests that come together share what is decoded, and with
        // it the memory.
        for client in &mut greedy {
            client.send_request(Request::read(cookie, part.start as u64, part.len() as u32));
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    // More than sockets have room for.
    let whole = Request::read(0, 0, IMAGE_SIZE as u32);
    for _ in 0..4 {
        let mut client = server.go("");
        (0..8).for_each(|_| client.send_request(whole));
        greedy.push(client);
    }
    // Small requests find room whatever others do.
    let mut modest = server.go("");
    for offset in (0..IMAGE_SIZE).step_by(256 * 1024) {
        let from = offset as usize;
        assert!(modest.read_ok(offset, 4096) == image()[from..from + 4096]);
        std::thread::sleep(Duration::from_millis(20));
    }
    let write = Request { command: CMD_WRITE, ..Request::default() };
    assert_eq!(modest.request(write), EPERM);
    // A large one waits until those who are in the way are let go.
    assert!(modest.read_ok(0, IMAGE_SIZE as u32) == image());
    server.wait_for_cause("stalled");
    let peak = server.peak_rss_kib();
    assert!(peak < LIMIT_KIB, "{peak} KiB");
    drop(greedy);
    server.assert_alive();
}

/// nbdkit, qemu-nbd | a client that requests and never reads makes the server grow by
/// 512 MiB: what it asks for when enough waits for it stays in the sockets
#[test]
fn who_reads_nothing_is_not_read_from() {
    // Much more than sockets have room for, and each request is answered by a few bytes only.
    const FLOOD: usize = 64 << 20;
    let requests = Request::read(7, 0, 1).encode().repeat(10_000);
    for server in [plain().start(), tls().start()] {
        let mut client = server.go("");
        client.stream.socket().set_write_timeout(Duration::from_secs(2));
        let mut sent = 0;
        while client.try_send(&requests).is_ok() {
            sent += requests.len();
            assert!(sent < FLOOD, "it goes on reading");
        }
        // It is a matter between the two of them.
        server.assert_alive();
        assert!(server.peak_rss_kib() < 100 * 1024);
    }
}
