//! Cipher suites, and sessions whose keys are used up.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hexz_exports::{BlockReader, Catalog};
use hexz_reader::{OpenOptions, Snapshot};
use nbd_gateway::access::Rules;
use nbd_gateway::audit::{Audit, Event, Sink};
use nbd_gateway::config::{Config, Limits, Timeouts};
use nbd_gateway::listen::{ListenAddress, SocketPermissions, bind_all};
use nbd_gateway::tls::ServerTls;
use nbd_gateway::{Gateway, Policy};
use nbd_server::client::{self, ClientError, Transmission};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suites};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{
    CipherSuiteCommon, ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    Tls12CipherSuite,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::fmt::MakeWriter;

use super::{BASE, plain};
use crate::clients::run_for;
use crate::support::client::{FLAGS, OPT_STARTTLS, option};
use crate::support::pki::Pki;
use crate::support::server::Server;
use crate::support::{IMAGE_SIZE, archive, image};

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

/// AES-GCM with TLS 1.2, whose keys are used up after so many records.
fn limited_to(records: u64) -> SupportedCipherSuite {
    let base = suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384;
    let SupportedCipherSuite::Tls12(base) = base else { panic!("not of TLS 1.2") };
    SupportedCipherSuite::Tls12(Box::leak(Box::new(Tls12CipherSuite {
        common: CipherSuiteCommon {
            suite: base.common.suite,
            hash_provider: base.common.hash_provider,
            confidentiality_limit: records,
        },
        prf_provider: base.prf_provider,
        kx: base.kx,
        sign: base.sign,
        aead_alg: base.aead_alg,
    })))
}

fn server_config(pki: &Pki, suite: SupportedCipherSuite) -> ServerConfig {
    let chain = CertificateDer::pem_file_iter(pki.server_cert()).unwrap();
    let key = PrivateKeyDer::from_pem_file(pki.server_key()).unwrap();
    let provider = CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() };
    ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain.map(Result::unwrap).collect(), key)
        .unwrap()
}

/// What was told and logged.
#[derive(Debug, Clone, Default)]
struct Record {
    events: Arc<Mutex<Vec<Event>>>,
    log: Arc<Mutex<Vec<u8>>>,
}

impl Sink for Record {
    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl io::Write for Record {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.log.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Record {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

type Reader = Transmission<tokio_rustls::client::TlsStream<TcpStream>>;

/// Serves one client whose keys are used up after so many records, and asserts that its end is
/// logged, counted and told as that.
async fn assert_ends_at_the_limit<F>(records: u64, read: impl FnOnce(Reader) -> F)
where
    F: Future<Output = ()>,
{
    let record = Record::default();
    let subscriber = tracing_subscriber::fmt().json().with_writer(record.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let pki = Pki::new();
    let config = Config {
        listen: vec![ListenAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))],
        proxies: Vec::new(),
        insecure_no_tls: false,
        limits: Limits::default(),
        timeouts: Timeouts::default(),
        audit: Audit::with_sink(Arc::new(record.clone())),
    };
    let tls = ServerTls::from(server_config(&pki, limited_to(records)));
    let policy = Policy { rules: Rules::default(), tls: Some(tls) };
    let snapshot = Snapshot::open(&archive(BASE), &OpenOptions::default()).unwrap();
    let exports = Catalog::with_snapshot(BASE, snapshot, BlockReader::new(64 << 20));
    let sockets = bind_all(&config.listen, true, &SocketPermissions::default()).unwrap();
    let gateway = Gateway::new(sockets, config, policy, exports).unwrap();
    let Some(ListenAddress::Tcp(address)) = gateway.addresses().unwrap().first().cloned() else {
        panic!("it listens nowhere")
    };
    let (control, stop) = (gateway.control(), CancellationToken::new());
    let serving = tokio::spawn(gateway.run(stop.clone()));

    let mut stream = TcpStream::connect(address).await.unwrap();
    client::greet(&mut stream).await.unwrap();
    client::start_tls(&mut stream).await.unwrap();
    let connector = TlsConnector::from(offering(&pki, &OF_NBD_CLIENT));
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    read(client::go(stream, BASE).await.unwrap()).await;

    let ended = async {
        loop {
            let events = record.events.lock().unwrap().clone();
            let ended = events.into_iter().find_map(|event| match event {
                Event::Ended(ended) => Some(ended),
                _ => None,
            });
            if let Some(ended) = ended {
                return ended;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = tokio::time::timeout(crate::support::PATIENCE, ended).await.unwrap();
    let ended = serde_json::to_value(&ended).unwrap();
    assert_eq!(ended["how"], "tls_key_limit", "{ended}");
    assert_eq!(ended["export"], BASE);
    assert_eq!(control.failure_counts().to_string(), "tls_key_limit 1");
    stop.cancel();
    serving.await.unwrap().unwrap();
    let log = String::from_utf8(record.log.lock().unwrap().clone()).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let closed: Vec<_> = lines.filter(|line| line["fields"]["reason"] == "tls_key_limit").collect();
    assert_eq!(closed.len(), 1, "{log}");
    assert_eq!(closed[0]["level"], "WARN");
}

/// rustls closed the session in the middle of a reply, and the log said that the client had left.
#[tokio::test]
async fn a_session_ends_between_replies_before_its_keys_are_used_up() {
    const RECORDS: u64 = 1024;
    const PIECE: u32 = 128 * 1024;
    assert_ends_at_the_limit(RECORDS, |mut reader| async move {
        let mut read: u64 = 0;
        loop {
            let offset = read % IMAGE_SIZE;
            match reader.read(offset, PIECE).await {
                Ok(bytes) => assert!(bytes == image()[offset as usize..][..PIECE as usize]),
                // Announced, or closed before the request came.
                Err(
                    ClientError::Failed(_)
                    | ClientError::FailedWithMessage { .. }
                    | ClientError::Io(_),
                ) => break,
                Err(error) => panic!("{error}"),
            }
            read += u64::from(PIECE);
            assert!(read < RECORDS * (16 << 10));
        }
        // Three quarters of what full records would have held.
        assert!(read > RECORDS * (12 << 10), "{read}");
    })
    .await;
}

/// More is owed than what is kept for replies, so that TLS itself ends the session.
#[tokio::test]
async fn a_session_that_tls_cuts_is_not_said_to_have_left() {
    assert_ends_at_the_limit(256, |mut reader| async move {
        assert!(reader.read(0, IMAGE_SIZE as u32).await.is_err());
    })
    .await;
}
