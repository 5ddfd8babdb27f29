//! The units for systemd, as they are packaged.

use std::collections::BTreeSet;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::manager::Manager;
use super::{BASE, first_client, text};
use crate::clients::{run, run_command};
use crate::support::client::{Client, FLAGS, Plain};
use crate::support::pki::Pki;
use crate::support::server::{Server, run as run_binary};
use crate::support::{IMAGE_SIZE, archive, image};

const BINARY: &str = env!("CARGO_BIN_EXE_hexz-nbd");

/// How exposed the service may be, in tenths, as `systemd-analyze security` reckons.
const MOST_EXPOSED: &str = "12";

fn unit(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd").join(name);
    std::fs::read_to_string(path).unwrap()
}

/// The units in a folder, with the built binary in the place of the installed one.
fn units() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let names = ["hexz-nbd.service", "hexz-nbd.socket", "hexz-nbd-monitor.socket"];
    let copy = |name: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, unit(name).replace("/usr/bin/hexz-nbd", BINARY)).unwrap();
        path
    };
    let paths = names.map(copy).to_vec();
    (folder, paths)
}

#[test]
fn systemd_understands_all_of_it() {
    let (_folder, units) = units();
    let mut arguments = vec!["verify", "--man=no"];
    arguments.extend(units.iter().map(|path| text(path)));
    let said = run("systemd-analyze", &arguments);
    let everything = said.everything();
    said.ok();
    assert_eq!(everything, "");
}

/// The timer for renewals in examples/, without what isn't installed here.
#[test]
fn systemd_understands_the_renewal_timer() {
    let folder = tempfile::tempdir().unwrap();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let paths = ["hexz-nbd-renew.service", "hexz-nbd-renew.timer"].map(|name| {
        let path = folder.path().join(name);
        let unit = std::fs::read_to_string(examples.join(name)).unwrap();
        let unit = unit.replace("/usr/bin/hexz-nbd", BINARY).replace("/usr/bin/rsync", "/bin/true");
        std::fs::write(&path, unit).unwrap();
        path
    });
    let [service, timer] = paths.each_ref().map(|path| text(path));
    let said = run("systemd-analyze", &["verify", "--man=no", service, timer]);
    let everything = said.everything();
    said.ok();
    assert_eq!(everything, "");
}

#[test]
fn the_service_is_hardly_exposed() {
    let (_folder, units) = units();
    let threshold = format!("--threshold={MOST_EXPOSED}");
    let arguments = ["security", "--no-pager", "--offline=yes", &threshold, text(&units[0])];
    run("systemd-analyze", &arguments).ok();
}

/// What the unit runs, run as systemd does: with sockets, credentials and a place to tell of it.
/// The user and what only systemd can do are left out.
#[test]
fn the_command_of_the_service_serves_reloads_and_ends() {
    let (folder, pki) = (tempfile::tempdir().unwrap(), Pki::new());
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("credentials")).unwrap();
    for (from, name) in [(pki.server_cert(), "tls-cert"), (pki.server_key(), "tls-key")] {
        let credential = at("credentials").join(format!("hexz-nbd.{name}"));
        std::fs::copy(from, &credential).unwrap();
        std::fs::set_permissions(&credential, Permissions::from_mode(0o400)).unwrap();
    }
    let archives = archive("");
    let settings = format!("log-format = \"json\"\nexport-dir = \"{}\"\n", text(&archives));
    std::fs::write(at("hexz-nbd.toml"), &settings).unwrap();

    let service = unit("hexz-nbd.service");
    let value = |key: &str| service.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    // One of the unit's commands, with files of this test.
    let command = |key: &str| -> Vec<String> {
        let line = value(key).replace("/etc/hexz-nbd/", &format!("{}/", text(folder.path())));
        let line = line.replace("/run/hexz-nbd/", &format!("{}/", text(folder.path())));
        let mut words = line.split(' ').map(str::to_owned);
        assert_eq!(words.next().unwrap(), "/usr/bin/hexz-nbd");
        words.collect()
    };

    let manager = Manager::at_a_path();
    let socket = at("socket");
    let client = first_client(&socket);
    let activate = [
        "systemd-socket-activate".to_owned(),
        format!("--listen={}", text(&socket)),
        "--fdname=nbd".to_owned(),
        format!("--setenv=NOTIFY_SOCKET={}", manager.place),
        format!("--setenv=CREDENTIALS_DIRECTORY={}", text(&at("credentials"))),
    ];
    let builder = Server::builder().within(activate).bare().args(command("ExecStart="));
    let mut server = builder.start();
    let ready = manager.hears_until("READY=1");
    assert!(ready[1].contains(text(&archives)) && ready[1].contains("TLS"), "{ready:?}");

    let mut client = Client::new(Plain::Unix(client.join().unwrap()));
    client.greet(FLAGS);
    let mut client = client.starttls(pki.client_config());
    client.go(BASE);
    assert!(client.read_ok(0, IMAGE_SIZE as u32) == image());

    // The command of a reload gets no credentials.
    let reload = || {
        let code = run_binary(command("ExecReload=")).code;
        manager.hears_until("RELOADING=1");
        manager.hears_until("READY=1");
        code
    };
    assert_eq!(reload(), Some(0));
    std::fs::write(at("hexz-nbd.toml"), settings.replace("export-dir", "export")).unwrap();
    assert_eq!(reload(), Some(2));
    client.read_ok(0, 1);
    server.signal("TERM");
    manager.hears_until("STOPPING=1");
    assert_eq!(server.wait().code(), Some(0));
    assert!(socket.exists());
}

