//! What can be seen, where, and when.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{ask, connect, get, get_with, metrics, monitor_of, status};
use crate::support::client::{OPT_INFO, REP_ERR_UNKNOWN, Request, info_data};
use crate::support::server::{Server, run, run_to_failure};
use crate::support::{PATIENCE, archive, wait_until};

const BASE: &str = "base-zstd.hxz";

fn shown() -> Server {
    Server::builder().archive(BASE).args(["--monitor", "0"]).start()
}

#[test]
fn each_page_says_what_it_is() {
    let server = shown();
    for (target, kind, inside) in [
        ("/", "text/html; charset=utf-8", "<!doctype html>"),
        ("/status.json", "application/json", "\"format\":1"),
        ("/history.json", "application/json", "\"format\":1"),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8", "hexz_nbd_ready 1\n"),
        ("/healthz", "text/plain; charset=utf-8", "ok\n"),
        ("/readyz", "text/plain; charset=utf-8", "ok\n"),
    ] {
        let answer = get(&server, target);
        assert_eq!((answer.code, answer.fields["content-type"].as_str()), (200, kind));
        assert!(answer.body.contains(inside), "{answer:?}");
        assert_eq!(answer.fields["cache-control"], "no-store");
        assert_eq!(answer.fields["x-content-type-options"], "nosniff");
        assert!(answer.fields["content-security-policy"].starts_with("default-src 'none'"));
        assert!(!answer.fields.contains_key("server"));
        assert!(!answer.fields.contains_key("access-control-allow-origin"));

        let head = ask(
            &server,
            &format!("HEAD {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
        );
        assert_eq!((head.code, head.body.as_str()), (200, ""));
    }
    let page = get(&server, "/");
    assert!(page.fields["content-security-policy"].contains("script-src 'sha256-"));
    assert_eq!(get(&server, "/nothing").code, 404);
}

/// All that the form of `/status.json` promises, of a server that has just begun.
#[test]
fn the_status_has_all_its_members() {
    let server = shown();
    let status = status(&server);
    for member in [
        "/format",
        "/version",
        "/pid",
        "/now",
        "/started",
        "/ready",
        "/listen/0",
        "/tls",
        "/connections",
        "/connections_total/negotiating",
        "/connections_total/reading",
        "/connections_total/accepted",
        "/connections_total/served",
        "/connections_total/refused",
        "/connections_total/failed",
        "/connections_total/handshake_failures",
        "/exports/0/name",
        "/exports/0/description",
        "/exports/0/size",
        "/exports/0/readers",
        "/exports/0/requests/read",
        "/exports/0/requests/block_status",
        "/exports/0/requests/cache",
        "/exports/0/requests/other",
        "/exports/0/bytes",
        "/exports/0/errors",
        "/exports/0/read_seconds/count",
        "/exports/0/read_seconds/sum",
        "/exports/0/read_seconds/buckets/0/0",
        "/cache/bytes",
        "/cache/capacity",
        "/cache/hits",
        "/cache/misses",
        "/cache/decoded_blocks",
        "/cache/decoded_bytes",
        "/storage/reads",
        "/storage/bytes",
        "/verification_failures",
        "/host",
        "/problems",
        "/archives/folder",
        "/archives/unavailable",
        "/archives/unavailable_count",
        "/process/cpu_seconds",
        "/memory/resident",
        "/memory/budget",
        "/memory/in_flight",
        "/reloads/succeeded",
        "/reloads/failed",
        "/reloads/last",
        "/reloads/last_error",
        "/audit",
        "/recent_errors",
    ] {
        assert!(status.pointer(member).is_some(), "{member}: {status:#}");
    }
    assert_eq!(status["pid"], server.pid());
    assert_eq!(status["listen"][0], server.address().to_string());
    assert_eq!(status["exports"][0]["name"], BASE);
    assert!(status["started"].as_f64() <= status["now"].as_f64());
    // In the sandbox, too, where the kernel's file can't be opened any more.
    let resident = status["memory"]["resident"].as_u64().unwrap();
    let kernel = server.rss_kib() * 1024;
    assert!(resident > kernel / 2 && resident < kernel * 2, "{resident} {kernel}");
    assert_eq!(status["memory"]["budget"], 256 << 20);
    let descriptors = status["process"]["open_fds"].as_u64().unwrap();
    let open = server.fd_count() as u64;
    // Connections come and go.
    assert!(descriptors.abs_diff(open) <= 3, "{descriptors} {open}");
    assert!(status["process"]["virtual_memory"].as_u64() > status["memory"]["resident"].as_u64());
    assert!(status["process"]["max_fds"].as_u64() > Some(descriptors));
}

#[test]
fn prometheus_gets_the_format_that_it_asks_for() {
    let server = shown();
    // As Prometheus 2.42 asks.
    let accept = "Accept: application/openmetrics-text;version=1.0.0,\
                  application/openmetrics-text;version=0.0.1;q=0.75,\
                  text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n";
    let newer = get_with(&server, "/metrics", accept);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    assert_eq!(newer.fields["content-type"], kind);
    assert!(newer.body.ends_with("# EOF\n"));
    for accept in ["", "Accept: */*\r\n", "Accept: text/plain\r\n"] {
        let older = get_with(&server, "/metrics", accept);
        assert_eq!(older.fields["content-type"], "text/plain; version=0.0.4; charset=utf-8");
        assert!(!older.body.contains("# EOF"));
    }
}

#[test]
fn by_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("monitor");
    let at = format!("unix:{}", path.display());
    let mut server = Server::builder().archive(BASE).args(["--monitor", &at]).start();
    assert_eq!(monitor_of(&server), at);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream
        .write_all(b"GET /readyz HTTP/1.1\r\nHost: whatever\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    server.terminate();
    assert!(!path.exists());
}

#[test]
fn by_a_socket_that_is_handed_over() {
    let handed = || {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap().to_string();
        let builder = Server::builder()
            .archive(BASE)
            .within(["sh", "-c", "LISTEN_PID=$$ exec \"$@\" 3<&0 </dev/null", "sh"])
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", "monitor")
            .stdio(OwnedFd::from(listener), Stdio::null());
        (at, builder)
    };
    let (at, builder) = handed();
    let server = builder.start();
    assert_eq!(monitor_of(&server), at);
    assert_eq!(get(&server, "/readyz").code, 200);
    handed().1.args(["--monitor", "0"]).fails_with(2, "monitor_given_twice");
}

/// A copy of an archive that has so many zeros in front of its index that it takes long to hash,
/// and no room on the disk.
fn with_a_hole(from: &Path, to: &Path) {
    const HOLE: u64 = 24 << 30;
    const INDEX_OFFSET: std::ops::Range<usize> = 12..20;
    let mut bytes = std::fs::read(from).unwrap();
    let offset = u64::from_le_bytes(bytes[INDEX_OFFSET].try_into().unwrap());
    bytes[INDEX_OFFSET].copy_from_slice(&(offset + HOLE).to_le_bytes());
    let (blocks, index) = bytes.split_at(usize::try_from(offset).unwrap());
    let file = std::fs::File::create(to).unwrap();
    file.write_all_at(blocks, 0).unwrap();
    file.write_all_at(index, offset + HOLE).unwrap();
}

/// Hashing an archive takes as long as it takes; meanwhile there is something to see.
#[test]
fn it_answers_while_the_program_starts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("big.hxz");
    with_a_hole(&archive(BASE), &path);
    let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    let digest = format!("big.hxz={}", "0".repeat(64));
    command.args(["--listen", "127.0.0.1:0", "--digest", &digest, "--log-format", "json"]);
    let monitor = folder.path().join("monitor");
    command.args(["--monitor", &format!("unix:{}", monitor.display())]).arg(&path);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    wait_until("it listens", || UnixStream::connect(&monitor).is_ok());
    let ask = |target: &str| {
        let mut stream = UnixStream::connect(&monitor).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let ready = ask("/readyz");
    let alive = ask("/healthz");
    let status = ask("/status.json");
    let metrics = ask("/metrics");
    let _ = child.kill();
    let _ = child.wait();
    assert!(ready.starts_with("HTTP/1.1 503 ") && ready.ends_with("\nstarting\n"), "{ready}");
    assert!(alive.starts_with("HTTP/1.1 200 "), "{alive}");
    assert!(status.contains("\"ready\":false"), "{status}");
    assert!(metrics.contains("\nhexz_nbd_ready 0\n"), "{metrics}");
}

#[test]
fn who_shuts_down_is_not_ready_and_goes_on_showing() {
    let server = Server::builder().archive(BASE).args(["--monitor", "0"]).start();
    let mut stays = server.go("");
    // It never reads the answers, so the end has to wait for it.
    for cookie in 0..8 {
        stays.send_request(Request::read(cookie, 0, 8 << 20));
    }
    wait_until("it is busy", || status(&server)["connections"][0]["in_flight"] == 8);
    server.signal("TERM");
    wait_until("it is shutting down", || get(&server, "/readyz").code == 503);
    assert_eq!(get(&server, "/readyz").body, "shutting down\n");
    assert_eq!(get(&server, "/healthz").code, 200);
    assert_eq!(status(&server)["connections_total"]["reading"], 1);
}

#[test]
fn who_can_open_nothing_is_not_ready() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.hxz");
    std::fs::copy(archive(BASE), &path).unwrap();
    let server = Server::builder().arg(&path).args(["--monitor", "0"]).start();
    assert_eq!(get(&server, "/readyz").code, 200);
    std::fs::write(folder.path().join("new"), "junk").unwrap();
    std::fs::rename(folder.path().join("new"), &path).unwrap();
    // Nobody has noticed yet.
    assert_eq!(get(&server, "/readyz").code, 200);
    server.greeted().refused(OPT_INFO, &info_data(b"", &[]), REP_ERR_UNKNOWN);
    let answer = get(&server, "/readyz");
    assert_eq!((answer.code, answer.body.as_str()), (503, "no export can be opened\n"));
    assert_eq!(metrics(&server)["hexz_nbd_open_failures_total{reason=\"not_hexz\"}"], 1.0);
    let errors = &status(&server)["recent_errors"];
    assert!(errors[0]["message"].as_str().unwrap().contains("not_hexz"), "{errors}");
}

