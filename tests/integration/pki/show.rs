//! The table of what was issued.

use std::fs;

use serde_json::Value;

use super::Ca;
use crate::clients::run;

#[test]
fn everything_that_was_issued() {
    let ca = Ca::new();
    ca.make(["server", "nbd.example.org", "192.0.2.7"]);
    ca.make(["client", "Büro 2", "spiffe://corp/2"]);
    ca.make(["client", "gone", "--days", "3"]);
    let certificate = "clients/gone/client-cert.pem";
    let serial = ca.serial(certificate).to_lowercase();
    let fingerprint = ca.openssl(certificate, &["-fingerprint", "-sha256"]);
    let fingerprint = fingerprint.trim().split('=').next_back().unwrap().replace(':', "");
    fs::remove_dir_all(ca.path("clients/gone")).unwrap();
    let line = |name: &str| {
        let shown = ca.make(["show"]);
        shown.lines().find(|line| line.contains(name)).unwrap().to_owned()
    };
    let expires = line("gone");
    assert!(expires.starts_with("client  expires in 2 days "), "{expires}");
    assert!(
        expires.contains(&serial) && expires.contains(&fingerprint.to_lowercase()),
        "{expires}"
    );
    ca.make(["revoke", "gone", "--reason", "privilege-withdrawn"]);
    assert!(line("gone").starts_with("client  revoked "));
    assert!(line("nbd.example.org, 192.0.2.7").starts_with("server  expires in 396 days "));
    assert!(line("hexz-nbd CA ").starts_with("ca      expires in 3649 days "));

    let json: Value = serde_json::from_str(&ca.make(["show", "--json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 4);
    assert_eq!((&json[0]["kind"], &json[0]["state"]), (&"ca".into(), &"valid".into()));
    // In the order in which they end.
    assert_eq!(json[1]["serial"], serial);
    assert_eq!(json[1]["state"], "revoked");
    assert_eq!(json[1]["revoked"]["reason"], "privilegeWithdrawn");
    assert_eq!(json[1]["sha256"], fingerprint.to_lowercase());
    assert_eq!(json[2]["names"][0], serde_json::json!({ "kind": "cn", "name": "Büro 2" }));
    assert_eq!(
        json[2]["names"][1],
        serde_json::json!({ "kind": "uri", "name": "spiffe://corp/2" })
    );
    assert_eq!(json[2]["expires_in_days"], 89);
    assert_eq!(json[3]["names"][1], serde_json::json!({ "kind": "ip", "name": "192.0.2.7" }));
}

#[test]
fn what_expires_soon_has_an_exit_code() {
    let ca = Ca::new();
    ca.make(["server", "nbd.example.org"]);
    assert_eq!(ca.make(["show", "--expiring", "30d"]), "");
    assert_eq!(ca.make(["show", "--expiring", "30d", "--json"]), "[]\n");
    for name in ["soon", "renewed", "revoked"] {
        ca.make(["client", name, "--days", "20"]);
    }
    ca.make(["revoke", "revoked"]);
    ca.make(["renew", "renewed", "--days", "40"]);
    let ended = ca.run(["show", "--expiring", "30d"]);
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let lines: Vec<_> = ended.stdout.lines().collect();
    assert!(lines[0].starts_with("KIND ") && lines[1].ends_with(" soon"), "{lines:?}");
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert_eq!(ca.run(["show", "--expiring", "1d"]).code, Some(0));
    // Whatever is revoked or superseded never counts.
    let ended = ca.run(["show", "--expiring", "1y", "--json"]);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    let kinds: Vec<_> = json.as_array().unwrap().iter().map(|it| &it["kind"]).collect();
    assert_eq!(kinds, ["client", "client"]);
    assert_eq!(ended.code, Some(3));
    ca.reject(["show", "--expiring", "30"]);
    ca.reject(["show", "--expiring", "0d"]);

    let json: Value = serde_json::from_str(&ca.make(["show", "--json"])).unwrap();
    let superseded = json.as_array().unwrap().iter().filter(|it| it["superseded"] == true);
    let superseded: Vec<_> = superseded.map(|it| &it["names"][0]["name"]).collect();
    assert_eq!(superseded, ["renewed"]);

    let short = Ca::nowhere();
    short.make(["init", "--days", "20"]);
    let ended = short.run(["show", "--expiring", "30d"]);
    assert_eq!(ended.code, Some(3), "{}", ended.stdout);
    assert!(ended.stdout.contains("\nca "), "{}", ended.stdout);
}

/// It needs no key, and passes over what it can't read.
#[test]
fn without_the_key() {
    let ca = Ca::new();
    ca.make(["client", "backup"]);
    fs::remove_file(ca.path("ca-key.pem")).unwrap();
    fs::write(ca.path("issued/junk.pem"), "x").unwrap();
    let ended = ca.run(["show"]);
    assert_eq!(ended.code, Some(0));
    assert!(ended.stdout.contains(" backup"), "{}", ended.stdout);
    for part in ["junk.pem", "reason=\"no_certificate\""] {
        assert!(ended.stderr.contains(part), "{}", ended.stderr);
    }
    fs::remove_file(ca.path("crl.pem")).unwrap();
    assert!(ca.fail(["show"], "io_error").contains("crl.pem"));
}

#[test]
fn what_has_expired() {
    let ca = Ca::new();
    let expired = "cd \"$0\" && mkdir issued && openssl req -new -newkey ec -pkeyopt \
         ec_paramgen_curve:P-256 -nodes -keyout k -subj /CN=old -out r && openssl x509 -req -in r \
         -CA ca-cert.pem -CAkey ca-key.pem -days -1 -set_serial 7 -out issued/07.pem";
    run("sh", &["-c", expired, ca.folder.to_str().unwrap()]).ok();
    let shown = ca.make(["show"]);
    assert!(shown.contains("other   expired "), "{shown}");
    // It can be revoked all the same, for clocks that are wrong.
    ca.make(["revoke", "old"]);
    assert!(ca.make(["show"]).contains("other   revoked "));
}
