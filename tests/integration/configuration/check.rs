//! `--check-config`, and the samples.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use object_server::{Credentials, Issuer, ObjectServer};

use super::{BASE, CHILD, Site};
use crate::support::archive;
use crate::support::authority::Authority;
use crate::support::pki::Pki;
use crate::support::server::{Ended, run};

fn check(path: &Path) -> Ended {
    run(["--config".as_ref(), path, "--check-config".as_ref()])
}

/// The stores that the samples name.
struct Stores {
    s3: ObjectServer,
    web: ObjectServer,
}

impl Stores {
    fn start() -> Self {
        let issuer = Issuer::new(Duration::from_secs(3600));
        issuer.add(Credentials::permanent("AKIAEXAMPLE", "secret"));
        let stores = Self {
            s3: ObjectServer::builder().https().credentials(&issuer).start().unwrap(),
            web: ObjectServer::builder().https().start().unwrap(),
        };
        stores.s3.put("golden/v7/web.hxz", fs::read(archive(BASE)).unwrap());
        stores.web.put("v7/db.hxz", fs::read(archive("sparse-zstd.hxz")).unwrap());
        stores
    }
}

/// Everything that the samples name, in a folder of the test.
fn with_what_it_names(sample: &Path, stores: &Stores) -> Site {
    let text = fs::read_to_string(sample).unwrap();
    let text = text.replace("https://minio.example.org:9000", &stores.s3.endpoint());
    let text = text.replace("https://images.example.org", &stores.web.endpoint());
    let site = Site::new(&text.replace("/srv/hexz-nbd", "{}").replace("/etc/hexz-nbd", "{}"));
    site.copy(BASE, "disk.hexz");
    site.copy("sparse-zstd.hxz", "web-server.hexz");
    site.copy("fixed-4k-zstd.hxz", "database.hexz");
    let pki = Pki::new();
    fs::copy(pki.server_cert(), site.path("server-cert.pem")).unwrap();
    fs::copy(pki.server_key(), site.path("server-key.pem")).unwrap();
    let authority = Authority::new();
    fs::copy(authority.certificate(), site.path("ca-cert.pem")).unwrap();
    fs::copy(authority.revocation_list(), site.path("crl.pem")).unwrap();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    fs::copy(examples.join("rules.toml"), site.path("rules.toml")).unwrap();
    let archives = ["web-server.hexz", "database.hexz"].map(|name| site.path(name));
    let digests = run([PathBuf::from("digest")].iter().chain(&archives));
    fs::write(site.path("digests"), digests.stdout).unwrap();
    fs::write(site.path("store-ca.pem"), stores.s3.ca_pem().unwrap()).unwrap();
    fs::write(site.path("images-ca.pem"), stores.web.ca_pem().unwrap()).unwrap();
    let keys = "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n";
    fs::write(site.path("store-credentials"), keys).unwrap();
    fs::write(site.path("images-credentials"), "token\n").unwrap();
    site
}

#[test]
fn every_sample_is_sound() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let samples = fs::read_dir(examples).unwrap().map(|entry| entry.unwrap().path());
    let is_sample = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "toml")
            && path.file_name().is_some_and(|name| name != "rules.toml")
    };
    let stores = Stores::start();
    let mut checked = 0;
    for sample in samples.filter(is_sample) {
        let site = with_what_it_names(&sample, &stores);
        let ended = check(&site.file());
        assert_eq!(ended.code, Some(0), "{}: {}", sample.display(), ended.stderr);
        assert!(ended.stdout.starts_with("would serve "), "{}", ended.stdout);
        assert_eq!(ended.stderr, "", "{}", sample.display());
        checked += 1;
    }
    assert!(checked >= 5, "{checked}");
}

