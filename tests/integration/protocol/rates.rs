//! Rate limits and the idle timeout over real sockets.

use std::time::{Duration, Instant};

use super::BASE;
use crate::support::image;
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server};

fn servers(args: &[&str]) -> [Server; 2] {
    let with = |server: Builder| server.archive(BASE).args(args.iter().copied()).start();
    [with(Server::builder()), with(Server::builder().tls(Pki::new()))]
}

#[test]
fn an_idle_client_is_closed_over_real_sockets() {
    for server in servers(&["--idle-timeout", "1s"]) {
        let mut client = server.go("");
        let started = Instant::now();
        client.read_ok(0, 1);
        client.expect_end();
        assert!(started.elapsed() >= Duration::from_secs(1));
        let line = server.wait_for_how("idle");
        assert_eq!(
            (line.json["level"].as_str(), line.json["requests"].as_u64()),
            (Some("INFO"), Some(1))
        );
        server.assert_alive();
    }
}

/// No more than this is let through; a busy machine may take longer.
#[test]
fn rates_are_kept_over_real_sockets() {
    for server in servers(&["--max-requests", "20", "--max-bandwidth", "1MiB"]) {
        let mut client = server.go("");
        let started = Instant::now();
        for _ in 0..50 {
            client.read_ok(0, 1);
        }
        assert!(started.elapsed() >= Duration::from_millis(1400), "{:?}", started.elapsed());
        client.disconnect();
        let mut client = server.go("");
        let started = Instant::now();
        // Three seconds' worth, of which one may come at once.
        assert!(client.read_ok(0, 3 << 20) == image()[..3 << 20]);
        client.read_ok(0, 1);
        assert!(started.elapsed() >= Duration::from_millis(1900), "{:?}", started.elapsed());
        client.disconnect();
    }
}
