//! Making a CA, whole or not at all, and nothing twice.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Ca, assert_secrecy, contents, mode};
use crate::clients::run;
use crate::support::Random;

const FILES: [&str; 3] = ["ca-key.pem", "ca-cert.pem", "crl.pem"];

#[test]
fn a_ca_as_rfc_5280_wants_it() {
    let ca = Ca::new();
    assert_secrecy(&ca.folder);
    let text = ca.openssl("ca-cert.pem", &["-text"]);
    for expected in [
        "X509v3 Basic Constraints: critical\n                CA:TRUE, pathlen:0",
        "X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign",
        "X509v3 Subject Key Identifier:",
        "NIST CURVE: P-256",
        "Subject: CN = hexz-nbd CA ",
    ] {
        assert!(text.contains(expected), "{expected} is missing in {text}");
    }
    let [certificate, key, crl] = ["ca-cert.pem", "ca-key.pem", "crl.pem"].map(|it| ca.text(it));
    run("openssl", &["verify", "-x509_strict", "-CAfile", &certificate, &certificate]).ok();
    // Certificate and key are a pair.
    let of_key = run("openssl", &["pkey", "-pubout", "-in", &key]).ok();
    assert_eq!(ca.openssl("ca-cert.pem", &["-pubkey"]), of_key);
    // Ten years, the list as long as the CA.
    let year = 365 * 24 * 3600;
    ca.openssl("ca-cert.pem", &["-checkend", &(10 * year - 3600).to_string()]);
    let list = run("openssl", &["crl", "-noout", "-text", "-CAfile", &certificate, "-in", &crl]);
    let list = list.ok();
    assert!(list.contains("No Revoked Certificates."), "{list}");
    let end = ca.openssl("ca-cert.pem", &["-enddate"]).replace("notAfter=", "Next Update: ");
    assert!(list.contains(&end), "{list}");
    assert!(list.contains("X509v3 CRL Number: \n                1\n"), "{list}");
}

#[test]
fn a_ca_by_other_wishes() {
    let ca = Ca::nowhere();
    ca.make(["init", "--name", "Büro \"A\"", "--days", "2", "--ed25519"]);
    let subject = ca.openssl("ca-cert.pem", &["-subject", "-nameopt", "utf8,sep_comma_plus"]);
    assert_eq!(subject, "subject=CN=Büro \"A\"\n");
    assert!(ca.openssl("ca-cert.pem", &["-text"]).contains("Public Key Algorithm: ED25519"));
    let key = ca.text("ca-key.pem");
    run("openssl", &["pkey", "-noout", "-in", &key]).ok();
    let stays = ca.openssl("ca-cert.pem", &["-checkend", "170000"]);
    assert!(stays.contains("will not expire"), "{stays}");
    // Its certificates end with it.
    ca.make(["client", "backup"]);
    assert_eq!(
        ca.openssl("clients/backup/client-cert.pem", &["-enddate"]),
        ca.openssl("ca-cert.pem", &["-enddate"])
    );
    for (option, value) in
        [("--days", "0"), ("--days", "36501"), ("--days", "x"), ("--name", ""), ("--name", "a\nb")]
    {
        Ca::nowhere().reject(["init", option, value]);
    }
}

#[test]
fn two_cas_have_two_names() {
    let subject = || Ca::new().openssl("ca-cert.pem", &["-subject"]);
    assert_ne!(subject(), subject());
}

#[test]
fn nothing_is_overwritten() {
    let ca = Ca::new();
    ca.make(["server", "localhost"]);
    ca.make(["client", "backup"]);
    let before = contents(&ca.folder);
    ca.fail(["init"], "already_exists");
    ca.fail(["server", "localhost"], "already_exists");
    ca.fail(["client", "backup"], "already_exists");
    assert!(contents(&ca.folder) == before);
    // What isn't this program's stays too.
    for name in ["foreign", "linked"] {
        let path = ca.path("clients").join(name);
        if name == "linked" {
            std::os::unix::fs::symlink("/nonexistent", &path).unwrap();
        } else {
            fs::write(&path, "x").unwrap();
        }
        ca.fail(["client", name], "already_exists");
        assert!(fs::symlink_metadata(&path).is_ok());
    }
}

/// With half of a CA gone a new one, which no client knows, isn't made in its place.
#[test]
fn what_is_missing_is_asked_for() {
    for missing in FILES {
        let ca = Ca::new();
        ca.make(["client", "backup"]);
        let moved = fs::read(ca.path(missing)).unwrap();
        fs::remove_file(ca.path(missing)).unwrap();
        let before = contents(&ca.folder);
        let logged = ca.fail(["init"], "missing_file");
        assert!(logged.contains(&ca.text(missing)), "{logged}");
        if missing == FILES[1] {
            ca.fail(["revoke", "backup"], "no_ca");
        } else {
            let logged = ca.fail(["revoke", "backup"], "io_error");
            assert!(logged.contains(&ca.text(missing)), "{logged}");
        }
        assert!(contents(&ca.folder) == before);
        fs::write(ca.path(missing), moved).unwrap();
        fs::set_permissions(ca.path(missing), fs::Permissions::from_mode(0o600)).unwrap();
        ca.make(["revoke", "backup"]);
    }
}

