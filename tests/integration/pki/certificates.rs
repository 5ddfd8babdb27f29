//! What servers and clients get.

use std::fs;

use super::{Ca, assert_secrecy, contents};
use crate::clients::run;

const SERVER: &str = "servers/nbd.example.org/server-cert.pem";

#[test]
fn a_servers_certificate() {
    let ca = Ca::new();
    let names = ["nbd.example.org", "192.0.2.7", "2001:db8::7", "*.example.org", "nbd.example.org"];
    let [a, b, c, d, e] = names;
    ca.make(["server", a, b, c, d, e]);
    assert_secrecy(&ca.folder);
    ca.verify(SERVER, "sslserver").ok();
    ca.verify(SERVER, "sslclient").failed();
    let text = ca.openssl(SERVER, &["-text"]);
    for expected in [
        "Subject: CN = nbd.example.org\n",
        "DNS:nbd.example.org, IP Address:192.0.2.7, IP Address:2001:DB8:0:0:0:0:0:7, \
         DNS:*.example.org\n",
        // Not critical, for qemu.
        "X509v3 Key Usage: \n                Digital Signature\n",
        "X509v3 Extended Key Usage: \n                TLS Web Server Authentication\n",
        "X509v3 Basic Constraints: critical\n                CA:FALSE\n",
        "X509v3 Subject Key Identifier:",
        "X509v3 Authority Key Identifier:",
    ] {
        assert!(text.contains(expected), "{expected} is missing in {text}");
    }
    assert_eq!(ca.serial(SERVER).len(), 32);
    for (host, good) in [("nbd.example.org", true), ("a.example.org", true), ("a.b.org", false)] {
        let said = ca.openssl(SERVER, &["-checkhost", host]);
        assert_eq!(!said.contains("NOT"), good, "{said}");
    }
    let folder = ca.path("servers/nbd.example.org");
    assert_eq!(
        fs::read(folder.join("ca-cert.pem")).unwrap(),
        fs::read(ca.path("ca-cert.pem")).unwrap()
    );
    // Its copy is the same.
    let copy = format!("issued/{}.pem", ca.serial(SERVER).to_lowercase());
    assert_eq!(fs::read(ca.path(SERVER)).unwrap(), fs::read(ca.path(&copy)).unwrap());
}

#[test]
fn a_clients_certificate() {
    let ca = Ca::new();
    ca.make([
        "client",
        "spiffe://corp/backup/1",
        "backup.example.org",
        "me@example.org",
        "192.0.2.9",
        "Backup 1",
    ]);
    assert_secrecy(&ca.folder);
    let certificate = "clients/spiffe=3A=2F=2Fcorp=2Fbackup=2F1/client-cert.pem";
    ca.verify(certificate, "sslclient").ok();
    ca.verify(certificate, "sslserver").failed();
    let text = ca.openssl(certificate, &["-text"]);
    for expected in [
        "Subject: CN = Backup 1\n",
        "URI:spiffe://corp/backup/1, DNS:backup.example.org, email:me@example.org, \
         IP Address:192.0.2.9\n",
        "TLS Web Client Authentication\n",
    ] {
        assert!(text.contains(expected), "{expected} is missing in {text}");
    }
    assert!(!text.contains("Server Authentication"), "{text}");
}

/// The time begins a little before now, and ends as is said.
#[test]
fn certificates_have_their_time() {
    let ca = Ca::new();
    ca.make(["server", "nbd.example.org"]);
    ca.make(["client", "backup"]);
    ca.make(["client", "short", "--days", "1"]);
    for (certificate, days) in [
        (SERVER, 397),
        ("clients/backup/client-cert.pem", 90),
        ("clients/short/client-cert.pem", 1),
    ] {
        for (seconds, words) in [(-3600, "will not expire"), (60, "will expire")] {
            let end = (days * 24 * 3600 + seconds).to_string();
            let certificate = ca.text(certificate);
            // It ends with 1 where it would expire.
            let said = run(
                "sh",
                &["-c", "openssl x509 -noout -checkend $0 -in \"$1\" || true", &end, &certificate],
            );
            assert!(said.ok().contains(words));
        }
        // Slow clocks take it too.
        let ca_certificate = ca.text("ca-cert.pem");
        let slow = "openssl verify -attime $(($(date +%s) - 240)) -CAfile \"$0\" \"$1\"";
        run("sh", &["-c", slow, &ca_certificate, &ca.text(certificate)]).ok();
    }
}

