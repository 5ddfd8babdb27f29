//! Who may come in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use super::{plain, tls};
use crate::support::client::{Client, Plain, connect_from};
use crate::support::server::{Builder, Server, run_to_failure};

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, last).into()
}

fn assert_let_in(server: &Server, from: IpAddr) {
    let mut client = server.connect_from(from);
    client.expect(crate::support::client::GREETING);
}

/// Closed before a byte is sent: whoever may not come in learns nothing.
fn assert_closed(server: &Server, from: IpAddr) {
    server.connect_from(from).expect_closed();
    let peer = from.to_string();
    server.wait_for_log("it was refused", |line| {
        line.json["reason"] == "address" && line.json["peer"] == peer.as_str()
    });
}

fn allowing(server: Builder, lists: &[&str]) -> Server {
    server.args(lists.iter().copied()).start()
}

#[test]
fn only_who_is_allowed_comes_in() {
    for server in [plain(), tls()] {
        let server = allowing(server, &["--allow", "127.0.0.1"]);
        assert_let_in(&server, v4(1));
        assert_closed(&server, v4(2));
        server.wait_for_cause("no_rule_for_address");
    }
}

/// nbd-server CVE-2013-6410 | partial address match in the access list
#[test]
fn addresses_are_matched_whole() {
    let server = allowing(plain(), &["--allow", "127.0.0.3", "--allow", "127.0.0.30/31"]);
    for (last, let_in) in
        [(3, true), (30, true), (31, true), (1, false), (2, false), (29, false), (32, false)]
    {
        match let_in {
            true => assert_let_in(&server, v4(last)),
            false => assert_closed(&server, v4(last)),
        }
    }
    assert_closed(&server, Ipv4Addr::new(127, 0, 3, 3).into());
}

#[test]
fn deny_wins() {
    let server = allowing(plain(), &["--allow", "127.0.0.2,127.0.0.0/8", "--deny", "127.0.0.2"]);
    assert_let_in(&server, v4(1));
    assert_closed(&server, v4(2));
    let line = server.wait_for_cause("denied_by_rule");
    assert!(line.message().ends_with("--deny 127.0.0.2/32"), "{}", line.text);
    // Without --allow, deny takes away from what is allowed by default.
    let server = allowing(plain(), &["--deny", "127.0.0.0/29"]);
    assert_let_in(&server, v4(8));
    assert_closed(&server, v4(7));
    let server = allowing(tls(), &["--allow", "0.0.0.0/0", "--deny", "0.0.0.0/0"]);
    assert_closed(&server, v4(1));
}

/// Allowing others doesn't leave this machine allowed.
#[test]
fn who_is_not_named_is_not_allowed() {
    let server = allowing(tls(), &["--allow", "10.0.0.0/8"]);
    assert_closed(&server, v4(1));
    let server = allowing(plain(), &["--allow", "10.0.0.0/8", "--insecure-no-tls"]);
    assert_closed(&server, v4(1));
}

fn needs_ipv6() {
    TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).expect("this test needs ::1");
}

