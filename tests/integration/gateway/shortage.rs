//! When the machine is short of something, those who are in go on.

use std::process::Command;

use super::plain;
use crate::support::server::Server;
use crate::support::{image, wait_until};

/// Sets how many descriptors the server may have.
fn set_descriptors(server: &Server, most: usize) {
    let pid = server.pid().to_string();
    let limit = format!("--nofile={most}:4096");
    let set = Command::new("prlimit").args(["--pid", &pid, &limit]).status();
    assert!(set.expect("prlimit is missing").success());
}

#[test]
fn without_descriptors_those_who_are_in_go_on() {
    let server = plain().start();
    let mut served = server.go("");
    served.read_ok(0, 512);
    let now = server.fd_count();
    set_descriptors(&server, now + 1);
    // One more comes in; the others wait until there are descriptors.
    let mut waiting: Vec<_> = (0..5).map(|_| server.connect()).collect();
    server.wait_for_reason("resource_shortage");
    for at in 0..100 {
        let at = at * 4096;
        assert_eq!(served.read_ok(at, 4096), image()[at as usize..at as usize + 4096]);
    }
    set_descriptors(&server, 1024);
    for client in &mut waiting {
        client.greet(crate::support::client::FLAGS);
        client.go("");
        client.read_ok(0, 1);
    }
    drop(waiting);
    wait_until("their descriptors are free", || server.fd_count() <= now);
    // It has been said, and not once for each attempt.
    let log = server.log();
    let said = log.iter().filter(|line| line.json["reason"] == "resource_shortage");
    assert!(said.count() <= 4, "{}", server.log_text());
}

/// The soft limit is raised as far as the hard one goes; where that isn't far enough, figures say so.
#[test]
fn too_few_descriptors_are_said_at_the_start() {
    let within = |limit: &str| {
        let script = format!("ulimit {limit}; exec \"$0\" \"$@\"");
        plain().within(["sh", "-c", &script]).args(["--max-connections", "100"])
    };
    let is_warning = |line: &&crate::support::server::Line| line.json["granted"].is_number();
    let server = within("-n 150").args(["--max-handshakes", "60"]).start();
    let log = server.log();
    let line = log.iter().find(is_warning).expect("nothing says so");
    assert_eq!((&line.json["level"], &line.json["granted"]), (&"WARN".into(), &150.into()));
    assert!(line.json["needed"].as_u64().unwrap() > 160, "{}", line.text);
    server.assert_alive();

    let server = within("-Sn 100").start();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let figures: Vec<&str> = files.split_ascii_whitespace().skip(3).take(2).collect();
    assert_eq!(figures[0], figures[1], "{files}");
    assert!(!server.log().iter().any(|line| is_warning(&line)), "{}", server.log_text());
}

/// A client that is gone without a word is found by asking, when nothing is under way.
#[test]
fn who_is_silent_is_asked_whether_it_lives() {
    let server = plain().start();
    let mut client = server.go("");
    client.read_ok(0, 1);
    let source = format!("sport = :{}", server.port());
    let sockets = || {
        let output = Command::new("ss").args(["-Htno", "state", "established", &source]).output();
        String::from_utf8(output.expect("ss is missing").stdout).unwrap()
    };
    wait_until("the kernel counts the time", || sockets().contains("timer:(keepalive,"));
}

/// Connections that begin one after another, too fast to be a client's.
#[test]
fn who_begins_connections_too_often_is_refused() {
    let server = plain().args(["--connection-rate", "2"]).start();
    let mut served = server.go("");
    let refused = (0..60).filter(|_| !server.connect().is_greeted());
    // A burst of ten seconds' worth, and two a second.
    assert!(refused.count() >= 20);
    server.wait_for_reason("connection_rate");
    served.read_ok(0, 1);
    let mut other = server.connect_from([127, 0, 0, 9]);
    other.greet(crate::support::client::FLAGS);
    assert_eq!(other.list(), [super::BASE]);
}