#[test]
fn names_of_every_kind_and_length() {
    let long = format!("spiffe://corp/{}", "x".repeat(290));
    let ca = Ca::new();
    for name in [
        "..", ".", "a/b", "../../x", "Büro 2", "a b", "=2E.", "it's", "\"", "\\", "$(id)", "*",
        "~", "%41", "a,b", &long,
    ] {
        ca.make(["client", name]);
        // Named again it's the same, and found.
        ca.fail(["client", name], "already_exists");
        ca.make(["revoke", name]);
    }
    ca.make(["client", "--", "-x"]);
    ca.make(["revoke", "--", "-x"]);
    let clients: Vec<_> = fs::read_dir(ca.path("clients")).unwrap().collect();
    assert_eq!(clients.len(), 17);
    assert_secrecy(&ca.folder);
    for client in clients {
        let certificate = client.unwrap().path().join("client-cert.pem");
        let certificate =
            certificate.strip_prefix(&ca.folder).unwrap().to_str().unwrap().to_owned();
        let why = ca.verify(&certificate, "sslclient").failed();
        assert!(why.contains("certificate revoked"), "{why}");
    }
    // A subject without a name makes the other names critical.
    let shown = ca.make(["show"]);
    assert!(shown.contains(&long), "{shown}");
    let serial = shown.lines().find(|line| line.contains(&long)).unwrap();
    let serial = serial.split_whitespace().nth(3).unwrap();
    let text = ca.openssl(&format!("issued/{serial}.pem"), &["-text"]);
    assert!(text.contains("X509v3 Subject Alternative Name: critical"), "{text}");
}

#[test]
fn names_that_make_no_sense_are_refused() {
    let ca = Ca::new();
    for name in ["", " ", "a\nb", "a\u{202e}b", &"x".repeat(300), "a@b@c", "://x"] {
        ca.reject(["client", name]);
    }
    for name in ["", "..", "a/b", "Büro", "10.0.0.0/8", "host:10809", "me@example.org"] {
        ca.reject(["server", name]);
    }
    ca.fail(["client", "one", "two"], "usage");
    ca.reject(["client"]);
    ca.reject(["client", "-x"]);
    assert!(!ca.path("clients").exists() && !ca.path("issued").exists());
}

#[test]
fn a_hundred_names() {
    let ca = Ca::new();
    let dir = ca.folder.to_str().unwrap();
    let names: Vec<String> = (0..101).map(|number| format!("host{number}.example.org")).collect();
    let run = |count: usize| {
        let names = names[..count].iter().map(String::as_str);
        crate::support::server::run(["pki", "--dir", dir, "server"].into_iter().chain(names))
    };
    assert_eq!(run(101).code, Some(2));
    assert_eq!(run(100).code, Some(0));
    let certificate = "servers/host0.example.org/server-cert.pem";
    ca.verify(certificate, "sslserver").ok();
    assert!(ca.openssl(certificate, &["-text"]).contains("DNS:host99.example.org"));
}

/// The CA of another program, with a name of several parts and an RSA key: what is made with
/// it must name it byte by byte, or nobody finds it.
#[test]
fn a_ca_that_openssl_made() {
    for (key, strings, organization) in
        [("ec", "utf8only", "Büro & Co"), ("rsa", "default", "Old Office")]
    {
        let ca = Ca::nowhere();
        fs::create_dir(&ca.folder).unwrap();
        let make = format!(
            "cd \"$0\" && printf '[req]\nstring_mask={strings}\ndistinguished_name=dn\n[dn]\n' > cnf &&
             openssl genpkey -algorithm {key} {} -out ca-key.pem &&
             openssl req -config cnf -utf8 -x509 -new -key ca-key.pem -out ca-cert.pem -days 30 \
               -subj '/C=DE/O={organization}/OU=a/CN=old CA' -addext basicConstraints=critical,CA:TRUE \
               -addext keyUsage=critical,keyCertSign,cRLSign && rm cnf",
            if key == "ec" { "-pkeyopt ec_paramgen_curve:P-256" } else { "" }
        );
        run("sh", &["-c", &make, ca.folder.to_str().unwrap()]).ok();
        // The list is all that it lacks.
        let before = contents(&ca.folder);
        ca.make(["init"]);
        assert!(before.iter().all(|file| contents(&ca.folder).contains(file)));
        ca.make(["client", "backup"]);
        let certificate = "clients/backup/client-cert.pem";
        ca.verify(certificate, "sslclient").ok();
        ca.make(["revoke", "backup"]);
        let why = ca.verify(certificate, "sslclient").failed();
        assert!(why.contains("certificate revoked"), "{why}");
    }
    // A name that can't be written again isn't written otherwise.
    let ca = Ca::nowhere();
    fs::create_dir(&ca.folder).unwrap();
    let make = "cd \"$0\" && openssl req -x509 -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 \
                -nodes -keyout ca-key.pem -out ca-cert.pem -subj '/OU=a/OU=b/CN=c'";
    run("sh", &["-c", make, ca.folder.to_str().unwrap()]).ok();
    ca.fail(["client", "backup"], "unsupported_name");
}
