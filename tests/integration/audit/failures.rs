//! Where events can't be written, or not as fast as they come.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::process::{Child, Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::Value;

use super::{BASE, Record, assert_no_gaps, read};
use crate::support::client::{Client, OPT_GO, Plain, REP_ERR_UNKNOWN, connect_from, info_data};
use crate::support::server::Server;
use crate::support::{archive, wait_until};

#[test]
fn what_can_not_be_appended_to_refuses_to_start() {
    let record = Record::new();
    fs::write(record.at("file"), "").unwrap();
    symlink("file", record.at("link")).unwrap();
    mknodat(CWD, record.at("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    for (path, reason) in [
        (record.at("link"), "audit_link"),
        (record.at("none/file"), "audit_unwritable"),
        (record.0.path().to_owned(), "audit_unwritable"),
        (record.at("pipe"), "audit_no_reader"),
    ] {
        let message =
            Server::builder().archive(BASE).arg("--audit").arg(&path).fails_with(7, reason);
        assert!(message.contains(path.to_str().unwrap()), "{message}");
    }
}

/// A file that was rotated, as logrotate does it, inside the sandbox.
#[test]
fn a_rotation_loses_nothing() {
    let record = Record::new();
    let server = Server::builder().archive(BASE).arg("--audit").arg(record.path());
    let mut server = server.args(["--sandbox", "auto"]).start();
    for number in 1..=3 {
        server.assert_alive();
        fs::rename(record.path(), record.at(&format!("old.{number}"))).unwrap();
        server.signal("HUP");
        wait_until("there is a new one", || record.path().exists());
    }
    server.assert_alive();
    server.terminate();
    let files = ["old.1", "old.2", "old.3", "audit.jsonl"];
    let all: Vec<Value> = files.iter().flat_map(|name| read(&record.at(name))).collect();
    assert_eq!(assert_no_gaps(&all), 0);
    assert_eq!(all.iter().filter(|event| event["event"] == "ended").count(), 4);
    assert_eq!(all.last().unwrap()["event"], "stop");
    let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(record.path()).unwrap());
    assert_eq!(mode & 0o777 & !0o640, 0);
    // Without a rename, a SIGHUP leaves the file as it is.
    assert_eq!(server.log_text().matches("audit: reopened").count(), 3);
}

/// A server whose files can have 8 blocks of the shell's `ulimit -f`, 4 KiB: behind them it is
/// as on a full disk, in the middle of a line.
struct OnFullDisk {
    child: Child,
    port: u16,
}

impl OnFullDisk {
    fn start(record: &Record) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut command = Command::new("sh");
        command
            .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$@\"", "sh"])
            .arg(env!("CARGO_BIN_EXE_hexz-nbd"))
            .args(["--listen", &format!("127.0.0.1:{port}"), "--allow", "127.0.0.1", "--audit"])
            .arg(record.path())
            .arg(archive(BASE))
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        wait_until("it listens", || !super::read(&record.path()).is_empty());
        Self { child, port }
    }

    fn refuse(&self, times: usize) {
        for _ in 0..times {
            let address = ([127, 0, 0, 1], self.port).into();
            let refused = connect_from([127, 0, 0, 2].into(), address);
            Client::new(Plain::Tcp(refused)).expect_closed();
        }
    }

    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Its end, and what it said.
    fn end(mut self) -> String {
        self.signal("TERM");
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{said}");
        said
    }
}

impl Drop for OnFullDisk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_full(record: &Record) -> bool {
    fs::metadata(record.path()).is_ok_and(|file| file.len() == 8 * 512)
}

/// The line that didn't fit is begun anew in the next file, and the server went on meanwhile.
#[test]
fn a_full_disk_is_survived_by_rotation() {
    let record = Record::new();
    let server = OnFullDisk::start(&record);
    server.refuse(30);
    wait_until("it is full", || is_full(&record));
    server.refuse(3);
    fs::rename(record.path(), record.at("old")).unwrap();
    server.signal("HUP");
    record.wait_for("refused", |event| event["id"] == 33);
    let said = server.end();
    let old = read(&record.at("old"));
    let all = [old, record.events()].concat();
    assert_eq!(assert_no_gaps(&all), 0);
    assert_eq!(all.iter().filter(|event| event["event"] == "refused").count(), 33);
    assert!(said.contains("reason=\"audit_write_failed\""), "{said}");
    // It ends in the middle of a line.
    assert!(!fs::read_to_string(record.at("old")).unwrap().ends_with('\n'));
}

/// Somebody cut the file, with the beginning of the line that hadn't been written whole.
#[test]
fn a_file_that_was_cut_meanwhile_goes_on_with_whole_lines() {
    let record = Record::new();
    let server = OnFullDisk::start(&record);
    server.refuse(30);
    wait_until("it is full", || is_full(&record));
    let before = record.events();
    File::options().write(true).open(record.path()).unwrap().set_len(0).unwrap();
    record.wait_for("refused", |event| event["id"] == 30);
    server.end();
    let all = [before, record.events()].concat();
    assert_eq!(assert_no_gaps(&all), 0);
}

/// A pipe that nobody reads any more: clients are served as before, what is lost is counted, in
/// the log, too, and told when somebody reads again.
#[test]
fn a_reader_that_stalls_delays_nobody() {
    let record = Record::new();
    mknodat(CWD, record.path(), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let open = || File::options().read(true).custom_flags(libc::O_NONBLOCK).open(record.path());
    let mut reader = open().unwrap();
    let rule = "[[rule]]\naction = \"allow\"\nnetwork = \"127.0.0.0/8\"\nexport = \"base-*\"";
    fs::write(record.at("rules.toml"), rule).unwrap();
    let server = Server::builder().archive(BASE).arg("--rules").arg(record.at("rules.toml"));
    let server = server.args(["--connection-rate", "1000000"]);
    let mut server = server.arg("--audit").arg(record.path()).start();
    let mut client = server.go("");
    // 4 MiB of memory, and the pipe's 64 KiB, at some 1200 bytes each.
    let is_lost = || server.has_reason("audit_events_lost");
    let mut denied = 0;
    while !is_lost() {
        // As many as are told of one connection.
        let mut asking = server.greeted();
        for _ in 0..16 {
            let name = info_data(&[b'x'; 1000], &[]);
            asking.refused(OPT_GO, &name, REP_ERR_UNKNOWN);
        }
        denied += 16;
        client.read_ok(0, 512);
        assert!(denied < 20_000, "nothing is lost");
    }
    assert!(server.rss_kib() < 200 * 1024);
    client.disconnect();
    server.signal("TERM");
    let mut bytes = Vec::new();
    wait_until("it has ended", || {
        let mut chunk = vec![0; 1 << 16];
        while let Ok(read) = reader.read(&mut chunk) {
            if read == 0 {
                break;
            }
            bytes.extend_from_slice(&chunk[..read]);
        }
        !server.is_running()
    });
    if let Err(error) = reader.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    }
    let text = String::from_utf8(bytes).unwrap();
    let events: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let lost = assert_no_gaps(&events);
    assert!(lost > 0);
    let told = events.iter().filter(|event| event["event"] == "export_denied").count() as u64;
    assert!(told + lost >= denied, "{told} + {lost} of {denied}");
    assert_eq!(events.last().unwrap()["event"], "stop");
    server.wait_for_reason("audit_events_unwritten");
}
