//! Names from the command line, files, folders, clients and certificates: none forges a line of
//! the log or of a report, none reaches a terminal unescaped, and none passes for another.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};

use nbd_telemetry::escape::is_hidden;
use serde_json::Value;

use super::BASE;
use crate::archive_writer::{ArchiveWriter, Piece};
use crate::support::authority::{Authority, Recipe};
use crate::support::client::{Client, FLAGS, OPT_GO, Plain, REP_ERR_UNKNOWN, info_data};
use crate::support::pki::Pki;
use crate::support::server::{Server, run};
use crate::support::{archive, wait_until};

/// What a line of the log, or of clap, could begin with.
const FORGED: &str = "x\n2026-01-01T00:00:00.000000Z ERROR forged \u{1b}[2J\u{9b}2J\r\u{202e}\
                      \u{200b}\u{61c}\u{2028}y";

/// Bytes that are no UTF-8.
const NOT_UTF8: &[u8] = b"not-\xff-utf8.hxz";

/// Asserts that nothing in `text` is more than a line of what can be seen.
fn assert_tame(text: &str, what: &str) {
    let is_layout = |character: char| character == '\n' || !is_hidden(character);
    assert!(text.chars().all(is_layout), "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("2026-01-01T")), "{what}: {text}");
}

#[test]
fn the_command_line_forges_no_line() {
    let base = archive(BASE).into_os_string().into_string().unwrap();
    let option = |name: &str| vec![format!("--{name}={FORGED}"), base.clone()];
    let mut lines: Vec<Vec<String>> = vec![
        vec![FORGED.to_owned()],
        vec![format!("{FORGED}={FORGED}")],
        vec![format!("{FORGED}={base}"), "--check-config".to_owned()],
        vec![format!("{FORGED}={base}"), format!("{FORGED}={base}")],
        vec![format!("--{FORGED}"), base.clone()],
        vec!["--tls-cert".to_owned(), FORGED.to_owned(), "--tls-key=x".to_owned(), base.clone()],
    ];
    for name in [
        "allow",
        "deny",
        "rules",
        "config",
        "export-dir",
        "default-export",
        "listen",
        "monitor",
        "monitor-name",
        "audit",
        "user",
        "socket-group",
        "socket-mode",
        "password-file",
        "digest",
        "verify-key",
        "cache-size",
        "idle-timeout",
        "sandbox",
        "allow-identity",
        "parent-dir",
        "resolve-references",
        "log-format",
        "max-connections",
    ] {
        let mut line = option(name);
        line.push("--check-config".to_owned());
        lines.push(line);
    }
    for command in ["inspect", "verify", "digest", "doctor", "top", "pki"] {
        lines.push(vec![command.to_owned(), FORGED.to_owned()]);
    }
    lines.push(["check", "--from", FORGED, "x"].map(str::to_owned).to_vec());
    lines.push(vec!["pki".to_owned(), "--dir".to_owned(), FORGED.to_owned(), "show".to_owned()]);
    lines.push(vec!["doctor".to_owned(), format!("unix:/{FORGED}")]);
    lines.push(vec!["doctor".to_owned(), format!("{FORGED}://x")]);
    lines.push(vec!["top".to_owned(), format!("unix:/{FORGED}")]);
    for line in lines {
        let ended = run(&line);
        let what = format!("{line:?}");
        assert_tame(&ended.stdout, &what);
        assert_tame(&ended.stderr, &what);
        // What is sound isn't spoken of.
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(ended.code == Some(0) || said.contains("forged"), "{what}: {said}");
    }
}

#[test]
fn a_configuration_file_forges_no_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hexz-nbd.toml");
    let quoted = serde_json::to_string(FORGED).unwrap().replace('\u{9b}', "\\u009b");
    let base = archive(BASE);
    for text in [
        format!("{quoted} = 1"),
        format!("[{quoted}]\na = 1"),
        format!("allow = {quoted}"),
        format!("log-format = {quoted}"),
        format!("[exports]\n{quoted} = 1"),
        format!("[exports]\n{quoted}.a = 1"),
        format!("[exports]\na = {quoted}"),
        format!("[exports]\n{quoted} = {base:?}"),
        quoted,
        format!("a = {FORGED}"),
    ] {
        fs::write(&path, &text).unwrap();
        let ended = run([OsStr::new("--check-config"), "--config".as_ref(), path.as_ref()]);
        assert_tame(&ended.stdout, &text);
        assert_tame(&ended.stderr, &text);
    }
}

