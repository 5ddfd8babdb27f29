//! What all who take part know.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use nbd_server::client::ClientError;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use tokio::io::BufStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::archives::{Archives, Expected, TURNING};
use crate::authority::{Authority, Certified};
use crate::faults::Faults;
use crate::ledger::Ledger;
use crate::session::{self, PATIENCE, Session, Stream};

pub(crate) struct World {
    pub(crate) ledger: Ledger,
    pub(crate) archives: Archives,
    pub(crate) faults: Faults,
    pub(crate) people: People,
    pub(crate) address: SocketAddr,
    /// How many clients are in that shall stay.
    pub(crate) readers: AtomicU32,
    /// So many come in at once, as clients of an honest crowd would.
    pub(crate) gate: Semaphore,
    pub(crate) revocation: Turn,
    pub(crate) denial: Turn,
    pub(crate) shown: Shown,
    /// When the server was stopped, and went on.
    pub(crate) stop: Turn,
    over: AtomicBool,
}

/// Everybody's certificates, and what they connect with.
pub(crate) struct People {
    pub(crate) revoked: Certified,
    /// Of those who stay: the one that a revocation that isn't taken over names.
    pub(crate) spared: Certified,
    pub(crate) readers: Vec<Arc<ClientConfig>>,
    pub(crate) to_be_revoked: Arc<ClientConfig>,
    pub(crate) to_be_denied: Arc<ClientConfig>,
    /// May come in, and behaves badly.
    pub(crate) insider: Arc<ClientConfig>,
    /// May not come in: without a certificate, and with somebody else's.
    pub(crate) strangers: [Arc<ClientConfig>; 2],
}

impl People {
    pub(crate) fn new(servers: &Authority, clients: &Authority) -> Result<Self> {
        let certify = |name: &str| clients.client(&format!("spiffe://stress/{name}"));
        let config = |own: &Certified| servers.trusting(Some(own));
        let (revoked, spared) = (certify("revoked")?, certify("reader/0")?);
        let mut readers = vec![config(&spared)?];
        for number in 1..8 {
            readers.push(config(&certify(&format!("reader/{number}"))?)?);
        }
        let impostor =
            Authority::new("nobody trusts this one")?.client("spiffe://stress/reader/0")?;
        Ok(Self {
            readers,
            to_be_revoked: config(&revoked)?,
            to_be_denied: config(&certify("denied")?)?,
            insider: config(&certify("insider")?)?,
            strangers: [servers.trusting(None)?, config(&impostor)?],
            revoked,
            spared,
        })
    }
}

/// Something that begins, and is done.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    begun: OnceLock<Instant>,
    done: OnceLock<Instant>,
}

impl Turn {
    pub(crate) fn begin(&self) {
        self.begun.get_or_init(Instant::now);
    }

    pub(crate) fn end(&self, at: Instant) {
        self.done.get_or_init(|| at);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.get().is_some()
    }

    pub(crate) fn done(&self) -> Option<Instant> {
        self.done.get().copied()
    }

    /// Whether any of it was between `since` and now.
    pub(crate) fn touches(&self, since: Instant) -> bool {
        self.has_begun() && self.done().is_none_or(|done| done > since)
    }
}

/// Which certificates the server may be showing: two while one takes the other's place.
#[derive(Default)]
pub(crate) struct Shown(Mutex<Vec<CertificateDer<'static>>>);

impl Shown {
    pub(crate) fn set(&self, certificates: Vec<CertificateDer<'static>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = certificates;
    }

    pub(crate) fn now(&self) -> Vec<CertificateDer<'static>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl World {
    pub(crate) fn new(
        archives: Archives,
        faults: Faults,
        people: People,
        address: SocketAddr,
    ) -> Self {
        Self {
            ledger: Ledger::default(),
            archives,
            faults,
            people,
            address,
            readers: AtomicU32::new(0),
            gate: Semaphore::new(32),
            revocation: Turn::default(),
            denial: Turn::default(),
            shown: Shown::default(),
            stop: Turn::default(),
            over: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Waits that long, or until all is over.
    pub(crate) async fn rest(&self, time: Duration) -> ControlFlow<()> {
        let until = Instant::now() + time;
        while !self.is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return ControlFlow::Continue(());
            }
            tokio::time::sleep(left.min(Duration::from_millis(200))).await;
        }
        ControlFlow::Break(())
    }

    /// Connects, with TLS.
    pub(crate) async fn secure(
        &self,
        from: Ipv4Addr,
        config: &Arc<ClientConfig>,
    ) -> Result<Stream, ClientError> {
        let way = async {
            let stream = session::connect(from.into(), self.address).await?;
            session::secure(stream, Arc::clone(config)).await
        };
        in_time(way).await
    }

    /// Connects and chooses an export: also the export's size.
    pub(crate) async fn choose(
        &self,
        from: Ipv4Addr,
        config: &Arc<ClientConfig>,
        export: &str,
        structured: bool,
    ) -> Result<(BufStream<Stream>, u64), ClientError> {
        let stream = self.secure(from, config).await?;
        in_time(Session::begin(stream, export, structured)).await
    }

    /// Begins to read an export whose bytes are known.
    pub(crate) async fn session(
        &self,
        from: Ipv4Addr,
        config: &Arc<ClientConfig>,
        expected: &Expected,
        structured: bool,
    ) -> Result<Session, ClientError> {
        let (stream, size) = self.choose(from, config, &expected.name, structured).await?;
        if size != expected.content.len() as u64 {
            self.ledger.violation(format_args!("{} has a size of {size}", expected.name));
        }
        Ok(Session::new(stream, expected.clone(), structured))
    }

    /// Begins to read the archive that is replaced again and again.
    pub(crate) async fn turning(
        &self,
        from: Ipv4Addr,
        config: &Arc<ClientConfig>,
        structured: bool,
    ) -> Result<Session, ClientError> {
        let before = self.archives.turning.steps();
        let (stream, size) = self.choose(from, config, TURNING, structured).await?;
        let after = self.archives.turning.steps();
        let Some(expected) = self.archives.turning.content(before, after, size) else {
            self.ledger
                .violation(format_args!("the replaced archive is {size} bytes, at {before}"));
            return Err(ClientError::UnexpectedReply("GO"));
        };
        Ok(Session::new(stream, expected, structured))
    }
}

async fn in_time<T>(way: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let late = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
    timeout(PATIENCE, way).await.map_err(late)?
}
