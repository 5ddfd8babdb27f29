//! Behind a load balancer: who it says that it forwards.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Shutdown};
use std::time::{Duration, Instant};

use super::{plain, tls};
use crate::support::client::{
    Client, FLAGS, GREETING, OPT_GO, Plain, Request, connect_from, info_data, option,
};
use crate::support::server::{Builder, Line, Server};
use crate::support::wait_until;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header: version and command, family and transport, and what follows.
fn header(command: u8, kind: u8, block: &[u8]) -> Vec<u8> {
    let length = (block.len() as u16).to_be_bytes();
    [SIGNATURE, &[command, kind], &length, block].concat()
}

/// The header of a client with that address.
fn from(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(v4) => {
            header(0x21, 0x11, &[&v4.octets()[..], &[10, 0, 0, 1, 1, 2, 3, 4]].concat())
        }
        IpAddr::V6(v6) => header(0x21, 0x21, &[&v6.octets()[..], &[7; 20]].concat()),
    }
}

fn local() -> Vec<u8> {
    header(0x20, 0, b"")
}

/// A server behind the balancer 127.0.0.1, for clients of 192.0.2.0/24 alone.
fn behind() -> Builder {
    plain().args(["--proxy-from", "127.0.0.1", "--allow", "192.0.2.0/24", "--insecure-no-tls"])
}

/// A connection of the balancer that has sent that.
fn sending(server: &Server, bytes: &[u8]) -> Client<Plain> {
    let mut client = server.connect();
    client.send(bytes);
    client
}

/// Chooses the default export and reads a byte.
fn comes_in(mut client: Client<Plain>) -> Client<Plain> {
    client.greet(FLAGS);
    client.go("");
    client.read_ok(0, 1);
    client
}