/// nbdkit ip filter before 1.40 | unknown address family let in despite deny=all: here
/// ::ffff:a.b.c.d meets the IPv4 rules
#[test]
fn mapped_addresses_are_judged_as_ipv4() {
    needs_ipv6();
    let lists = ["--allow", "127.0.0.1", "--deny", "127.0.0.2"];
    let server = allowing(tls().listen("[::]:0"), &lists);
    let connect = |from: IpAddr| {
        let to: IpAddr = match from {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        Client::new(Plain::Tcp(connect_from(from, SocketAddr::new(to, server.port()))))
    };
    connect(v4(1)).expect(crate::support::client::GREETING);
    connect(v4(2)).expect_closed();
    let line = server.wait_for_cause("denied_by_rule");
    assert!(line.message().ends_with("--deny 127.0.0.2/32"), "{}", line.text);
    connect(v4(3)).expect_closed();
    // IPv6 isn't let in because IPv4 is.
    connect(Ipv6Addr::LOCALHOST.into()).expect_closed();
    server.wait_for_log("::1 was refused", |line| line.json["peer"] == "::1");
}

#[test]
fn ipv6_has_its_own_rules() {
    needs_ipv6();
    let server = allowing(plain().listen("[::1]:0"), &["--allow", "::1"]);
    assert_let_in(&server, Ipv6Addr::LOCALHOST.into());
    let server = allowing(plain().listen("[::1]:0"), &["--allow", "127.0.0.0/8"]);
    assert_closed(&server, Ipv6Addr::LOCALHOST.into());
    // A rule may be written in the mapped form.
    let server = allowing(plain(), &["--allow", "::ffff:127.0.0.2"]);
    assert_let_in(&server, v4(2));
    assert_closed(&server, v4(1));
}

/// A listener on a mapped address is one on the IPv4 address in it.
#[test]
fn a_mapped_address_can_be_listened_on() {
    let server = plain().listen("[::ffff:127.0.0.1]:0").start();
    let to = SocketAddr::new(v4(1), server.port());
    Client::new(Plain::Tcp(connect_from(v4(1), to))).expect(crate::support::client::GREETING);
}

/// nbd-server | missing access file means everyone; junk in a list refuses to start
#[test]
fn junk_in_a_list_refuses_to_start() {
    let archive = crate::support::archive(super::BASE);
    let archive = archive.to_str().unwrap();
    for junk in [
        "",
        ",",
        "all",
        "10.0.0.0/8,",
        "10.1.2.3/8",
        "10.0.0.256",
        "10.0.0.0/33",
        "/0",
        "/8",
        "10.0.0.0/-1",
        "10.0.0",
        "::/129",
        "localhost",
        " ",
        "10.0.0.1 ",
        "10.0.0.2, ",
        "*",
    ] {
        for list in ["--allow", "--deny"] {
            let (code, stderr) = run_to_failure([
                "--insecure-no-tls",
                "--listen",
                "127.0.0.1:0",
                list,
                junk,
                archive,
            ]);
            assert_eq!(code, 2, "{list} {junk}: {stderr}");
            assert!(stderr.contains(list), "{stderr}");
        }
    }
    let (_, stderr) = run_to_failure(["--allow", "10.1.2.3/8", archive]);
    assert!(stderr.contains("10.0.0.0/8") && stderr.contains("10.1.2.3"), "{stderr}");
}

#[test]
fn others_are_not_served_without_tls() {
    let (listener, clients) = ("remote_listener_without_tls", "remote_clients_without_tls");
    for (listen, args, reason) in [
        ("0.0.0.0:0", &[][..], listener),
        ("[::]:0", &[], listener),
        ("127.0.0.1:0", &["--allow", "10.0.0.0/8"], clients),
        ("127.0.0.1:0", &["--allow", "127.0.0.1,0.0.0.0/0"], clients),
        ("127.0.0.1:0", &["--allow", "::/0"], clients),
        ("127.0.0.1:0", &["--allow", "126.0.0.0/7"], clients),
    ] {
        let message = plain().listen(listen).args(args.iter().copied()).fails_with(2, reason);
        for option in ["--tls-cert", "--tls-key", "--insecure-no-tls"] {
            assert!(message.contains(option), "{message}");
        }
    }
    // Unless that is wanted, which is said in the log.
    let server = plain().args(["--insecure-no-tls", "--allow", "127.0.0.1,192.0.2.0/24"]).start();
    server.assert_alive();
    server.wait_for_reason("no_tls");
    // It is one or the other.
    let (code, stderr) = tls().arg("--insecure-no-tls").fail();
    assert_eq!(code, 2);
    assert!(stderr.contains("--insecure-no-tls") && stderr.contains("--tls-cert"), "{stderr}");
}
