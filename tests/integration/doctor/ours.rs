//! Against this program, in whatever way it is set up.

use std::ffi::OsString;
use std::path::Path;

use crate::archive_writer::{ArchiveWriter, noise};
use crate::support::archive;
use crate::support::authority::{Authority, Recipe};
use crate::support::pki::Pki;
use crate::support::server::{Builder, Server, run};

use super::{doctor, examine};

const DAY: i64 = 24 * 3600;

fn tls() -> Builder {
    Server::builder().archive("base-zstd.hxz").tls(Pki::new())
}

fn localhost(server: &Server) -> OsString {
    format!("localhost:{}", server.port()).into()
}

fn with_ca(server: &Server) -> Vec<OsString> {
    vec!["--tls-ca".into(), server.pki().ca_cert().into(), localhost(server)]
}

fn with_folder(folder: &Path, server: &Server) -> Vec<OsString> {
    vec!["--no-speed".into(), "--tls-dir".into(), folder.into(), localhost(server)]
}

#[test]
fn without_tls() {
    let server = Server::start([archive("base-zstd.hxz")]);
    let found = examine([format!("127.0.0.1:{}", server.port())]);
    found.assert_works();
    assert_eq!(found.report["outcome"], "good");
    assert_eq!(found.detail("in clear", "tls"), "refused");
    assert_eq!(found.detail("exports", "names")[0]["name"], "base-zstd.hxz");
    assert_eq!(found.detail("export", "size"), 8_388_608);
    assert_eq!(found.detail("export", "read_only"), true);
    assert_eq!(found.detail("export", "block_sizes")["preferred"], 65_536);
    assert_eq!(found.detail("replies", "extended"), true);
    assert_eq!(found.detail("metadata contexts", "names")[0], "base:allocation");
    assert_eq!(found.detail("speed", "bytes"), 8_388_608);
    assert!(found.detail("latency", "median_seconds").as_f64().unwrap() > 0.0);
    assert!(!found.has("TLS") && !found.has("certificate"));

    let ended = doctor([format!("127.0.0.1:{}", server.port())]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    for line in ["✓ greeting: ", "✓ first read: 4096 bytes at 0 ("] {
        assert!(ended.stdout.lines().any(|told| told.starts_with(line)), "{}", ended.stdout);
    }
}

#[test]
fn over_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let _server = Server::builder().arg("--raw").archive("aux-lz4.hxz").listen_unix(&path).start();
    let export = "aux-lz4.hxz/aux";
    let target = format!("unix:{}", path.display());
    let found = examine(["--export", export, "--no-speed", &target]);
    found.assert_works();
    assert_eq!(found.detail("export", "size"), 70_000);
    // 70,000 isn't a multiple of 512.
    found.assert_outcome("export", "warning").assert_advice(
        "export",
        "size_not_multiple_of_512",
        "server",
    );
    assert!(!found.has("speed"));
    let uri = format!("nbd+unix:///{}?socket={}", "aux-lz4.hxz%2Faux", path.display());
    examine([uri]).assert_works();

    let nowhere = format!("unix:{}", folder.path().join("nowhere").display());
    examine([nowhere]).assert_ends("connection", "no_socket", "client");
}

#[test]
fn with_tls() {
    let server = tls().start();
    let found = examine(with_ca(&server));
    found.assert_works();
    assert_eq!(found.report["outcome"], "good", "{:#}", found.report);
    assert_eq!(found.detail("in clear", "tls"), "required");
    assert_eq!(found.detail("TLS", "version"), "TLS 1.3");
    assert_eq!(found.detail("TLS", "key_exchange"), "X25519MLKEM768");
    assert_eq!(found.detail("certificate", "verified"), true);
    assert_eq!(found.detail("certificate", "names")[0], "localhost");
    assert_eq!(found.detail("certificate", "issuer"), "CN=hexz-nbd test CA");
    assert_eq!(found.detail("client certificate", "asked_for"), false);
    assert_eq!(found.detail("TLS 1.2", "spoken"), true);

    // As libnbd has it.
    let uri = format!(
        "nbds://localhost:{}/base-zstd.hxz?tls-certificates={}",
        server.port(),
        server.pki().folder().display()
    );
    examine([uri]).assert_works();
    // Nobody vouches for it.
    let found = examine([localhost(&server)]);
    found.assert_works().assert_outcome("certificate", "warning");
    found.assert_advice("certificate", "not_verified", "client");
    assert_eq!(found.detail("certificate", "verified"), false);
    // In clear there is nothing.
    for args in [
        vec!["--no-tls".into(), localhost(&server)],
        vec![format!("nbd://localhost:{}", server.port()).into()],
    ] {
        examine(args).assert_ends("in clear", "tls_required", "client");
    }
}

