//! The identity matrix: each kind of certificate, with each kind of client.

use std::time::Duration;

use rcgen::ExtendedKeyUsagePurpose;
use rustls::version::{TLS12, TLS13};

use super::{asking, reads};
use crate::clients::{run, run_for};
use crate::support::authority::{Authority, Certified, Recipe};
use crate::support::server::Server;

const DAY: i64 = 24 * 3600;

/// A client, and the cause of its failure; `None` for the one that comes in.
type Row = (&'static str, Option<Certified>, Option<&'static str>);

fn matrix() -> (Server, Vec<Row>) {
    let authority = Authority::new();
    let with = |recipe: Recipe| Some(authority.certify(&recipe));
    let revoked = authority.alice();
    authority.revoke(&[&revoked]);
    let rows = vec![
        ("right", Some(authority.alice()), None),
        ("none", None, Some("no_certificate")),
        ("wrong CA", Some(Authority::named("somebody else's CA").alice()), Some("unknown_ca")),
        (
            "expired",
            with(Recipe { seconds: (-30 * DAY, -2 * DAY), ..Recipe::default() }),
            Some("expired"),
        ),
        (
            "not yet valid",
            with(Recipe { seconds: (2 * DAY, 30 * DAY), ..Recipe::default() }),
            Some("not_yet_valid"),
        ),
        ("revoked", Some(revoked), Some("revoked")),
        (
            "wrong purpose",
            with(Recipe { purpose: ExtendedKeyUsagePurpose::ServerAuth, ..Recipe::default() }),
            Some("wrong_purpose"),
        ),
    ];
    (asking(&authority).start(), rows)
}

/// Goes through the matrix with a client that says whether it could read.
fn go_through(mut can_read: impl FnMut(&Server, Option<&Certified>) -> bool) {
    let (server, rows) = matrix();
    for (name, who, cause) in rows {
        assert_eq!(can_read(&server, who.as_ref()), cause.is_none(), "{name}");
        if let Some(cause) = cause {
            server.wait_for_cause(cause);
        }
    }
}

#[test]
fn with_a_scripted_client() {
    for version in [&TLS12, &TLS13] {
        go_through(|server, who| {
            let config = match who {
                Some(who) => who.config_for(server.pki(), &[version]),
                None => server.pki().client_config_for(&[version]),
            };
            reads(server, config)
        });
    }
}

/// The folder of a client with a certificate, or with none.
fn folder(server: &Server, who: Option<&Certified>) -> tempfile::TempDir {
    match who {
        Some(who) => who.folder(server.pki()),
        None => {
            let folder = tempfile::tempdir().unwrap();
            std::fs::copy(server.pki().ca_cert(), folder.path().join("ca-cert.pem")).unwrap();
            folder
        }
    }
}

#[test]
fn with_libnbd() {
    go_through(|server, who| {
        let folder = folder(server, who);
        let folder = folder.path().display();
        let uri = format!("nbds://localhost:{}/?tls-certificates={folder}", server.port());
        run("nbdinfo", &["--size", &uri]).output() == Some("8388608\n")
    });
}

#[test]
fn with_qemu() {
    go_through(|server, who| {
        let folder = folder(server, who);
        // Otherwise qemu itself refuses to begin with a certificate that has expired.
        let check = "sanity-check=off";
        let folder = folder.path().display();
        let tls = format!("tls-creds-x509,id=tls,endpoint=client,dir={folder},{check}");
        let image = format!("driver=nbd,host=localhost,port={},tls-creds=tls", server.port());
        let said = run("qemu-img", &["info", "--object", &tls, "--image-opts", &image]);
        said.output().is_some_and(|output| output.contains("8388608 bytes"))
    });
}

/// nbd-client negotiates in user space. What it negotiated it gives to the kernel, which
/// has no NBD here; so what counts is how far it comes.
#[test]
fn with_nbd_client() {
    go_through(|server, who| {
        let folder = folder(server, who);
        let path = |name: &str| folder.path().join(name).display().to_string();
        let port = server.port().to_string();
        let ca = path("ca-cert.pem");
        let (certificate, key) = (path("client-cert.pem"), path("client-key.pem"));
        let mut args = vec!["localhost", &port, "/dev/null", "-N", "base-zstd.hxz", "-n"];
        args.extend(["-x", "-A", &ca, "-H", "localhost"]);
        if who.is_some() {
            args.extend(["-certfile", &certificate, "-keyfile", &key]);
        }
        let said = run_for("nbd-client", &args, Duration::from_secs(10));
        said.everything().contains("size = 8MB")
    });
}
