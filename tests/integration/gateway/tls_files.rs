//! Certificates and keys, good and bad.

use std::fs;
use std::path::Path;

use super::plain;
use crate::support::authority::Authority;
use crate::support::pki::Pki;
use crate::support::server::Server;

/// It must refuse, with a message that names the file, and a label of what is wrong with it.
fn refused(pki: Pki, file: &str, reason: &str) {
    let path = pki.folder().join(file).display().to_string();
    let folder = pki.folder().to_owned();
    let message = plain().tls(pki).fails_with(4, reason);
    assert!(message.contains(&path), "{path} isn't named: {message}");
    drop(folder);
}

const CERT: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";

fn write(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
}

#[test]
fn what_can_not_be_used_is_refused_with_a_reason() {
    refused(Pki::new().with_wrong_key(), KEY, "key_mismatch");
    refused(Pki::expired(), CERT, "certificate_expired");
    refused(Pki::not_yet_valid(), CERT, "certificate_not_yet_valid");
    refused(Pki::new().with_exposed_key(), KEY, "secret_exposed");

    let swapped = Pki::new();
    fs::copy(swapped.server_key(), swapped.server_cert()).unwrap();
    refused(swapped, CERT, "no_certificate_in_file");

    let empty = Pki::new();
    write(&empty.server_cert(), "");
    refused(empty, CERT, "no_certificate_in_file");

    let swapped = Pki::new();
    let certificate = fs::read_to_string(swapped.server_cert()).unwrap();
    write(&swapped.server_key(), &certificate);
    refused(swapped, KEY, "no_key_in_file");

    let missing = Pki::new();
    fs::remove_file(missing.server_cert()).unwrap();
    refused(missing, CERT, "tls_file_unreadable");

    let missing = Pki::new();
    fs::remove_file(missing.server_key()).unwrap();
    refused(missing, KEY, "tls_file_unreadable");

    let huge = Pki::new();
    write(&huge.server_cert(), &"x".repeat((16 << 20) + 1));
    refused(huge, CERT, "tls_file_too_large");

    let broken = Pki::new();
    let text = fs::read_to_string(broken.server_cert()).unwrap();
    write(&broken.server_cert(), &text.replace("MII", "AAA"));
    refused(broken, CERT, "tls_file_unusable");
}

#[test]
fn an_encrypted_key_is_refused_with_a_way_out() {
    let encrypt = ["-aes256", "-passout", "pass:secret"];
    let reason = "encrypted_key";
    refused(Pki::new().with_key_rewritten(&encrypt), KEY, reason);
    // The older kind, with the cipher in a header of its own.
    let traditional = [&["-traditional"][..], &encrypt].concat();
    refused(Pki::rsa().with_key_rewritten(&traditional), KEY, reason);
    refused(Pki::new().with_key_rewritten(&traditional), KEY, reason);
}

/// PKCS#8 as rcgen and openssl write it, PKCS#1, SEC1; keys on a curve and RSA.
#[test]
fn keys_of_every_format() {
    for (pki, begins) in [
        (Pki::new(), "-----BEGIN PRIVATE KEY-----"),
        (Pki::rsa(), "-----BEGIN PRIVATE KEY-----"),
        (Pki::rsa().with_key_rewritten(&["-traditional"]), "-----BEGIN RSA PRIVATE KEY-----"),
        (Pki::new().with_key_rewritten(&["-traditional"]), "-----BEGIN EC PRIVATE KEY-----"),
    ] {
        let key = fs::read_to_string(pki.server_key()).unwrap();
        assert!(key.starts_with(begins), "{key}");
        plain().tls(pki).start().assert_alive();
    }
}

/// The client knows the root alone; the server sends what is between.
#[test]
fn a_chain_with_an_intermediate() {
    plain().tls(Pki::with_intermediate()).start().assert_alive();
    // Without the second certificate in the file the client can't follow.
    let pki = Pki::with_intermediate();
    let chain = fs::read_to_string(pki.server_cert()).unwrap();
    let end = "-----END CERTIFICATE-----\n";
    let first = chain.find(end).unwrap() + end.len();
    assert!(first < chain.len());
    write(&pki.server_cert(), &chain[..first]);
    let server = plain().tls(pki).start();
    let mut client = server.connect();
    client.greet(crate::support::client::FLAGS);
    client.send(&crate::support::client::option(crate::support::client::OPT_STARTTLS, b""));
    client.option_replies(crate::support::client::OPT_STARTTLS);
    assert!(client.handshake(server.pki().client_config()).is_err());
}

#[test]
fn certificate_and_key_belong_together_on_the_command_line() {
    let pki = Pki::new();
    let builder = || Server::builder().archive(super::BASE);
    for (option, file) in [("--tls-cert", pki.server_cert()), ("--tls-key", pki.server_key())] {
        let (code, stderr) = builder().arg(option).arg(file).fail();
        assert_eq!(code, 2, "{stderr}");
    }
}

/// The certificate was blamed for a key that can't be used.
#[test]
fn a_key_of_an_unsupported_kind_is_blamed_itself() {
    refused(Pki::new().with_key_on("secp256k1"), KEY, "unsupported_key");
}

// RUSTSEC-2026-0104, -0049, rustls-webpki | revocation lists made it panic, or were not heeded
#[test]
fn broken_revocation_lists_refuse_to_start() {
    let authority = Authority::new();
    let good = fs::read(authority.revocation_list()).unwrap();
    let starts = |content: &[u8]| {
        fs::write(authority.revocation_list(), content).unwrap();
        Server::builder().archive("base-zstd.hxz").tls(Pki::new()).clients_of(&authority)
    };
    // Cut anywhere, it is refused in words.
    let body = good.len() - b"-----END X509 CRL-----\n".len();
    for length in [0, 1, 30, 60, body / 2, body - 8, body] {
        let (code, error) = starts(&good[..length]).fail();
        assert_eq!(code, 4, "{length}: {error}");
        assert!(error.contains("crl.pem"), "{error}");
    }
    // One that has run out would let nobody in.
    authority.revoke_until(&[], -60);
    let list = fs::read(authority.revocation_list()).unwrap();
    starts(&list).fails_with(4, "revocation_list_expired");
}
