//! The end, and clients who would delay it.

use std::time::{Duration, Instant};

use super::{connect, plain, tls};
use crate::support::client::{Client, FLAGS, OPT_STARTTLS, Request, Session, ack, option};
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, image};

/// Clients of whom nothing is owed, at every stage.
fn idle(server: &Server) -> Vec<Client<Session>> {
    let mut clients = vec![connect(server).boxed(), server.greeted(), server.go("")];
    if server.has_tls() {
        let mut client = connect(server);
        client.send(&[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat());
        assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
        clients.push(client.boxed());
    }
    clients
}

/// Waits until it has received the signal.
fn is_shutting_down(server: &Server) {
    server.wait_for_log("it shuts down", |line| line.json["signal"].is_string());
}

/// A client that has asked for more than fits into its socket, and reads nothing of it.
fn stalled(server: &Server) -> Client<Session> {
    let mut client = server.go("");
    let requests: Vec<u8> =
        (0..7).flat_map(|cookie| Request::read(cookie, 0, IMAGE_SIZE as u32).encode()).collect();
    client.send(&requests);
    client.receive(1);
    client
}

/// nbdkit 1.32 | alive 5 s after SIGTERM with idle clients
#[test]
fn idle_clients_do_not_delay_the_end() {
    for server in [plain(), tls()] {
        // Much longer than the test waits.
        let mut server = server.args(["--shutdown-timeout", "10min"]).start();
        let mut clients = idle(&server);
        assert_eq!(server.terminate().code(), Some(0));
        for client in &mut clients {
            client.rest();
        }
        is_shutting_down(&server);
    }
}

/// qemu CVE-2024-7409 | a socket held open during shutdown
#[test]
fn stalled_clients_delay_the_end_until_the_deadline() {
    for server in [plain(), tls()] {
        let mut server = server.args(["--shutdown-timeout", "1s"]).start();
        let _idle = idle(&server);
        let _stalled = [stalled(&server), stalled(&server)];
        let started = Instant::now();
        assert_eq!(server.terminate().code(), Some(0));
        // They had their time, and no more.
        assert!(started.elapsed() >= Duration::from_millis(900));
        // Each of them is logged, with what it was read.
        let log = server.log();
        let dropped: Vec<_> = log.iter().filter(|line| line.json["how"] == "dropped").collect();
        assert_eq!(dropped.len(), 2, "{}", server.log_text());
        for line in dropped {
            assert_eq!(line.json["requests"], 7, "{}", line.text);
            assert!((1..=7).contains(&line.json["unanswered"].as_u64().unwrap()), "{}", line.text);
        }
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    for signal in ["TERM", "INT"] {
        let mut server = plain().args(["--shutdown-timeout", "10min"]).start();
        let _stalled = stalled(&server);
        server.signal("INT");
        is_shutting_down(&server);
        assert!(server.is_running());
        server.signal(signal);
        assert_eq!(server.wait().code(), Some(0));
        assert!(server.has_reason("second_signal"), "{}", server.log_text());
    }
}

/// "Terminating the transmission phase": "On a server shutdown, the server SHOULD wait for
/// inflight requests to be serviced prior to initiating a hard disconnect."
#[test]
fn requests_in_flight_are_answered() {
    const PIECE: u32 = 1 << 20;
    for server in [plain(), tls()] {
        let mut server = server.args(["--shutdown-timeout", "10min"]).start();
        let mut client = server.go("");
        let requests: Vec<u8> = (0..40)
            .flat_map(|cookie| Request::read(cookie, cookie * 4096, PIECE).encode())
            .collect();
        client.send(&requests);
        // The first byte of an answer: by now the server has taken all of them in, and more
        // has to be sent than a socket holds.
        let first = client.receive(1);
        assert_eq!(first, [0x67]);
        server.signal("TERM");
        is_shutting_down(&server);

        let mut open: Vec<u64> = (0..40).collect();
        client.expect(&[0x44, 0x66, 0x98]);
        loop {
            let head = client.receive(12);
            assert_eq!(head[..4], [0; 4]);
            let cookie = u64::from_be_bytes(head[4..].try_into().unwrap());
            open.remove(open.iter().position(|open| *open == cookie).unwrap());
            let from = cookie as usize * 4096;
            assert!(client.receive(PIECE as usize) == image()[from..from + PIECE as usize]);
            if open.is_empty() {
                break;
            }
            client.expect(&[0x67, 0x44, 0x66, 0x98]);
        }
        client.expect_end();
        assert_eq!(server.wait().code(), Some(0));
        let end = server.wait_for_log("it ended", |line| line.json["requests"] == 40);
        assert_eq!(end.json["how"], "shutting_down");
        assert!(end.json["unanswered"].is_null(), "{}", end.text);
    }
}

/// The server has ended the session, so it is no failed connection.
#[test]
fn who_goes_away_while_it_is_drained_is_logged_as_shut_down() {
    for server in [plain(), tls()] {
        let mut server = server.args(["--shutdown-timeout", "10min"]).start();
        let client = stalled(&server);
        server.signal("TERM");
        is_shutting_down(&server);
        client.stream.socket().reset_on_close();
        drop(client);
        assert_eq!(server.wait().code(), Some(0));
        let end = server.wait_for_log("it ended", |line| !line.json["how"].is_null());
        assert_eq!((&end.json["how"], &end.json["requests"]), (&"shutting_down".into(), &7.into()));
        assert!((1..=7).contains(&end.json["unanswered"].as_u64().unwrap()), "{}", end.text);
        assert!(!server.has_reason("session"), "{}", server.log_text());
    }
}

/// nbd-server CVE-2015-0847 | unsafe signal handling deadlocks
#[test]
fn a_storm_of_signals_under_load() {
    let mut server = plain().start();
    std::thread::scope(|scope| {
        let load = |number: u64| {
            let mut client = server.go("");
            move || {
                // The server closes at some point; until then every answer is right.
                for round in 0..10_000 {
                    let offset = (number * 7919 + round * 4096) % (IMAGE_SIZE - 4096);
                    if client.try_send(&Request::read(1, offset, 4096).encode()).is_err() {
                        return;
                    }
                    let mut reply = vec![0; 16 + 4096];
                    if std::io::Read::read_exact(&mut client.stream, &mut reply).is_err() {
                        return;
                    }
                    assert!(reply[16..] == image()[offset as usize..][..4096]);
                }
            }
        };
        let loads = [load(1), load(2)];
        loads.into_iter().for_each(|load| drop(scope.spawn(load)));
        for signal in ["TERM", "INT", "TERM", "TERM", "INT", "TERM"] {
            server.signal(signal);
        }
    });
    assert_eq!(server.wait().code(), Some(0));
}

/// Nobody new comes in while it ends.
#[test]
fn nobody_is_accepted_while_it_ends() {
    let mut server = plain().args(["--shutdown-timeout", "10min"]).start();
    let _stalled = stalled(&server);
    let address = server.address();
    server.signal("TERM");
    is_shutting_down(&server);
    crate::support::wait_until("the socket is closed", || {
        std::net::TcpStream::connect(address).is_err()
    });
    assert!(server.is_running());
}
