//! Renewal.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::{Ca, assert_secrecy, contents, mode};
use crate::clients::run;

const SERVER: &str = "servers/nbd.example.org/server-cert.pem";
const BACKUP: &str = "clients/backup/client-cert.pem";

/// What `openssl x509` shows of a certificate's names, purposes and kind of key.
fn names(ca: &Ca, certificate: &str) -> Vec<String> {
    let text = ca.openssl(
        certificate,
        &["-subject", "-ext", "subjectAltName,extendedKeyUsage,keyUsage,basicConstraints"],
    );
    let key = ca.openssl(certificate, &["-text"]);
    let key = key.lines().find(|line| line.contains("Public Key Algorithm")).unwrap();
    text.lines().chain([key]).map(str::to_owned).collect()
}

fn public_key(ca: &Ca, certificate: &str) -> String {
    ca.openssl(certificate, &["-pubkey"])
}

/// The public half of the key in a folder.
fn key_of(ca: &Ca, key: &str) -> String {
    run("openssl", &["pkey", "-pubout", "-in", &ca.text(key)]).ok()
}

#[test]
fn names_and_kind_stay_and_the_key_is_new() {
    let ca = Ca::new();
    ca.make(["server", "nbd.example.org", "192.0.2.7", "*.example.org", "--days", "200"]);
    ca.make(["client", "spiffe://corp/1", "me@example.org", "Backup 1", "--ed25519"]);
    let client = "clients/spiffe=3A=2F=2Fcorp=2F1/client-cert.pem";
    for (certificate, which, purpose) in
        [(SERVER, "nbd.example.org", "sslserver"), (client, "Backup 1", "sslclient")]
    {
        let before =
            (names(&ca, certificate), ca.serial(certificate), public_key(&ca, certificate));
        let said = ca.make(["renew", which]);
        assert!(said.starts_with("renewed ") && said.contains(" --reason superseded "), "{said}");
        let after = (names(&ca, certificate), ca.serial(certificate), public_key(&ca, certificate));
        assert_eq!(before.0, after.0);
        assert!(before.1 != after.1 && before.2 != after.2);
        let key = certificate.replace("-cert", "-key");
        assert_eq!(key_of(&ca, &key), after.2);
        ca.verify(certificate, purpose).ok();
        // Both are known, and the former one is good.
        for serial in [before.1, after.1] {
            ca.verify(&format!("issued/{}.pem", serial.to_lowercase()), purpose).ok();
        }
    }
    assert!(names(&ca, client).iter().any(|line| line.contains("ED25519")));
    assert_secrecy(&ca.folder);
    // The lifetime stays, too, unless another one is given.
    let days = |serial: String| {
        let shown = ca.make(["show"]);
        let line = shown.lines().find(|line| line.contains(&serial.to_lowercase())).unwrap();
        line.split_whitespace().nth(3).unwrap().parse::<u32>().unwrap()
    };
    assert_eq!(days(ca.serial(SERVER)), 199);
    ca.make(["renew", "192.0.2.7", "--days", "20"]);
    assert_eq!(days(ca.serial(SERVER)), 19);
}

/// A server that reads them from there keeps its access, and a sandbox its folder.
#[test]
fn files_are_replaced_in_their_folder() {
    use std::os::unix::fs::MetadataExt;
    let ca = Ca::new();
    ca.make(["server", "nbd.example.org"]);
    let folder = ca.path("servers/nbd.example.org");
    fs::set_permissions(folder.join("server-key.pem"), Permissions::from_mode(0o640)).unwrap();
    fs::write(folder.join("crl.pem"), "added by somebody").unwrap();
    let inode = fs::metadata(&folder).unwrap().ino();
    let owner = |name: &str| {
        let file = fs::metadata(folder.join(name)).unwrap();
        (file.uid(), file.gid())
    };
    if crate::support::is_root() {
        std::os::unix::fs::chown(folder.join("server-key.pem"), Some(0), Some(65534)).unwrap();
    }
    let before = owner("server-key.pem");
    ca.make(["renew", "nbd.example.org"]);
    assert_eq!(fs::metadata(&folder).unwrap().ino(), inode);
    assert_eq!(mode(&folder.join("server-key.pem")), 0o640);
    assert_eq!(mode(&folder.join("server-cert.pem")), 0o644);
    assert_eq!(owner("server-key.pem"), before);
    assert_eq!(fs::read_to_string(folder.join("crl.pem")).unwrap(), "added by somebody");
    let mut files: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["ca-cert.pem", "crl.pem", "server-cert.pem", "server-key.pem"]);
    // A folder that was moved away is created again, under the name that is given.
    fs::rename(&folder, ca.path("moved")).unwrap();
    ca.make(["renew", "nbd.example.org"]);
    assert_eq!(mode(&folder.join("server-key.pem")), 0o600);
}

