//! The log: where it can't be written, and what can't be said in it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{BASE, plain};
use crate::archive_writer::{ArchiveWriter, Piece};
use crate::support::client::{Client, FLAGS, Plain, connect_from};
use crate::support::server::Line;
use crate::support::{IMAGE_SHA256, archive, wait_until};

/// A server whose standard error stream is not the test's. It is killed on drop.
struct Mute {
    child: Child,
    address: SocketAddr,
}

impl Mute {
    /// Serves on a port that was free a moment ago; only 127.0.0.1 is let in.
    fn start(stderr: impl Into<Stdio>, port: u16) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        command.args(["--listen", &address.to_string(), "--allow", "127.0.0.1"]);
        command.arg(archive(BASE)).env_remove("RUST_LOG");
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        Self { child, address }
    }

    fn listening(self) -> Self {
        wait_until("it listens", || TcpStream::connect(self.address).is_ok());
        self
    }

    fn assert_goes_on(mut self) {
        let come_in = || {
            let stream = TcpStream::connect(self.address).unwrap();
            let mut client = Client::new(Plain::Tcp(stream));
            client.greet(FLAGS);
            client.go("");
            client
        };
        let mut served = come_in();
        served.read_ok(0, 512);
        for _ in 0..3 {
            let refused = connect_from(Ipv4Addr::new(127, 0, 0, 2).into(), self.address);
            Client::new(Plain::Tcp(refused)).expect_closed();
            served.read_ok(0, 512);
            come_in().disconnect();
        }
        assert!(self.child.try_wait().unwrap().is_none());
        served.disconnect();
        let kill = format!("kill -TERM {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

/// A line that could not be written ended the session, or the whole server.
#[test]
fn a_log_that_can_not_be_written_hurts_nobody() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    Mute::start(full, free_port()).listening().assert_goes_on();

    let mut closed = Mute::start(Stdio::piped(), free_port());
    // Closed after the first line, as when a pager ends.
    let mut stderr = BufReader::new(closed.child.stderr.take().unwrap());
    stderr.read_line(&mut String::new()).unwrap();
    drop(stderr);
    closed.listening().assert_goes_on();
}

#[test]
fn exit_codes_are_right_without_a_log() {
    for (args, code) in [(&["--no-such-option"][..], 2), (&["/nowhere/x.hxz"], 3)] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
        let status = command.args(args).stdout(Stdio::null()).stderr(full).status().unwrap();
        assert_eq!(status.code(), Some(code), "{args:?}");
    }
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    let status = demo.args(["demo", "--once"]).stdout(full()).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(IMAGE_SHA256.len(), 64);
}

/// As behind `| true`: nobody reads what is printed, and nothing is said of that.
#[test]
fn commands_end_quietly_when_nobody_reads_them() {
    const CLOSED: i32 = 141;
    let folder = tempfile::tempdir().unwrap();
    let server = plain().args(["--monitor", "127.0.0.1:0"]).start();
    let monitor = server.wait_for_log("the monitor runs", |line| line.json["monitor"].is_string());
    let monitor = monitor.json["monitor"].as_str().unwrap().to_owned();
    let (address, base) = (server.address().to_string(), archive(BASE).display().to_string());
    let dir = folder.path().join("pki").display().to_string();
    for (args, code) in [
        (&["inspect", &base][..], CLOSED),
        (&["inspect", "--json", "--files", &base], CLOSED),
        (&["verify", "-q", &base], CLOSED),
        (&["verify", "-q", "--json", &base], CLOSED),
        (&["digest", &base], CLOSED),
        (&["check", "--from", "127.0.0.1", &base], CLOSED),
        (&["--check-config", &base], CLOSED),
        (&["doctor", "--no-speed", &address], CLOSED),
        (&["man"], CLOSED),
        (&["completions", "bash"], CLOSED),
        (&["pki", "--dir", &dir, "init"], CLOSED),
        (&["pki", "--dir", &dir, "server", "localhost"], CLOSED),
        (&["pki", "--dir", &dir, "show"], CLOSED),
        (&["demo", "--once"], CLOSED),
        (&["top", "--once", "--interval", "200ms", &monitor], 0),
        (&["--help"], 0),
        (&["--version"], 0),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
        command.args(args).env_remove("RUST_LOG").stdin(Stdio::null()).stdout(writer);
        let output = command.stderr(Stdio::piped()).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
        assert_eq!(output.status.code(), Some(code), "{args:?}");
    }
    // What they do is done all the same.
    assert!(folder.path().join("pki/ca-cert.pem").exists());
}

