//! Certificates, keys and lists as people have them: what each is, and what to do, in one line.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use super::plain;
use crate::support::authority::Authority;
use crate::support::openssl::{ED448, Openssl, P256, RSA_1024, RSA_PSS, SECP256K1, mark};
use crate::support::pki::{Pki, write_secret};
use crate::support::server::Builder;

/// It must refuse for that reason, and name that file and the other parts: what it is, and the
/// command that makes a better one.
#[track_caller]
fn refused(builder: Builder, file: &Path, reason: &str, parts: &[&str]) {
    let error = builder.fails_with(4, reason);
    let named = format!("{}: ", file.display());
    for part in parts.iter().chain([&named.as_str()]) {
        assert!(error.contains(part), "{part}: {error}");
    }
}

fn with(certificate: &Path, key: &Path) -> Builder {
    let args: [OsString; 4] =
        ["--tls-cert".into(), certificate.into(), "--tls-key".into(), key.into()];
    plain().args(args)
}

fn with_clients(authorities: &Path) -> Builder {
    plain().tls(Pki::new()).arg("--tls-client-ca").arg(authorities)
}

#[test]
fn keys_that_are_not_spoken_say_what_they_are() {
    let openssl = Openssl::new();
    for (way, name) in
        [(SECP256K1, "secp256k1"), (RSA_1024, "1024"), (RSA_PSS, "RSA-PSS"), (ED448, "Ed448")]
    {
        let key = openssl.key("localhost", way);
        let certificate = openssl.self_signed("localhost", false);
        refused(with(&certificate, &key), &key, "unsupported_key", &[name, "openssl genpkey"]);
    }
    // The older formats.
    for (way, name) in [(SECP256K1, "secp256k1"), (RSA_1024, "1024")] {
        let key = openssl.key("localhost", way);
        let certificate = openssl.self_signed("localhost", false);
        let pem = openssl.run(&["pkey", "-in", "localhost.key", "-traditional"]);
        assert!(!pem.starts_with("-----BEGIN PRIVATE KEY-----"));
        write_secret(&key, &pem);
        refused(with(&certificate, &key), &key, "unsupported_key", &[name, "openssl genpkey"]);
    }
}

#[test]
fn a_certificate_of_version_1_is_called_that() {
    let openssl = Openssl::new();
    for name in ["ca", "localhost"] {
        openssl.key(name, P256);
    }
    openssl.self_signed("ca", true);
    let certificate = openssl.signed("localhost", "ca", "");
    let builder = with(&certificate, &openssl.path("localhost.key"));
    refused(builder, &certificate, "unsupported_certificate", &["-extfile"]);
}

/// The key was blamed, or the CA's certificate was judged as the server's.
#[test]
fn a_certificate_that_is_not_first_is_called_that() {
    let pki = Pki::with_intermediate();
    let text = fs::read_to_string(pki.server_cert()).unwrap();
    let end = "-----END CERTIFICATE-----\n";
    let (own, others) = text.split_at(text.find(end).unwrap() + end.len());
    fs::write(pki.server_cert(), [others, own].concat()).unwrap();
    let path = pki.server_cert();
    refused(plain().tls(pki), &path, "server_certificate_not_first", &["number 2"]);
}

#[test]
fn a_byte_order_mark_is_called_that() {
    for file in [Pki::server_cert, Pki::server_key] {
        let pki = Pki::new();
        let path = file(&pki);
        mark(&path);
        refused(plain().tls(pki), &path, "not_pem", &["tail -c +4"]);
    }
    let authority = Authority::new();
    mark(&authority.certificate());
    let builder = with_clients(&authority.certificate());
    refused(builder, &authority.certificate(), "not_pem", &["tail -c +4"]);
    let authority = Authority::new();
    mark(&authority.revocation_list());
    let builder = with_clients(&authority.certificate())
        .arg("--tls-client-crl")
        .arg(authority.revocation_list());
    refused(builder, &authority.revocation_list(), "not_pem", &["tail -c +4"]);
    // As Windows' own shell writes text.
    let pki = Pki::new();
    let text = fs::read_to_string(pki.server_cert()).unwrap();
    let wide: Vec<u8> =
        std::iter::once(0xFEFF).chain(text.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    fs::write(pki.server_cert(), wide).unwrap();
    let path = pki.server_cert();
    refused(plain().tls(pki), &path, "not_pem", &["iconv"]);
}

#[test]
fn a_list_of_version_1_is_called_that() {
    let openssl = Openssl::new();
    openssl.key("ca", P256);
    let authority = openssl.self_signed("ca", true);
    let list = openssl.list("ca");
    let builder = with_clients(&authority).arg("--tls-client-crl").arg(&list);
    refused(builder, &list, "revocation_list_version_1", &["openssl ca -gencrl"]);
}

/// The server starts, since clients may come in by other CAs or without a certificate.
#[test]
fn a_file_of_cas_that_holds_none_is_a_warning() {
    let openssl = Openssl::new();
    for name in ["ca", "alice"] {
        openssl.key(name, P256);
    }
    let authority = openssl.self_signed("ca", true);
    let constraint = "basicConstraints=CA:FALSE";
    let leaf = openssl.signed("alice", "ca", constraint);
    let reasons = |file: &Path| {
        let server = with_clients(file).start();
        let log = server.log();
        let reasons = log.iter().map(|line| line.reason().to_owned());
        reasons.filter(|reason| reason.starts_with("client_ca")).collect::<Vec<_>>()
    };
    assert_eq!(reasons(&leaf), ["client_ca_is_none"]);
    assert_eq!(reasons(&authority), [""; 0]);
    // Nothing that it signed can be verified.
    openssl.key("weak", RSA_1024);
    assert_eq!(reasons(&openssl.self_signed("weak", true)), ["client_ca_unusable"]);
}

#[test]
fn a_client_s_certificate_of_version_1_is_called_that() {
    let openssl = Openssl::new();
    for name in ["ca", "alice"] {
        openssl.key(name, P256);
    }
    let authority = openssl.self_signed("ca", true);
    openssl.signed("alice", "ca", "");
    let server = with_clients(&authority).start();
    // libnbd isn't so strict with its own.
    let folder = tempfile::tempdir().unwrap();
    fs::copy(server.pki().ca_cert(), folder.path().join("ca-cert.pem")).unwrap();
    for (from, to) in [("alice.pem", "client-cert.pem"), ("alice.key", "client-key.pem")] {
        fs::copy(openssl.path(from), folder.path().join(to)).unwrap();
    }
    let uri =
        format!("nbds://localhost:{}/?tls-certificates={}", server.port(), folder.path().display());
    let said = crate::clients::run("nbdinfo", &["--size", &uri]);
    assert_eq!(said.output(), None);
    let line = server.wait_for_reason("tls_handshake");
    assert_eq!(line.json["cause"], "bad_certificate");
    assert!(line.message().contains("openssl x509 -req -extfile"), "{}", line.text);
}
