//! Reading certificates, CAs, lists, rules and archives anew, while clients are in.

use std::fs;
use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::{
    BASE, asking, come_in_as, failed_reloads, reads, reload, replace, rules_file,
    wait_for_failed_reloads,
};
use crate::support::authority::{Authority, Recipe};
use crate::support::client::{FLAGS, OPT_STARTTLS};
use crate::support::pki::{Pki, trusting};
use crate::support::server::{Line, Server};
use crate::support::{image, is_root, wait_until};

/// Copies the server's files of one PKI over those of another.
fn change_certificate(from: &Pki, to: &Pki) {
    for (from, to) in [(from.server_cert(), to.server_cert()), (from.server_key(), to.server_key())]
    {
        let new = to.with_extension("new");
        fs::copy(from, &new).unwrap();
        fs::rename(new, to).unwrap();
    }
}

#[test]
fn a_new_certificate_is_shown_to_those_who_come_then() {
    let server = Server::builder().archive(BASE).tls(Pki::new()).start();
    let mut before = server.go("");
    let other = Pki::new();
    change_certificate(&other, server.pki());
    reload(&server, 1);
    assert!(!reads(&server, server.pki().client_config()));
    assert!(reads(&server, trusting(other.authority(), rustls::ALL_VERSIONS)));
    // Those who are in go on.
    before.read_ok(0, 512);
}

/// Nothing is sent to those who wait to negotiate and may no longer when it is their turn.
#[test]
fn those_who_wait_are_judged_by_the_new_rules() {
    let rules = |networks: &str| format!("[[rule]]\naction = \"allow\"\nnetwork = [{networks}]\n");
    let (_folder, file) = rules_file(&rules("\"127.0.0.0/8\""));
    let server = Server::builder()
        .archive(BASE)
        .args(["-v", "--max-handshakes", "1", "--rules"])
        .arg(&file)
        .start();
    let mut first = server.connect_from([127, 0, 0, 2]);
    assert!(first.is_greeted());
    let mut waiting = server.connect_from([127, 0, 0, 3]);
    server.wait_for_message("waiting to negotiate");
    replace(&file, &rules("\"127.0.0.2/32\""));
    reload(&server, 1);
    drop(first);
    waiting.expect_closed();
    server.wait_for_reason("address");
}

/// What is wrong is said, and everything stays as it was: nothing of it is taken over.
#[test]
fn what_is_wrong_changes_nothing() {
    let authority = Authority::new();
    let (_folder, rules) = rules_file("[[rule]]\naction = \"allow\"\nidentity = \"alice\"");
    let server = asking(&authority).arg("--rules").arg(&rules).start();
    let alice = authority.alice();
    let mut client = come_in_as(&server, &alice);
    client.go("");
    let mut failed = 0;
    let mut refuses = |reason: &str| {
        failed += 1;
        server.signal("HUP");
        wait_for_failed_reloads(&server, failed);
        let line = failed_reloads(&server).pop().unwrap();
        assert_eq!(line.json["cause"], reason, "{}", line.text);
        assert!(reads(&server, alice.config(server.pki())), "{reason}");
    };
    let good = fs::read_to_string(&rules).unwrap();
    let key = fs::read_to_string(server.pki().server_key()).unwrap();

    // The rules are good and let nobody in, but the revocation list is broken: a policy is
    // taken over whole or not at all.
    // RUSTSEC-2026-0104, -0049 | panics and mismatches with revocation lists
    replace(&rules, "[[rule]]\naction = \"deny\"");
    for broken in [
        "-----BEGIN X509 CRL-----\nMAAA\n-----END X509 CRL-----\n",
        "-----BEGIN X509 CRL-----\nMIIBAA==\n-----END X509 CRL-----\n",
    ] {
        replace(&authority.revocation_list(), broken);
        refuses("invalid_revocation_list");
    }
    replace(&authority.revocation_list(), "");
    refuses("no_revocation_list_in_file");
    fs::remove_file(authority.revocation_list()).unwrap();
    refuses("tls_file_unreadable");
    authority.revoke_until(&[], -60);
    refuses("revocation_list_expired");
    authority.revoke(&[]);

    replace(&rules, "");
    refuses("rules_empty");
    // It was waited for whoever would write into it, and no signal heeded any more.
    fs::remove_file(&rules).unwrap();
    assert!(Command::new("mkfifo").arg(&rules).status().unwrap().success());
    refuses("pipe");
    // nbd-server | missing access file means everyone
    fs::remove_file(&rules).unwrap();
    refuses("rules_unreadable");
    replace(&rules, &good);

    change_certificate(&Pki::expired(), server.pki());
    refuses("certificate_expired");
    fs::write(server.pki().server_key(), &key).unwrap();
    refuses("certificate_expired");
    fs::remove_file(server.pki().server_cert()).unwrap();
    refuses("tls_file_unreadable");

    // The client that was there has noticed nothing.
    assert_eq!(client.read_ok(4096, 512), image()[4096..4608]);
}

