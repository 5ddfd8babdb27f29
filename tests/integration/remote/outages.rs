//! Stores that are down: clients read what is cached, and stay connected.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use super::{BLOCK, MIB, gateway_of, has_export, monitor_page, sample, store};
use crate::support::client::{CMD_READ, EIO, Request};
use crate::support::wait_until;

const TIMEOUT: Duration = Duration::from_secs(2);

/// A service manager whose watchdog wants to hear of the process twice a second.
struct Watchdog {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
}

impl Watchdog {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("s")).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self { socket, folder }
    }

    /// Returns how often the process has said that it is alive, since the last call.
    fn pings(&self) -> usize {
        let mut message = [0; 8192];
        let mut pings = 0;
        while let Ok(length) = self.socket.recv(&mut message) {
            pings += usize::from(message[..length].starts_with(b"WATCHDOG=1"));
        }
        pings
    }
}

#[test]
fn cached_reads_go_on_while_a_store_is_down() {
    let (store, watchdog) = (store(), Watchdog::new());
    let server = gateway_of(&store)
        .args(["--store-timeout", "2s", "--fresh-for", "1ms", "--monitor", "0"])
        .env("NOTIFY_SOCKET", watchdog.folder.path().join("s"))
        .env("WATCHDOG_USEC", "1000000")
        .start();
    let mut reader = server.go("");
    sample().is_read_at(&mut reader, 4 * MIB);
    let mut waiting = server.go("");
    watchdog.pings();

    store.stop();
    let begin = Instant::now();
    waiting.send_request(Request::read(1, 2 * MIB, 4096));
    let (mut slowest, mut reads) = (Duration::ZERO, 0);
    while begin.elapsed() < 2 * TIMEOUT {
        let read = Instant::now();
        sample().is_read_at(&mut reader, 4 * MIB + reads % 8 * BLOCK);
        (slowest, reads) = (slowest.max(read.elapsed()), reads + 1);
        std::thread::sleep(Duration::from_millis(5));
    }
    // Debug build, busy machine.
    assert!(slowest < Duration::from_millis(250), "{slowest:?}");
    let reply = waiting.simple_reply();
    assert_eq!((reply.error, reply.cookie), (EIO, 1));
    server.wait_for_log("the store is down", |line| {
        ["store_down", "store_timed_out"].contains(&line.reason())
    });
    let pings = watchdog.pings();
    assert!(pings >= 4, "{pings} pings in 4 s");
    assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
    assert!(monitor_page(&server, "/healthz").starts_with("HTTP/1.1 200"));
    // A new client gets what is cached, too.
    sample().is_read_at(&mut server.go(""), 4 * MIB);

    store.restart().unwrap();
    let begin = Instant::now();
    wait_until("reads work", || waiting.read(2 * MIB, 4096).is_ok());
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    sample().is_read(&mut reader);
}

/// The read fails at the time-out: not before, and not much later. That also holds for those that
/// come while the store is known to be down.
#[test]
fn uncached_reads_fail_at_the_time_limit() {
    let store = store();
    let server = gateway_of(&store).args(["--store-timeout", "2s"]).start();
    let mut client = server.go("");
    store.stop();
    for offset in [2, 3, 4].map(|part| part * MIB) {
        let begin = Instant::now();
        assert_eq!(client.read(offset, 4096), Err(EIO));
        let waited = begin.elapsed();
        assert!((TIMEOUT / 2..TIMEOUT * 2).contains(&waited), "{waited:?}");
    }
    sample().is_read_at(&mut client, 0);
}

/// A read that waits succeeds once the store is back.
#[test]
fn a_short_outage_is_only_a_delay() {
    let store = store();
    let server = gateway_of(&store).start();
    let mut client = server.go("");
    store.stop();
    client.send_request(Request::read(7, 4 * MIB, BLOCK as u32));
    std::thread::sleep(Duration::from_secs(2));
    store.restart().unwrap();
    let begin = Instant::now();
    let reply = client.simple_reply();
    assert_eq!((reply.error, reply.cookie), (0, 7));
    assert!(client.receive(BLOCK as usize) == sample().part(4 * MIB, BLOCK));
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(!server.log().iter().any(|line| line.json["level"] == "ERROR"));
}

/// A store that accepts connections and says nothing is as good as down.
#[test]
fn a_store_that_hangs() {
    let store = store();
    let server = gateway_of(&store).args(["--store-timeout", "2s"]).start();
    let mut client = server.go("");
    let hangs = object_server::Behavior::new().delay(Duration::from_secs(3600));
    store.set_script(object_server::Script::always(hangs));
    let begin = Instant::now();
    assert_eq!(client.read(4 * MIB, 4096), Err(EIO));
    assert!(begin.elapsed() < TIMEOUT * 2, "{:?}", begin.elapsed());
    sample().is_read_at(&mut client, 0);
    store.set_script(object_server::Script::new());
    wait_until("reads work", || client.read(4 * MIB, 4096).is_ok());
}