/// What would be served, how, to whom and where; nothing is bound, and nothing stays.
#[test]
fn what_would_be_served_is_said() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let pki = Pki::new();
    let site = Site::new(&format!(
        "listen = ['{address}', 'unix:{{}}/s']\naudit = '{{}}/audit'\nallow = '10.0.0.0/8'\n\
         tls-cert = '{}'\ntls-key = '{}'\n[exports]\na = '{{archives}}/{CHILD}'\n",
        pki.server_cert().display(),
        pki.server_key().display(),
    ));
    let ended = check(&site.file());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let socket = site.path("s");
    assert_eq!(
        ended.stdout,
        format!(
            "would serve a (main stream, 8.0 MiB, Zstandard, thin over base-zstd.hxz) over TLS to \
             10.0.0.0/8, on {address}, unix:{}\n",
            socket.display()
        )
    );
    let there = fs::read_dir(site.folder.path()).unwrap().count();
    assert_eq!(there, 1, "it has left something");

    // It needs no file, and opens what is named.
    let ended = run(["--check-config".into(), archive(BASE).into_os_string()]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stdout.ends_with("to this machine only, on port 10809 of loopback\n"));
    let ended = run(["--check-config", "--export-dir", "/none/of/that"]);
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
}

#[test]
fn all_that_is_wrong_is_said_and_the_exit_code_is_the_starts() {
    let pki = Pki::new();
    for (text, code, messages) in [
        (
            "rules = '{}/rules'\ntls-cert = '{}/cert'\ntls-key = '{}/key'\n\
             password-file = '{}/password'\ndigest = '{}/digests'\n\
             [exports]\na = '{archives}/base-zstd.hxz'\n'a/aux' = '{}/b'",
            2,
            &[
                "reason=\"rules_unreadable\"",
                "reason=\"tls_file_unreadable\"",
                "reason=\"password\"",
                "reason=\"unreadable_digests\"",
                "reason=\"duplicate_export\"",
            ][..],
        ),
        (
            "allow = '10.0.0.0/8'\n[exports]\na = '{}/none'",
            2,
            &["remote_clients_without_tls", "none"],
        ),
        (
            "tls-cert = '{}/cert'\ntls-key = '{}/key'\n[exports]\na = '{}/none'",
            4,
            &["reason=\"tls_file_unreadable\"", "none"],
        ),
        ("password-file = '{}/none'\n[exports]\na = 'x'", 3, &["reason=\"password\""]),
        ("[exports]\na = '{}/none'", 3, &["none"]),
        ("strict = true\n[exports]\na = '{}/none'\nb = '{archives}/base-zstd.hxz'", 3, &["none"]),
        ("x = 1\ny = 2", 2, &["\"x\"", "\"y\""]),
    ] {
        let site = Site::new(text);
        let ended = check(&site.file());
        assert_eq!(ended.code, Some(code), "{text}: {}", ended.stderr);
        assert_eq!(ended.stdout, "");
        assert_eq!(ended.stderr.lines().count(), messages.len(), "{text}: {}", ended.stderr);
        for message in messages {
            assert!(ended.stderr.contains(message), "{message}: {}", ended.stderr);
        }
        // And so does the start, by the first of them.
        assert_eq!(site.server().run().code, Some(code), "{text}");
    }
    // Certificate and key have to fit.
    let site = Site::new(&format!(
        "tls-cert = '{}'\ntls-key = '{}'\n[exports]\na = '{{archives}}/{BASE}'",
        pki.server_cert().display(),
        Pki::new().server_key().display(),
    ));
    assert_eq!(check(&site.file()).code, Some(4));
    // What the start leaves out, it leaves out as well.
    let site = Site::new(&format!("[exports]\na = '{{}}/none'\nb = '{{archives}}/{BASE}'"));
    let ended = check(&site.file());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("reason=\"io\""), "{}", ended.stderr);
    assert!(ended.stdout.starts_with("would serve b ("), "{}", ended.stdout);
}

#[test]
fn files_that_are_none() {
    let site = Site::new("");
    let refused = |expected: &str| {
        let ended = check(&site.file());
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(expected), "{}", ended.stderr);
    };
    refused("config_nothing_to_serve");
    fs::write(site.file(), [b'#'; 1024 * 1024 + 1]).unwrap();
    refused("config_unreadable");
    fs::write(site.file(), b"# \xff").unwrap();
    refused("config_unreadable");
    fs::remove_file(site.file()).unwrap();
    refused("No such file");
    fs::create_dir(site.file()).unwrap();
    refused("Is a directory");
}

