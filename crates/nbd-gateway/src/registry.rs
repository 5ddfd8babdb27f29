//! Registry of the connections that are open, with what is known about each. A reload or the
//! passing of time has them reviewed against the policy again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::access::{AccessRequest, Timestamp};
use crate::policy::{Dismissal, VersionedPolicy};
use crate::report::{ActivityTotals, MAX_LISTED};
use crate::route::Route;
use crate::tls::Credentials;
use nbd_server::{Export, ExportSummary, MetricsTotals, SessionMetrics};

/// Label under which exports beyond [`MAX_LISTED`] are aggregated.
const OTHER_EXPORTS: &str = "other";

/// Registry of all open connections, with totals of those that have ended.
#[derive(Debug, Default)]
pub(crate) struct ConnectionRegistry {
    state: Mutex<RegistryState>,
}

#[derive(Debug, Default)]
struct RegistryState {
    entries: HashMap<u64, Arc<RegistryEntry>>,
    /// Activity of connections that have ended, by export.
    exports: HashMap<String, ExportTotals>,
    accepted: u64,
    served: u64,
}

/// An export that was read, with the activity of connections that have ended.
#[derive(Debug, Clone)]
pub(crate) struct ExportTotals {
    pub(crate) export: ExportSummary,
    pub(crate) done: MetricsTotals,
}

/// Shared state of one open connection.
#[derive(Debug)]
pub(crate) struct RegistryEntry {
    /// Number of the connection, unique within this run.
    pub(crate) id: u64,
    pub(crate) route: Route,
    /// Requests and bytes since the client chose an export.
    pub(crate) activity: Arc<SessionMetrics>,
    /// Number of requests for exports that the client may not open.
    denied: AtomicU64,
    missing: AtomicU64,
    since: SystemTime,
    client: Mutex<ClientInfo>,
    dismissed: CancellationToken,
    dismissal: OnceLock<Dismissal>,
}

/// Knowledge about the client so far, filled in during the handshake.
#[derive(Debug, Default)]
struct ClientInfo {
    authentication: Option<ClientAuthentication>,
    export: Option<String>,
    /// Other exports whose contents the client's metadata contexts reveal.
    compared: Vec<String>,
    reading: Option<OpenExport>,
}

/// The export that a connection reads.
#[derive(Debug, Clone)]
pub(crate) struct OpenExport {
    pub(crate) export: String,
    /// Label under which the activity is counted: the export's name, or [`OTHER_EXPORTS`].
    pub(crate) label: String,
}

#[derive(Debug)]
struct ClientAuthentication {
    credentials: Option<Arc<Credentials>>,
    /// Number of the policy that verified the credentials.
    verified_by: u64,
    /// TLS version of the stream, if it is encrypted.
    tls: Option<&'static str>,
}

/// Snapshot of all connections, oldest first.
#[derive(Debug)]
pub(crate) struct RegistrySnapshot {
    pub(crate) connections: Vec<ConnectionStatus>,
    pub(crate) exports: HashMap<String, ExportTotals>,
    pub(crate) accepted: u64,
    pub(crate) served: u64,
}

/// Snapshot of one connection.
#[derive(Debug)]
pub(crate) struct ConnectionStatus {
    pub(crate) id: u64,
    pub(crate) route: Route,
    pub(crate) identity: Option<String>,
    pub(crate) tls: Option<&'static str>,
    /// Expiry of the client's certificate.
    pub(crate) certificate_expires: Option<Timestamp>,
    pub(crate) reading: Option<OpenExport>,
    pub(crate) since: SystemTime,
    pub(crate) done: MetricsTotals,
    pub(crate) in_flight: u64,
}

/// Registration of a connection; dropping it removes the connection.
#[derive(Debug)]
pub(crate) struct Registration<'a> {
    connections: &'a ConnectionRegistry,
    pub(crate) entry: Arc<RegistryEntry>,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        let mut state = self.connections.state.lock();
        state.entries.remove(&self.entry.id);
        // Under the same lock, so that a snapshot neither counts the activity twice nor misses it.
        let client = self.entry.client.lock();
        if let Some(OpenExport { label, .. }) = &client.reading
            && let Some(read) = state.exports.get_mut(label)
        {
            read.done += self.entry.activity.totals();
        }
    }
}

