//! What each line of a connection says of it: for machines, for people, and in the journal.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::{BASE, plain};
use crate::support::authority::{Authority, Recipe};
use crate::support::client::{
    Client, FLAGS, OPT_EXPORT_NAME, OPT_GO, Plain, REP_ERR_UNKNOWN, info_data, option,
};
use crate::support::pki::Pki;
use crate::support::server::Server;
use crate::support::{archive, wait_until};

/// `jq 'select(.id == 7)'` has all lines of a connection, with all that was known by then.
#[test]
fn lines_of_a_connection_are_flat_and_say_whose_they_are() {
    let authority = Authority::new();
    let server = Server::builder().archive(BASE).tls(Pki::new()).clients_of(&authority);
    let server = server.arg("-v").start();
    for who in ["alice", "bob"] {
        let certified = authority.certify(&Recipe { name: who, ..Recipe::default() });
        let mut client = server.connect();
        client.greet(FLAGS);
        let mut client = client.starttls(certified.config(server.pki())).boxed();
        client.go("");
        client.disconnect();
    }
    wait_until("both have left", || {
        server.log().iter().filter(|line| line.json["how"] == "left").count() == 2
    });
    for (id, who) in [(1, "cn:alice"), (2, "cn:bob")] {
        let lines: Vec<_> = server.log().into_iter().filter(|line| line.json["id"] == id).collect();
        assert!(lines.len() >= 4, "{}", server.log_text());
        let first = &lines[0].json;
        assert!(first.get("identity").is_none() && first.get("export").is_none(), "{first}");
        for line in &lines {
            let json = &line.json;
            assert_eq!(json["peer"], "127.0.0.1", "{}", line.text);
            assert!(json.as_object().unwrap().values().all(|value| !value.is_object()));
            let knows = |name: &str| json.get(name).is_some();
            if knows("tls") || json["how"] == "left" {
                assert_eq!((&json["identity"], &json["export"]), (&who.into(), &BASE.into()));
            }
            assert!(!knows("export") || knows("identity"), "{}", line.text);
        }
        let first = &lines[0].json;
        assert!(first.get("identity").is_none(), "{first}");
    }
    let server = plain().args(["--allow", "127.0.0.1"]).start();
    server.connect_from([127, 0, 0, 2]).expect_closed();
    server.wait_for_log("it is refused", |line| {
        line.json["peer"] == "127.0.0.2" && line.json["id"] == 1
    });
}

/// A server that logs for people. It is killed on drop.
struct ForPeople {
    child: Child,
    folder: tempfile::TempDir,
    address: SocketAddr,
}

impl ForPeople {
    /// Runs what `prepare` makes of a command that has no arguments yet. Standard error is the
    /// file `log` in its folder.
    fn start(args: &[&str], prepare: impl FnOnce(&Path) -> Command) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let folder = tempfile::tempdir().unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let mut command = prepare(folder.path());
        command.args(["--listen", &address.to_string()]).args(args).arg(archive(BASE));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let started = Self { child, folder, address };
        // Its socket is there sooner than what it does at a signal.
        wait_until("it greets", || started.greets().is_ok());
        started
    }

    fn greets(&self) -> io::Result<()> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.read_exact(&mut [0; 8])
    }

    fn connect(&self) -> Client<Plain> {
        Client::new(Plain::Tcp(TcpStream::connect(self.address).unwrap()))
    }

    /// Its end, and what it said.
    fn end(mut self) -> String {
        let kill = format!("kill -TERM {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        let code = self.child.wait().unwrap().code();
        let said = fs::read_to_string(self.folder.path().join("log")).unwrap();
        assert_eq!(code, Some(0), "{said}");
        said
    }
}

impl Drop for ForPeople {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
    command.env_remove("RUST_LOG").env_remove("JOURNAL_STREAM");
    command
}

/// With RUST_LOG=warn the lines that are left say whose they are, too.
#[test]
fn whose_a_line_is_does_not_depend_on_the_level() {
    let server = ForPeople::start(&[], |_| {
        let mut command = binary();
        command.env("RUST_LOG", "warn");
        command
    });
    let mut client = server.connect();
    client.send(b"nonsense, and more of it");
    client.rest();
    let said = server.end();
    let line = said.lines().find(|line| line.contains("reason=\"session\"")).expect(&said);
    assert!(line.contains(" WARN connection{id=") && line.contains(" peer=127.0.0.1}: "));
}

/// Names in a client's certificate, and of exports that it asks for, stay within their line.
#[test]
fn peers_can_not_forge_a_log_line() {
    const FORGED: &str = "x\n2026-01-01T00:00:00Z  INFO all is well \u{1b}[31mred\r\u{85}\u{2028}";
    let (authority, pki) = (Authority::new(), Pki::new());
    let text = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let files = [
        text(pki.server_cert()),
        text(pki.server_key()),
        text(authority.certificate()),
        text(authority.revocation_list()),
    ];
    let options = ["--tls-cert", "--tls-key", "--tls-client-ca", "--tls-client-crl"];
    let mut args = vec!["-v"];
    for (option, file) in options.iter().zip(&files) {
        args.extend([*option, file]);
    }
    let server = ForPeople::start(&args, |_| binary());
    let mallory = authority.certify(&Recipe { name: FORGED, ..Recipe::default() });
    let come_in = || {
        let mut client = server.connect();
        client.greet(FLAGS);
        client.starttls(mallory.config(&pki)).boxed()
    };
    let mut client = come_in();
    client.refused(OPT_GO, &info_data(FORGED.as_bytes(), &[]), REP_ERR_UNKNOWN);
    client.go("");
    client.disconnect();
    let mut client = come_in();
    client.send(&option(OPT_EXPORT_NAME, FORGED.as_bytes()));
    client.rest();
    let said = server.end();
    assert!(said.contains("\"x\\n2026") && said.contains("identity=cn:x\\n2026"));
    for line in said.lines() {
        assert!(!line.starts_with("2026-01-01"), "{line:?}");
        assert!(!line.contains(|letter: char| letter.is_control() || letter == '\u{2028}'));
    }
}