#[test]
fn an_archive_that_was_replaced_is_opened_and_a_broken_one_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    fs::copy(crate::support::archive(BASE), &path).unwrap();
    let server = Server::builder().arg(&path).start();
    let mut before = server.go("");
    let new = folder.path().join("new");
    fs::copy(crate::support::archive("text-dict-zstd.hxz"), &new).unwrap();
    fs::rename(new, &path).unwrap();
    reload(&server, 1);
    let line = server.wait_for_message("now serving");
    assert!(line.message().contains("683.6 KiB"), "{}", line.text);
    before.read_ok(0, 512);

    fs::write(folder.path().join("junk"), "junk").unwrap();
    fs::rename(folder.path().join("junk"), &path).unwrap();
    server.signal("HUP");
    server.wait_for_reason("archives_not_reloaded");
}

/// With --user the key is usually one that can't be read again; until a restart nobody could
/// be revoked.
#[test]
fn a_key_that_can_not_be_read_again_stays() {
    let (authority, pki) = (Authority::new(), Pki::new());
    let alice = authority.alice();
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::copy(crate::support::archive(BASE), path("disk.hxz")).unwrap();
    fs::copy(pki.server_cert(), path("cert.pem")).unwrap();
    fs::copy(pki.server_key(), path("key.pem")).unwrap();
    fs::copy(authority.certificate(), path("ca.pem")).unwrap();
    fs::copy(authority.revocation_list(), path("crl.pem")).unwrap();
    for name in ["disk.hxz", "cert.pem", "ca.pem", "crl.pem"] {
        fs::set_permissions(path(name), Permissions::from_mode(0o644)).unwrap();
    }
    let user: &[_] = if is_root() { &["--user", "nobody"] } else { &[] };
    let mut server = Server::builder().arg(path("disk.hxz")).args(user.iter().copied());
    for (option, name) in [
        ("--tls-cert", "cert.pem"),
        ("--tls-key", "key.pem"),
        ("--tls-client-ca", "ca.pem"),
        ("--tls-client-crl", "crl.pem"),
    ] {
        server = server.arg(option).arg(path(name));
    }
    let server = server.start();
    fs::set_permissions(path("key.pem"), Permissions::from_mode(0o000)).unwrap();
    assert!(reads(&server, alice.config(&pki)));
    authority.revoke(&[&alice]);
    replace(&path("crl.pem"), &fs::read_to_string(authority.revocation_list()).unwrap());
    reload(&server, 1);
    assert!(!reads(&server, alice.config(&pki)));
    server.wait_for_reason("key_kept");

    // It has to fit the certificate all the same.
    replace(&path("cert.pem"), &fs::read_to_string(Pki::new().server_cert()).unwrap());
    server.signal("HUP");
    server.wait_for_cause("key_mismatch");
}

/// Who was revoked stayed in, and came in again, when an archive was gone as well.
#[test]
fn a_revocation_holds_whatever_becomes_of_the_archives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    fs::copy(crate::support::archive(BASE), &path).unwrap();
    let authority = Authority::new();
    let alice = authority.alice();
    let server = Server::builder().arg(&path).tls(Pki::new()).clients_of(&authority).start();
    let mut client = come_in_as(&server, &alice);
    client.go("");
    fs::remove_file(&path).unwrap();
    authority.revoke(&[&alice]);
    reload(&server, 1);
    client.expect_closed();
    assert!(!reads(&server, alice.config(server.pki())));
    server.wait_for_reason("archives_not_reloaded");
}

#[test]
fn watched_files_are_read_anew_by_themselves() {
    let (_folder, rules) = rules_file("[[rule]]\naction = \"allow\"");
    let server = Server::builder()
        .archive(BASE)
        .args(["--watch", "--insecure-no-tls", "--rules"])
        .arg(&rules)
        .start();
    let mut client = server.go("");
    client.read_ok(0, 1);
    replace(&rules, "[[rule]]\naction = \"deny\"");
    server.wait_for_reloads(1);
    client.expect_closed();
    wait_until("nobody comes in", || {
        let mut client = server.connect();
        client.rest().0.is_empty()
    });
    replace(&rules, "[[rule]]\naction = \"allow\"");
    server.wait_for_reloads(2);
    server.assert_alive();
}

/// A program that starts is held up by its password, which comes by a pipe: all files have
/// been read by then.
fn held_up(rules: &Path, folder: &Path, watch: &[&str]) -> (Child, fs::File) {
    let pipe = folder.join("password");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let server = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"))
        .args(["--insecure-no-tls", "--listen", "127.0.0.1:0"])
        .args(watch)
        .args([Path::new("--rules"), rules, Path::new("--password-file"), &pipe])
        .arg(crate::support::archive(BASE))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Opening it waits for the one who reads it.
    let password = fs::OpenOptions::new().write(true).open(&pipe).unwrap();
    (server, password)
}