/// A server whose log is that of people, until it ends.
struct Spoken {
    child: Child,
    log: tempfile::NamedTempFile,
    port: u16,
}

impl Spoken {
    fn start(arguments: &[OsString]) -> Self {
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
        command.args(["-vv", "--listen", &format!("127.0.0.1:{port}")]).args(arguments);
        command.env_remove("RUST_LOG").stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(log.reopen().unwrap()).spawn().unwrap();
        let server = Self { child, log, port };
        wait_until("it listens", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        server
    }

    fn connect(&self) -> Client<Plain> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        let mut client = Client::new(Plain::Tcp(stream));
        client.greet(FLAGS);
        client
    }

    fn end(mut self) -> String {
        let kill = format!("kill -TERM {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        fs::read_to_string(self.log.path()).unwrap()
    }
}

impl Drop for Spoken {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Names of exports, of files in a folder, and of what a client asks for.
#[test]
fn exports_and_files_forge_no_line() {
    let folder = tempfile::tempdir().unwrap();
    // A slash would end a file's name.
    let broken = format!("{FORGED}.hxz");
    fs::write(folder.path().join(&broken), "no archive").unwrap();
    let mut named = OsString::from(format!("served {FORGED}="));
    named.push(archive(BASE));
    let server = Spoken::start(&[named, "--export-dir".into(), folder.path().into()]);
    let mut client = server.connect();
    assert_eq!(client.list(), [format!("served {FORGED}")]);
    client.refused(OPT_GO, &info_data(broken.as_bytes(), &[]), REP_ERR_UNKNOWN);
    client.refused(OPT_GO, &info_data(b"asked \x1b[2J\n\xff", &[]), REP_ERR_UNKNOWN);
    client.go(&format!("served {FORGED}"));
    client.disconnect();
    let log = server.end();
    assert_tame(&log, "the log");
    for name in ["served x\\n2026", "can't be served"] {
        assert!(log.contains(name), "{name}: {log}");
    }
}

/// The same in JSON, where it is for machines: the name comes back as it is.
#[test]
fn json_keeps_names_and_hides_nothing() {
    let mut named = OsString::from(format!("{FORGED}="));
    named.push(archive(BASE));
    let server = Server::builder().arg(named).start();
    let mut client = server.go(FORGED);
    client.read_ok(0, 1);
    client.disconnect();
    let line = server.wait_for_how("left");
    assert_eq!(line.json["export"], FORGED);
    assert!(!server.log_text().chars().any(|it| it != '\n' && is_hidden(it)));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(format!("{FORGED}.hxz"));
    fs::copy(archive(BASE), &path).unwrap();
    for arguments in [&["inspect", "--json"][..], &["verify", "--json"]] {
        let ended = run(arguments.iter().map(OsStr::new).chain([path.as_os_str()]));
        assert_tame(&ended.stdout, "JSON");
        let last = if arguments[0] == "verify" {
            ended.stdout.lines().last().unwrap()
        } else {
            &ended.stdout
        };
        let json: Value = serde_json::from_str(last).unwrap();
        assert_eq!(json["archive"], path.to_str().unwrap(), "{arguments:?}");
    }
}

/// A client chooses what is in its certificate, as far as its CA lets it.
#[test]
fn a_certificates_subject_forges_no_line() {
    let authority = Authority::new();
    // A common name has at most 64 characters.
    let name = "x\n2026-01-01T00:00:00Z ERROR forged \u{1b}[2J\u{202e}y";
    let certified = authority.certify(&Recipe { name, ..Recipe::default() });
    let folder = tempfile::tempdir().unwrap();
    let audit = folder.path().join("audit.jsonl");
    let server = Server::builder()
        .archive(BASE)
        .tls(Pki::new())
        .clients_of(&authority)
        .arg("-v")
        .arg("--audit")
        .arg(&audit)
        .start();
    let mut client = server.connect();
    client.greet(FLAGS);
    let mut client = client.starttls(certified.config(server.pki())).boxed();
    client.go("");
    client.disconnect();
    let line = server.wait_for_how("left");
    let identity = line.json["identity"].as_str().unwrap();
    assert_eq!(identity, r"cn:x\n2026-01-01T00:00:00Z ERROR forged \u{1b}[2J\u{202e}y");
    let mut text = String::new();
    wait_until("the end is in the audit", || {
        text = fs::read_to_string(&audit).unwrap();
        text.contains("\"ended\"")
    });
    assert_tame(&text, "the audit");
    assert!(!server.log_text().chars().any(|it| it != '\n' && is_hidden(it)));
}

/// Reports on archives whose paths, parents and metadata their makers chose.
#[test]
fn reports_on_archives_forge_no_line() {
    let folder = tempfile::tempdir().unwrap();
    let parent = folder.path().join(FORGED);
    let child = ArchiveWriter {
        parents: vec![FORGED.into()],
        main: vec![Piece::Zeros(512)],
        ..ArchiveWriter::default()
    };
    let path = folder.path().join(format!("child {FORGED}.hxz"));
    child.write().save(&path);
    ArchiveWriter { main: vec![Piece::Zeros(512)], ..ArchiveWriter::default() }
        .write()
        .save(&parent);
    for command in ["inspect", "verify"] {
        let ended = run([OsStr::new(command), path.as_os_str()]);
        assert_eq!(ended.code, Some(0), "{command}: {ended:?}");
        assert_tame(&ended.stdout, command);
        assert_tame(&ended.stderr, command);
        assert!(ended.stdout.contains("child x\\n2026"), "{command}: {}", ended.stdout);
    }
}

/// A path that isn't UTF-8 is used as it is, and named so that it can be told from others.
#[test]
fn paths_that_are_not_utf8_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(OsStr::from_bytes(NOT_UTF8));
    fs::copy(archive(BASE), &path).unwrap();
    // No client could ask for the file's own name.
    let ended = run([OsStr::new("--check-config"), path.as_os_str()]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(ended.stderr.contains(r"not-\xff-utf8.hxz") && ended.stderr.contains("NAME=PATH"));
    // Under another one it is served.
    let mut named = OsString::from("disk=");
    named.push(&path);
    Server::builder().arg(&named).start().go("disk").read_ok(0, 1);

    let missing = folder.path().join(OsStr::from_bytes(b"none-\xfe.hxz"));
    for command in ["inspect", "verify", "digest"] {
        let ended = run([OsStr::new(command), missing.as_os_str()]);
        assert!(ended.stderr.contains(r"none-\xfe.hxz"), "{command}: {}", ended.stderr);
        assert!(!ended.stderr.contains('\u{fffd}'), "{command}: {}", ended.stderr);
    }
    let ended = run([OsStr::new("inspect"), "--json".as_ref(), path.as_os_str()]);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert!(json["archive"].as_str().unwrap().ends_with(r"/not-\xff-utf8.hxz"), "{json}");

    let socket = folder.path().join(OsStr::from_bytes(b"\xff.sock"));
    let mut listen = OsString::from("unix:");
    listen.push(&socket);
    let server = [OsStr::new("--listen"), &listen, "--check-config".as_ref(), &named];
    let ended = run(server);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains(r"\xff.sock"), "{}", ended.stdout);
    // What takes text says which argument isn't.
    let allow = OsStr::from_bytes(b"--allow=10.0.0.\xfd");
    let ended = run([allow, archive(BASE).as_os_str()]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains(r"--allow=10.0.0.\xfd"), "{}", ended.stderr);
}
