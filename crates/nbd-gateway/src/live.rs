//! Registry of the connections that are open, with what is known about each. A reload or the
//! passing of time has them reviewed against the policy again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use tokio_util::sync::CancellationToken;

use super::access::{AccessRequest, Timestamp};
use super::admission::Route;
use super::policy::{Dismissal, Numbered};
use super::report::MAX_LISTED;
use super::tls::Credentials;
use nbd_server::{Export, ExportSummary, MetricsTotals, SessionMetrics};

/// Label under which exports beyond [`MAX_LISTED`] are aggregated.
const OTHERS: &str = "other";

/// Registry of all open connections, with totals of those that have ended.
#[derive(Debug, Default)]
pub(super) struct Connections {
    there: Mutex<There>,
}

#[derive(Debug, Default)]
struct There {
    live: HashMap<u64, Arc<Live>>,
    /// Activity of connections that have ended, by export.
    read: HashMap<String, Read>,
    accepted: u64,
    served: u64,
}

/// An export that was read, with the activity of connections that have ended.
#[derive(Debug, Clone)]
pub(super) struct Read {
    pub(super) export: ExportSummary,
    pub(super) done: MetricsTotals,
}

/// Shared state of one open connection.
#[derive(Debug)]
pub(super) struct Live {
    /// Number of the connection, unique within this run.
    pub(super) id: u64,
    pub(super) route: Route,
    /// Requests and bytes since the client chose an export.
    pub(super) activity: Arc<SessionMetrics>,
    /// Number of requests for exports that the client may not open.
    denied: AtomicU64,
    missing: AtomicU64,
    since: SystemTime,
    known: Mutex<Known>,
    dismissed: CancellationToken,
    why: OnceLock<Dismissal>,
}

/// Knowledge about the client so far, filled in during the handshake.
#[derive(Debug, Default)]
struct Known {
    client: Option<Client>,
    export: Option<String>,
    /// Other exports whose contents the client's metadata contexts reveal.
    compared: Vec<String>,
    reading: Option<Reading>,
}

/// The export that a connection reads.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) export: String,
    /// Label under which the activity is counted: the export's name, or [`OTHERS`].
    pub(super) counted_as: String,
}

#[derive(Debug)]
struct Client {
    credentials: Option<Arc<Credentials>>,
    /// Number of the policy that verified the credentials.
    verified_by: u64,
    /// TLS version of the stream, if it is encrypted.
    tls: Option<&'static str>,
}

/// Snapshot of all connections, oldest first.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) live: Vec<One>,
    pub(super) read: HashMap<String, Read>,
    pub(super) accepted: u64,
    pub(super) served: u64,
}

/// Snapshot of one connection.
#[derive(Debug)]
pub(super) struct One {
    pub(super) id: u64,
    pub(super) route: Route,
    pub(super) identity: Option<String>,
    pub(super) tls: Option<&'static str>,
    pub(super) reading: Option<Reading>,
    pub(super) since: SystemTime,
    pub(super) done: MetricsTotals,
    pub(super) in_flight: u64,
}

/// Registration of a connection; dropping it removes the connection.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    connections: &'a Connections,
    pub(super) live: Arc<Live>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut there = lock(&self.connections.there);
        there.live.remove(&self.live.id);
        // Under the same lock, so that a snapshot neither counts the activity twice nor misses it.
        let known = lock(&self.live.known);
        if let Some(Reading { counted_as, .. }) = &known.reading
            && let Some(read) = there.read.get_mut(counted_as)
        {
            read.done += self.live.activity.totals();
        }
    }
}

impl Connections {
    /// Registers a connection that was admitted by its address.
    pub(super) fn enter(&self, id: u64, route: Route) -> Entry<'_> {
        let live = Arc::new(Live {
            id,
            route,
            activity: Arc::default(),
            denied: AtomicU64::new(0),
            missing: AtomicU64::new(0),
            since: SystemTime::now(),
            known: Mutex::default(),
            dismissed: CancellationToken::new(),
            why: OnceLock::new(),
        });
        let mut there = lock(&self.there);
        there.accepted += 1;
        there.live.insert(id, Arc::clone(&live));
        Entry { connections: self, live }
    }

    /// Reviews all connections against `policy`, dismisses those that are no longer authorized, and
    /// returns their number.
    pub(super) fn review(&self, policy: &Numbered, now: Timestamp) -> usize {
        let all: Vec<Arc<Live>> = lock(&self.there).live.values().cloned().collect();
        all.iter().filter(|live| live.review(policy, now).is_err()).count()
    }

    /// Records that a connection starts reading `export`.
    pub(super) fn begin(&self, live: &Live, export: &impl Export) {
        let offered = ExportSummary {
            name: export.name().to_owned(),
            description: Some(export.description().to_owned()),
            size: Some(export.size()),
        };
        let mut there = lock(&self.there);
        there.served += 1;
        let is_known = there.read.contains_key(&offered.name);
        let (name, offered) = if is_known || there.read.len() < MAX_LISTED {
            (offered.name.clone(), offered)
        } else {
            (OTHERS.to_owned(), ExportSummary::name_only(OTHERS))
        };
        let reading = Reading { export: export.name().to_owned(), counted_as: name.clone() };
        lock(&live.known).reading = Some(reading);
        // The archive behind the name may have been replaced.
        there
            .read
            .entry(name)
            .and_modify(|read| read.export = offered.clone())
            .or_insert_with(|| Read { export: offered.clone(), done: MetricsTotals::default() });
    }

    /// Returns the number of connections with unanswered requests.
    pub(super) fn busy(&self) -> usize {
        lock(&self.there).live.values().filter(|live| live.is_busy()).count()
    }

    /// Takes a snapshot of all connections.
    pub(super) fn seen(&self) -> Seen {
        let (mut live, read, accepted, served) = {
            let there = lock(&self.there);
            let live: Vec<_> = there.live.values().map(Arc::clone).collect();
            (live, there.read.clone(), there.accepted, there.served)
        };
        // A connection that ends in the meantime is reported as open, and isn't in the totals yet.
        live.sort_by_key(|live| live.id);
        let live = live.iter().map(|live| live.seen()).collect();
        Seen { live, read, accepted, served }
    }
}

