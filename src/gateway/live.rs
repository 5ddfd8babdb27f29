//! The connections that there are, and what is known of each: so that they can be judged
//! again when the rules have changed, or time has.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use tokio_util::sync::CancellationToken;

use super::access::{Facts, Moment};
use super::admission::Route;
use super::policy::{Dismissal, Numbered};
use super::report::MAX_LISTED;
use super::tls::Credentials;
use crate::nbd::{Activity, Done, Export, Offered};

/// As what exports are counted together that were read when there were too many already.
const OTHERS: &str = "other";

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Connections {
    there: Mutex<There>,
}

#[derive(Debug, Default)]
struct There {
    live: HashMap<u64, Arc<Live>>,
    /// What those did that aren't there any more, by export.
    read: HashMap<String, Read>,
    accepted: u64,
    served: u64,
}

/// An export that was read, and what those did who have left.
#[derive(Debug, Clone)]
pub(super) struct Read {
    pub(super) export: Offered,
    pub(super) done: Done,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Live {
    /// Its number in this run.
    pub(super) id: u64,
    pub(super) route: Route,
    /// What it has done since it chose an export.
    pub(super) activity: Arc<Activity>,
    /// How often it asked for an export that it may not open.
    denied: AtomicU64,
    missing: AtomicU64,
    since: SystemTime,
    known: Mutex<Known>,
    dismissed: CancellationToken,
    why: OnceLock<Dismissal>,
}

/// What has turned out so far.
#[derive(Debug, Default)]
struct Known {
    client: Option<Client>,
    export: Option<String>,
    /// Other exports that its metadata contexts tell about.
    compared: Vec<String>,
    reading: Option<Reading>,
}

/// What a connection reads.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) export: String,
    /// As which export that is counted.
    pub(super) counted_as: String,
}

#[derive(Debug)]
struct Client {
    credentials: Option<Arc<Credentials>>,
    /// The number of the policy that verified them.
    verified_by: u64,
    /// What protects its stream, if anything does.
    tls: Option<&'static str>,
}

/// All connections at one moment, the older ones first.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) live: Vec<One>,
    pub(super) read: HashMap<String, Read>,
    pub(super) accepted: u64,
    pub(super) served: u64,
}

/// One connection at one moment.
#[derive(Debug)]
pub(super) struct One {
    pub(super) id: u64,
    pub(super) route: Route,
    pub(super) identity: Option<String>,
    pub(super) tls: Option<&'static str>,
    pub(super) reading: Option<Reading>,
    pub(super) since: SystemTime,
    pub(super) done: Done,
    pub(super) in_flight: u64,
}

/// A connection's place among all, until this is dropped.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    connections: &'a Connections,
    pub(super) live: Arc<Live>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut there = lock(&self.connections.there);
        there.live.remove(&self.live.id);
        // In the same moment, so that nobody sees it twice or not at all.
        let known = lock(&self.live.known);
        if let Some(Reading { counted_as, .. }) = &known.reading
            && let Some(read) = there.read.get_mut(counted_as)
        {
            read.done += self.live.activity.so_far();
        }
    }
}

impl Connections {
    /// Enters a connection that was let in by its address.
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

    /// Judges all of them; who may not stay is dismissed. Says how many that were.
    pub(super) fn review(&self, policy: &Numbered, now: Moment) -> usize {
        let all: Vec<Arc<Live>> = lock(&self.there).live.values().cloned().collect();
        all.iter().filter(|live| live.review(policy, now).is_err()).count()
    }

    /// Notes that a connection begins to read an export.
    pub(super) fn begin(&self, live: &Live, export: &impl Export) {
        let offered = Offered {
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
            (OTHERS.to_owned(), Offered::named(OTHERS))
        };
        let reading = Reading { export: export.name().to_owned(), counted_as: name.clone() };
        lock(&live.known).reading = Some(reading);
        // The archive may be another one by now.
        there
            .read
            .entry(name)
            .and_modify(|read| read.export = offered.clone())
            .or_insert_with(|| Read { export: offered.clone(), done: Done::default() });
    }

    /// Number of connections that have unanswered requests.
    pub(super) fn busy(&self) -> usize {
        lock(&self.there).live.values().filter(|live| live.is_busy()).count()
    }

    /// What there is to see of all of them.
    pub(super) fn seen(&self) -> Seen {
        let (mut live, read, accepted, served) = {
            let there = lock(&self.there);
            let live: Vec<_> = there.live.values().map(Arc::clone).collect();
            (live, there.read.clone(), there.accepted, there.served)
        };
        // Who leaves meanwhile is seen here, and not among those who have left.
        live.sort_by_key(|live| live.id);
        let live = live.iter().map(|live| live.seen()).collect();
        Seen { live, read, accepted, served }
    }
}

impl Live {
    /// Notes who it is. Policies may have changed since these were looked at, so it is
    /// judged at once; later changes are judged by [`Connections::review`].
    pub(super) fn identify(
        &self,
        credentials: Option<Arc<Credentials>>,
        verified_by: u64,
        tls: Option<&'static str>,
    ) {
        lock(&self.known).client = Some(Client { credentials, verified_by, tls });
    }

    /// Notes what it reads, and the other exports about which it can ask.
    pub(super) fn note_export(&self, name: &str, compared: Vec<String>) {
        let mut known = lock(&self.known);
        known.export = Some(name.to_owned());
        known.compared = compared;
    }

    /// The certificates that it has shown, if it is known.
    pub(super) fn credentials(&self) -> Option<Arc<Credentials>> {
        lock(&self.known).client.as_ref()?.credentials.clone()
    }

    /// What it reads, if it has chosen.
    pub(super) fn export(&self) -> Option<String> {
        lock(&self.known).export.clone()
    }

    /// Notes that it asked for an export that it may not open, and says how often that was.
    pub(super) fn note_denied(&self) -> u64 {
        self.denied.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Counts a request for an export that isn't there, and returns the number of them.
    pub(super) fn note_missing(&self) -> u64 {
        self.missing.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Number of requests for exports that aren't there.
    pub(super) fn missing(&self) -> u64 {
        self.missing.load(Ordering::Relaxed)
    }

    /// How often that was.
    pub(super) fn denied(&self) -> u64 {
        self.denied.load(Ordering::Relaxed)
    }

    /// Returns true if it has unanswered requests.
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
            done: self.activity.so_far(),
            in_flight: self.activity.in_flight(),
        }
    }

    /// Whether it may stay, by what is known of it.
    pub(super) fn review(&self, policy: &Numbered, now: Moment) -> Result<(), Dismissal> {
        let judged = self.judge(policy, now);
        if let Err(why) = &judged
            && self.why.set(why.clone()).is_ok()
        {
            self.dismissed.cancel();
        }
        judged
    }

    fn judge(&self, policy: &Numbered, now: Moment) -> Result<(), Dismissal> {
        let mut known = lock(&self.known);
        let Known { client, export, compared, .. } = &mut *known;
        let mut facts = Facts::of_peer(self.route.peer).at(now);
        if let Some(client) = client {
            let credentials = client.credentials.as_deref();
            policy.judge_credentials(credentials, client.verified_by, now)?;
            client.verified_by = policy.number;
            facts = facts.with_identity(credentials.map(Credentials::identity));
        }
        let rules = &policy.policy.rules;
        for compared in compared.iter() {
            rules.judge(&facts.with_export(compared)).map_err(Dismissal::Rules)?;
        }
        if let Some(export) = export {
            facts = facts.with_export(export);
        }
        rules.judge(&facts).map(|_| ()).map_err(Dismissal::Rules)
    }

    /// Waits until it may not stay, and says why.
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
