//! Archives, passwords, and the words and numbers with which a start fails.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::support::server::{Builder, Server, run};
use crate::support::{IMAGE_SHA256, PASSWORD, archive, nbd_port};

const ENCRYPTED: &str = "encrypted-zstd.hxz";

fn encrypted() -> Builder {
    Server::builder().archive(ENCRYPTED)
}

fn secret(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn the_number_of_the_process_is_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let (file, other) = (folder.path().join("pid"), folder.path().join("other"));
    // Whatever is in its place is replaced, and a link isn't followed.
    fs::write(&other, "stays").unwrap();
    std::os::unix::fs::symlink(&other, &file).unwrap();
    let with_password = || encrypted().env("HEXZ_PASSWORD", PASSWORD);
    let mut server = with_password().arg("--pid-file").arg(&file).start();
    assert_eq!(fs::read_to_string(&file).unwrap(), format!("{}\n", server.pid()));
    assert_eq!(fs::read_to_string(&other).unwrap(), "stays");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    server.assert_alive();
    assert_eq!(server.terminate().code(), Some(0));

    let nowhere = folder.path().join("missing/pid");
    let message = with_password().arg("--pid-file").arg(&nowhere).fails_with(1, "write_failed");
    assert!(message.contains(nowhere.to_str().unwrap()), "{message}");
}

#[test]
fn the_password_by_file_credential_or_environment() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    secret(&file, &format!("{PASSWORD}\n"));
    secret(&folder.path().join("hexz-nbd.password"), PASSWORD);

    encrypted().arg("--password-file").arg(&file).start().assert_alive();
    encrypted().env("CREDENTIALS_DIRECTORY", folder.path()).start().assert_alive();
    encrypted().env("HEXZ_PASSWORD", PASSWORD).start().assert_alive();
    // The first of them counts.
    let by_file = encrypted().arg("--password-file").arg(&file).env("HEXZ_PASSWORD", "wrong");
    by_file.start().assert_alive();
    let by_credential = encrypted().env("CREDENTIALS_DIRECTORY", folder.path());
    by_credential.env("HEXZ_PASSWORD", "wrong").start().assert_alive();
    // A folder of credentials for somebody else is no obstacle.
    let empty = tempfile::tempdir().unwrap();
    let by_variable = encrypted().env("CREDENTIALS_DIRECTORY", empty.path());
    by_variable.env("HEXZ_PASSWORD", PASSWORD).start().assert_alive();
}

#[test]
fn a_password_that_can_not_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    let by_file = || encrypted().arg("--password-file").arg(&file);
    let refused = |builder: Builder, reason: &str| {
        let message = builder.fails_with(3, reason);
        assert!(!message.contains("horse"), "a secret is in the log: {message}");
    };
    refused(encrypted(), "password_needed");
    refused(encrypted().env("HEXZ_PASSWORD", "wrong"), "wrong_password");
    refused(by_file(), "password");
    secret(&file, "");
    refused(by_file(), "password");
    secret(&file, "wrong horse");
    refused(by_file(), "wrong_password");
    secret(&file, PASSWORD);
    // Readable for others, who can reach it.
    for (path, mode) in [(&*file, 0o644), (folder.path(), 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    refused(by_file(), "password");
}

#[test]
fn a_packed_directory_is_no_disk() {
    Server::builder().archive("tree.hxz").fails_with(3, "directory_archive");
    let server = Server::builder().archive("tree.hxz").arg("--raw").start();
    assert_eq!(server.greeted().go("").size, 288_662);
}

#[test]
fn a_missing_parent_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let child = folder.path().join("child-zstd.hxz");
    fs::copy(archive("child-zstd.hxz"), &child).unwrap();
    let message = Server::builder().arg(&child).fails_with(3, "parent_missing");
    assert!(message.contains("child-zstd.hxz") && message.contains("base-zstd.hxz"), "{message}");
    // It may be somewhere else, if one says where.
    let archives = archive("");
    let server = Server::builder().arg(&child).arg("--parent-dir").arg(archives).start();
    server.assert_alive();
    server.wait_for_message("thin over base-zstd.hxz");
}

#[test]
fn what_is_no_archive() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk.img");
    for (content, reason) in
        [(&b""[..], "not_hexz"), (b"HEXZ", "truncated"), (&[0; 10_000], "not_hexz")]
    {
        fs::write(&file, content).unwrap();
        let message = Server::builder().arg(&file).fails_with(3, reason);
        assert!(message.contains("disk.img"), "{message}");
    }
    for path in [folder.path().join("nothing"), folder.path().to_owned()] {
        let message = Server::builder().arg(&path).fails_with(3, "io");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
    }
}