#[test]
fn servers_that_are_not_the_right_one() {
    let server = tls().start();
    let other = Pki::new();
    let args = |pki: &Pki| -> Vec<OsString> {
        vec!["--tls-ca".into(), pki.ca_cert().into(), localhost(&server)]
    };
    // Both have the same name, as a CA has that was made anew.
    examine(args(&other)).assert_ends("certificate", "ca_key_differs", "client");
    let named = Pki::made_by(&crate::support::pki::Recipe {
        authority: "somebody else",
        ..crate::support::pki::Recipe::default()
    });
    let found = examine(args(&named));
    found.assert_ends("certificate", "unknown_ca", "client");
    let advice = found.step("certificate")["advice"][0]["text"].as_str().unwrap();
    assert!(advice.ends_with(": CN=hexz-nbd test CA"), "{advice}");

    let mut wrong_name = with_ca(&server);
    wrong_name.extend(["--tls-hostname".into(), "nbd.example.org".into()]);
    let found = examine(wrong_name);
    found.assert_ends("certificate", "wrong_name", "client");
    found.assert_advice("certificate", "wrong_name", "server");
    assert_eq!(found.detail("certificate", "name"), "nbd.example.org");
    assert_eq!(found.detail("certificate", "name_fits"), false);

    let missing = vec!["--tls-ca".into(), "/nowhere/ca.pem".into(), localhost(&server)];
    let found = examine(missing);
    found.assert_ends("own files", "unreadable", "client");
    assert!(found.found("own files").contains("/nowhere/ca.pem"), "{:#}", found.report);
    let no_pem: Vec<OsString> =
        vec!["--tls-ca".into(), server.pki().server_key().into(), localhost(&server)];
    examine(no_pem).assert_ends("own files", "no_certificate", "client");
}

#[test]
fn client_certificates() {
    let authority = Authority::new();
    let server = tls().clients_of(&authority).start();
    let alice = authority.alice().folder(server.pki());
    let found = examine(with_folder(alice.path(), &server));
    found.assert_works();
    assert_eq!(found.report["outcome"], "good", "{:#}", found.report);
    assert_eq!(found.detail("client certificate", "accepted"), true);

    let found = examine(with_ca(&server));
    found.assert_ends("client certificate", "client_certificate_required", "client");
    assert_eq!(found.detail("client certificate", "alert"), "CertificateRequired");

    let stranger = Authority::named("hexz-nbd test other CA").alice().folder(server.pki());
    let found = examine(with_folder(stranger.path(), &server));
    found.assert_ends("client certificate", "client_certificate_unknown_ca", "server");

    let seconds = (-9 * DAY, -2 * DAY);
    let old = authority.certify(&Recipe { seconds, ..Recipe::default() }).folder(server.pki());
    let found = examine(with_folder(old.path(), &server));
    found.assert_ends("client certificate", "client_certificate_expired", "client");

    // Its key is another one.
    std::fs::copy(stranger.path().join("client-key.pem"), alice.path().join("client-key.pem"))
        .unwrap();
    let found = examine(with_folder(alice.path(), &server));
    found.assert_ends("own files", "key_mismatch", "client");
}

/// The client's own, before it is too late.
#[test]
fn a_client_certificate_that_expires_soon_is_a_warning() {
    let authority = Authority::new();
    let server = tls().clients_of(&authority).start();
    for (seconds, is_due) in [
        ((-76 * DAY, 13 * DAY), true),
        ((-75 * DAY, 15 * DAY), false),
        // One that is valid for a day is due in its last quarter.
        ((-DAY * 4 / 5, DAY / 5), true),
        ((-DAY / 2, DAY / 2), false),
    ] {
        let own = authority.certify(&Recipe { seconds, ..Recipe::default() });
        let own = own.folder(server.pki());
        let found = examine(with_folder(own.path(), &server));
        found.assert_works();
        let step = "client certificate";
        if is_due {
            found.assert_outcome(step, "warning");
            found.assert_advice(step, "client_certificate_expires_soon", "client");
        } else {
            found.assert_outcome(step, "good");
        }
    }
}

