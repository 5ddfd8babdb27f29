//! Who asks the monitor and means no good: it disturbs nobody.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::{ask, connect, get, metrics, monitor_of, status};
use crate::support::server::Server;
use crate::support::wait_until;

const BASE: &str = "base-zstd.hxz";

/// As many connections as it has at once.
const MOST: usize = 16;

fn shown() -> Server {
    Server::builder().archive(BASE).args(["--monitor", "0"]).start()
}

/// Whether the other end has closed, be it with a reset.
fn is_closed(stream: &mut TcpStream) -> bool {
    match stream.read(&mut [0; 4096]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => {
            !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        }
    }
}

#[test]
fn nothing_can_be_told() {
    let server = shown();
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
        let answer =
            ask(&server, &format!("{method} /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"));
        assert_eq!((answer.code, answer.fields["connection"].as_str()), (405, "close"), "{method}");
        assert_eq!(answer.fields["allow"], "GET, HEAD");
    }
    for body in [
        "Content-Length: 5\r\n\r\nhello",
        "Content-Length: 99999999999\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ] {
        let answer = ask(&server, &format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\n{body}"));
        assert_eq!((answer.code, answer.fields["connection"].as_str()), (413, "close"), "{body}");
    }
    let answer = ask(&server, "CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(answer.code, 405);
    server.assert_alive();
}

/// DNS rebinding: a stranger's page in a browser of somebody who may see the monitor.
#[test]
fn who_asks_for_another_name_is_refused() {
    let server = Server::builder()
        .archive(BASE)
        .args(["--monitor", "0", "--monitor-name", "monitor.example.org"])
        .start();
    let port = monitor_of(&server).rsplit_once(':').unwrap().1.to_owned();
    let code = |host: &str| {
        let head =
            format!("GET /status.json HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        ask(&server, &head).code
    };
    for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "a@b"] {
        assert_eq!(code(host), 421, "{host}");
        assert_eq!(code(&format!("{host}:{port}")), 421, "{host}");
    }
    for host in ["localhost", "127.0.0.1", "[::1]", "monitor.example.org"] {
        assert_eq!(code(host), 200, "{host}");
        assert_eq!(code(&format!("{host}:{port}")), 200, "{host}");
    }
    let two = "GET /status.json HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\
               Connection: close\r\n\r\n";
    assert_eq!(ask(&server, two).code, 421);
    let absolute = "GET http://evil.example/status.json HTTP/1.1\r\nHost: localhost\r\n\
                    Connection: close\r\n\r\n";
    assert_eq!(ask(&server, absolute).code, 421);
}

#[test]
fn heads_are_bounded_and_garbage_is_closed() {
    let server = shown();
    let long = "a".repeat(20_000);
    let many = "A: b\r\n".repeat(100);
    for request in [
        format!("GET /{long} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {long}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: localhost\r\n{many}\r\n"),
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\u{3}\u{3}\r\n\r\n".to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        "\0\r\n\r\n".to_owned(),
        "GET /\u{0} HTTP/1.1\r\n\r\n".to_owned(),
    ] {
        let mut stream = connect(&server);
        // It may have been closed before all of it is sent.
        let _ = stream.write_all(request.as_bytes());
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        let is_refused =
            said.is_empty() || said.starts_with("HTTP/1.1 4") || said.starts_with("HTTP/1.1 505");
        assert!(is_refused, "{said}");
    }
    assert_eq!(get(&server, "/healthz").code, 200);
}

#[test]
fn requests_that_come_together_are_answered_one_after_another() {
    let server = shown();
    let mut stream = connect(&server);
    let mut all = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(20);
    all.push_str("GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(all.as_bytes()).unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 21);
    assert_eq!(answers.matches("ok\n").count(), 21);
}

/// They take all places for a while, and then these are free again. Who reads an export
/// doesn't notice.
#[test]
fn who_drips_or_is_silent_is_closed_and_disturbs_nobody() {
    let server = shown();
    let mut client = server.go("");
    let begun = Instant::now();
    let mut held: Vec<TcpStream> = (0..MOST).map(|_| connect(&server)).collect();
    for stream in &mut held[..MOST / 2] {
        stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    }
    // A further one finds no place, and nobody waits for one.
    let mut refused = connect(&server);
    assert!(is_closed(&mut refused));

    wait_until("they are closed", || {
        for stream in &mut held[..MOST / 2] {
            // A byte a moment stretches nothing.
            let _ = stream.write_all(b"X");
        }
        client.read_ok(0, 512);
        let mut probe = connect(&server);
        let asked = probe.write_all(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n");
        let mut said = String::new();
        asked.is_ok() && probe.read_to_string(&mut said).is_ok() && said.contains(" 200 ")
    });
    assert!(begun.elapsed() > Duration::from_secs(10), "{:?}", begun.elapsed());
    for mut stream in held {
        assert!(is_closed(&mut stream) || is_closed(&mut stream), "one is still there");
    }
}

#[test]
fn a_flood_of_questions_leaves_clients_alone() {
    let server = shown();
    let address = monitor_of(&server);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let Ok(mut stream) = TcpStream::connect(&address) else { continue };
                    let _ = stream.write_all(
                        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
                    );
                    // Some of them go without having read anything.
                    let _ = stream.shutdown(Shutdown::Write);
                    let _ = stream.read(&mut [0; 100]);
                }
            });
        }
        let mut client = server.go("");
        for number in 0..300 {
            client.read_ok(number * 512, 4096);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        client.disconnect();
    });
    let descriptors = server.fd_count();
    wait_until("all are closed", || server.fd_count() <= descriptors);
    assert_eq!(status(&server)["exports"][0]["requests"]["read"], 300);
    assert_eq!(metrics(&server)["hexz_nbd_ready"], 1.0);
}
