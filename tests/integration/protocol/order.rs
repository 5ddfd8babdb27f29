//! "Ordering of messages and writes", `NBD_CMD_DISC`: many requests at once.

use std::collections::HashMap;

use super::{BASE, servers};
use crate::support::client::{CMD_FLUSH, Client, Duplex, EINVAL, EPERM, Request};
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, Random, image};

/// Requests of all kinds, each with a cookie of its own.
fn requests(count: usize, seed: u64) -> Vec<Request> {
    let mut random = Random::new(seed);
    let request = |number| {
        // Cookies as they may be: small, large, with every byte used.
        let cookie = match number {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << 63,
            _ => random.number(),
        };
        let offset = random.below(IMAGE_SIZE - 70_000);
        let length = random.below(70_000) as u32;
        match number % 16 {
            5 => Request { command: CMD_FLUSH, cookie, ..Request::default() },
            6 => Request::read(cookie, IMAGE_SIZE, 1),
            7 => Request { command: 4, cookie, offset, length, flags: 0 },
            _ => Request::read(cookie, offset, length),
        }
    };
    (0..count).map(request).collect()
}

/// Takes one reply for each request, in whatever order, and checks it.
fn expect_replies<S: Duplex>(client: &mut Client<S>, requests: &[Request]) {
    let mut open: HashMap<u64, Request> =
        requests.iter().map(|request| (request.cookie, *request)).collect();
    assert_eq!(open.len(), requests.len());
    while !open.is_empty() {
        let reply = client.simple_reply();
        let request = open.remove(&reply.cookie).expect("an answer that nobody waits for");
        match request.command {
            0 if request.offset == IMAGE_SIZE => assert_eq!(reply.error, EINVAL),
            0 => {
                assert_eq!(reply.error, 0);
                let from = request.offset as usize;
                let data = client.receive(request.length as usize);
                assert!(data == image()[from..from + data.len()], "{request:?}");
            }
            CMD_FLUSH => assert_eq!(reply.error, 0),
            _ => assert_eq!(reply.error, EPERM),
        }
    }
}

/// "the server MUST set … cookie … to the value that was sent by the client"; "The server
/// MAY process commands out of order, and MAY reply out of order"; each is answered once.
///
/// kernel nbd client, 2024-10 | requeued request carries a new cookie
#[test]
fn every_request_is_answered_once_with_its_cookie() {
    for (seed, server) in servers("fixed-4k-zstd.hxz").into_iter().enumerate() {
        let requests = requests(128, seed as u64);
        let mut client = server.go("");
        // The first time nothing is cached, the second time everything.
        for _ in 0..2 {
            let bytes: Vec<u8> = requests.iter().flat_map(|request| request.encode()).collect();
            client.send(&bytes);
            expect_replies(&mut client, &requests);
        }
        client.disconnect();
    }
}

/// More than a connection may have in flight: the rest waits in the socket, none is lost.
#[test]
fn more_requests_than_fit_at_once() {
    for server in servers(BASE) {
        let requests = requests(1000, 7);
        let bytes: Vec<u8> = requests.iter().flat_map(|request| request.encode()).collect();
        let mut client = server.go("");
        client.send(&bytes);
        expect_replies(&mut client, &requests);
        client.disconnect();
    }
}

/// `NBD_CMD_DISC`: "The server MUST handle all outstanding requests, shut down the TLS
/// session (if one is running), and close the TCP session."
///
/// qemu-nbd | requests sent before DISC are dropped
#[test]
fn requests_before_disc_are_all_answered() {
    for archive in [BASE, "fixed-4k-zstd.hxz"] {
        for server in servers(archive) {
            let requests = requests(200, 3);
            let mut bytes: Vec<u8> = requests.iter().flat_map(|request| request.encode()).collect();
            bytes.extend(Request::disc().encode());
            let mut client = server.go("");
            client.send(&bytes);
            expect_replies(&mut client, &requests);
            // Inside TLS this is an end with close_notify.
            client.expect_end();
        }
    }
}

/// What comes behind DISC isn't read: "A client MUST NOT send anything to the server after
/// sending an `NBD_CMD_DISC` command."
#[test]
fn nothing_behind_disc_is_answered() {
    for server in servers(BASE) {
        let mut client = server.go("");
        client.send(&[Request::disc().encode(), Request::read(1, 0, 1).encode()].concat());
        client.expect_closed();
    }
}

/// `NBD_FLAG_CAN_MULTI_CONN`: several connections, several exports, at the same time.
#[test]
fn several_connections_at_once() {
    let server = Server::builder().archive("fixed-64k-zstd.hxz").start();
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let server = &server;
            scope.spawn(move || {
                let requests = requests(60, 100 + seed);
                let bytes: Vec<u8> = requests.iter().flat_map(|request| request.encode()).collect();
                let mut client = server.go("");
                client.send(&bytes);
                expect_replies(&mut client, &requests);
                client.disconnect();
            });
        }
    });
}
