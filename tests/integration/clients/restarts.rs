//! Planned restarts under clients that reconnect: whoever reads the disk sees no error.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::command;
use crate::support::pki::Pki;
use crate::support::server::{Address, Builder, Server};
use crate::support::{IMAGE_SHA256, IMAGE_SIZE, PATIENCE, archive, sha256, wait_until};

const RESTARTS: u64 = 3;

/// How a server is started, each time anew.
enum Place {
    /// On the port that it had before, once there was one.
    Tcp(Option<u16>),
    Tls(Option<u16>, Pki),
    Unix(PathBuf),
    /// On a socket that outlives it, as a service manager's.
    Activated(TcpListener),
}

impl Place {
    fn start(&mut self, args: &[&str]) -> Server {
        let listen = |port: Option<u16>| format!("127.0.0.1:{}", port.unwrap_or(0));
        let server = match self {
            Self::Tcp(port) => Server::builder().listen(listen(*port)),
            Self::Tls(port, pki) => Server::builder()
                .listen(listen(*port))
                .arg("--tls-cert")
                .arg(pki.server_cert())
                .arg("--tls-key")
                .arg(pki.server_key()),
            Self::Unix(path) => Server::builder().listen_unix(path),
            Self::Activated(listener) => activated(listener),
        };
        let server = server.args(args).arg(archive("base-zstd.hxz")).start();
        if let (Self::Tcp(port) | Self::Tls(port, _), Address::Tcp(address)) =
            (self, &server.addresses()[0])
        {
            *port = Some(address.port());
        }
        server
    }

    /// The arguments by which qemu's programs find the default export.
    fn source(&self) -> Vec<String> {
        let inet = |port: u16| format!("host=localhost,port={port}");
        let (server, folder) = match self {
            Self::Tcp(port) => (inet(port.unwrap()), None),
            Self::Tls(port, pki) => (inet(port.unwrap()), Some(pki.folder().display())),
            Self::Unix(path) => (format!("server.type=unix,server.path={}", path.display()), None),
            Self::Activated(listener) => (inet(listener.local_addr().unwrap().port()), None),
        };
        let mut source = Vec::new();
        let mut options = format!("driver=nbd,{server},export=,reconnect-delay=60");
        if let Some(folder) = folder {
            source.push("--object".to_owned());
            source.push(format!("tls-creds-x509,id=tls,endpoint=client,dir={folder}"));
            options += ",tls-creds=tls";
        }
        source.extend(["--image-opts".to_owned(), options]);
        source
    }
}

fn activated(listener: &TcpListener) -> Builder {
    let script = "LISTEN_PID=$$ exec \"$@\" 3<&0 </dev/null";
    let socket = std::os::fd::OwnedFd::from(listener.try_clone().unwrap());
    Server::builder()
        .without_listening()
        .within(["sh", "-c", script, "sh"])
        .env("LISTEN_FDS", "1")
        .stdio(socket, Stdio::null())
}

/// A client that reads meanwhile. It is killed when this is dropped.
struct Reader {
    child: Child,
    log: PathBuf,
}