/// An interrupted run leaves the first of the files, which the next one goes on with.
#[test]
fn an_interrupted_run_is_taken_up() {
    for left in 0..FILES.len() {
        let ca = Ca::new();
        for name in &FILES[left..] {
            fs::remove_file(ca.path(name)).unwrap();
        }
        // And what it was just about to write.
        fs::write(ca.path(".new-abcdef"), "half a k").unwrap();
        let before: Vec<_> = FILES[..left].iter().map(|name| fs::read(ca.path(name))).collect();
        ca.make(["init"]);
        for (name, before) in FILES.iter().zip(before) {
            assert!(fs::read(ca.path(name)).unwrap() == before.unwrap(), "{name}");
        }
        assert_secrecy(&ca.folder);
        ca.make(["client", "backup"]);
        ca.verify("clients/backup/client-cert.pem", "sslclient").ok();
    }
}

/// The same, by whatever moments a signal that can't be caught comes at.
#[test]
fn a_killed_run_blocks_nothing() {
    let mut random = Random::new(1);
    for _ in 0..40 {
        let ca = Ca::nowhere();
        for args in [&["init"][..], &["client", "backup"]] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
            command.arg("pki").arg("--dir").arg(&ca.folder).args(args);
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(Duration::from_micros(random.below(30_000)));
            let _ = child.kill();
            child.wait().unwrap();
            let ended = match args {
                ["init"] => ca.run(["init"]),
                _ => ca.run(["client", "backup"]),
            };
            let is_done = ended.stderr.contains("reason=\"already_exists\"");
            assert!(ended.code == Some(0) || is_done, "{}", ended.stderr);
        }
        assert_secrecy(&ca.folder);
        ca.verify("clients/backup/client-cert.pem", "sslclient").ok();
        ca.make(["revoke", "backup"]);
    }
}

#[test]
fn the_folder_is_made_or_used() {
    // In folders that aren't there; the last is its owner's alone.
    let ca = Ca::nowhere_called("a/b c/pki");
    ca.make(["init"]);
    assert_secrecy(&ca.folder);
    // One that is there keeps its mode, and what is in it.
    let ca = Ca::nowhere();
    fs::create_dir(&ca.folder).unwrap();
    fs::set_permissions(&ca.folder, fs::Permissions::from_mode(0o750)).unwrap();
    fs::write(ca.path("notes"), "x").unwrap();
    ca.make(["init"]);
    assert_eq!(mode(&ca.folder), 0o750);
    assert_eq!(fs::read(ca.path("notes")).unwrap(), b"x");
    // One that isn't a folder isn't one.
    let ca = Ca::nowhere();
    fs::write(&ca.folder, "x").unwrap();
    ca.fail(["init"], "io_error");
    // The folder is `pki`, here, whatever the umask.
    let here = tempfile::tempdir().unwrap();
    let script = "umask 0; \"$0\" pki init && \"$0\" pki server localhost && umask 77 && \
                  \"$0\" pki client backup";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_hexz-nbd")]).current_dir(&here);
    crate::clients::run_command(command).ok();
    assert_secrecy(&here.path().join("pki"));
}

#[test]
fn without_a_ca_nothing_is_made() {
    let ca = Ca::nowhere();
    for args in [["server", "localhost"], ["client", "backup"], ["revoke", "backup"]] {
        ca.fail(args, "no_ca");
    }
    ca.fail(["show"], "no_ca");
    assert!(!ca.folder.exists());
    fs::create_dir(&ca.folder).unwrap();
    ca.fail(["client", "backup"], "no_ca");
    assert!(contents(&ca.folder).is_empty());
}

#[test]
fn a_ca_that_can_not_be_used_is_refused_with_a_reason() {
    let other = Ca::new();
    let ca = Ca::new();
    fs::copy(other.path("ca-key.pem"), ca.path("ca-key.pem")).unwrap();
    ca.fail(["client", "backup"], "key_mismatch");
    let ca = Ca::new();
    fs::copy(other.path("crl.pem"), ca.path("crl.pem")).unwrap();
    ca.make(["client", "backup"]);
    ca.fail(["revoke", "backup"], "other_ca");
    let ca = Ca::new();
    fs::set_permissions(ca.path("ca-key.pem"), fs::Permissions::from_mode(0o644)).unwrap();
    // Nobody else comes to it as long as the folder is closed.
    ca.make(["client", "other"]);
    for folder in [ca.folder.as_path(), ca.folder.parent().unwrap()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    ca.fail(["client", "backup"], "exposed_key");
    let ca = Ca::new();
    other.make(["client", "backup"]);
    fs::copy(other.path("clients/backup/client-cert.pem"), ca.path("ca-cert.pem")).unwrap();
    ca.fail(["client", "backup"], "not_a_ca");
    let junk = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for (name, content, reason) in [
        ("ca-cert.pem", "", "no_certificate"),
        ("ca-cert.pem", "x", "no_certificate"),
        ("ca-cert.pem", junk, "malformed_certificate"),
        ("ca-key.pem", "", "unusable_key"),
        ("ca-key.pem", "x", "unusable_key"),
        ("ca-key.pem", junk, "unusable_key"),
    ] {
        let ca = Ca::new();
        fs::write(ca.path(name), content).unwrap();
        let logged = ca.fail(["client", "backup"], reason);
        assert!(logged.contains(name), "{logged}");
    }
}