/// Clients that count in sectors don't see what is behind the last whole one.
#[test]
fn an_odd_size_is_noted() {
    let server = Server::builder().archive("text-dict-zstd.hxz").start();
    let line = server.wait_for_reason("unaligned_size");
    assert_eq!(line.json["level"], "WARN");
    assert!(line.message().contains("96 bytes"), "{}", line.text);
    assert!(!Server::builder().archive("base-zstd.hxz").start().has_reason("unaligned_size"));
}

/// The commit behind the version of a program that was built from a checkout.
fn commit() -> String {
    let repository = env!("CARGO_MANIFEST_DIR");
    let mut git = std::process::Command::new("git");
    git.args(["-C", repository, "rev-parse", "--short=12", "HEAD"]);
    match git.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").output() {
        Ok(output) if output.status.success() && Path::new(repository).join(".git").exists() => {
            format!(" ({})", String::from_utf8(output.stdout).unwrap().trim())
        }
        _ => String::new(),
    }
}

#[test]
fn version_and_help() {
    let version = run(["--version"]);
    assert_eq!(version.code, Some(0));
    assert_eq!(version.stdout, format!("hexz-nbd {}{}\n", env!("CARGO_PKG_VERSION"), commit()));
    let help = run(["--help"]);
    assert_eq!(help.code, Some(0));
    for words in ["EXIT STATUS", "EXAMPLES", "HEXZ_PASSWORD", "--tls-cert", "--allow", "--listen"] {
        assert!(help.stdout.contains(words), "{words}");
    }
    let short = run(["-h"]);
    assert_eq!(short.code, Some(0));
    for words in ["--tls-cert", "--allow", "--listen", "--export-dir", "--config", "doctor"] {
        assert!(short.stdout.contains(words), "{words}");
    }
    assert!(!short.stdout.contains("--max-connections"), "{}", short.stdout);
    assert!(short.stdout.lines().count() <= 50, "{}", short.stdout);
}

#[test]
fn a_wrong_command_line() {
    let snapshot = archive("base-zstd.hxz");
    let snapshot = snapshot.to_str().unwrap();
    for args in [
        &[][..],
        &["--no-such-option", snapshot],
        &[snapshot, snapshot],
        &["--max-connections", "0", snapshot],
        &["--handshake-timeout", "0s", snapshot],
        &["--handshake-timeout", "soon", snapshot],
        &["--cache-size", "much", snapshot],
        &["--tls-min", "1.1", snapshot],
        // Numbers that overflowed somewhere behind the command line.
        &["--max-connections", "18446744073709551615", snapshot],
        &["--max-connections", "18446744073709551616", snapshot],
        &["--max-connections", "1000001", snapshot],
        &["--max-connections-per-address", "18446744073709551615", snapshot],
        &["--max-connections-per-address", "0", snapshot],
        &["--handshake-timeout", "300000000000years", snapshot],
        &["--handshake-timeout", "2years", snapshot],
        &["--tls-handshake-timeout", "18446744073709551615s", snapshot],
        &["--shutdown-timeout", "584942417355years", snapshot],
        &["--idle-timeout", "0s", snapshot],
        // Limits that nobody could be served with.
        &["--max-options", "0", snapshot],
        &["--max-option-bytes", "100", snapshot],
        &["--max-in-flight", "31MiB", snapshot],
        &["--max-in-flight", "4GiB", snapshot],
        &["--max-in-flight-per-connection", "1KiB", snapshot],
        &["--max-bandwidth", "1KiB", snapshot],
        &["--max-requests", "0", snapshot],
    ] {
        let ended = run(args);
        assert_eq!(ended.code, Some(2), "{args:?}: {}", ended.stderr);
        assert!(!ended.stderr.is_empty());
    }
}

#[test]
fn the_demonstration_goes_the_whole_way() {
    let _port = nbd_port();
    let demo = run(["demo", "--once"]);
    assert_eq!(demo.code, Some(0), "{}", demo.stderr);
    assert!(demo.stdout.contains(&format!("SHA-256 {IMAGE_SHA256}")), "{}", demo.stdout);
    assert!(demo.stdout.contains("TLS"), "{}", demo.stdout);
}