/// What the journal reads of standard error begins with a priority, and has no time.
#[test]
fn the_journal_is_told_priorities() {
    let server = ForPeople::start(&["--allow", "127.0.0.1"], |folder| {
        let log = fs::metadata(folder.join("log")).unwrap();
        let mut command = binary();
        command.env("JOURNAL_STREAM", format!("{}:{}", log.dev(), log.ino()));
        command
    });
    let mut client = server.connect();
    client.send(b"nonsense, and more of it");
    client.rest();
    let said = server.end();
    assert!(said.lines().any(|line| line.starts_with("<6>ready: ")), "{said}");
    assert!(said.lines().any(|line| line.starts_with("<4>connection{id=")), "{said}");
    assert!(said.lines().all(|line| line.starts_with('<')), "{said}");
    // Another stream than the one that the journal reads.
    let server = ForPeople::start(&[], |_| {
        let mut command = binary();
        command.env("JOURNAL_STREAM", "1:1");
        command
    });
    assert!(server.end().lines().all(|line| line.starts_with("20")));
}

/// The fields of an entry; each has its length in front of it.
fn entry(mut bytes: &[u8]) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|&byte| byte == b'\n').unwrap();
        let name = str::from_utf8(&bytes[..end]).unwrap().to_owned();
        let (length, rest) = bytes[end + 1..].split_first_chunk::<8>().unwrap();
        let (value, rest) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let value = str::from_utf8(value).unwrap().to_owned();
        assert!(fields.insert(name, value).is_none());
        bytes = rest.strip_prefix(b"\n").unwrap();
    }
    fields
}

/// In a mount namespace of its own, where the test's socket is the journal's. The sandbox is on.
#[test]
fn the_journal_gets_fields() {
    let folder = tempfile::tempdir().unwrap();
    let journal = UnixDatagram::bind(folder.path().join("socket")).unwrap();
    journal.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let args = ["--log-format", "journal", "--allow", "127.0.0.1"];
    let server = ForPeople::start(&args, |_| {
        const SCRIPT: &str = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && \
                              mount --bind \"$JOURNAL\" /run/systemd/journal && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh"]);
        command.arg(env!("CARGO_BIN_EXE_hexz-nbd")).env("JOURNAL", folder.path());
        command.env_remove("RUST_LOG");
        command
    });
    let next = |wanted: &dyn Fn(&BTreeMap<String, String>) -> bool| {
        let mut bytes = vec![0; 1 << 20];
        loop {
            let length = journal.recv(&mut bytes).unwrap();
            let fields = entry(&bytes[..length]);
            assert_eq!(fields["SYSLOG_IDENTIFIER"], "hexz-nbd");
            if wanted(&fields) {
                return fields;
            }
        }
    };
    assert_eq!(next(&|fields| fields.contains_key("HEXZ_NBD_LISTEN"))["PRIORITY"], "6");
    let mut client = server.connect();
    client.greet(FLAGS);
    client.go("");
    client.read_ok(0, 512);
    let is = |field: &'static str, value: &'static str| {
        move |fields: &BTreeMap<String, String>| fields.get(field).is_some_and(|it| it == value)
    };
    let reading = next(&is("HEXZ_NBD_TLS", "none"));
    assert_eq!(reading["HEXZ_NBD_PEER"], "127.0.0.1");
    assert_eq!(reading["HEXZ_NBD_EXPORT"], BASE);
    client.disconnect();
    let left = next(&is("HEXZ_NBD_HOW", "left"));
    assert_eq!(
        (&left["HEXZ_NBD_ID"], &left["HEXZ_NBD_BYTES"]),
        (&reading["HEXZ_NBD_ID"], &"512".into())
    );
    // Long values, and control characters.
    let mut client = server.connect();
    client.greet(FLAGS);
    client.send(&option(OPT_EXPORT_NAME, &[b'\n'; 4096]));
    client.rest();
    let closed = next(&is("HEXZ_NBD_REASON", "session"));
    assert_eq!(closed["PRIORITY"], "4");
    assert!(!closed["MESSAGE"].contains('\n'));

    // It stops reading; others are served as before, and what is lost is counted.
    for _ in 0..100 {
        let mut client = server.connect();
        client.send(b"nonsense, and more of it, which is logged");
        client.rest();
    }
    let mut client = server.connect();
    client.greet(FLAGS);
    client.go("");
    let read_on = std::thread::scope(|scope| {
        let reads = scope.spawn(|| next(&is("HEXZ_NBD_REASON", "log_lines_lost")));
        while !reads.is_finished() {
            let mut client = server.connect();
            client.send(b"nonsense, and more of it, which is logged");
            client.rest();
        }
        reads.join().unwrap()
    });
    assert_eq!(read_on["PRIORITY"], "4");
    client.read_ok(0, 512);
    client.disconnect();
    assert_eq!(server.end(), "");
}

#[test]
fn without_a_journal_it_does_not_start() {
    let (code, stderr) = {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c"]);
        command.args(["mount -t tmpfs tmpfs /run && exec \"$@\"", "sh"]);
        command.arg(env!("CARGO_BIN_EXE_hexz-nbd")).args(["--log-format", "journal"]);
        let output = command.arg(archive(BASE)).env_remove("RUST_LOG").output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("/run/systemd/journal/socket"), "{stderr}");
}