#[test]
fn a_process_that_stands_still_says_nothing_and_goes_on_afterwards() {
    let server = shown();
    let mut stream = connect(&server);
    server.signal("STOP");
    stream.write_all(b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    server.signal("CONT");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[test]
fn other_machines_are_shown_it_only_with_a_warning() {
    let server = Server::builder().archive(BASE).args(["--monitor", "0.0.0.0:0"]).start();
    server.wait_for_reason("monitor_exposed");
    assert!(!shown().has_reason("monitor_exposed"));
}

#[test]
fn what_makes_no_sense_stops_the_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let base = archive(BASE);
    let base = base.to_str().unwrap();
    let (code, said) = run_to_failure(["--listen", "127.0.0.1:0", "--monitor", &port, base]);
    assert_eq!(code, 5);
    assert!(said.contains("reason=\"address_in_use\"") && said.contains(&port), "{said}");
    let (code, said) = run_to_failure(["--monitor", "localhost:1", base]);
    assert_eq!(code, 2);
    assert!(said.contains("--monitor") && said.contains("localhost:1"), "{said}");
    let (code, said) = run_to_failure(["--monitor", "0", "--monitor-name", "a b", base]);
    assert_eq!(code, 2);
    assert!(said.contains("--monitor-name") && said.contains("a b"), "{said}");
    assert!(run(["--help"]).stdout.contains("--monitor <WHERE>"));
}

/// A load balancer takes some time to notice that a gateway is going to shut down.
#[test]
fn a_draining_gateway_accepts_clients_until_the_delay_has_passed() {
    let builder = Server::builder().archive(BASE);
    let mut server = builder.args(["--monitor", "0", "--drain-delay", "2s"]).start();
    assert_eq!(get(&server, "/readyz").code, 200);
    let mut early = server.go("");
    let begun = Instant::now();
    server.signal("TERM");
    wait_until("it is draining", || get(&server, "/readyz").code == 503);
    assert_eq!(get(&server, "/healthz").code, 200);
    let mut late = server.go("");
    for client in [&mut early, &mut late] {
        client.send(&Request::read(1, 0, 512).encode());
        client.receive(512);
    }
    assert_eq!(server.wait().code(), Some(0));
    assert!(begun.elapsed() >= Duration::from_secs(2));
}