/// SIGHUP ended the program until it was ready, and what changed before that was never
/// noticed by --watch.
#[test]
fn what_changes_while_it_starts_is_not_missed() {
    for is_watched in [true, false] {
        let (folder, rules) = rules_file("[[rule]]\naction = \"allow\"");
        let watch: &[_] = if is_watched { &["--watch"] } else { &[] };
        let (mut server, mut password) = held_up(&rules, folder.path(), watch);
        replace(&rules, "[[rule]]\naction = \"deny\"");
        if !is_watched {
            let signal = Command::new("kill").args(["-HUP", &server.id().to_string()]).status();
            assert!(signal.unwrap().success());
        }
        password.write_all(b"secret").unwrap();
        drop(password);
        let mut log = BufReader::new(server.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(log.any(|line| line.contains(" dropped=")), "watched: {is_watched}");
        server.kill().unwrap();
        server.wait().unwrap();
    }
}

/// Whoever went on touching a file kept its change from being noticed.
#[test]
fn files_that_never_come_to_rest_are_read_anew() {
    let (_folder, rules) = rules_file("[[rule]]\naction = \"allow\"");
    let server = Server::builder()
        .archive(BASE)
        .args(["--watch", "--insecure-no-tls", "--rules"])
        .arg(&rules)
        .start();
    crate::support::wait_until("it is reloaded", || {
        replace(&rules, "[[rule]]\naction = \"deny\"");
        server.reloads() > 0
    });
    server.connect().expect_closed();
}

/// A handshake that began before its CA was dropped doesn't get in after it.
#[test]
fn a_handshake_across_a_reload_is_judged_by_the_new_policy() {
    let authority = Authority::new();
    let server = asking(&authority).start();
    let alice = authority.alice();
    let mut slow = server.connect();
    slow.greet(FLAGS);
    assert_eq!(slow.option(OPT_STARTTLS, b"").len(), 1);
    authority.revoke(&[&alice]);
    reload(&server, 1);
    if let Ok(mut client) = slow.handshake(alice.config(server.pki())) {
        client.expect_closed();
    }
    server.wait_for_cause("revoked");
}

/// A newer list that was added behind an older one, in the same file or in another one.
#[test]
fn of_several_lists_of_one_ca_the_newest_counts() {
    let authority = Authority::new();
    let (alice, bob) =
        (authority.alice(), authority.certify(&Recipe { name: "bob", ..Recipe::default() }));
    let list = |revoked: &[_], number| authority.numbered_revocations(revoked, number);
    let more = authority.folder().join("more.pem");
    fs::write(&more, list(&[], 3)).unwrap();
    let server = asking(&authority).arg("--tls-client-crl").arg(&more).start();
    let both = || [&alice, &bob].map(|who| reads(&server, who.config(server.pki())));
    assert_eq!(both(), [true, true]);
    // 255 and 256 differ in length.
    replace(&authority.revocation_list(), &(list(&[], 255) + &list(&[&alice], 256)));
    reload(&server, 1);
    assert_eq!(both(), [false, true]);
    replace(&more, &list(&[&alice, &bob], 257));
    reload(&server, 2);
    assert_eq!(both(), [false, false]);
}

/// SIGHUP and SIGTERM in the middle of work.
// nbd-server CVE-2015-0847 | unsafe signal handling deadlocks
#[test]
fn a_storm_of_signals_under_load_changes_nothing() {
    let mut server = Server::builder().archive(BASE).tls(Pki::new()).start();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = [(); 3].map(|()| {
            scope.spawn(|| {
                let mut client = server.go("");
                let mut at = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let bytes = client.read_ok(at as u64, 65_536);
                    assert!(bytes == image()[at..at + 65_536]);
                    at = (at + 65_536) % image().len();
                }
            })
        });
        for _ in 0..200 {
            server.signal("HUP");
        }
        server.wait_for_reloads(3);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for reading in reading {
            reading.join().unwrap();
        }
    });
    server.assert_alive();
    for _ in 0..20 {
        server.signal("HUP");
    }
    assert_eq!(server.terminate().code(), Some(0));
}

/// Archives that were replaced come with a new list of digests.
#[test]
fn a_new_list_of_digests_is_heeded() {
    let folder = tempfile::tempdir().unwrap();
    let (disk, list) = (folder.path().join("disk.hxz"), folder.path().join("digests"));
    fs::copy(crate::support::archive(BASE), &disk).unwrap();
    let pin = || {
        let ended = crate::support::server::run([std::ffi::OsStr::new("digest"), disk.as_os_str()]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        replace(&list, &ended.stdout);
    };
    pin();
    let server = Server::builder().arg(&disk).arg("--digest").arg(&list).start();
    let mut before = server.go("");
    let kept = |times| {
        let is_it = |line: &&Line| line.reason() == "archives_not_reloaded";
        wait_until("they stay", || server.log().iter().filter(is_it).count() == times);
    };
    let new = folder.path().join("new");
    fs::copy(crate::support::archive("text-dict-zstd.hxz"), &new).unwrap();
    fs::rename(new, &disk).unwrap();
    server.signal("HUP");
    kept(1);
    pin();
    server.signal("HUP");
    server.wait_for_message("now serving");
    assert_eq!(server.go("").read_ok(0, 512).len(), 512);
    before.read_ok(0, 512);
    // A list that doesn't have it any more lets nobody open it, and isn't taken over.
    replace(&list, &format!("{}  other.hxz\n", "0".repeat(64)));
    server.signal("HUP");
    kept(2);
    server.assert_alive();
}
