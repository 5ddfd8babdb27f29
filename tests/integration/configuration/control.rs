//! `hexz-nbd reload`, which asks a server by its control socket and reports the result.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::{BASE, CHILD, Site, replace};
use crate::support::PATIENCE;
use crate::support::pki::Pki;
use crate::support::server::{Builder, Ended, Server, run};

/// A server with a control socket.
fn controlled(site: &Site) -> Builder {
    site.server().args(["--sandbox", "require", "--control-socket"]).arg(site.path("control"))
}

fn reload(site: &Site) -> Ended {
    run(["reload".as_ref(), site.path("control").as_os_str()])
}

/// Runs a reload that must succeed, and returns what it prints.
fn reload_ok(site: &Site) -> String {
    let ended = reload(site);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(ended.stderr, "");
    ended.stdout
}

/// Runs a reload that must fail with this exit status and label.
fn reload_fails(site: &Site, code: i32, reason: &str) -> Ended {
    let ended = reload(site);
    assert_eq!(ended.code, Some(code), "{}{}", ended.stdout, ended.stderr);
    assert!(ended.stderr.contains(&format!("reason=\"{reason}\"")), "{}", ended.stderr);
    ended
}

#[test]
fn the_changes_are_reported() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'\nb = '{{}}/b.hxz'"));
    site.copy(BASE, "b.hxz");
    let server = controlled(&site).start();
    let unchanged = reload_ok(&site);
    let lines: Vec<&str> = unchanged.lines().collect();
    assert_eq!(lines[0], "reloaded: open to this machine only");
    assert!(lines[1].starts_with("serving a (main stream, "), "{unchanged}");
    assert_eq!(lines.len(), 2, "{unchanged}");

    site.say(&format!(
        "allow = '127.0.0.1'\nmax-connections = 7\n[exports]\na = '{{archives}}/{CHILD}'\n\
         c = '{{archives}}/{BASE}'"
    ));
    let changed = reload_ok(&site);
    let file = site.file();
    let expected = [
        "reloaded: open to 127.0.0.1/32",
        "  exports added: c",
        "  exports removed: b",
        "  exports with a new path: a",
        "  open to 127.0.0.1/32, before: this machine only",
        &format!("  changed files: {}", file.display()),
        "changes that need a restart: max-connections",
    ];
    assert_eq!(changed.lines().take(expected.len()).collect::<Vec<_>>(), expected);
    let logged = server.wait_for_message("exports added: c; exports removed: b; ");
    assert_eq!(logged.json["level"], "INFO");
    // What it prints is the case by then.
    assert_eq!(server.greeted().list(), ["a", "c"]);
    assert_eq!(server.reloads(), 2);
}