/// The system calls of a group, with those of the groups in it.
fn calls(group: &str, into: &mut BTreeSet<String>) {
    let said = run("systemd-analyze", &["syscall-filter", "--no-pager", group]).ok();
    for line in said.lines().skip(1).map(str::trim).filter(|line| !line.starts_with('#')) {
        if line.starts_with('@') {
            calls(line, into);
        } else if !line.is_empty() {
            into.insert(line.to_owned());
        }
    }
}

/// What the unit takes away must not be what the program needs, from the first call of its own
/// to the last.
#[test]
fn the_filter_of_the_service_leaves_what_is_needed() {
    let mut allowed = BTreeSet::new();
    for line in unit("hexz-nbd.service").lines() {
        let Some(words) = line.strip_prefix("SystemCallFilter=") else { continue };
        let (takes_away, words) = match words.strip_prefix('~') {
            Some(words) => (true, words),
            None => (false, words),
        };
        for word in words.split_ascii_whitespace() {
            let mut these = BTreeSet::new();
            if word.starts_with('@') {
                calls(word, &mut these);
            } else {
                these.insert(word.to_owned());
            }
            match takes_away {
                true => allowed.retain(|call| !these.contains(call)),
                false => allowed.extend(these),
            }
        }
    }
    assert!(allowed.len() > 100 && !allowed.contains("mount"), "{allowed:?}");

    // The client starts the server, which stays its child: the tracer is detached.
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let archive = archive(BASE);
    let traced = [
        "strace",
        "-D",
        "-f",
        "-qq",
        "-o",
        text(&trace),
        BINARY,
        "--sandbox",
        "auto",
        text(&archive),
    ];
    let client = [&["--", "["][..], &traced, &["]", "null:"]].concat();
    let mut command = Command::new("nbdcopy");
    command.args(client).env("NOTIFY_SOCKET", "/no/such/socket").stdin(Stdio::null());
    run_command(command).ok();
    let trace = std::fs::read_to_string(trace).unwrap();
    // A line is "PID name(arguments) = result", or "PID <... name resumed>". The name is "???" for
    // a thread that ended before strace could read which call it had made.
    let name = |line: &str| {
        let call = line.split_ascii_whitespace().nth(1)?;
        let (name, _) = call.split_once('(')?;
        (name != "???").then(|| name.to_owned())
    };
    let mut made: BTreeSet<String> = trace.lines().filter_map(name).collect();
    // Only root has capabilities to give up.
    made.remove("capset");
    assert!(made.contains("landlock_restrict_self") && made.contains("pread64"), "{made:?}");
    let missing: Vec<_> = made.iter().filter(|call| !allowed.contains(*call)).collect();
    assert!(missing.is_empty(), "{missing:?} of {made:?}");
}