impl Live {
    /// Records the client's credentials. The policy may have changed since they were verified, so
    /// the caller reviews the connection right away; later changes are handled by
    /// [`Connections::review`].
    pub(super) fn identify(
        &self,
        credentials: Option<Arc<Credentials>>,
        verified_by: u64,
        tls: Option<&'static str>,
    ) {
        lock(&self.known).client = Some(Client { credentials, verified_by, tls });
    }

    /// Records the chosen export and the other exports that its metadata contexts reveal.
    pub(super) fn note_export(&self, name: &str, compared: Vec<String>) {
        let mut known = lock(&self.known);
        known.export = Some(name.to_owned());
        known.compared = compared;
    }

    /// Returns the client's credentials, if it has presented a certificate.
    pub(super) fn credentials(&self) -> Option<Arc<Credentials>> {
        lock(&self.known).client.as_ref()?.credentials.clone()
    }

    /// Returns the name of the chosen export, if any.
    pub(super) fn export(&self) -> Option<String> {
        lock(&self.known).export.clone()
    }

    /// Counts a request for an export that the client may not open, and returns the new total.
    pub(super) fn note_denied(&self) -> u64 {
        self.denied.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts a request for an export that doesn't exist, and returns the new total.
    pub(super) fn note_missing(&self) -> u64 {
        self.missing.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns the number of requests for exports that don't exist.
    pub(super) fn missing(&self) -> u64 {
        self.missing.load(Ordering::Relaxed)
    }

    /// Returns the number of requests for exports that the client may not open.
    pub(super) fn denied(&self) -> u64 {
        self.denied.load(Ordering::Relaxed)
    }

    /// Returns true if requests are unanswered.
    pub(super) fn is_busy(&self) -> bool {
        self.activity.in_flight() > 0
    }

    fn seen(&self) -> One {
        let known = lock(&self.known);
        let client = known.client.as_ref();
        let credentials = client.and_then(|client| client.credentials.as_deref());
        One {
            id: self.id,
            route: self.route,
            identity: credentials.map(|it| it.identity().to_string()),
            tls: client.and_then(|client| client.tls),
            reading: known.reading.clone(),
            since: self.since,
            done: self.activity.totals(),
            in_flight: self.activity.in_flight(),
        }
    }

    /// Checks whether the client is still authorized, and dismisses it if not.
    pub(super) fn review(&self, policy: &Numbered, now: Timestamp) -> Result<(), Dismissal> {
        let judged = self.judge(policy, now);
        if let Err(why) = &judged
            && self.why.set(why.clone()).is_ok()
        {
            self.dismissed.cancel();
        }
        judged
    }

    fn judge(&self, policy: &Numbered, now: Timestamp) -> Result<(), Dismissal> {
        let mut known = lock(&self.known);
        let Known { client, export, compared, .. } = &mut *known;
        let mut facts = AccessRequest::from_peer(self.route.peer).at(now);
        if let Some(client) = client {
            let credentials = client.credentials.as_deref();
            policy.judge_credentials(credentials, client.verified_by, now)?;
            client.verified_by = policy.number;
            facts = facts.with_identity(credentials.map(Credentials::identity));
        }
        let rules = &policy.policy.rules;
        for compared in compared.iter() {
            rules.evaluate(&facts.with_export(compared)).map_err(Dismissal::Rules)?;
        }
        if let Some(export) = export {
            facts = facts.with_export(export);
        }
        rules.evaluate(&facts).map(|_| ()).map_err(Dismissal::Rules)
    }

    /// Waits until the connection is dismissed, and returns the reason.
    pub(super) async fn dismissed(&self) -> Dismissal {
        loop {
            self.dismissed.cancelled().await;
            if let Some(why) = self.why.get() {
                return why.clone();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
