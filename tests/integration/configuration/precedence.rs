//! The command line, the file and credentials put together.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use super::{BASE, CHILD, Site};
use crate::support::client::FLAGS;
use crate::support::pki::Pki;
use crate::support::server::{Address, Server};
use crate::support::{archive, image};

const LOG: &str = "log-format = \"json\"\n";

#[test]
fn the_file_alone_names_everything() {
    let site = Site::new(&format!(
        "{LOG}listen = ['127.0.0.1:0', 'unix:{{}}/s']\ndefault-export = 'b.hxz'\n\
         [exports]\na = '{{archives}}/{CHILD}'\n'b.hxz' = '{{archives}}/{BASE}'\n"
    ));
    let server = site.alone().start();
    assert_eq!(server.addresses()[1], Address::Unix(site.path("s")));
    let mut client = server.go("");
    assert_eq!(client.read_ok(4096, 512), image()[4096..4608]);
    assert_eq!(server.greeted().list(), ["a", "b.hxz"]);
}

#[test]
fn the_command_line_replaces_values_lists_and_archives() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let site = Site::new(&format!(
        "listen = ['{taken}', 'unix:{{}}/s']\nallow = '127.0.0.0/8'\nmax-connections = 3\n\
         verbose = 1\n[exports]\na = '{{}}/none'\n"
    ));
    let server = site
        .server()
        .args(["--allow", "127.0.0.2", "--max-connections", "4", "--insecure-no-tls"])
        .archive(BASE)
        .start();
    assert_eq!(server.addresses().len(), 1);
    assert!(!site.path("s").exists());
    let limits = server.wait_for_message("limits: ");
    assert!(limits.message().contains("max-connections 4,"), "{}", limits.text);
    assert!(server.connect().rest().0.is_empty());
    let mut client = server.connect_from([127, 0, 0, 2]);
    client.greet(FLAGS);
    assert_eq!(client.list(), [BASE]);
}

/// What the command line contradicts is dropped, and what needs it.
#[test]
fn the_command_line_drops_what_it_contradicts() {
    let site = Site::new(&format!(
        "rules = '{{}}/none'\ntls-cert = '{{}}/none'\ntls-key = '{{}}/none'\n\
         tls-client-ca = '{{}}/none'\ntls-client-auth = 'optional'\ntls-min = '1.3'\n\
         [exports]\na = '{{archives}}/{BASE}'\n"
    ));
    let server = site.server().args(["--allow", "127.0.0.1", "--insecure-no-tls"]).start();
    server.assert_alive();
    // Either is still wrong without the command line.
    let (code, stderr) = site.alone().fail();
    assert_eq!(code, 2);
    assert!(stderr.contains("can't use the rules"), "{stderr}");
}

#[test]
fn certificate_and_key_may_come_from_both() {
    let pki = Pki::new();
    let certificate = pki.server_cert();
    let site = Site::new(&format!(
        "tls-cert = '{}'\n[exports]\na = '{{archives}}/{BASE}'\n",
        certificate.display()
    ));
    let server = site.server().arg("--tls-key").arg(pki.server_key()).start();
    read_over_tls(&server, &pki);

    let (code, stderr) = site.server().fail();
    assert_eq!(code, 2);
    assert!(stderr.contains("config_missing_option"), "{stderr}");
    assert!(stderr.contains("hexz-nbd.toml, line 1: tls-cert requires tls-key"), "{stderr}");
}

fn read_over_tls(server: &Server, pki: &Pki) {
    let mut client = server.connect();
    client.greet(FLAGS);
    let mut client = client.starttls(pki.client_config());
    client.go("");
    assert_eq!(client.read_ok(4096, 512), image()[4096..4608]);
}

