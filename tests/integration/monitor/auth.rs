//! TLS and the token of the monitor.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{get, get_with, monitor_of};
use crate::clients::{Said, run};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server, run as run_binary};
use crate::support::wait_until;

const BASE: &str = "base-zstd.hxz";
const TOKEN: &str = "0123456789abcdef0123";

/// A file that only its owner can read.
fn secret(folder: &TempDir, content: &str) -> PathBuf {
    let path = folder.path().join("token");
    replace(&path, content);
    path
}

fn replace(path: &Path, content: &str) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&new, path).unwrap();
}

fn with_token(token: &Path) -> Builder {
    let builder = Server::builder().archive(BASE).args(["--monitor", "127.0.0.1:0"]);
    builder.arg("--monitor-token-file").arg(token)
}

fn with_tls(builder: Builder, pki: &Pki) -> Builder {
    let files = [("cert", pki.server_cert()), ("key", pki.server_key())];
    let builder = builder.args(["--sandbox", "require"]);
    files.into_iter().fold(builder, |builder, (what, path)| {
        builder.arg(format!("--monitor-tls-{what}")).arg(path)
    })
}

/// The monitor's address with the name in its certificate.
fn place(server: &Server) -> String {
    format!("https://localhost:{}", monitor_of(server).rsplit_once(':').unwrap().1)
}

fn curl(server: &Server, authority: &Path, target: &str, more: &[&str]) -> Said {
    let authority = authority.to_str().unwrap();
    let url = format!("{}{target}", place(server));
    let common = ["--silent", "--show-error", "--fail", "--cacert", authority, &url];
    run("curl", &[&common[..], more].concat())
}

#[test]
fn only_requests_with_the_token_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let token = secret(&folder, &format!("{TOKEN}\n"));
    let server = with_token(&token).start();
    let code = |target: &str, fields: &str| get_with(&server, target, fields).code;
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    for target in ["/", "/status.json", "/history.json", "/metrics", "/nothing"] {
        let answer = get(&server, target);
        assert_eq!((answer.code, answer.body.contains(BASE)), (401, false), "{target}");
        assert!(answer.fields["www-authenticate"].contains("realm=\"hexz-nbd\""), "{answer:?}");
        assert_eq!(code(target, "Authorization: Bearer 0123456789abcdef0124\r\n"), 401);
        let expected = if target == "/nothing" { 404 } else { 200 };
        assert_eq!(code(target, &bearer), expected, "{target}");
    }
    for target in ["/healthz", "/readyz"] {
        assert_eq!(code(target, ""), 200);
    }
    // Another token is noticed without a reload; one that can't be used isn't.
    let other = "fedcba9876543210";
    replace(&token, other);
    let bearer_of_other = format!("Authorization: Bearer {other}\r\n");
    wait_until("the token is read again", || code("/metrics", &bearer_of_other) == 200);
    assert_eq!(code("/metrics", &bearer), 401);
    replace(&token, "short");
    let line = server.wait_for_reason("monitor_auth_not_reloaded");
    assert_eq!(line.json["cause"], "monitor_token");
    assert_eq!(code("/metrics", &bearer_of_other), 200);
}

#[test]
fn readers_use_tls_with_the_newest_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let token = secret(&folder, TOKEN);
    let (pki, other) = (Pki::new(), Pki::new());
    let server = with_tls(with_token(&token), &pki).start();
    let bearer = format!("Authorization: Bearer {TOKEN}");
    let metrics = |authority: &Path| curl(&server, authority, "/metrics", &["--header", &bearer]);
    assert!(metrics(&pki.ca_cert()).ok().contains("hexz_nbd_ready 1"));
    assert_eq!(curl(&server, &pki.ca_cert(), "/readyz", &[]).ok(), "ok\n");
    assert!(curl(&server, &pki.ca_cert(), "/metrics", &[]).failed().contains("401"));
    let user = format!("somebody:{TOKEN}");
    let page = curl(&server, &pki.ca_cert(), "/", &["--user", &user]).ok();
    assert!(page.starts_with("<!doctype html>"), "{page}");
    metrics(&other.ca_cert()).failed();
    let plain = format!("http://{}/readyz", monitor_of(&server));
    run("curl", &["--silent", "--show-error", &plain]).failed();

    // One file after the other, as they are renewed.
    replace(&pki.server_key(), &fs::read_to_string(other.server_key()).unwrap());
    replace(&pki.server_cert(), &fs::read_to_string(other.server_cert()).unwrap());
    wait_until("the certificate is read again", || metrics(&other.ca_cert()).output().is_some());
    metrics(&pki.ca_cert()).failed();
    fs::write(pki.server_cert(), "junk").unwrap();
    let line = server.wait_for_reason("monitor_auth_not_reloaded");
    assert_eq!(line.json["cause"], "no_certificate_in_file");
    metrics(&other.ca_cert()).ok();
}

#[test]
fn top_presents_the_token_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let token = secret(&folder, TOKEN);
    let pki = Pki::new();
    let server = with_tls(with_token(&token), &pki).start();
    let place = place(&server);
    let authority = pki.ca_cert();
    let authority = ["--tls-ca", authority.to_str().unwrap()];
    let of_token = ["--token-file", token.to_str().unwrap()];
    let top = |more: &[&str]| {
        run_binary([&["top", "--once", &place, "--interval", "200ms"][..], more].concat())
    };
    let ended = top(&[authority, of_token].concat());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("EXPORTS 1\n"), "{}", ended.stdout);

    let documented = include_str!("../../../docs/troubleshooting.md");
    let fails = |more: &[&str], code: i32, reason: &str| {
        let ended = top(more);
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        assert!(ended.stderr.contains(&format!("reason=\"{reason}\"")), "{}", ended.stderr);
        assert!(documented.contains(&format!("`{reason}`")), "{reason} isn't documented");
    };
    fails(&authority, 1, "unauthorized");
    fails(&of_token, 2, "usage");
    let (other, wrong) = (Pki::new(), tempfile::tempdir().unwrap());
    let wrong = secret(&wrong, "0123456789abcdef0124");
    fails(&["--tls-ca", other.ca_cert().to_str().unwrap()], 1, "tls_failed");
    let wrong = ["--token-file", wrong.to_str().unwrap()];
    fails(&[authority, wrong].concat(), 1, "unauthorized");
}

#[test]
fn unusable_files_stop_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let token = secret(&folder, "short");
    with_token(&token).fails_with(4, "monitor_token");
    with_token(&token).arg("--check-config").fails_with(4, "monitor_token");
    let builder = Server::builder().archive(BASE).args(["--monitor", "0"]);
    let (code, message) = builder.arg("--monitor-tls-cert").arg(Pki::new().server_cert()).fail();
    assert_eq!(code, 2);
    assert!(message.contains("--monitor-tls-cert requires --monitor-tls-key"), "{message}");
}

/// Without both, whoever can reach it or is on the path sees who is connected.
#[test]
fn an_exposed_monitor_without_tls_and_token_causes_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let (token, pki) = (secret(&folder, TOKEN), Pki::new());
    let exposed = || Server::builder().archive(BASE).args(["--monitor", "0.0.0.0:0"]);
    let token_only = exposed().arg("--monitor-token-file").arg(&token).start();
    token_only.wait_for_reason("monitor_exposed");
    with_tls(exposed(), &pki).start().wait_for_reason("monitor_exposed");
    let both = with_tls(exposed().arg("--monitor-token-file").arg(&token), &pki).start();
    monitor_of(&both);
    assert!(!both.has_reason("monitor_exposed"));
}