#[test]
fn what_expires_soon_is_renewed() {
    let ca = Ca::new();
    ca.make(["server", "nbd.example.org"]);
    for name in ["backup", "revoked", "late"] {
        ca.make(["client", name, "--days", if name == "late" { "31" } else { "20" }]);
    }
    ca.make(["revoke", "revoked"]);
    let before = contents(&ca.folder);
    assert_eq!(ca.make(["renew", "--expiring", "10d"]), "nothing to renew\n");
    assert_eq!(ca.make(["renew", "late", "--expiring", "30d"]), "nothing to renew\n");
    assert!(contents(&ca.folder) == before);
    let said = ca.make(["renew", "--expiring", "30d", "--days", "60"]);
    assert_eq!(said.matches("renewed ").count(), 1, "{said}");
    assert!(said.contains("client backup,"), "{said}");
    // The next time it is no longer due.
    assert_eq!(ca.make(["renew", "--expiring", "30d"]), "nothing to renew\n");
    ca.make(["renew", "late", "nbd.example.org"]);
    assert_eq!(fs::read_dir(ca.path("issued")).unwrap().count(), 7);
    // Servers' certificates last more than a year.
    let said = ca.make(["renew", "nbd.example.org", "--expiring", "400d"]);
    assert_eq!(said.matches("renewed ").count(), 1, "{said}");
}

#[test]
fn what_cannot_be_renewed() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    ca.make(["client", "nbd.example.org"]);
    ca.make(["server", "nbd.example.org"]);
    ca.make(["client", "revoked"]);
    ca.make(["revoke", "revoked"]);
    // A CA that ends before.
    let ending = Ca::nowhere();
    ending.make(["init", "--days", "30"]);
    ending.make(["client", "backup"]);
    ending.fail(["renew", "backup"], "ca_expires_first");
    // One that openssl has issued, with an organization that would be lost; and no kind of ours.
    let issue = "cd \"$0\" && openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
         -keyout k -subj \"/O=Example/CN=$1\" -out r && printf \"$3\" > e && \
         openssl x509 -req -in r \
         -CA ca-cert.pem -CAkey ca-key.pem -days 9 -extfile e -set_serial $2 \
         -out issued/0$2.pem && rm k r e";
    let folder = ca.folder.to_str().unwrap().to_owned();
    for (name, serial, extensions) in
        [("lost", "7", "extendedKeyUsage=clientAuth\\n"), ("other", "8", "\\n")]
    {
        run("sh", &["-c", issue, &folder, name, serial, extensions]).ok();
    }
    let before = contents(&ca.folder);
    ca.fail(["renew", "nobody"], "not_issued");
    ca.fail(["renew", "revoked"], "revoked");
    ca.fail(["renew", "nbd.example.org"], "usage");
    ca.fail(["renew", "lost"], "not_renewable");
    ca.fail(["renew", "other"], "not_renewable");
    // None if not all.
    ca.fail(["renew", "backup", "revoked"], "revoked");
    let message = ca.reject(["renew"]);
    assert!(message.contains("--expiring"), "{message}");
    ca.reject(["renew", "backup", "--days", "0"]);
    assert!(contents(&ca.folder) == before);
    ca.make(["renew", BACKUP.replace("clients/backup", &ca.text("clients/backup")).as_str()]);
    ca.fail(["client", "backup"], "already_exists");
}

/// Certificates that are issued in the same second are told apart all the same.
#[test]
fn the_newest_is_the_one_issued_last() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    for _ in 0..3 {
        ca.make(["renew", "backup"]);
    }
    let said = ca.make(["revoke", "backup", "--reason", "superseded"]);
    assert_eq!(said.matches("\nrevoked: ").count() + usize::from(said.starts_with("revoked: ")), 3);
    ca.verify(BACKUP, "sslclient").ok();
}