#[test]
fn certificate_and_key_by_credentials() {
    let pki = Pki::new();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::copy(pki.server_cert(), path("hexz-nbd.tls-cert")).unwrap();
    let started = || Server::builder().archive(BASE).env("CREDENTIALS_DIRECTORY", folder.path());
    let (code, stderr) = started().fail();
    assert_eq!(code, 2);
    assert!(
        stderr.contains("config_missing_option") && stderr.contains("hexz-nbd.tls-key: "),
        "{stderr}"
    );
    // Whoever has said something else of TLS doesn't need it.
    started().arg("--insecure-no-tls").start().assert_alive();
    started().tls(Pki::new()).start().assert_alive();

    fs::copy(pki.server_key(), path("hexz-nbd.tls-key")).unwrap();
    fs::set_permissions(path("hexz-nbd.tls-key"), fs::Permissions::from_mode(0o400)).unwrap();
    read_over_tls(&started().start(), &pki);
    // What needs a certificate has one.
    let client_ca = ["--tls-client-auth", "optional", "--tls-client-ca"];
    read_over_tls(&started().args(client_ca).arg(pki.ca_cert()).start(), &pki);
    started().arg("--insecure-no-tls").start().assert_alive();
    started().tls(Pki::new()).start().assert_alive();
    let site = Site::new("insecure-no-tls = true");
    let said = started().arg("--config").arg(site.file());
    said.start().assert_alive();
}

/// What can't be looked at isn't taken for none: that would be a server without TLS.
#[test]
fn credentials_that_can_not_be_looked_at_stop_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (names, expected) in [
        (&["hexz-nbd.password"][..], (3, "can't use the password")),
        (&["hexz-nbd.tls-cert", "hexz-nbd.tls-key"][..], (4, "can't use TLS")),
    ] {
        // A link to itself, as root may look everywhere else.
        names.iter().for_each(|name| std::os::unix::fs::symlink(name, at(name)).unwrap());
        let builder = Server::builder().archive(BASE).env("CREDENTIALS_DIRECTORY", folder.path());
        let (code, stderr) = builder.fail();
        assert_eq!(code, expected.0, "{stderr}");
        assert!(stderr.contains(expected.1) && stderr.contains(names[0]), "{stderr}");
        names.iter().for_each(|name| fs::remove_file(at(name)).unwrap());
    }
}

#[test]
fn wording_of_problems_in_the_file() {
    let serving = format!("[exports]\na = '{}'", archive(BASE).display());
    for (text, messages) in [
        ("listen = 7", &["line 1: listen: invalid value \"7\": "][..]),
        ("strict = true", &["hexz-nbd.toml: no archive to serve"]),
        (
            "allow = '::1'\nrules = 'x'\nallow-identity = 'y'\ntls-client-ca = 'z'",
            &[
                "line 2: rules conflicts with allow, line 1",
                "line 3: allow-identity conflicts with rules, line 2",
                "line 4: tls-client-ca requires tls-cert",
            ],
        ),
        (
            "lisen = 7\nmax-connections = 0",
            &["line 1: unknown option \"lisen\"", "line 2: max-connections: "],
        ),
    ] {
        let text =
            if text.contains("strict") { text.to_owned() } else { format!("{text}\n{serving}") };
        let site = Site::new(&text);
        let (code, stderr) = site.alone().fail();
        assert_eq!(code, 2, "{stderr}");
        assert_eq!(stderr.lines().count(), messages.len(), "{stderr}");
        for message in messages {
            assert!(stderr.contains(message), "{message}: {stderr}");
        }
        assert!(!stderr.contains("--") && !stderr.contains("Usage"), "{stderr}");
    }
    // Options of the command line are named as they are there.
    let site = Site::new(&serving);
    let (code, stderr) = site.server().args(["--rules", "x", "--allow", "::1"]).fail();
    assert_eq!(code, 2);
    assert!(stderr.contains("--rules conflicts with --allow"), "{stderr}");
    let (code, stderr) = site.server().arg("--tls-key=x").fail();
    assert_eq!(code, 2);
    assert!(stderr.contains("--tls-key requires --tls-cert"), "{stderr}");
}