/// Not closed, and not a byte from the server for a while.
fn assert_silent(client: &mut Client<Plain>) {
    client.stream.set_read_timeout(Duration::from_millis(200));
    let error = client.stream.read(&mut [0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    client.stream.set_read_timeout(crate::support::PATIENCE);
}

fn is_from(line: &Line, peer: &str, via: &str) -> bool {
    let fields = |of: &serde_json::Value| of["peer"] == peer && of["via"] == via;
    fields(&line.json) || fields(&line.json["span"])
}

/// Waits for a line about that client whose field `name` has that value.
fn assert_logged(server: &Server, (name, value): (&str, &str), peer: &str, via: &str) -> Line {
    server.wait_for_log(value, |line| line.json[name] == value && is_from(line, peer, via))
}

fn assert_reading(server: &Server, peer: &str, via: &str) {
    server.wait_for_log("it reads", |line| line.is_reading() && is_from(line, peer, via));
}

#[test]
fn the_client_is_judged_and_not_the_balancer() {
    let server = behind().start();
    comes_in(sending(&server, &from("192.0.2.7"))).disconnect();
    assert_reading(&server, "192.0.2.7", "127.0.0.1");
    assert_logged(&server, ("how", "left"), "192.0.2.7", "127.0.0.1");
    for other in ["198.51.100.7", "2001:db8::7", "192.0.3.7"] {
        sending(&server, &from(other)).expect_closed();
        assert_logged(&server, ("cause", "no_rule_for_address"), other, "127.0.0.1");
    }
    // Another spelling of the same address.
    comes_in(sending(&server, &from("::ffff:192.0.2.8")));
    assert_reading(&server, "192.0.2.8", "127.0.0.1");
    // Who isn't named as a balancer has to be allowed itself.
    server.connect_from([127, 0, 0, 2]).expect_closed();
}

#[test]
fn deny_and_rules_are_about_the_client() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    let write = |network: &str| {
        let rule = format!("[[rule]]\naction = \"allow\"\nnetwork = \"{network}\"\n");
        std::fs::write(&rules, rule).unwrap();
    };
    write("192.0.2.0/24");
    let server = tls()
        .args(["--proxy-from", "127.0.0.0/8", "--deny", "192.0.2.66,127.0.0.3", "--rules"])
        .arg(&rules)
        .start();
    let connect = |balancer: [u8; 4], client: &str| {
        let mut connected = server.connect_from(balancer);
        connected.send(&from(client));
        connected
    };
    connect([127, 0, 0, 1], "192.0.2.66").expect_closed();
    // A balancer that may not come in for itself still forwards others.
    let mut stays = connect([127, 0, 0, 3], "192.0.2.7");
    let mut goes = connect([127, 0, 0, 4], "192.0.2.99");
    stays.greet(FLAGS);
    goes.greet(FLAGS);
    let mut stays = stays.starttls(server.pki().client_config());
    let mut goes = goes.starttls(server.pki().client_config());
    stays.go("");
    goes.go("");
    stays.read_ok(0, 1);
    write("192.0.2.0/28");
    server.signal("HUP");
    goes.expect_closed();
    assert_logged(&server, ("reason", "dismissed"), "192.0.2.99", "127.0.0.4");
    stays.read_ok(0, 1);
}

/// What isn't said by a balancer doesn't count; nor does anything change for others.
#[test]
fn a_header_from_anybody_else_is_broken_nbd() {
    let server = plain().args(["--proxy-from", "127.0.0.9"]).start();
    server.assert_alive();
    let mut client = sending(&server, &from("127.0.0.1"));
    client.expect(GREETING);
    client.expect_closed();
    server.wait_for_cause("unknown_client_flags");
    let server = plain().args(["--proxy-from", "127.0.0.9", "--allow", "127.0.0.9"]).start();
    sending(&server, &from("127.0.0.9")).expect_closed();
}

#[test]
fn nothing_is_sent_before_the_header_is_whole() {
    let server = behind().start();
    let mut client = server.connect();
    assert_silent(&mut client);
    let header = from("192.0.2.7");
    let (last, rest) = header.split_last().unwrap();
    for byte in rest {
        client.send(&[*byte]);
    }
    assert_silent(&mut client);
    client.send(&[*last]);
    comes_in(client);
}

/// A byte too many that was read with the header would be missing from what follows.
#[test]
fn what_follows_the_header_is_the_client_s() {
    let server = behind().start();
    let go = option(OPT_GO, &info_data(b"", &[]));
    let padded = header(
        0x21,
        0x11,
        &[&[192, 0, 2, 9, 1, 1, 1, 1, 0, 1, 0, 2, 4, 0, 100][..], &[0; 100]].concat(),
    );
    for header in [from("192.0.2.7"), from("::ffff:192.0.2.7"), padded] {
        let read = Request::read(7, 0, 512).encode();
        let all = [header, FLAGS.to_be_bytes().to_vec(), go.clone(), read].concat();
        let mut client = sending(&server, &all);
        client.expect(GREETING);
        assert_eq!(client.option_replies(OPT_GO).pop(), Some(crate::support::client::ack()));
        assert_eq!(client.simple_reply().error, 0);
        assert_eq!(client.receive(512), crate::support::image()[..512]);
    }
}

#[test]
fn tls_comes_behind_the_header() {
    let server = tls().args(["--proxy-from", "127.0.0.1", "--allow", "2001:db8::/32"]).start();
    let mut client = sending(&server, &from("2001:db8::7"));
    client.greet(FLAGS);
    let mut client = client.starttls(server.pki().client_config());
    client.go("");
    client.read_ok(0, 1);
    // A ClientHello is no header.
    let mut client = sending(&server, b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03");
    client.expect_closed();
    let line = server.wait_for_cause("not_a_header");
    assert!(line.message().contains(r#""\x16\x03\x01\x02"#), "{}", line.text);
}

/// A connection that ends within the header is nobody's.
#[test]
fn cut_at_every_byte() {
    let server = behind().start();
    for header in [from("192.0.2.7"), from("2001:db8::7"), local()] {
        for length in 0..header.len() {
            let mut client = sending(&server, &header[..length]);
            client.stream.shutdown(Shutdown::Write);
            client.expect_closed();
            if length > 0 {
                server.wait_for_log("it was cut", |line| {
                    let names_length = line.message().contains(&format!(" {length} bytes"));
                    line.json["cause"] == "closed_early" && names_length
                });
            }
        }
    }
    comes_in(sending(&server, &from("192.0.2.7")));
}

/// Balancers look every other second whether a server lives: that isn't worth a line each.
#[test]
fn looks_of_the_balancer_fill_no_log() {
    let server = behind().start();
    for _ in 0..20 {
        drop(server.connect());
        server.connect().reset();
        drop(sending(&server, &local()));
        sending(&server, &local()).expect_closed();
    }
    // Where it may come in for itself, that is no failure either.
    let allowed = behind().args(["--allow", "127.0.0.1", "-v"]).start();
    for _ in 0..5 {
        drop(sending(&allowed, &local()));
        assert!(sending(&allowed, &local()).is_greeted());
    }
    comes_in(sending(&allowed, &local())).disconnect();
    allowed.wait_for_log("a health check is logged", |line| line.json["health_check"] == true);
    comes_in(sending(&server, &from("192.0.2.7")));
    for server in [server, allowed] {
        let lines = server.log();
        assert!(!lines.iter().any(Line::is_failure), "{}", server.log_text());
    }
}

/// LOCAL: the balancer speaks for itself, and is judged by its own address.
#[test]
fn the_balancer_s_own_connections_are_its_own() {
    // By default this machine may come in, and the balancer is on it.
    let server = plain().args(["--proxy-from", "127.0.0.1"]).start();
    comes_in(sending(&server, &local()));
    // Whatever else stands in such a header.
    comes_in(sending(&server, &header(0x20, 0x11, &from("192.0.2.7")[16..])));
    comes_in(sending(&server, &header(0x20, 0xee, b"anything")));
    let server = plain().args(["--proxy-from", "127.0.0.1", "--deny", "127.0.0.1"]).start();
    sending(&server, &local()).expect_closed();
}

/// What is this machine's isn't had by claiming to be on it.
#[test]
fn nobody_is_on_this_machine_by_saying_so() {
    let default = plain().args(["--proxy-from", "127.0.0.1"]).start();
    default.wait_for_reason("no_proxied_clients");
    let named = plain()
        .args(["--proxy-from", "127.0.0.1,unix", "--allow", "127.0.0.0/8,::1", "--insecure-no-tls"])
        .start();
    let all = plain()
        .args(["--proxy-from", "127.0.0.1", "--allow", "0.0.0.0/0,::/0", "--insecure-no-tls"])
        .start();
    for server in [default, named, all] {
        for claim in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "255.255.255.255",
            "224.0.0.1",
            "ff02::1",
        ] {
            sending(&server, &from(claim)).expect_closed();
            let said = claim.trim_start_matches("::ffff:");
            server.wait_for_log("the address is refused", |line| {
                line.json["reason"] == "proxy_address"
                    && line.message().contains(&format!(" {said},"))
            });
        }
    }
    // Without TLS others aren't served, whoever forwards them.
    let (code, stderr) =
        plain().args(["--proxy-from", "127.0.0.1", "--allow", "192.0.2.0/24"]).fail();
    assert!(code == 2 && stderr.contains("--tls-cert"), "{stderr}");
}

#[test]
fn what_can_not_be_judged_is_refused() {
    let server = behind().args(["--allow", "0.0.0.0/0,::/0,127.0.0.1"]).start();
    let v4 = &from("192.0.2.7")[16..];
    let mut long = header(0x21, 0x11, v4);
    long[14..16].copy_from_slice(&2049u16.to_be_bytes());
    let mut checked = header(0x21, 0x11, &[v4, &[3, 0, 4, 1, 2, 3, 4]].concat());
    for (sent, cause) in [
        (&b"PROXY TCP4 192.0.2.7 10.0.0.1 5000 10809\r\n"[..], "version_1"),
        (b"PROXY UNKNOWN\r\n", "version_1"),
        (&FLAGS.to_be_bytes(), "not_a_header"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not_a_header"),
        (b"\n2026-01-01 forged\x1b[31m", "not_a_header"),
        (&header(0x21, 0x00, b""), "no_address"),
        (&header(0x21, 0x31, &[0; 216]), "unix_client"),
        (&header(0x21, 0x12, v4), "datagram"),
        (&header(0x21, 0x22, &[1; 36]), "datagram"),
        (&header(0x21, 0x51, v4), "unknown_family"),
        (&header(0x22, 0x11, v4), "unknown_command"),
        (&header(0x31, 0x11, v4), "unsupported_version"),
        (&header(0x21, 0x11, &v4[..8]), "too_short"),
        (&header(0x21, 0x11, &[v4, &[4, 0, 9]].concat()), "malformed_tlv"),
        (&long, "too_long"),
        (&checked, "checksum_mismatch"),
    ] {
        let known = server.log().len();
        sending(&server, sent).expect_closed();
        wait_until("it is logged", || {
            server.log()[known..].iter().any(|line| {
                (&line.json["reason"], &line.json["cause"], &line.json["peer"])
                    == (&"proxy_header".into(), &cause.into(), &"127.0.0.1".into())
            })
        });
    }
    // What was sent instead is shown, and forges no line.
    let log = server.log_text();
    for shown in [r"\x00\x00\x00\x03", "GET / HTTP/1", r"\n2026-01-01 "] {
        assert!(log.contains(&shown.replace('\\', r"\\")), "{shown}: {log}");
    }
    // One that is right.
    checked.truncate(16 + 12 + 3);
    checked.extend(0x7f3e_8a07_u32.to_be_bytes());
    comes_in(sending(&server, &checked));
}

/// Silence, and a byte now and then.
#[test]
fn the_header_has_a_deadline_however_slowly_bytes_drip() {
    let server = behind().args(["--handshake-timeout", "1s"]).start();
    let started = Instant::now();
    server.connect().expect_closed();
    assert!(started.elapsed() >= Duration::from_millis(900), "{:?}", started.elapsed());
    server.wait_for_cause("nothing_sent");
    assert_drips_in_vain(&server, Duration::from_secs(1));
    server.wait_for_cause("timed_out");
    // It is shorter than that of the handshake, which is 30 seconds here.
    assert_drips_in_vain(&behind().start(), Duration::from_secs(5));
}

fn assert_drips_in_vain(server: &Server, deadline: Duration) {
    let mut client = server.connect();
    let started = Instant::now();
    for byte in from("192.0.2.7").iter().cycle() {
        if client.try_send(&[*byte]).is_err() {
            break;
        }
        assert!(started.elapsed() < deadline * 3, "it isn't closed");
        std::thread::sleep(deadline / 20);
    }
    assert!(started.elapsed() >= deadline - Duration::from_millis(100));
}

/// The wait for the header is a part of the handshake: a client that sends it late is closed
/// before one that connected after it and sent it at once.
#[test]
fn a_late_header_leaves_less_for_the_handshake() {
    let server = behind().args(["--handshake-timeout", "5s"]).start();
    let mut late = server.connect();
    std::thread::sleep(Duration::from_secs(2));
    let mut prompt = server.connect();
    prompt.send(&from("192.0.2.8"));
    late.send(&from("192.0.2.7"));
    for client in [&mut late, &mut prompt] {
        client.expect(GREETING);
        client.expect_closed();
    }
    for address in ["192.0.2.7", "192.0.2.8"] {
        assert_logged(&server, ("reason", "deadline"), address, "127.0.0.1");
    }
    let log = server.log();
    let closed = |address: &str| {
        let is_it = |line: &Line| line.json["reason"] == "deadline" && line.json["peer"] == address;
        log.iter().position(is_it).unwrap()
    };
    assert!(closed("192.0.2.7") < closed("192.0.2.8"), "{}", server.log_text());
}

#[test]
fn limits_for_an_address_are_the_client_s() {
    let server = behind()
        .args(["--max-handshakes-per-address", "3", "--max-connections-per-address", "2"])
        .args(["--max-handshakes-per-network", "5", "--handshake-timeout", "10s"])
        .start();
    // More than one address may have, all of them from the balancer.
    let mut waiting: Vec<_> = (0..8).map(|_| server.connect()).collect();
    let mut coming = |address: &str| {
        let mut client = waiting.pop().unwrap();
        client.send(&from(address));
        client
    };
    let mut admitted = ["192.0.2.7", "192.0.2.7", "192.0.2.7", "192.0.2.8"].map(&mut coming);
    assert!(admitted.iter_mut().all(Client::is_greeted));
    let mut fourth = coming("192.0.2.7");
    let mut last = coming("192.0.2.9");
    assert!(last.is_greeted());
    let mut other = coming("192.0.2.10");
    // They wait in vain.
    assert!(!fourth.is_greeted() && !other.is_greeted());
    assert_logged(&server, ("reason", "handshakes_per_address"), "192.0.2.7", "127.0.0.1");
    assert_logged(&server, ("reason", "handshakes_per_network"), "192.0.2.10", "127.0.0.1");
    drop((admitted, last));
    wait_until("their places are free", || sending(&server, &from("192.0.2.7")).is_greeted());
    let served = [(); 2].map(|()| comes_in(sending(&server, &from("192.0.2.7"))));
    let mut third = sending(&server, &from("192.0.2.7"));
    third.greet(FLAGS);
    third.go("");
    third.expect_closed();
    assert_logged(&server, ("reason", "connections_per_address"), "192.0.2.7", "127.0.0.1");
    comes_in(sending(&server, &from("192.0.2.8")));
    drop(served);
}

#[test]
fn the_rate_of_an_address_is_the_client_s() {
    let server = behind().args(["--connection-rate", "2"]).start();
    let greeted = |address: &str| sending(&server, &from(address)).is_greeted();
    let refused = (0..60).filter(|_| !greeted("192.0.2.7")).count();
    assert!(refused >= 20, "{refused}");
    assert_logged(&server, ("reason", "connection_rate"), "192.0.2.7", "127.0.0.1");
    assert!(greeted("192.0.2.8"));
}

/// Who hasn't sent its header yet has a place of those that negotiate.
#[test]
fn waiting_for_headers_is_bounded() {
    let server = behind()
        .args(["--allow", "127.0.0.2", "--max-handshakes", "4", "--handshake-timeout", "2s"])
        .start();
    let mut silent: Vec<_> = (0..4).map(|_| server.connect()).collect();
    let direct = || server.connect_from([127, 0, 0, 2]).is_greeted();
    wait_until("all places are taken", || !direct());
    server.wait_for_reason("handshakes");
    server.connect().expect_closed();
    wait_until("the deadline frees them", direct);
    silent.iter_mut().for_each(Client::expect_closed);
}

#[test]
fn the_end_does_not_wait_for_headers() {
    let mut server = behind().start();
    let mut waiting = server.connect();
    assert_silent(&mut waiting);
    assert_eq!(server.terminate().code(), Some(0));
    waiting.expect_closed();
    let log = server.log_text();
    assert!(!log.contains("\"nothing_sent\""), "it waited for the header: {log}");
}

#[test]
fn a_balancer_on_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let server = plain()
        .listen_unix(&path)
        .listen("127.0.0.1:0")
        .args(["--proxy-from", "unix", "--allow", "192.0.2.0/24,127.0.0.1", "--insecure-no-tls"])
        .start();
    comes_in(sending(&server, &from("192.0.2.7")));
    assert_reading(&server, "192.0.2.7", "unix");
    sending(&server, &from("192.0.3.7")).expect_closed();
    sending(&server, b"PROXY TCP4 ").expect_closed();
    // For itself it comes in as all do who may open the socket.
    comes_in(sending(&server, &local()));
    // By TCP nothing is different.
    let stream = connect_from([127, 0, 0, 1].into(), server.address());
    comes_in(Client::new(Plain::Tcp(stream)));
}

#[test]
fn junk_is_no_balancer() {
    for junk in ["", "all", "10.1.2.3/8", "haproxy", "10.0.0.1,"] {
        let (code, stderr) = plain().args(["--proxy-from", junk]).fail();
        assert!(code == 2 && stderr.contains("--proxy-from"), "{junk}: {stderr}");
    }
}
