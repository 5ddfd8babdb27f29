//! Warnings of the server's own certificate that expires, and of files that anybody can change.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::plain;
use crate::support::authority::Authority;
use crate::support::pki::{Pki, Recipe};
use crate::support::server::Server;

/// Labels of what has been logged about certificates so far, at that level.
fn reasons(server: &Server, level: &str) -> Vec<String> {
    let log = server.log();
    let lines = log.iter().filter(|line| line.json["level"] == level);
    let reasons = lines.map(|line| line.reason().to_owned());
    reasons.filter(|reason| reason.starts_with("certificate")).collect()
}

#[test]
fn a_certificate_that_expires_within_a_month_is_warned_of_at_the_start() {
    for (days, expected) in [(60, vec![]), (29, vec!["certificate_expires"])] {
        let pki = Pki::made_by(&Recipe { days: (-1, days), ..Recipe::default() });
        let server = plain().tls(pki).start();
        server.assert_alive();
        assert_eq!(reasons(&server, "WARN"), expected);
        // At a reload as well.
        server.signal("HUP");
        server.wait_for_reloads(1);
        assert_eq!(reasons(&server, "WARN").len(), 2 * expected.len());
    }
}

#[test]
fn a_certificate_that_expires_while_it_is_in_use_is_an_error() {
    let pki = Pki::made_by(&Recipe { ends_in: Some(15), ..Recipe::default() });
    let server = plain().tls(pki).start();
    let line =
        server.wait_for_log("it has expired", |line| line.json["reason"] == "certificate_expired");
    assert_eq!(line.json["level"], "ERROR");
    assert_eq!(reasons(&server, "ERROR"), ["certificate_expired"]);
    assert_eq!(reasons(&server, "WARN"), ["certificate_expires"]);
}

fn set(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Only the configuration file's was a warning.
#[test]
fn files_that_anybody_may_change_are_warned_of() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    fs::write(&rules, "[[rule]]\naction = \"allow\"\nidentity = \"alice\"").unwrap();
    let pki = Pki::new();
    let files = [
        (pki.server_cert(), 0o644),
        (pki.server_key(), 0o600),
        (authority.certificate(), 0o644),
        (authority.revocation_list(), 0o644),
        (rules.clone(), 0o644),
    ];
    for (path, mode) in &files {
        set(path, *mode);
    }
    let server = plain().tls(pki).clients_of(&authority).arg("--rules").arg(&rules).start();
    assert_eq!(reasons(&server, "WARN"), [""; 0]);
    for (number, (path, mode)) in files.iter().enumerate() {
        set(path, mode | 0o002);
        server.signal("HUP");
        server.wait_for_reloads(number + 1);
        let log = server.log();
        let warned: Vec<_> =
            log.iter().filter(|line| line.json["reason"] == "writable_by_all").collect();
        assert_eq!(warned.len(), number + 1, "{}", path.display());
        assert!(warned[number].message().contains(path.to_str().unwrap()));
        set(path, *mode);
    }
    // Whoever can write to the folder can put another file there, unless it is like /tmp.
    for (mode, count) in [(0o1777, 0), (0o777, 1)] {
        set(folder.path(), mode);
        let pki = server.pki();
        let builder = plain().arg("--check-config").arg("--rules").arg(&rules);
        let builder = builder.arg("--tls-cert").arg(pki.server_cert());
        let ended = builder.arg("--tls-key").arg(pki.server_key()).clients_of(&authority).run();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(ended.stderr.matches("writable_by_all").count(), count, "{}", ended.stderr);
    }
}
