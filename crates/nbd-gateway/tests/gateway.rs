//! A gateway over exports in memory, without TLS, as an embedder uses it: over real sockets, with
//! the engine's own client.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test that can't go on shall panic"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nbd_gateway::access::{Rules, parse_rules};
use nbd_gateway::audit::{Audit, Event, Sink};
use nbd_gateway::config::{Config, Limits};
use nbd_gateway::listen::{ListenAddress, SocketPermissions, bind_all};
use nbd_gateway::{AcceptLoopFailed, CancellationToken, Control, Gateway, Policy};
use nbd_server::client::{self, ClientError};
use nbd_server::{BytesExport, ExportSet};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const TIMEOUT: Duration = Duration::from_secs(30);
const SIZE: usize = 1 << 20;

/// Keeps all audit events, as JSON.
#[derive(Debug, Clone, Default)]
struct Events(Arc<Mutex<Vec<serde_json::Value>>>);

impl Sink for Events {
    fn record(&self, event: Event) {
        self.0.lock().unwrap().push(serde_json::to_value(event).unwrap());
    }
}

impl Events {
    /// Waits for the first event of that name.
    async fn wait_for(&self, name: &str) -> serde_json::Value {
        let found = async {
            loop {
                let found = self.0.lock().unwrap().iter().find(|it| it["event"] == name).cloned();
                if let Some(event) = found {
                    return event;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let found = tokio::time::timeout(TIMEOUT, found).await;
        found.unwrap_or_else(|_| panic!("no {name} in {:?}", self.0.lock().unwrap()))
    }
}

/// A gateway that serves the exports `open` and `secret`.
struct Running {
    address: SocketAddr,
    events: Events,
    control: Control<ExportSet<BytesExport>>,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), AcceptLoopFailed>>,
}

impl Running {
    fn start(rules: Rules, limits: Limits) -> Self {
        let events = Events::default();
        let config = Config {
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            limits,
            audit: Audit::with_sink(Arc::new(events.clone())),
            ..Config::default()
        };
        let sockets = bind_all(&config.listen, true, &SocketPermissions::default()).unwrap();
        let policy = Policy { rules, tls: None };
        let gateway = Gateway::new(sockets, config, policy, exports(7)).unwrap();
        let Some(ListenAddress::Tcp(address)) = gateway.addresses().unwrap().first().cloned()
        else {
            panic!("it listens nowhere")
        };
        let (control, shutdown) = (gateway.control(), CancellationToken::new());
        let serving = tokio::spawn(gateway.run(shutdown.clone()));
        Self { address, events, control, shutdown, serving }
    }

    async fn greeted(&self) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        client::greet(&mut stream).await.unwrap();
        stream
    }

    async fn stop(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(TIMEOUT, self.serving).await;
        ended.unwrap().unwrap().unwrap();
    }
}

fn exports(byte: u8) -> ExportSet<BytesExport> {
    ExportSet::new(["open", "secret"].map(|name| BytesExport::new(name, vec![byte; SIZE])))
}

fn rules(text: &str) -> Rules {
    Rules::from_file(&[], parse_rules(text, Path::new("rules.toml")).unwrap())
}

const OPEN_ALONE: &str = "[[rule]]\naction = \"allow\"\nexport = \"open\"\n";

#[tokio::test]
async fn reads_are_served_counted_and_audited() {
    let running = Running::start(Rules::default(), Limits::default());
    let mut reader = client::go(running.greeted().await, "open").await.unwrap();
    assert_eq!(reader.read(4096, 512).await.unwrap(), [7; 512]);
    assert_eq!(running.control.active_sessions(), 1);
    let reading = running.events.wait_for("reading").await;
    assert_eq!((&reading["export"], &reading["peer"]), (&"open".into(), &"127.0.0.1".into()));
    reader.disconnect_and_wait().await.unwrap();
    let ended = running.events.wait_for("ended").await;
    assert_eq!((&ended["how"], &ended["bytes"]), (&"left".into(), &512.into()));
    let report = running.control.report();
    assert_eq!((report.connections_total.accepted, report.connections_total.served), (1, 1));
    let open = report.exports.iter().find(|export| export.name == "open").unwrap();
    assert_eq!((open.bytes, open.requests.read), (512, 1));
    running.stop().await;
}

#[tokio::test]
async fn denied_exports_are_hidden_and_audited() {
    let running = Running::start(rules(OPEN_ALONE), Limits::default());
    let mut stream = running.greeted().await;
    let listed = client::list(&mut stream).await.unwrap();
    assert_eq!(listed.into_iter().map(|(name, _)| name).collect::<Vec<_>>(), ["open"]);
    let refused = client::info(&mut stream, "secret").await.unwrap_err();
    let missing = client::info(&mut stream, "nothing").await.unwrap_err();
    // A client can't tell one from the other.
    let reply = |error| match error {
        ClientError::Refused { reply, .. } => reply,
        other => panic!("{other}"),
    };
    assert_eq!(reply(refused), reply(missing));
    let denied = running.events.wait_for("export_denied").await;
    assert_eq!(denied["export"], "secret");
    // Listing it wasn't a request for it.
    let events = running.events.0.lock().unwrap().clone();
    assert_eq!(events.iter().filter(|it| it["event"] == "export_denied").count(), 1);
    running.stop().await;
}

#[tokio::test]
async fn clients_are_dismissed_when_the_policy_no_longer_allows_them() {
    let running = Running::start(Rules::default(), Limits::default());
    let mut reader = client::go(running.greeted().await, "secret").await.unwrap();
    reader.read(0, 512).await.unwrap();
    let policy = Policy { rules: rules(OPEN_ALONE), tls: None };
    assert_eq!(running.control.replace_policy(policy), 1);
    assert!(reader.read(0, 512).await.is_err());
    let dismissed = running.events.wait_for("dismissed").await;
    assert_eq!(dismissed["export"], "secret");
    assert_eq!(running.control.failure_counts().to_string(), "dismissed 1");
    assert_eq!(running.control.policy_number(), 1);
    running.stop().await;
}

#[tokio::test]
async fn replaced_exports_are_served_to_new_clients_only() {
    let running = Running::start(Rules::default(), Limits::default());
    let mut before = client::go(running.greeted().await, "open").await.unwrap();
    running.control.replace_exports(Arc::new(exports(9)));
    let mut after = client::go(running.greeted().await, "open").await.unwrap();
    assert_eq!(before.read(0, 512).await.unwrap(), [7; 512]);
    assert_eq!(after.read(0, 512).await.unwrap(), [9; 512]);
    running.stop().await;
}

#[tokio::test]
async fn refused_connections_are_closed_before_a_byte_is_sent() {
    let nobody = rules("[[rule]]\naction = \"deny\"\n");
    let running = Running::start(nobody, Limits::default());
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    assert!(matches!(client::greet(&mut stream).await, Err(ClientError::Io(_))));
    let refused = running.events.wait_for("refused").await;
    assert_eq!(refused["reason"], "address");
    assert_eq!(running.control.failure_counts().to_string(), "address 1");
    running.stop().await;
}

#[tokio::test]
async fn sessions_are_limited_per_address() {
    let limits = Limits { connections_per_address: 1, ..Limits::default() };
    let running = Running::start(Rules::default(), limits);
    let mut first = client::go(running.greeted().await, "open").await.unwrap();
    first.read(0, 512).await.unwrap();
    let second = client::go(running.greeted().await, "open").await;
    let is_served = match second {
        Ok(mut reader) => reader.read(0, 512).await.is_ok(),
        Err(_) => false,
    };
    assert!(!is_served);
    let ended = running.events.wait_for("ended").await;
    assert_eq!(ended["how"], "connections_per_address");
    first.read(0, 512).await.unwrap();
    running.stop().await;
}
