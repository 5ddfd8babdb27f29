//! Revocation.

use std::fs;
use std::process::{Command, Stdio};

use super::{Ca, assert_secrecy, contents};
use crate::clients::run;

const BACKUP: &str = "clients/backup/client-cert.pem";

fn list(ca: &Ca) -> String {
    let [crl, certificate] = ["crl.pem", "ca-cert.pem"].map(|it| ca.text(it));
    run("openssl", &["crl", "-noout", "-text", "-CAfile", &certificate, "-in", &crl]).ok()
}

fn assert_revoked(ca: &Ca, certificate: &str) {
    let why = ca.verify(certificate, "sslclient").failed();
    assert!(why.contains("certificate revoked"), "{why}");
}

#[test]
fn by_name_by_serial_and_by_file() {
    let ca = Ca::new();
    for name in ["backup", "b2", "b3", "b4", "stays"] {
        ca.make(["client", name]);
    }
    ca.verify(BACKUP, "sslclient").ok();
    let said = ca.make(["revoke", "backup"]);
    assert!(said.contains("client backup (") && said.contains(&ca.text("crl.pem")), "{said}");
    assert_revoked(&ca, BACKUP);

    // As openssl shows it, and with colons.
    let serial = ca.serial("clients/b2/client-cert.pem");
    ca.make(["revoke", &serial, "--reason", "key-compromise"]);
    let serial = ca.serial("clients/b3/client-cert.pem").to_lowercase();
    let pairs: Vec<_> = serial.as_bytes().chunks(2).map(|it| str::from_utf8(it).unwrap()).collect();
    ca.make(["revoke", &pairs.join(":")]);
    // A file alone is enough; nobody has to remember it.
    let file = ca.text("clients/b4/client-cert.pem");
    fs::remove_dir_all(ca.path("issued")).unwrap();
    ca.make(["revoke", &file, "--reason", "cessation-of-operation"]);

    for name in ["backup", "b2", "b3", "b4"] {
        assert_revoked(&ca, &format!("clients/{name}/client-cert.pem"));
    }
    ca.verify("clients/stays/client-cert.pem", "sslclient").ok();
    let list = list(&ca);
    assert_eq!(list.matches("Serial Number:").count(), 4, "{list}");
    assert!(list.contains("Key Compromise") && list.contains("Cessation Of Operation"), "{list}");
    assert!(list.contains("X509v3 CRL Number: \n                5\n"), "{list}");
    assert_secrecy(&ca.folder);
}

#[test]
fn twice_is_said_and_changes_nothing() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    ca.make(["revoke", "backup"]);
    let before = contents(&ca.folder);
    let said = ca.make(["revoke", "backup", "--reason", "key-compromise"]);
    assert!(!said.contains(&ca.text("crl.pem")), "{said}");
    assert!(contents(&ca.folder) == before);
}

/// A client whose folder is gone, and who has got another one, is shut out altogether.
#[test]
fn a_name_stands_for_all_its_certificates() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    fs::rename(ca.path("clients/backup"), ca.path("clients/old")).unwrap();
    ca.make(["client", "backup"]);
    let said = ca.make(["revoke", "backup"]);
    assert_eq!(said.matches("client backup (").count(), 2, "{said}");
    assert_revoked(&ca, BACKUP);
    assert_revoked(&ca, "clients/old/client-cert.pem");
    // One of a certificate's further names will do.
    ca.make(["client", "spiffe://corp/1", "host.example.org", "words"]);
    for name in ["words", "host.example.org", "spiffe://corp/1"] {
        assert!(ca.make(["revoke", name]).contains("words"));
    }
}

/// The obvious renewal procedure used to lock the client out.
#[test]
fn a_superseded_certificate_is_revoked_but_never_the_newest() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    let before = contents(&ca.folder);
    let serial = ca.serial(BACKUP);
    for which in ["backup", &serial, &ca.text(BACKUP)] {
        ca.fail(["revoke", which, "--reason", "superseded"], "not_superseded");
    }
    assert!(contents(&ca.folder) == before);
    let old = format!("issued/{}.pem", serial.to_lowercase());
    ca.make(["renew", "backup"]);
    let said = ca.make(["revoke", "backup", "--reason", "superseded"]);
    assert!(
        said.contains(&format!("revoked: client backup ({})", serial.to_lowercase())),
        "{said}"
    );
    assert!(said.contains("\nkept, as the newest: client backup ("), "{said}");
    assert_revoked(&ca, &old);
    ca.verify(BACKUP, "sslclient").ok();
    // Again, there is nothing to do.
    let before = contents(&ca.folder);
    let said = ca.make(["revoke", "backup", "--reason", "superseded"]);
    assert!(said.starts_with("was already revoked: "), "{said}");
    assert!(contents(&ca.folder) == before);
    // Another reason applies to the newest one, too.
    ca.make(["revoke", "backup"]);
    assert_revoked(&ca, BACKUP);
}

