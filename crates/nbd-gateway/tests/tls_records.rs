//! Sessions whose TLS keys are used up.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a test that can't go on shall panic"
)]

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_gateway::access::Rules;
use nbd_gateway::audit::{Audit, Event, Sink};
use nbd_gateway::config::Config;
use nbd_gateway::listen::{ListenAddress, SocketPermissions, bind_all};
use nbd_gateway::tls::ServerTls;
use nbd_gateway::{CancellationToken, Gateway, Policy};
use nbd_server::client::{self, ClientError, Transmission};
use nbd_server::{BytesExport, ExportSet};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite as suites};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS12;
use rustls::{
    CipherSuiteCommon, ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    Tls12CipherSuite,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tracing_subscriber::fmt::MakeWriter;

const TIMEOUT: Duration = Duration::from_secs(30);
const IMAGE_SIZE: u64 = 8 << 20;

fn image() -> Vec<u8> {
    (0..IMAGE_SIZE).map(|at| (at ^ (at >> 9)) as u8).collect()
}

fn self_signed() -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    (made.cert.der().clone(), key)
}

/// Returns the configuration of a client that trusts one certificate, and speaks TLS 1.2.
fn trusting(certificate: CertificateDer<'static>) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate).unwrap();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider);
    let config = config.with_protocol_versions(&[&TLS12]).unwrap();
    Arc::new(config.with_root_certificates(roots).with_no_client_auth())
}

/// Returns a suite with AES-GCM of TLS 1.2, whose keys may protect `records` records.
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

fn server_config(
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    suite: SupportedCipherSuite,
) -> ServerConfig {
    let provider = CryptoProvider { cipher_suites: vec![suite], ..aws_lc_rs::default_provider() };
    ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap()
}

/// Audit events and log lines.
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

/// Serves one client whose TLS keys may protect `records` records, and asserts that the end of its
/// session is logged, counted and audited as such.
async fn assert_ends_at_the_limit<F>(records: u64, read: impl FnOnce(Reader) -> F)
where
    F: Future<Output = ()>,
{
    let record = Record::default();
    let subscriber = tracing_subscriber::fmt().json().with_writer(record.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let (certificate, key) = self_signed();
    let config = Config {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        audit: Audit::with_sink(Arc::new(record.clone())),
        ..Config::default()
    };
    let tls = ServerTls::from(server_config(certificate.clone(), key, limited_to(records)));
    let policy = Policy { rules: Rules::default(), tls: Some(tls) };
    let exports = ExportSet::single(BytesExport::new("disk", image()));
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
    let connector = TlsConnector::from(trusting(certificate));
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, stream).await.unwrap();
    read(client::go(stream, "disk").await.unwrap()).await;

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
    let ended = tokio::time::timeout(TIMEOUT, ended).await.unwrap();
    let ended = serde_json::to_value(&ended).unwrap();
    assert_eq!(ended["how"], "tls_key_limit", "{ended}");
    assert_eq!(ended["export"], "disk");
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
async fn session_ends_between_replies_before_its_keys_are_used_up() {
    const RECORDS: u64 = 1024;
    const PIECE: u32 = 128 * 1024;
    assert_ends_at_the_limit(RECORDS, |mut reader| async move {
        let image = image();
        let mut read: u64 = 0;
        loop {
            let offset = read % IMAGE_SIZE;
            match reader.read(offset, PIECE).await {
                Ok(bytes) => assert!(bytes == image[offset as usize..][..PIECE as usize]),
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

/// A reply needs more records than the reserve has, so that TLS itself ends the session.
#[tokio::test]
async fn session_ended_by_tls_is_reported_as_key_limit() {
    assert_ends_at_the_limit(256, |mut reader| async move {
        assert!(reader.read(0, IMAGE_SIZE as u32).await.is_err());
    })
    .await;
}
