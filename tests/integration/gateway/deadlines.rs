//! Clients that take their time.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use super::{connect, plain, tls, wait_for_descriptors};
use crate::support::client::{
    Client, Duplex, FLAGS, OPT_LIST, OPT_STARTTLS, Request, ack, option, option_head,
};
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, PATIENCE, wait_until};

const DEADLINE: Duration = Duration::from_secs(1);

/// Sends `bytes` again and again, one by one, until the server has closed. It must not
/// have closed at once, but because time was up.
fn drip<S: Duplex>(mut client: Client<S>, bytes: &[u8], started: Instant) {
    for byte in bytes.iter().cycle() {
        if client.try_send(&[*byte]).is_err() {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "it goes on for ever");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(started.elapsed() >= DEADLINE, "closed for another reason");
}

/// nbdkit 1.32, nbd-server 3.24 | no deadline for the NBD handshake (seen: 75 s and on)
#[test]
fn the_handshake_has_a_deadline_however_slowly_bytes_drip() {
    let in_clear = plain().args(["--handshake-timeout", "1s"]).start();
    let with_tls = tls().args(["--handshake-timeout", "1s"]).start();
    let endless = [&FLAGS.to_be_bytes()[..], &option_head(99, 60_000)].concat();
    let lists = option(OPT_LIST, b"");
    std::thread::scope(|scope| {
        for server in [&in_clear, &with_tls] {
            // Never a whole option.
            let endless = &endless;
            scope.spawn(move || {
                let started = Instant::now();
                let mut client = connect(server);
                client.send(endless);
                drip(client, &[0], started);
            });
            // One option after another, each in time.
            let lists = &lists;
            scope.spawn(move || {
                let started = Instant::now();
                let mut client = connect(server);
                client.send(&FLAGS.to_be_bytes());
                drip(client, lists, started);
            });
            // Not a byte.
            scope.spawn(|| {
                let started = Instant::now();
                connect(server).expect_closed();
                assert!(started.elapsed() >= DEADLINE);
            });
        }
        // The TLS handshake counts too.
        scope.spawn(|| {
            let started = Instant::now();
            let mut client = connect(&with_tls);
            client.send(&[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat());
            assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
            let hello = super::tls::client_hello(with_tls.pki().client_config());
            drip(client, &hello, started);
        });
        // And what follows inside TLS.
        scope.spawn(|| {
            let started = Instant::now();
            let mut client = with_tls.greeted();
            client.send(&option_head(99, 60_000));
            drip(client, &[0], started);
        });
    });
    in_clear.wait_for_reason("deadline");
    with_tls.wait_for_reason("deadline");
    in_clear.assert_alive();
    with_tls.assert_alive();
}

#[test]
fn the_tls_handshake_has_a_deadline_of_its_own() {
    let server =
        tls().args(["--handshake-timeout", "10min", "--tls-handshake-timeout", "1s"]).start();
    let started = Instant::now();
    let mut client = connect(&server);
    client.send(&[&FLAGS.to_be_bytes()[..], &option(OPT_STARTTLS, b"")].concat());
    assert_eq!(client.option_replies(OPT_STARTTLS), [ack()]);
    client.rest();
    assert!(started.elapsed() >= DEADLINE);
    let line = server.wait_for_reason("tls_handshake");
    assert_eq!(line.json["cause"], "deadline");
}

/// The deadline is for the handshake: a client that is served may be silent for longer.
#[test]
fn a_served_client_may_be_silent() {
    for server in [plain(), tls()] {
        let server = server.args(["--handshake-timeout", "1s"]).start();
        let mut client = server.go("");
        std::thread::sleep(DEADLINE + DEADLINE / 2);
        client.read_ok(0, 1);
        client.disconnect();
    }
}

/// Clients at every stage: before their flags, in negotiation, served.
fn clients(server: &Server) -> Vec<Client<crate::support::client::Session>> {
    let mut clients = Vec::new();
    for _ in 0..5 {
        clients.push(connect(server).boxed());
        clients.push(server.greeted());
        let mut client = server.go("");
        client.read_ok(0, 1);
        clients.push(client);
    }
    clients
}

/// No more than this is used in a second of doing nothing; a loop would use all of it.
const NEXT_TO_NOTHING: Duration = Duration::from_millis(300);

/// nbd-server pull request 173 | TLS end of stream loops
#[test]
fn no_processor_time_is_used_while_idle() {
    for server in [plain().start(), tls().start()] {
        let before = server.fd_count();
        let mut clients = clients(&server);
        let idle = |what: &str| {
            let start = server.cpu_time();
            std::thread::sleep(Duration::from_secs(1));
            let used = server.cpu_time() - start;
            assert!(used < NEXT_TO_NOTHING, "{used:?} {what}");
        };
        idle("with silent clients");
        for client in &clients {
            client.stream.socket().shutdown(Shutdown::Write);
        }
        idle("with clients that have sent a FIN");
        // Clients that have sent a FIN are let go.
        for client in &mut clients {
            client.rest();
        }
        wait_for_descriptors(&server, before);
        server.assert_alive();
    }
}

/// nbd-server pull request 173 | TLS end of stream loops: with close_notify alone, behind which
/// the socket stays open, and with an end that nobody can be told of, as replies wait
#[test]
fn no_processor_time_is_used_after_close_notify() {
    // What has to be read before the end is waited for throughout.
    let server = tls().args(["--stall-timeout", "10min"]).start();
    let ended = |requests: &[u8]| {
        let mut client = server.connect();
        client.greet(FLAGS);
        let mut client = client.starttls(server.pki().client_config());
        client.go("");
        client.send(requests);
        client.stream.conn.send_close_notify();
        client.stream.conn.write_tls(&mut client.stream.sock).unwrap();
        client
    };
    let more_than_fits: Vec<u8> =
        (0..8).flat_map(|cookie| Request::read(cookie, 0, IMAGE_SIZE as u32).encode()).collect();
    let clients = [ended(&[]), ended(&more_than_fits), ended(&more_than_fits)];
    // Until the sockets are full.
    let mut before = server.cpu_time();
    wait_until("it has nothing to do", || {
        std::thread::sleep(Duration::from_secs(1));
        let used = server.cpu_time() - before;
        before += used;
        used < NEXT_TO_NOTHING
    });
    drop(clients);
    server.assert_alive();
}

/// A client that took its export and then vanished without a word is noticed by a FIN or
/// a reset at once.
#[test]
fn vanished_clients_leave_nothing_behind() {
    for server in [plain().start(), tls().start()] {
        let before = server.fd_count();
        for (number, client) in clients(&server).into_iter().enumerate() {
            if number % 2 == 0 {
                client.reset();
            }
        }
        wait_for_descriptors(&server, before);
        wait_until("their places are free", || {
            server.log().iter().filter(|line| line.json["how"] == "left").count() >= 1
        });
    }
}