/// Peers that are refused, of which there can be many, used up the lines of those that are
/// served.
#[test]
fn refused_peers_use_up_no_lines_of_served_ones() {
    const SERVED: usize = 20;
    let server = plain().args(["--allow", "127.0.0.1"]).start();
    let flood = |number| {
        for _ in 0..number {
            drop(server.connect_from(Ipv4Addr::new(127, 0, 0, 2)));
        }
    };
    flood(300);
    for _ in 0..SERVED {
        flood(10);
        server.assert_alive();
    }
    let count = |wanted: fn(&Line) -> bool| server.log().into_iter().filter(wanted).count();
    wait_until("all have left", || count(|line| line.json["how"] == "left") == SERVED);
    assert_eq!(count(|line| line.json["tls"] == "none"), SERVED);
    let refused = count(|line| line.json["peer"] == "127.0.0.2");
    assert!(refused < 250, "{refused}");
}

/// Standard error of a server that doesn't start, as people see it.
fn stderr_for(archive: &Path) -> (i32, String) {
    let args = [Path::new("--listen=127.0.0.1:0"), archive];
    let (code, stderr) = crate::support::server::run_to_failure(args);
    // Lines that there are whatever the archive says.
    let is_usual = |line: &&str| line.contains(" sandbox: ") || line.contains("running_as_root");
    (code, stderr.lines().filter(|line| !is_usual(line)).collect::<Vec<_>>().join("\n"))
}

/// Parents are named by whoever packed an archive.
#[test]
fn a_parents_name_can_not_forge_a_log_line() {
    const FORGED: &str = "x\n2026-01-01T00:00:00Z  INFO all is well \u{1b}[31mred\r\u{2028}";
    let folder = tempfile::tempdir().unwrap();
    let child = ArchiveWriter {
        parents: vec![FORGED.into()],
        main: vec![Piece::Zeros(512)],
        ..ArchiveWriter::default()
    };
    let path = folder.path().join("child.hxz");
    let is_clean = |stderr: &str| {
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        assert!(stderr.contains("all is well"), "{stderr}");
        for bad in ['\u{1b}', '\r', '\u{2028}'] {
            assert!(!stderr.contains(bad), "{stderr:?}");
        }
    };
    // One that isn't there.
    child.write().save(&path);
    let (code, stderr) = stderr_for(&path);
    assert_eq!(code, 3);
    is_clean(&stderr);
    // One that would have to be elsewhere.
    let outside = ArchiveWriter { parents: vec![format!("/{FORGED}")], ..child.clone() };
    outside.write().save(&path);
    is_clean(&stderr_for(&path).1);
    // One that is there, and no archive.
    child.write().save(&path);
    std::fs::write(folder.path().join(FORGED), "no archive").unwrap();
    is_clean(&stderr_for(&path).1);
    // One that goes in a circle.
    let circle = folder.path().join(FORGED);
    child.write().save(&circle);
    is_clean(&stderr_for(&path).1);
}