impl Reader {
    fn start(folder: &Path, name: &str, program: &str, args: &[String]) -> Self {
        let log = folder.join(name);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command: Command = command(program, &args);
        let file = File::create(&log).unwrap();
        command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file);
        let child = command.spawn().unwrap_or_else(|error| panic!("{program} is needed: {error}"));
        Self { child, log }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it has read everything without an error.
    fn finish(mut self) {
        let deadline = Instant::now() + 6 * PATIENCE;
        while self.status().is_none() {
            assert!(Instant::now() < deadline, "it doesn't end: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
        let said = self.said();
        assert!(self.status().unwrap().success(), "{said}");
        for word in ["rror", "ailed"] {
            assert!(!said.contains(word), "{said}");
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Restarts the server again and again while `reader` reads, all but the last time with `args`.
fn restart_under(reader: &mut Reader, place: &mut Place, args: &[&str], mut server: Server) {
    for restart in 1..=RESTARTS {
        // The client is back. It may be through before the last restart.
        server.wait_for_reading();
        // Each time at another moment of what it does.
        std::thread::sleep(Duration::from_millis(10 * restart));
        if reader.status().is_some() {
            assert!(restart > 1, "it has ended before it was interrupted");
            break;
        }
        assert_eq!(server.terminate().code(), Some(0));
        let log = server.log();
        let ends: Vec<_> = log.iter().filter(|line| !line.json["how"].is_null()).collect();
        assert!(!ends.is_empty(), "{}", server.log_text());
        for end in ends {
            assert_eq!(end.json["how"], "shutting_down", "{}", end.text);
            assert!(end.json["unanswered"].is_null(), "{}", end.text);
        }
        server = place.start(if restart < RESTARTS { args } else { &[] });
    }
    // It has to be there until all is read.
    let deadline = Instant::now() + 6 * PATIENCE;
    while reader.status().is_none() {
        assert!(Instant::now() < deadline, "it doesn't end: {}", reader.said());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads `count` times 4 KiB, `depth` at a time, across some restarts.
fn bench(mut place: Place, depth: u32, count: u32) {
    let folder = tempfile::tempdir().unwrap();
    let server = place.start(&[]);
    let mut source = place.source();
    // `qemu-img bench` takes no credentials, so qemu-nbd is the client that reconnects.
    let socket = folder.path().join("socket");
    let _client = matches!(place, Place::Tls(..)).then(|| {
        let args = ["-r".to_owned(), "-k".to_owned(), socket.display().to_string()];
        let args = [&args[..], &source].concat();
        let client = Reader::start(folder.path(), "qemu-nbd", "qemu-nbd", &args);
        wait_until("qemu-nbd listens", || socket.exists());
        source = vec!["-f".to_owned(), "raw".to_owned()];
        source.push(format!("nbd+unix:///?socket={}", socket.display()));
        client
    });
    let args = ["bench", "-s", "4096", "-S", "16384", "-c", &count.to_string(), "-d"];
    let args = args.map(str::to_owned).into_iter().chain([depth.to_string()]).chain(source);
    let args: Vec<String> = args.collect();
    let mut reader = Reader::start(folder.path(), "bench", "qemu-img", &args);
    restart_under(&mut reader, &mut place, &[], server);
    reader.finish();
}

/// qemu hands an NBD_ESHUTDOWN to its guest, and reconnects when the stream ends
#[test]
fn one_read_at_a_time_goes_on_across_restarts() {
    bench(Place::Tcp(None), 1, 30_000);
}

#[test]
fn eight_reads_at_a_time_go_on_across_restarts() {
    bench(Place::Tcp(None), 8, 60_000);
}

#[test]
fn many_reads_at_a_time_go_on_across_restarts() {
    bench(Place::Tcp(None), 32, 100_000);
}

#[test]
fn reads_over_tls_go_on_across_restarts() {
    for (depth, count) in [(1, 10_000), (8, 20_000), (32, 30_000)] {
        bench(Place::Tls(None, Pki::new()), depth, count);
    }
}

#[test]
fn reads_by_a_unix_socket_go_on_across_restarts() {
    let folder = tempfile::tempdir().unwrap();
    bench(Place::Unix(folder.path().join("nbd.sock")), 8, 60_000);
}

#[test]
fn reads_go_on_across_restarts_behind_a_socket_that_stays() {
    bench(Place::Activated(TcpListener::bind("127.0.0.1:0").unwrap()), 8, 60_000);
}

/// Requests that the rate limit holds back at that moment are repeated, too.
#[test]
fn a_copy_is_right_across_restarts() {
    // Not even the data between the holes is through before the last restart.
    const LIMIT: [&str; 2] = ["--max-bandwidth", "64KiB"];
    for mut place in [Place::Tcp(None), Place::Tls(None, Pki::new())] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk.img");
        let server = place.start(&LIMIT);
        let to = file.display().to_string();
        let args = ["convert", "-O", "raw", "-m", "8"].map(str::to_owned);
        let args = [&args[..], &place.source(), &[to]].concat();
        let mut reader = Reader::start(folder.path(), "convert", "qemu-img", &args);
        restart_under(&mut reader, &mut place, &LIMIT, server);
        reader.finish();
        let copied = std::fs::read(&file).unwrap();
        assert_eq!((copied.len() as u64, sha256(&copied).as_str()), (IMAGE_SIZE, IMAGE_SHA256));
    }
}
