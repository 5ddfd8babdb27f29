//! Cipher suites.

use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suites};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, RootCertStore, SupportedCipherSuite};

use super::{BASE, plain};
use crate::clients::run_for;
use crate::support::client::{FLAGS, OPT_STARTTLS, option};
use crate::support::pki::Pki;
use crate::support::server::Server;

/// The suites of nbd-client 3.24 that are spoken here, in its order: TLS 1.2 with the default
/// priorities of GnuTLS.
const OF_NBD_CLIENT: [SupportedCipherSuite; 6] = [
    suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
    suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];

/// A client that offers those suites.
fn offering(pki: &Pki, suites: &[SupportedCipherSuite]) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(pki.authority().clone()).unwrap();
    let provider =
        CryptoProvider { cipher_suites: suites.to_vec(), ..aws_lc_rs::default_provider() };
    let config = ClientConfig::builder_with_provider(Arc::new(provider));
    let versions =
        if suites.iter().any(|suite| suite.tls13().is_some()) { [&TLS13] } else { [&TLS12] };
    let config = config.with_protocol_versions(&versions).unwrap();
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
}

/// The suite that is agreed on with a client that offers those.
fn agreed(server: &Server, offered: &[SupportedCipherSuite]) -> String {
    let mut client = server.connect();
    client.greet(FLAGS);
    client.send(&option(OPT_STARTTLS, b""));
    client.option_replies(OPT_STARTTLS);
    let client = client.handshake(offering(server.pki(), offered)).unwrap();
    let suite = client.stream.conn.negotiated_cipher_suite().unwrap().suite();
    suite.as_str().unwrap().to_owned()
}

#[test]
fn chacha20_is_preferred_with_tls_1_2_alone() {
    for (pki, signature) in [(Pki::new(), "ECDSA"), (Pki::rsa(), "RSA")] {
        let server = plain().tls(pki).start();
        let expected = format!("TLS_ECDHE_{signature}_WITH_CHACHA20_POLY1305_SHA256");
        assert_eq!(agreed(&server, &OF_NBD_CLIENT), expected);
        // Who has no ChaCha20 is served all the same.
        let only_aes: Vec<_> = OF_NBD_CLIENT
            .into_iter()
            .filter(|suite| !suite.suite().as_str().unwrap().contains("CHACHA20"))
            .collect();
        let expected = format!("TLS_ECDHE_{signature}_WITH_AES_256_GCM_SHA384");
        assert_eq!(agreed(&server, &only_aes), expected);
        // TLS 1.3 replaces its keys.
        let offered = [suites::TLS13_CHACHA20_POLY1305_SHA256, suites::TLS13_AES_128_GCM_SHA256];
        assert_eq!(agreed(&server, &offered), "TLS13_AES_128_GCM_SHA256");
    }
}

#[test]
fn nbd_client_gets_chacha20() {
    let folder = tempfile::tempdir().unwrap();
    let audit = folder.path().join("audit.jsonl");
    let server = plain().tls(Pki::new()).arg("--audit").arg(&audit).start();
    let (port, ca) = (server.port().to_string(), server.pki().ca_cert().display().to_string());
    let args = [
        ["localhost", &port, "/dev/null", "-N", BASE, "-n", "-x"].as_slice(),
        &["-A", &ca, "-H", "localhost"],
    ]
    .concat();
    let said = run_for("nbd-client", &args, Duration::from_secs(10));
    assert!(said.everything().contains("size = 8MB"), "{}", said.everything());
    crate::support::wait_until("it is told what nbd-client reads", || {
        let events = std::fs::read_to_string(&audit).unwrap_or_default();
        let mut events =
            events.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let reading = events.find(|event| event["event"] == "reading");
        reading.is_some_and(|event| {
            assert_eq!(event["tls"], "TLS 1.2");
            assert_eq!(event["cipher"], "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256");
            true
        })
    });
}