#[test]
fn an_outage_does_not_delay_the_end() {
    let store = store();
    let mut server =
        gateway_of(&store).args(["--shutdown-timeout", "1s", "--store-timeout", "1m"]).start();
    let mut clients: Vec<_> = (0..5).map(|_| server.go("")).collect();
    store.stop();
    for (client, part) in clients.iter_mut().zip(1..) {
        client.send_request(Request {
            command: CMD_READ,
            offset: part * MIB,
            length: 4096,
            ..Request::default()
        });
    }
    std::thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    server.terminate();
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}

/// The same while an archive is being opened, and before the gateway is ready.
#[test]
fn an_outage_does_not_delay_the_end_of_the_start() {
    let store = store();
    store.stop();
    let url = store.url(super::WEB);
    let config = tempfile::tempdir().unwrap();
    let pid_file = config.path().join("pid");
    let starting = std::thread::spawn({
        let pid_file = pid_file.clone();
        move || {
            let builder = super::gateway().arg(url).args(["--store-timeout", "1m"]);
            builder.arg("--pid-file").arg(pid_file).run()
        }
    });
    wait_until("it starts", || std::fs::read_to_string(&pid_file).is_ok_and(|it| it.len() > 1));
    std::thread::sleep(Duration::from_millis(500));
    let pid = std::fs::read_to_string(&pid_file).unwrap();
    let kill = format!("kill -TERM {}", pid.trim());
    assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let begin = Instant::now();
    let ended = starting.join().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[test]
fn a_gateway_starts_while_its_store_is_down() {
    let store = store();
    store.stop();
    let begin = Instant::now();
    let server = gateway_of(&store).args(["--store-timeout", "2s", "--monitor", "0"]).start();
    assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
    server.wait_for_log("the store is down", |line| {
        ["store_down", "store_timed_out"].contains(&line.reason())
    });
    assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
    assert!(!has_export(&server, ""));
    store.restart().unwrap();
    let begin = Instant::now();
    wait_until("it is served", || has_export(&server, ""));
    // Archives that couldn't be opened are tried again every five seconds.
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    sample().is_read(&mut server.go(""));
}

/// The listing of a folder is that of before; archives that are open go on.
#[test]
fn a_folder_while_its_store_is_down() {
    let store = store();
    let args = ["--store-timeout", "1s", "--fresh-for", "1s", "--monitor", "0", "--export-dir"];
    let server = super::gateway().args(args).arg(store.url("images/")).start();
    assert_eq!(server.greeted().list(), ["web.hxz"]);
    let mut client = server.go("web.hxz");
    sample().is_read_at(&mut client, 4 * MIB);
    store.stop();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(server.greeted().list(), ["web.hxz"]);
    sample().is_read_at(&mut server.go("web.hxz"), 4 * MIB);
    assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
    super::assert_no_export(&server, "other.hxz");
    store.restart().unwrap();
    wait_until("reads work", || client.read(6 * MIB, 4096).is_ok());
}

/// Without its dialer, the gateway has no connections any more. It says so, and serves what it has.
#[test]
fn the_dialer_ends() {
    let (store, watchdog) = (store(), Watchdog::new());
    let mut server = gateway_of(&store)
        .args(["--store-timeout", "1s", "--monitor", "0"])
        .env("NOTIFY_SOCKET", watchdog.folder.path().join("s"))
        .env("WATCHDOG_USEC", "1000000")
        .start();
    let mut client = server.go("");
    assert!(monitor_page(&server, "/healthz").starts_with("HTTP/1.1 200"));
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let children: String = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("children")).unwrap())
        .collect();
    let kill = format!("kill -KILL {}", children.trim());
    assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let line = server.wait_for_reason("dialer_gone");
    assert!(line.message().contains("restart"), "{}", line.text);
    // Only a restart helps, which these cause.
    let health = monitor_page(&server, "/healthz");
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("dialer_gone"), "{health}");
    assert!(monitor_page(&server, "/readyz").starts_with("HTTP/1.1 200"));
    let status = monitor_page(&server, "/status.json");
    assert!(status.contains("\"problem\":\"dialer_gone\""), "{status}");
    server.wait_for_reason("watchdog");
    watchdog.pings();
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(watchdog.pings(), 0);
    store.disconnect_all();
    assert_eq!(client.read(4 * MIB, 4096), Err(EIO));
    sample().is_read_at(&mut client, 0);
    assert_eq!(server.terminate().code(), Some(0));
}
