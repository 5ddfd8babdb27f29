//! `hexz-nbd health`, which container engines run.

use std::path::PathBuf;

use super::top::{DOCUMENTED, answering};
use super::{get, monitor_of};
use crate::support::server::{Ended, Server, run as run_binary};
use crate::support::{archive, wait_until};

fn health(place: &str, more: &[&str]) -> Ended {
    run_binary([&["health", "--monitor", place], more].concat())
}

#[test]
fn a_server_is_healthy_while_it_drains_but_not_ready() {
    let builder = Server::builder().archive("base-zstd.hxz");
    let server = builder.args(["--monitor", "127.0.0.1:0", "--drain-delay", "1m"]).start();
    let place = monitor_of(&server);
    for more in [&[][..], &["--ready"]] {
        let ended = health(&place, more);
        let expected = (Some(0), "ok\n", "");
        assert_eq!((ended.code, &*ended.stdout, &*ended.stderr), expected, "{more:?}");
    }

    server.signal("TERM");
    wait_until("the server drains", || get(&server, "/readyz").code == 503);
    let ended = health(&place, &["--ready"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""));
    assert!(ended.stderr.contains("reason=\"unavailable\""), "{}", ended.stderr);
    let reason = get(&server, "/readyz").body;
    assert!(ended.stderr.contains(reason.trim_end()), "{reason}: {}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert_eq!(health(&place, &[]).code, Some(0));
}

#[test]
fn unix_sockets_can_be_asked_for_the_health() {
    let folder = tempfile::tempdir().unwrap();
    let place = format!("unix:{}", folder.path().join("monitor").display());
    let absent = health(&place, &[]);
    assert_eq!(absent.code, Some(1));
    assert!(absent.stderr.contains("reason=\"connect_failed\""), "{}", absent.stderr);
    let _server =
        Server::start([archive("base-zstd.hxz"), "--monitor".into(), PathBuf::from(&place)]);
    assert_eq!(health(&place, &[]).code, Some(0));
}

#[test]
fn whatever_answers_can_not_disturb_the_health_check() {
    let refused = |answer: String, reason: &str| {
        let place = answering(move |stream| {
            // The program may have closed the connection.
            let _ = stream.write_all(answer.as_bytes());
        });
        let ended = health(&place, &[]);
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{reason}");
        assert!(ended.stderr.contains(&format!("reason=\"{reason}\"")), "{}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        assert!(DOCUMENTED.contains(&format!("`{reason}`")), "{reason} isn't documented");
        ended.stderr
    };
    let unavailable = |body: &str| {
        let answer = format!(
            "HTTP/1.1 503 Service Unavailable\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        refused(answer, "unavailable")
    };
    assert!(unavailable("stuck: no heartbeat\n").contains("stuck: no heartbeat reason="));
    let evil = unavailable("\u{1b}]0;owned\u{7}\u{202e}");
    assert!(evil.contains(r"\u{1b}]0;owned\u{7}\u{202e}"), "{evil}");
    assert!(unavailable("").contains("for an unknown reason"));
    assert!(unavailable(&"x".repeat(1 << 20)).contains("for an unknown reason"));
    refused("SSH-2.0-OpenSSH_9.2\r\n".to_owned(), "not_http");
    refused("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_owned(), "http_status");
}
