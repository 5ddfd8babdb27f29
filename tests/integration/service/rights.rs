//! Who may open a Unix socket that is made here.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{plain, socket_path};

fn mode(path: &Path) -> u32 {
    let file = fs::symlink_metadata(path).unwrap();
    assert!(file.file_type().is_socket());
    file.mode() & 0o7777
}

#[test]
fn the_mode_is_what_was_asked_for() {
    let (_folder, path) = socket_path();
    for umask in ["000", "077"] {
        for wanted in [0o600, 0o660, 0o666, 0o777] {
            let script = format!("umask {umask}; exec \"$@\"");
            let server = plain()
                .within(["sh", "-c", &script, "sh"])
                .listen_unix(&path)
                .arg("--socket-mode")
                .arg(format!("{wanted:04o}"))
                .start();
            assert_eq!(mode(&path), wanted, "umask {umask}");
            server.assert_alive();
        }
    }
}

#[test]
fn by_default_the_umask_says_so() {
    let (_folder, path) = socket_path();
    let server =
        plain().within(["sh", "-c", "umask 027; exec \"$@\"", "sh"]).listen_unix(&path).start();
    assert_eq!(mode(&path), 0o750);
    let (_folder, second) = socket_path();
    // The umask is the same for what comes later.
    let both = plain()
        .within(["sh", "-c", "umask 027; exec \"$@\"", "sh"])
        .listen_unix(&second)
        .args(["--socket-mode", "0700"])
        .start();
    let status = fs::read_to_string(format!("/proc/{}/status", both.pid())).unwrap();
    assert!(status.contains("Umask:\t0027"), "{status}");
    drop(server);
}

/// Of the groups of whoever runs this, or any as root.
#[test]
fn the_group_is_what_was_asked_for() {
    let (_folder, path) = socket_path();
    let own = rustix::process::getegid().as_raw();
    let (name, gid) =
        if crate::support::is_root() { ("daemon".to_owned(), 1) } else { (own.to_string(), own) };
    for group in [name, gid.to_string()] {
        let args = ["--socket-group", &group, "--socket-mode", "660"];
        let server = plain().listen_unix(&path).args(args).start();
        assert_eq!(fs::symlink_metadata(&path).unwrap().gid(), gid);
        assert_eq!(mode(&path), 0o660);
        server.assert_alive();
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (_folder, path) = socket_path();
    for (option, value) in [
        ("--socket-mode", "888"),
        ("--socket-mode", "7777"),
        ("--socket-mode", "rw"),
        ("--socket-group", "no such group"),
        ("--socket-group", ""),
    ] {
        let (code, stderr) = plain().listen_unix(&path).args([option, value]).fail();
        assert_eq!(code, 2, "{stderr}");
        assert!(stderr.contains(option), "{stderr}");
    }
}

#[test]
fn where_there_is_no_unix_socket_they_are_of_no_use() {
    let label = "no_unix_socket";
    plain().args(["--socket-mode", "0600"]).start().wait_for_reason(label);
    let (_folder, path) = socket_path();
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let before = mode(&path);
    super::handed(listener, "nbd").args(["--socket-mode", "0600"]).start().wait_for_reason(label);
    assert_eq!(mode(&path), before);
}

/// At no time has anybody wider rights than were asked for, whatever the umask.
#[test]
fn there_is_no_moment_with_wider_rights() {
    let (_folder, path) = socket_path();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let (mut seen, mut wider) = (0_u64, 0_u64);
            while !done.load(Ordering::Relaxed) {
                if let Ok(file) = fs::symlink_metadata(&path) {
                    seen += 1;
                    wider += u64::from(file.mode() & 0o177 != 0);
                }
            }
            (seen, wider)
        });
        for _ in 0..5 {
            let server = plain()
                .within(["sh", "-c", "umask 0; exec \"$@\"", "sh"])
                .listen_unix(&path)
                .args(["--socket-mode", "0600"])
                .start();
            drop(server);
        }
        done.store(true, Ordering::Relaxed);
        let (seen, wider) = watcher.join().unwrap();
        assert!(seen > 0);
        assert_eq!(wider, 0, "of {seen}");
    });
}