/// It names who may come in.
#[test]
fn a_file_that_anybody_may_change_is_a_warning() {
    let site = Site::new(&format!("[exports]\na = '{{archives}}/{BASE}'"));
    let warning = "writable_by_all";
    assert!(!check(&site.file()).stderr.contains(warning));
    fs::set_permissions(site.file(), fs::Permissions::from_mode(0o666)).unwrap();
    let ended = check(&site.file());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains(warning), "{}", ended.stderr);
    site.server().start().wait_for_reason(warning);
}

/// As a shell does it: `--config <(make-it)`.
#[test]
fn a_pipe_is_read_once() {
    let site = Site::new("");
    fs::remove_file(site.file()).unwrap();
    assert!(Command::new("mkfifo").arg(site.file()).status().unwrap().success());
    let (path, text) = (site.file(), format!("[exports]\na = '{}'", archive(BASE).display()));
    let writer = std::thread::spawn(move || fs::write(path, text).unwrap());
    let server = site.server().start();
    writer.join().unwrap();
    server.signal("HUP");
    let line = server.wait_for_reason("reload_failed");
    assert_eq!(line.json["cause"], "pipe");
    server.assert_alive();
}

/// Archives of a folder are opened, too. None of them would prevent a start, but clients couldn't
/// read them.
#[test]
fn archives_of_a_folder_that_can_not_be_opened_are_named() {
    let site = Site::new("export-dir = '{}/folder'\ndefault-export = 'good.hxz'");
    fs::create_dir(site.path("folder")).unwrap();
    site.copy(BASE, "folder/good.hxz");
    let would = |expected: &str| {
        let ended = check(&site.file());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let folder = site.path("folder");
        let start = format!("would serve every archive in {} ({expected}) ", folder.display());
        assert!(ended.stdout.starts_with(&start), "{}", ended.stdout);
        ended.stderr
    };
    assert_eq!(would("1 archive"), "");
    site.copy("encrypted-zstd.hxz", "folder/locked.hxz");
    fs::write(site.path("folder/torn.hexz"), "HEXZ").unwrap();
    // It lacks its parent.
    site.copy(CHILD, "folder/thin.hxz");
    let logged = would("4 archives, of which 3 can't be opened");
    assert_eq!(logged.lines().count(), 3, "{logged}");
    for (name, reason) in [
        ("locked.hxz", "password_needed"),
        ("thin.hxz", "parent_missing"),
        ("torn.hexz", "truncated"),
    ] {
        let line = logged.lines().find(|line| line.contains(&format!("{name:?}")));
        let line = line.unwrap_or_else(|| panic!("{name}: {logged}"));
        assert!(line.contains(&format!("reason=\"{reason}\"")), "{line}");
    }
}

#[test]
fn a_missing_folder_is_reported_once() {
    let site = Site::new("export-dir = '{}/folder'");
    let ended = check(&site.file());
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("folder_missing").count(), 1, "{}", ended.stderr);
    let ended = site.server().run();
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    assert_eq!(ended.stderr.matches("folder_missing").count(), 1, "{}", ended.stderr);
}

#[test]
fn an_empty_folder_and_an_impossible_default_are_warnings() {
    let site = Site::new("export-dir = '{}/folder'\ndefault-export = 'good'");
    fs::create_dir(site.path("folder")).unwrap();
    for reason in ["folder_empty", "default_export_impossible"] {
        let ended = check(&site.file());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.stderr.contains(reason), "{}", ended.stderr);
        site.server().start().wait_for_reason(reason);
    }
    site.copy(BASE, "folder/good.hxz");
    let server = site.server().start();
    let line = server.wait_for_reason("default_export_impossible");
    assert!(line.message().contains("did you mean \"good.hxz\"?"), "{}", line.text);
    assert!(!server.has_reason("folder_empty"), "{}", server.log_text());
    // A name of a named archive, or one that may come, is another matter.
    site.say("export-dir = '{}/folder'\ndefault-export = 'later.hxz'");
    let server = site.server().start();
    server.wait_for_reason("default_export_missing");
    assert!(!server.has_reason("default_export_impossible"), "{}", server.log_text());
}