/// Every limit that `--help` knows is in the log, as it is in force.
#[test]
fn the_limits_are_in_the_log() {
    let help = crate::support::server::run(["--help"]).stdout;
    let limits = help.split("\nLimits:\n").nth(1).unwrap().split("\n\n").take_while(|text| {
        // Until the next heading.
        !text.trim_start_matches('\n').starts_with(|first: char| first != ' ')
    });
    let names: Vec<&str> =
        limits.filter_map(|text| text.trim().strip_prefix("--")?.split(' ').next()).collect();
    assert!(names.len() >= 15, "{names:?}");
    let server = plain().args(["-v", "--max-requests", "77", "--idle-timeout", "99s"]).start();
    let line = server.wait_for_message("limits: ");
    for name in names {
        assert!(line.message().contains(&format!("{name} ")), "{name}: {}", line.text);
    }
    for value in ["max-requests 77/s", "idle-timeout 1m 39s", "max-connections 256", "8.0 MiB"] {
        assert!(line.message().contains(value), "{value}: {}", line.text);
    }
    let memory = server.wait_for_message("memory: ");
    assert!(memory.message().contains("208.0 MiB for decoded blocks"), "{}", memory.text);
    assert!(!plain().start().log_text().contains("limits: "));
}

/// Only warnings precede the line that the server is ready.
#[test]
fn readiness_is_the_first_information() {
    let server = plain().args(["--monitor", "127.0.0.1:0"]).start();
    let log = server.log();
    let first = log.iter().find(|line| line.json["level"] != "WARN").unwrap();
    assert!(first.message().starts_with("ready: "), "{}", server.log_text());
    assert!(first.json["monitor"].is_string(), "{}", first.text);
}

#[test]
fn quiet_servers_log_warnings_and_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    command.args(["-q", "--log-format", "json", "--default-export", "none"]).arg(archive(BASE));
    command.arg("--export-dir").arg(folder.path());
    command.arg("--listen").arg(format!("unix:{}", path.display()));
    command.env_remove("RUST_LOG").stdin(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut connected = None;
    wait_until("it listens", || {
        connected = UnixStream::connect(&path).ok();
        connected.is_some()
    });
    let mut client = Client::new(Plain::Unix(connected.unwrap()));
    client.greet(FLAGS);
    client.go(BASE);
    client.read_ok(0, 1);
    client.disconnect();
    // The shell's own kill: the program of that name isn't everywhere.
    let kill = format!("kill -TERM {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{log}");
    assert!(log.contains("default_export_impossible"), "{log}");
    assert!(log.lines().all(|line| line.contains(r#""level":"WARN""#)), "{log}");

    let (code, stderr) = plain().args(["--quiet", "/nowhere/x.hxz"]).arg("--strict").fail();
    assert_eq!(code, 3);
    assert!(stderr.contains("/nowhere/x.hxz"), "{stderr}");
}

/// Like other options, those of the command line take precedence over the file's.
#[test]
fn verbose_overrides_quiet_in_the_file() {
    let (code, stderr) = plain().args(["--quiet", "-v"]).fail();
    assert_eq!(code, 2, "{stderr}");
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("hexz-nbd.toml");
    std::fs::write(&config, "quiet = true\n").unwrap();
    let server = plain().arg("-v").arg("--config").arg(&config).start();
    server.wait_for_message("limits: ");
    std::fs::write(&config, "quiet = true\nverbose = 1\n").unwrap();
    let (code, stderr) = plain().arg("--config").arg(&config).fail();
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("config_conflict"), "{stderr}");
}

#[test]
fn an_empty_filter_is_none() {
    let server = plain().env("RUST_LOG", "").start();
    server.assert_alive();
    server.wait_for_log("it reads", |line| line.json["tls"] == "none");
    assert!(!server.log_text().contains("\"DEBUG\""));
}

#[test]
fn a_filter_that_makes_no_sense_is_refused() {
    for nonsense in ["nonsense=[", "hexz_nbd=loud"] {
        let (code, stderr) = plain().env("RUST_LOG", nonsense).fail();
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains("RUST_LOG"), "{stderr}");
    }
}
