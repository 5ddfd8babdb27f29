//! Certificates and keys as people have them: which file is to blame.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use super::{Found, examine};
use crate::support::authority::Authority;
use crate::support::openssl::{Openssl, P256, RSA_1024, SECP256K1, mark};
use crate::support::pki::{Pki, write_secret};
use crate::support::server::Server;

fn server() -> Server {
    Server::builder().archive("base-zstd.hxz").tls(Pki::new()).start()
}

/// That file of the folder is to blame, for that reason.
#[track_caller]
fn assert_blames(server: &Server, folder: &Path, file: &str, reason: &str) -> Found {
    let target: OsString = format!("localhost:{}", server.port()).into();
    let found = examine(["--tls-dir".into(), OsString::from(folder), target]);
    let path = folder.join(file).display().to_string();
    found.assert_ends("own files", reason, "client");
    assert!(found.found("own files").contains(&path), "{:#}", found.report);
    found
}

/// The key was blamed for what is wrong with the certificate.
#[test]
fn its_own_files() {
    let server = server();
    let authority = Authority::new();
    let folder = |change: &dyn Fn(&Path)| {
        let folder = authority.alice().folder(server.pki());
        change(folder.path());
        folder
    };
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        let marked = folder(&|folder| mark(&folder.join(file)));
        assert_blames(&server, marked.path(), file, "file_format");
    }
    let turned = folder(&|folder| {
        let own = folder.join("client-cert.pem");
        let ca = fs::read_to_string(authority.certificate()).unwrap();
        fs::write(&own, ca + &fs::read_to_string(&own).unwrap()).unwrap();
    });
    assert_blames(&server, turned.path(), "client-cert.pem", "certificate_order");

    let openssl = Openssl::new();
    for (name, way) in [("ca", P256), ("alice", P256), ("bob", SECP256K1)] {
        openssl.key(name, way);
    }
    openssl.self_signed("ca", true);
    openssl.signed("alice", "ca", "");
    openssl.signed("bob", "ca", "extendedKeyUsage=clientAuth");
    let of = |name: &str| {
        folder(&|folder| {
            fs::write(folder.join("client-cert.pem"), openssl.read(&format!("{name}.pem")))
                .unwrap();
            write_secret(&folder.join("client-key.pem"), &openssl.read(&format!("{name}.key")));
        })
    };
    let alice = of("alice");
    assert_blames(&server, alice.path(), "client-cert.pem", "unsupported_certificate");
    let found = assert_blames(&server, of("bob").path(), "client-key.pem", "unsupported_key");
    assert!(found.found("own files").contains("secp256k1"), "{:#}", found.report);
}

/// The server was to append a certificate of a CA in between.
#[test]
fn a_file_of_cas_without_one() {
    let server = server();
    let openssl = Openssl::new();
    for name in ["ca", "localhost"] {
        openssl.key(name, P256);
    }
    openssl.self_signed("ca", true);
    let leaf = openssl.signed("localhost", "ca", "basicConstraints=CA:FALSE");
    let args = |file: &Path| {
        let target: OsString = format!("localhost:{}", server.port()).into();
        examine(["--tls-ca".into(), OsString::from(file), target])
    };
    let path = leaf.display().to_string();
    let found = args(&leaf);
    found.assert_ends("certificate", "no_ca", "client");
    assert!(found.found("certificate").contains(&path), "{:#}", found.report);
    // The server's own certificate, which a CA signed, is no CA's either.
    let own = server.pki().server_cert();
    let path = own.display().to_string();
    let found = args(&own);
    found.assert_ends("certificate", "no_ca", "client");
    assert!(found.found("certificate").contains(&path), "{:#}", found.report);
}

/// A server of another kind, which uses what this one refuses.
#[test]
fn a_server_with_a_certificate_that_is_not_spoken() {
    let openssl = Openssl::new();
    for (name, way) in [("ca", P256), ("weak", RSA_1024), ("localhost", P256)] {
        openssl.key(name, way);
    }
    for name in ["ca", "weak"] {
        openssl.self_signed(name, true);
    }
    let names = "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE";
    for (ca, extensions, reason) in
        [("ca", "", "unsupported_certificate"), ("weak", names, "unsupported_ca")]
    {
        openssl.signed("localhost", ca, extensions);
        let folder = tempfile::tempdir().unwrap();
        for (from, to) in [
            (format!("{ca}.pem"), "ca-cert.pem"),
            ("localhost.pem".to_owned(), "server-cert.pem"),
            ("localhost.key".to_owned(), "server-key.pem"),
        ] {
            fs::copy(openssl.path(&from), folder.path().join(to)).unwrap();
        }
        let other = super::others::nbdkit_with_folder(folder.path(), &["memory", "1M"]);
        let target: OsString = format!("localhost:{}", other.port).into();
        let file = folder.path().join("ca-cert.pem").into_os_string();
        let found = examine(["--tls-ca".into(), file, target]);
        found.assert_bad("certificate", reason, "server");
    }
}