/// A certificate that is the newest of one of its names stays.
#[test]
fn a_certificate_with_several_names_is_superseded_name_by_name() {
    let ca = Ca::new();
    ca.make(["client", "web.example.org", "db.example.org"]);
    ca.make(["server", "db.example.org"]);
    fs::rename(ca.path("clients/web.example.org"), ca.path("clients/old")).unwrap();
    let old = "clients/old/client-cert.pem";
    ca.make(["client", "web.example.org"]);
    ca.fail(["revoke", &ca.text(old), "--reason", "superseded"], "not_superseded");
    ca.make(["client", "db.example.org"]);
    ca.make(["revoke", &ca.text(old), "--reason", "superseded"]);
    assert_revoked(&ca, old);
    ca.verify("servers/db.example.org/server-cert.pem", "sslserver").ok();
}

#[test]
fn what_is_not_meant_is_not_revoked() {
    let ca = Ca::new();
    ca.make(["client", "nbd.example.org"]);
    ca.make(["server", "nbd.example.org"]);
    let before = contents(&ca.folder);
    ca.fail(["revoke", "nbd.example.org"], "usage");
    ca.fail(["revoke", "nbd"], "not_issued");
    ca.fail(["revoke", ""], "not_issued");
    ca.fail(["revoke", "00ff"], "not_issued");
    ca.fail(["revoke", &ca.text("ca-cert.pem")], "ca_certificate");
    ca.fail(["revoke", &ca.text("ca-key.pem")], "no_certificate");
    ca.reject(["revoke", "nbd.example.org", "--reason", "x"]);
    let other = Ca::new();
    other.make(["client", "backup"]);
    ca.fail(["revoke", &other.text(BACKUP)], "other_ca");
    // Nor is one that somebody has written who would like another one to be revoked.
    let forge =
        "cd \"$0\" && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
         -keyout key -out ca -subj \"/$1\" && openssl req -new -key key -subj /CN=x -out r &&
         openssl x509 -req -in r -CA ca -CAkey key -set_serial \"0x$2\" -out forged";
    let subject = ca.openssl("ca-cert.pem", &["-subject"]).trim().replace(" = ", "=");
    let subject = subject.strip_prefix("subject=").unwrap();
    let serial = ca.serial("clients/nbd.example.org/client-cert.pem");
    let there = other.folder.to_str().unwrap();
    run("sh", &["-c", forge, there, subject, &serial]).ok();
    ca.fail(["revoke", &other.text("forged")], "other_ca");
    assert!(contents(&ca.folder) == before);
    // By its serial number it's one of the two.
    ca.make(["revoke", &ca.serial("clients/nbd.example.org/client-cert.pem")]);
    ca.verify("servers/nbd.example.org/server-cert.pem", "sslserver").ok();
}

/// Runs at the same time wait for each other: nobody's entry is lost.
#[test]
fn many_at_once() {
    let ca = Ca::new();
    let start = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hexz-nbd"));
        command.arg("pki").arg("--dir").arg(&ca.folder).args(args);
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    let names: Vec<String> = (0..12).map(|number| format!("client{number}")).collect();
    let all = |verb: &str| {
        let running: Vec<_> = names.iter().map(|name| start(&[verb, name])).collect();
        for mut child in running {
            assert!(child.wait().unwrap().success());
        }
    };
    all("client");
    all("revoke");
    for name in &names {
        assert_revoked(&ca, &format!("clients/{name}/client-cert.pem"));
    }
    assert!(list(&ca).contains("X509v3 CRL Number: \n                13\n"));
}

/// Entries that another program made stay as they are.
#[test]
fn entries_are_kept_with_all_they_have() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    let script = "cd \"$0\" && printf '[ca]\ndatabase=index\ncrlnumber=number\n' > cnf && echo 2a > number &&
        printf 'R\\t400101000000Z\\t250102030405Z,CAkeyTime,20250101000000Z\\tABCD\\tunknown\\t/CN=x\n' > index &&
        openssl ca -config cnf -name ca -gencrl -keyfile ca-key.pem -cert ca-cert.pem -md sha256 \
          -crldays 20 -crlexts ext -out crl.pem 2>&1 || { printf '[ext]\nauthorityKeyIdentifier=keyid\n' >> cnf &&
        openssl ca -config cnf -name ca -gencrl -keyfile ca-key.pem -cert ca-cert.pem -md sha256 \
          -crldays 20 -crlexts ext -out crl.pem; } && rm cnf index* number*";
    run("sh", &["-c", script, ca.folder.to_str().unwrap()]).ok();
    let entry = |list: &str| {
        let start = list.find("    Serial Number: ABCD").unwrap_or_else(|| panic!("{list}"));
        let entry: Vec<_> = list[start..].lines().take(6).map(str::to_owned).collect();
        entry
    };
    let before = entry(&list(&ca));
    assert!(before.iter().any(|line| line.contains("Invalidity Date")), "{before:?}");
    ca.make(["revoke", "backup"]);
    let after = list(&ca);
    assert_eq!(entry(&after), before);
    assert!(after.contains("CRL Number: \n                43\n"), "{after}");
    assert_revoked(&ca, BACKUP);
}