/// A server that isn't trusted doesn't learn who the client is.
#[test]
fn no_certificate_for_strangers() {
    let authority = Authority::new();
    let server = tls().clients_of(&authority).start();
    let alice = authority.alice().folder(&Pki::new());
    let found = examine(with_folder(alice.path(), &server));
    found.assert_ends("certificate", "ca_key_differs", "client");
    server.wait_for_cause("distrust");
    assert!(!server.log_text().contains("alice"), "{}", server.log_text());
    // Nor does one of which nobody can say who it is.
    let file = |name: &str| alice.path().join(name).into_os_string();
    let own =
        ["--tls-cert".into(), file("client-cert.pem"), "--tls-key".into(), file("client-key.pem")];
    let ended = doctor(own.into_iter().chain([localhost(&server)]));
    assert_eq!(ended.code, Some(2), "{}", ended.stdout);
    std::fs::remove_file(file("ca-cert.pem")).unwrap();
    let found = examine(with_folder(alice.path(), &server));
    found.assert_ends("own files", "unreadable", "client");
    assert!(found.found("own files").contains("ca-cert.pem"), "{:#}", found.report);
}

#[test]
fn a_ca_means_that_there_has_to_be_tls() {
    let server = Server::start([archive("base-zstd.hxz")]);
    let pki = Pki::new();
    let args: [OsString; 3] = ["--tls-ca".into(), pki.ca_cert().into(), localhost(&server)];
    examine(args).assert_ends("in clear", "tls_not_offered", "server");
}

#[test]
fn client_certificates_that_nobody_asks_for() {
    let server = tls().start();
    let folder = Authority::new().alice().folder(server.pki());
    let found = examine(with_folder(folder.path(), &server));
    found.assert_works().assert_outcome("client certificate", "warning");
    found.assert_advice("client certificate", "client_certificate_not_requested", "server");
}

#[test]
fn tls_1_3_alone_is_told() {
    let server = tls().args(["--tls-min", "1.3"]).start();
    let found = examine(with_ca(&server));
    found.assert_works().assert_outcome("TLS 1.2", "warning");
    found.assert_advice("TLS 1.2", "no_tls_1_2", "client");
}

#[test]
fn addresses_that_are_not_let_in() {
    let server = Server::builder()
        .archive("base-zstd.hxz")
        .args(["--deny", "127.0.0.1", "--allow", "127.0.0.0/8"])
        .start();
    let found = examine([format!("127.0.0.1:{}", server.port())]);
    found.assert_ends("greeting", "closed_before_greeting", "server");
    let port = server.port();
    drop(server);
    let found = examine([format!("127.0.0.1:{port}")]);
    found.assert_ends("connection", "connection_refused", "server");
}

#[test]
fn exports() {
    let server = Server::start([archive("base-zstd.hxz"), archive("base-lz4.hxz")]);
    let target = format!("localhost:{}", server.port());
    // Two exports, none of which is the default one.
    let found = examine(["--no-speed", &target]);
    found.assert_works().assert_outcome("default export", "warning");
    assert_eq!(found.detail("exports", "count"), 2);
    let found = examine(["--export", "nowhere.hxz", &target]);
    found.assert_ends("export", "unknown_export", "client");
    let found = examine([format!("nbd://{target}/base-lz4.hxz")]);
    found.assert_works();
    assert_eq!(found.detail("export", "name"), "base-lz4.hxz");
}

#[test]
fn damaged_archives() {
    let folder = tempfile::tempdir().unwrap();
    let mut written = ArchiveWriter::of_image(&noise(1, 1 << 20), 65536).write();
    let stored = written.main[0].blocks[0].stored.start;
    written.bytes[stored] ^= 1;
    let path = folder.path().join("damaged.hxz");
    written.save(&path);
    let server = Server::start([path]);
    let found = examine([format!("localhost:{}", server.port())]);
    found.assert_bad("first read", "read_error", "server");
    assert_eq!(found.detail("first read", "error"), "NBD_EIO");
    // The session goes on.
    found.assert_outcome("last read", "good").assert_outcome("speed", "bad");
    found.assert_outcome("goodbye", "good");
}

#[test]
fn command_lines_that_are_wrong() {
    for bad in [
        &["doctor"][..],
        &["doctor", "http://localhost"],
        &["doctor", "localhost:0"],
        &["doctor", "localhost", "--timeout", "0s"],
        &["doctor", "localhost", "--tls-cert", "x"],
        &["doctor", "localhost", "--tls-cert", "x", "--tls-key", "y"],
        &["doctor", "localhost", "--no-tls", "--require-tls"],
    ] {
        assert_eq!(run(bad).code, Some(2), "{bad:?}");
    }
    // What is no name of a host ends before anything is sent.
    let found = examine(["--tls-hostname", "a b", "localhost:1"]);
    found.assert_ends("name", "invalid_name", "client");
}