/// As a service manager's `systemctl reload` must hear.
#[test]
fn a_rejected_reload_is_a_failure() {
    let pki = Pki::new();
    let key = |from: PathBuf, site: &Site| fs::copy(from, site.path("key")).map(drop).unwrap();
    let site = Site::new(&format!(
        "tls-cert = '{}'\ntls-key = '{{}}/key'\nrules = '{{}}/rules'\n\
         [exports]\na = '{{archives}}/{BASE}'\n",
        pki.server_cert().display()
    ));
    let rules = "[[rule]]\naction = 'allow'\nnetwork = '127.0.0.1'\n";
    replace(&site.path("rules"), rules);
    key(pki.server_key(), &site);
    let server = controlled(&site).start();
    let port = server.port();
    let is_served = || assert_eq!(run(["doctor", &format!("127.0.0.1:{port}")]).code, Some(0));
    is_served();

    key(Pki::new().server_key(), &site);
    let ended = reload_fails(&site, 4, "key_mismatch");
    assert!(ended.stderr.contains("keeping the previous settings"), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    key(pki.server_key(), &site);

    replace(&site.path("rules"), "nonsense");
    reload_fails(&site, 2, "rules_malformed");
    replace(&site.path("rules"), rules);
    let sound = fs::read_to_string(site.file()).unwrap();
    site.say("nonsense = 1\n");
    reload_fails(&site, 2, "config_unknown_option");
    is_served();

    // The same settings as before: what was rejected counts for nothing.
    replace(&site.file(), &sound);
    reload_ok(&site);
    assert_eq!(server.reloads(), 1);
}

#[test]
fn archives_that_can_not_be_opened_are_a_failure() {
    let site = Site::new(&format!("strict = true\n[exports]\na = '{{archives}}/{BASE}'"));
    let server = controlled(&site).start();
    site.say("strict = true\n[exports]\na = '{}/none.hxz'");
    let ended = reload_fails(&site, 3, "io");
    // The rules are in force all the same.
    assert!(ended.stdout.starts_with("reloaded: open to this machine only\n"), "{}", ended.stdout);
    assert!(ended.stderr.contains("archives not reloaded, keeping"), "{}", ended.stderr);
    server.wait_for_reason("archives_not_reloaded");
    server.assert_alive();
}

#[test]
fn a_new_certificate_is_reported() {
    let (old, new) = (Pki::new(), Pki::new());
    let site = Site::new(&format!(
        "tls-cert = '{{}}/cert'\ntls-key = '{{}}/key'\n[exports]\na = '{{archives}}/{BASE}'"
    ));
    let install = |pki: &Pki| {
        for (from, to) in [(pki.server_cert(), "cert"), (pki.server_key(), "key")] {
            let next = site.path("next");
            fs::copy(from, &next).unwrap();
            fs::rename(next, site.path(to)).unwrap();
        }
    };
    install(&old);
    let _server = controlled(&site).start();
    install(&new);
    let printed = reload_ok(&site);
    let files =
        format!("changed files: {}, {}\n", site.path("cert").display(), site.path("key").display());
    assert!(printed.contains(&files), "{printed}");
}

#[test]
fn concurrent_requests_all_get_a_result() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let server = controlled(&site).start();
    std::thread::scope(|scope| {
        let requests: Vec<_> = (0..20).map(|_| scope.spawn(|| reload_ok(&site))).collect();
        for request in requests {
            assert!(request.join().unwrap().contains("\nserving a ("));
        }
    });
    assert!((1..=20).contains(&server.reloads()));
}

/// Like SIGHUP, for logrotate.
#[test]
fn the_audit_file_is_reopened() {
    let site = Site::new(&format!("audit = '{{}}/audit'\n[exports]\na = '{{archives}}/{BASE}'"));
    let _server = controlled(&site).start();
    fs::rename(site.path("audit"), site.path("audit.1")).unwrap();
    site.say("audit = '{}/audit'\nnonsense = 1");
    reload_fails(&site, 2, "config_unknown_option");
    crate::support::wait_until("there is a new file", || site.path("audit").exists());
}

#[test]
fn only_the_owner_can_connect() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let open = ["sh", "-c", "umask 000; exec \"$@\"", "sh"];
    let mut server = controlled(&site).within(open).start();
    let socket = fs::symlink_metadata(site.path("control")).unwrap();
    assert!(socket.file_type().is_socket());
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    server.terminate();
    assert!(!site.path("control").exists());
}

/// What else is sent there does no harm.
#[test]
fn other_requests_are_dropped() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let server = controlled(&site).start();
    let connect = || {
        let stream = UnixStream::connect(site.path("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    // These say nothing, and take fewer places than there are.
    let _silent: Vec<UnixStream> = (0..8).map(|_| connect()).collect();
    for request in [&b"restart"[..], b"GET / HTTP/1.1\r\n\r\n", &[0; 4096]] {
        let mut stream = connect();
        // It may be closed before all of it is sent.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"", "{request:?}");
    }
    assert_eq!(server.reloads(), 0);
    reload_ok(&site);
}

#[test]
fn a_server_that_does_not_answer_is_an_error() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let socket = site.path("control");
    let fails = |hint: &str| {
        let ended = run(["reload".as_ref(), "--timeout=300ms".as_ref(), socket.as_os_str()]);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        assert!(ended.stderr.contains("reason=\"control_socket\""), "{}", ended.stderr);
        assert!(ended.stderr.contains(hint), "{}", ended.stderr);
    };
    fails("--control-socket");
    let server: Server = controlled(&site).start();
    server.signal("STOP");
    fails("doesn't answer");
    server.signal("KILL");
    drop(server);
    fails("has ended");
    // Its successor replaces the dead socket, but not a live one.
    let _server = controlled(&site).start();
    reload_ok(&site);
    controlled(&site).fails_with(5, "address_in_use");
}