impl ConnectionRegistry {
    /// Registers a connection that was admitted by its address.
    pub(crate) fn register(&self, id: u64, route: Route) -> Registration<'_> {
        let entry = Arc::new(RegistryEntry {
            id,
            route,
            activity: Arc::default(),
            denied: AtomicU64::new(0),
            missing: AtomicU64::new(0),
            since: SystemTime::now(),
            client: Mutex::default(),
            dismissed: CancellationToken::new(),
            dismissal: OnceLock::new(),
        });
        let mut state = self.state.lock();
        state.accepted += 1;
        state.entries.insert(id, Arc::clone(&entry));
        Registration { connections: self, entry }
    }

    /// Reviews all connections against `policy`, dismisses those that are no longer authorized, and
    /// returns their number.
    pub(crate) fn review(&self, policy: &VersionedPolicy, now: Timestamp) -> usize {
        let all: Vec<Arc<RegistryEntry>> = self.state.lock().entries.values().cloned().collect();
        all.iter().filter(|entry| entry.review(policy, now).is_err()).count()
    }

    /// Records that a connection starts reading `export`.
    pub(crate) fn start_reading(&self, entry: &RegistryEntry, export: &impl Export) {
        let offered = ExportSummary {
            name: export.name().to_owned(),
            description: Some(export.description().to_owned()),
            size: Some(export.size()),
        };
        let mut state = self.state.lock();
        state.served += 1;
        let is_known = state.exports.contains_key(&offered.name);
        let (name, offered) = if is_known || state.exports.len() < MAX_LISTED {
            (offered.name.clone(), offered)
        } else {
            (OTHER_EXPORTS.to_owned(), ExportSummary::name_only(OTHER_EXPORTS))
        };
        let reading = OpenExport { export: export.name().to_owned(), label: name.clone() };
        entry.client.lock().reading = Some(reading);
        // The archive behind the name may have been replaced.
        state.exports.entry(name).and_modify(|read| read.export = offered.clone()).or_insert_with(
            || ExportTotals { export: offered.clone(), done: MetricsTotals::default() },
        );
    }

    /// Returns the number of connections with unanswered requests.
    pub(crate) fn busy_count(&self) -> usize {
        self.state.lock().entries.values().filter(|entry| entry.is_busy()).count()
    }

    /// Returns the activity of all connections, including those that have ended.
    pub(crate) fn activity(&self) -> ActivityTotals {
        let mut all = ActivityTotals::default();
        let state = self.state.lock();
        state.exports.values().for_each(|read| all.add(&read.done));
        for entry in state.entries.values() {
            all.connections += 1;
            all.add(&entry.activity.totals());
        }
        all
    }

    /// Takes a snapshot of all connections.
    pub(crate) fn snapshot(&self) -> RegistrySnapshot {
        let (mut entries, exports, accepted, served) = {
            let state = self.state.lock();
            let entries: Vec<_> = state.entries.values().map(Arc::clone).collect();
            (entries, state.exports.clone(), state.accepted, state.served)
        };
        // A connection that ends in the meantime is reported as open, and isn't in the totals yet.
        entries.sort_by_key(|entry| entry.id);
        let connections = entries.iter().map(|entry| entry.status()).collect();
        RegistrySnapshot { connections, exports, accepted, served }
    }
}

impl RegistryEntry {
    /// Records the client's credentials. The policy may have changed since they were verified, so
    /// the caller reviews the connection right away; later changes are handled by
    /// [`ConnectionRegistry::review`].
    pub(crate) fn set_authentication(
        &self,
        credentials: Option<Arc<Credentials>>,
        verified_by: u64,
        tls: Option<&'static str>,
    ) {
        self.client.lock().authentication =
            Some(ClientAuthentication { credentials, verified_by, tls });
    }

    /// Records the chosen export and the other exports that its metadata contexts reveal.
    pub(crate) fn set_export(&self, name: &str, compared: Vec<String>) {
        let mut client = self.client.lock();
        client.export = Some(name.to_owned());
        client.compared = compared;
    }

    /// Returns the client's credentials, if it has presented a certificate.
    pub(crate) fn credentials(&self) -> Option<Arc<Credentials>> {
        self.client.lock().authentication.as_ref()?.credentials.clone()
    }

    /// Returns the name of the chosen export, if any.
    pub(crate) fn export(&self) -> Option<String> {
        self.client.lock().export.clone()
    }

    /// Counts a request for an export that the client may not open, and returns the new total.
    pub(crate) fn count_denied(&self) -> u64 {
        self.denied.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts a request for an export that doesn't exist, and returns the new total.
    pub(crate) fn count_missing(&self) -> u64 {
        self.missing.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Returns the number of requests for exports that don't exist.
    pub(crate) fn missing(&self) -> u64 {
        self.missing.load(Ordering::Relaxed)
    }

    /// Returns the number of requests for exports that the client may not open.
    pub(crate) fn denied(&self) -> u64 {
        self.denied.load(Ordering::Relaxed)
    }

    /// Returns true if requests are unanswered.
    pub(crate) fn is_busy(&self) -> bool {
        self.activity.in_flight() > 0
    }

    fn status(&self) -> ConnectionStatus {
        let client = self.client.lock();
        let authentication = client.authentication.as_ref();
        let credentials = authentication.and_then(|it| it.credentials.as_deref());
        ConnectionStatus {
            id: self.id,
            route: self.route,
            identity: credentials.map(|it| it.identity().to_string()),
            tls: authentication.and_then(|it| it.tls),
            certificate_expires: credentials.map(Credentials::expires),
            reading: client.reading.clone(),
            since: self.since,
            done: self.activity.totals(),
            in_flight: self.activity.in_flight(),
        }
    }

    /// Checks whether the client is still authorized, and dismisses it if not.
    pub(crate) fn review(&self, policy: &VersionedPolicy, now: Timestamp) -> Result<(), Dismissal> {
        let judged = self.check(policy, now);
        if let Err(why) = &judged
            && self.dismissal.set(why.clone()).is_ok()
        {
            self.dismissed.cancel();
        }
        judged
    }

    fn check(&self, policy: &VersionedPolicy, now: Timestamp) -> Result<(), Dismissal> {
        let mut client = self.client.lock();
        let ClientInfo { authentication, export, compared, .. } = &mut *client;
        let mut request = AccessRequest::from_peer(self.route.peer).at(now);
        if let Some(authentication) = authentication {
            let credentials = authentication.credentials.as_deref();
            policy.check_credentials(credentials, authentication.verified_by, now)?;
            authentication.verified_by = policy.number;
            request = request.with_identity(credentials.map(Credentials::identity));
        }
        let rules = &policy.policy.rules;
        for compared in compared.iter() {
            rules.evaluate(&request.with_export(compared)).map_err(Dismissal::Rules)?;
        }
        if let Some(export) = export {
            request = request.with_export(export);
        }
        rules.evaluate(&request).map(|_| ()).map_err(Dismissal::Rules)
    }

    /// Waits until the connection is dismissed, and returns the reason.
    pub(crate) async fn wait_until_dismissed(&self) -> Dismissal {
        loop {
            self.dismissed.cancelled().await;
            if let Some(why) = self.dismissal.get() {
                return why.clone();
            }
        }
    }
}
