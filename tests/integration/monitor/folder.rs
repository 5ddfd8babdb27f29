//! A folder of exports that can't be read any more: what readiness and the log say of it, and
//! what becomes of it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{get, monitor_of, status};
use crate::support::client::{OPT_GO, REP_ERR_UNKNOWN, info_data};
use crate::support::server::{Builder, Server};
use crate::support::{archive, wait_until};

const BASE: &str = "base-zstd.hxz";

/// Runs the server in a mount namespace, with a helper beside it that mounts and unmounts a file
/// system on the folder there when it is told to, and ends with the word `end`.
const SCRIPT: &str = r#"
orders=$1 folder=$2 base=$3; shift 3
export orders folder base
timeout 120 sh -c '
    while read -r order < "$orders"; do
        case $order in
        mount) mount -t tmpfs tmpfs "$folder" && cp "$base" "$folder/new.hxz" ;;
        unmount) umount -l "$folder" ;;
        end) exit ;;
        esac
    done' > /dev/null 2>&1 &
exec "$@"
"#;

/// A folder of exports in a folder, with the helper's orders beside it.
struct Exports {
    folder: tempfile::TempDir,
}

impl Exports {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("exports")).unwrap();
        fs::copy(archive(BASE), folder.path().join("exports/old.hxz")).unwrap();
        let mut mkfifo = std::process::Command::new("mkfifo");
        assert!(mkfifo.arg(folder.path().join("orders")).status().unwrap().success());
        Self { folder }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("exports")
    }

    fn server(&self) -> Builder {
        let orders = self.folder.path().join("orders");
        let words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh"];
        let words = words.iter().map(Path::new).map(Path::to_owned);
        Server::builder()
            .within(words.chain([orders, self.path(), archive(BASE)]))
            .args(["--monitor", "127.0.0.1:0", "--export-dir"])
            .arg(self.path())
    }

    fn order(&self, what: &str) {
        let mut orders =
            OpenOptions::new().write(true).open(self.folder.path().join("orders")).unwrap();
        writeln!(orders, "{what}").unwrap();
    }
}

fn ready(server: &Server) -> bool {
    get(server, "/readyz").code == 200
}

/// It said "Permission denied", even to root, and that it was ready.
#[test]
fn what_is_mounted_on_it_since_the_start_is_named() {
    let exports = Exports::new();
    let server = exports.server().args(["--sandbox", "require"]).start();
    monitor_of(&server);
    assert!(ready(&server));
    server.go("old.hxz").read_ok(0, 1);

    exports.order("mount");
    wait_until("it isn't ready", || !ready(&server));
    let answer = get(&server, "/readyz");
    assert_eq!(answer.code, 503);
    let label = "folder_mounted_since_start";
    assert_eq!(answer.body.split(':').next(), Some(label));
    assert_eq!(status(&server)["ready"], false);
    server.wait_for_log("the cause", |line| line.json["reason"] == label);
    assert!(server.greeted().list().is_empty());
    let mut client = server.greeted();
    client.refused(OPT_GO, &info_data(b"new.hxz", &[]), REP_ERR_UNKNOWN);
    server.wait_for_log("the sandbox", |line| {
        line.message().contains("\"new.hxz\"") && line.text.contains("the sandbox")
    });

    // A reload can't admit it, and says so; nobody is served less by it.
    server.signal("HUP");
    server.wait_for_log("a reload tries it", |line| {
        line.reason() == "archives_not_reloaded" && line.json["cause"] == label
    });
    assert!(!ready(&server));

    // What was there at the start is served again.
    exports.order("unmount");
    wait_until("it is ready", || ready(&server));
    server.go("old.hxz").read_ok(0, 1);
    let said = server.log().iter().filter(|line| line.json["reason"] == label).count();
    assert_eq!(said, 1, "{}", server.log_text());
    exports.order("end");
}

/// Where the folder above it may be read, or everything may, so may what is mounted later.
#[test]
fn what_is_mounted_where_the_sandbox_admits_it_is_served() {
    for is_off in [false, true] {
        let exports = Exports::new();
        let server = match is_off {
            true => exports.server().args(["--sandbox", "off"]),
            false => exports
                .server()
                .args(["--sandbox", "require", "--parent-dir"])
                .arg(exports.folder.path()),
        };
        let server = server.start();
        exports.order("mount");
        wait_until("the new one is there", || server.greeted().list() == ["new.hxz"]);
        server.go("new.hxz").read_ok(0, 1);
        assert!(ready(&server));
        exports.order("end");
    }
}

/// Another folder of the same file system is no better, and one that is gone is said to be.
#[test]
fn a_folder_that_was_replaced_or_removed_is_named() {
    let above = tempfile::tempdir().unwrap();
    let (path, aside) = (above.path().join("exports"), above.path().join("aside"));
    fs::create_dir(&path).unwrap();
    fs::copy(archive(BASE), path.join("a.hxz")).unwrap();
    let server = Server::builder().args(["--monitor", "127.0.0.1:0", "--sandbox", "require"]);
    let server = server.arg("--export-dir").arg(&path).start();
    let label = |server: &Server| {
        let answer = get(server, "/readyz");
        answer.body.split(':').next().unwrap().trim().to_owned()
    };
    fs::rename(&path, &aside).unwrap();
    wait_until("it is gone", || label(&server) == "folder_missing");
    fs::create_dir(&path).unwrap();
    wait_until("another one is there", || label(&server) == "folder_replaced_since_start");
    fs::remove_dir(&path).unwrap();
    fs::rename(&aside, &path).unwrap();
    wait_until("it is back", || label(&server) == "ok");
    server.go("a.hxz").read_ok(0, 1);
}
