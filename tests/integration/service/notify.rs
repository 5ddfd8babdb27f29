//! What the service manager hears.

use std::time::Duration;

use super::manager::Manager;
use super::plain;
use crate::support::wait_until;

#[test]
fn the_start_the_clients_and_the_end() {
    for manager in [Manager::at_a_path(), Manager::abstract_one()] {
        let mut server = manager.starts(plain());
        let serving = "serving base-zstd.hxz (main stream, 8.0 MiB, Zstandard) without TLS to this \
                       machine only";
        let none = format!("STATUS=0 reading; {serving}");
        assert_eq!(manager.hears(), ["READY=1", &none]);
        let client = server.go("");
        assert_eq!(manager.hears(), [format!("STATUS=1 reading; {serving}")]);
        client.disconnect();
        assert_eq!(manager.hears(), [none]);
        // The sandbox lets it through, and nothing went wrong.
        assert!(!server.has_reason("service_manager_unreachable"), "{}", server.log_text());
        server.signal("TERM");
        assert_eq!(manager.hears()[0], "STOPPING=1");
        assert_eq!(server.wait().code(), Some(0));
    }
}

#[test]
fn a_reload_begins_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    let rule = |from| format!("[[rule]]\naction = \"allow\"\nnetwork = \"{from}\"\n");
    std::fs::write(&rules, rule("127.0.0.1")).unwrap();
    let manager = Manager::at_a_path();
    let server = manager.starts(plain().arg("--rules").arg(&rules));
    manager.hears_until("READY=1");

    let reload = || {
        let before = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        server.signal("HUP");
        let begun = manager.hears_until("RELOADING=1");
        let clock: i64 = begun[1].strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
        let after = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let micros = |time: rustix::time::Timespec| time.tv_sec * 1_000_000 + time.tv_nsec / 1000;
        assert!((micros(before)..=micros(after)).contains(&clock), "{clock}");
        manager.hears_until("READY=1")[1].clone()
    };
    std::fs::write(&rules, "nonsense").unwrap();
    assert!(reload().starts_with("STATUS=0 reading; reload failed, see the log; serving"));
    std::fs::write(&rules, rule("127.0.0.2")).unwrap();
    let status = reload();
    assert!(status.starts_with("STATUS=0 reading; serving base-zstd.hxz"), "{status}");
}

#[test]
fn the_watchdog_hears_nothing_of_a_process_that_is_stopped() {
    let manager = Manager::at_a_path();
    let server = manager.starts(plain().env("WATCHDOG_USEC", "1000000"));
    manager.hears_until("READY=1");
    for _ in 0..3 {
        assert_eq!(manager.hears_until("WATCHDOG=1"), ["WATCHDOG=1"]);
    }
    server.signal("STOP");
    let status = format!("/proc/{}/status", server.pid());
    wait_until("it is stopped", || {
        std::fs::read_to_string(&status).unwrap().contains("\nState:\tT")
    });
    // What was on its way.
    manager.counts(Duration::from_millis(1));
    assert_eq!(manager.counts(Duration::from_secs(2)), 0);
    server.signal("CONT");
    manager.hears_until("WATCHDOG=1");
    server.assert_alive();
}

#[test]
fn without_a_watchdog_it_hears_nothing() {
    let manager = Manager::at_a_path();
    let others = plain().env("WATCHDOG_USEC", "200000").env("WATCHDOG_PID", "1");
    for builder in [plain(), others] {
        let server = manager.starts(builder);
        manager.hears_until("READY=1");
        assert_eq!(manager.counts(Duration::from_millis(1500)), 0);
        drop(server);
    }
}

/// Whoever started the program will see to it.
#[test]
fn a_manager_that_is_not_there_is_a_warning() {
    for place in ["/no/such/socket", "@no such socket", "vsock:2:1234"] {
        let server = plain().env("NOTIFY_SOCKET", place).start();
        let line = server.wait_for_reason("service_manager_unreachable");
        assert_eq!(line.json["level"], "WARN");
        assert!(line.message().contains(place), "{}", line.text);
        server.assert_alive();
    }
    let server = plain().env("NOTIFY_SOCKET", "").start();
    assert!(!server.has_reason("service_manager_unreachable"));
}
