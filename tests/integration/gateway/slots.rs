//! Places for clients, and those who would take them all.

use std::net::{IpAddr, Ipv4Addr};

use super::plain;
use crate::support::client::FLAGS;
use crate::support::server::Server;
use crate::support::wait_until;

const HANDSHAKES: usize = 128;
const PER_ADDRESS: usize = 32;

/// Whoever gets no place is refused after five seconds; who has one may keep it for as long again.
const WAITING: [&str; 2] = ["--handshake-timeout", "10s"];

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, last).into()
}

fn comes_in(server: &Server, from: u8) -> bool {
    let mut client = server.connect_from(address(from));
    if !client.is_greeted() {
        return false;
    }
    client.send(&FLAGS.to_be_bytes());
    client.go("");
    client.read_ok(0, 1);
    true
}

/// qemu-nbd 7.2 | silent peers use up the connection slots
#[test]
fn one_address_can_not_take_the_places_of_others() {
    let server = plain().args(WAITING).start();
    let mut silent: Vec<_> =
        (0..PER_ADDRESS + 8).map(|_| server.connect_from(address(2))).collect();
    let greeted = silent.iter_mut().filter_map(|client| client.is_greeted().then_some(())).count();
    assert_eq!(greeted, PER_ADDRESS);
    server.wait_for_reason("handshakes_per_address");
    // Others come in, as many as they like, and at once.
    for from in 3..20 {
        assert!(comes_in(&server, from));
    }
    // And so does that address, once it has let go.
    silent.clear();
    wait_until("its places are free", || comes_in(&server, 2));
}

/// All addresses of a network together can't take all places to negotiate.
#[test]
fn one_network_can_not_take_all_places_to_negotiate() {
    const PER_NETWORK: usize = 64;
    let server = plain().args(WAITING).start();
    let mut silent: Vec<_> = (0..PER_NETWORK + 8)
        .map(|number| server.connect_from(address(2 + (number % 3) as u8)))
        .collect();
    let greeted = silent.iter_mut().filter_map(|client| client.is_greeted().then_some(())).count();
    assert_eq!(greeted, PER_NETWORK);
    server.wait_for_reason("handshakes_per_network");
    let mut other = server.connect_from(Ipv4Addr::new(127, 0, 1, 2));
    assert!(other.is_greeted());
}

/// All of them connect before the first one says anything: as many as a network has addresses, four
/// times as many as it has places to negotiate.
#[test]
fn machines_that_start_together_all_get_in() {
    let server = plain().start();
    let mut machines: Vec<_> = (1..=254).map(|last| server.connect_from(address(last))).collect();
    for machine in &mut machines {
        assert!(machine.is_greeted());
        machine.send(&FLAGS.to_be_bytes());
        machine.go("");
        machine.read_ok(0, 1);
    }
    assert!(!server.has_reason("handshakes_per_network"), "{}", server.log_text());
}

/// The places of silent peers aren't those of served clients.
#[test]
fn silent_peers_take_no_places_of_served_clients() {
    let server = plain().args(WAITING).start();
    let mut served = server.go("");
    let mut silent = Vec::new();
    for from in 0..6 {
        for _ in 0..PER_ADDRESS {
            // Each in a network of its own.
            silent.push(server.connect_from(Ipv4Addr::new(127, 0, 10 + from, 1)));
        }
    }
    let greeted = silent.iter_mut().filter_map(|client| client.is_greeted().then_some(())).count();
    assert_eq!(greeted, HANDSHAKES);
    server.wait_for_reason("handshakes");
    served.read_ok(0, 512);
}

/// Their places are free again when the deadline for handshakes is over.
#[test]
fn silent_peers_block_nobody_for_longer_than_the_deadline() {
    let server = plain().args(["--handshake-timeout", "1s", "--max-handshakes", "2"]).start();
    let silent = [(); 4].map(|()| server.connect());
    wait_until("somebody new comes in", || comes_in(&server, 99));
    drop(silent);
}

/// Served clients have their own limit; who has left gives a place back.
#[test]
fn no_more_clients_than_allowed_are_served() {
    let server = plain().args(["--max-connections", "2"]).start();
    let mut first = server.go("");
    let mut second = server.go("");
    // Their places are taken once they have been told that they are in.
    first.read_ok(0, 1);
    second.read_ok(0, 1);
    assert!(!comes_in(&server, 2));
    server.wait_for_reason("connections");
    second.read_ok(0, 1);
    first.disconnect();
    wait_until("a place is free", || comes_in(&server, 2));
    second.read_ok(0, 1);
}

/// Served clients of one address took all places.
#[test]
fn one_address_can_not_take_all_places_to_be_served() {
    for option in [&[][..], &["--max-connections-per-address", "3"]] {
        let server = plain().args(option).start();
        let most = if option.is_empty() { 64 } else { 3 };
        let come_in = || {
            let mut client = server.connect_from(address(2));
            assert!(client.is_greeted());
            client.send(&FLAGS.to_be_bytes());
            client.go("");
            client
        };
        let mut served: Vec<_> = (0..most).map(|_| come_in()).collect();
        served.iter_mut().for_each(|client| drop(client.read_ok(0, 1)));
        // It is told that it is in before it takes its place, and then let go.
        come_in().expect_closed();
        server.wait_for_reason("connections_per_address");
        for from in 3..6 {
            assert!(comes_in(&server, from));
        }
        for client in &mut served {
            client.read_ok(512, 1);
        }
        served.pop().unwrap().disconnect();
        wait_until("its place is free", || {
            let mut client = come_in();
            client.try_send(&crate::support::client::Request::read(0, 0, 1).encode()).is_ok()
                && std::io::Read::read_exact(&mut client.stream, &mut [0; 17]).is_ok()
        });
    }
}
