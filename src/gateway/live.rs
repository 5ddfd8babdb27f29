//! The connections that there are, and what is known of each: so that they can be judged
//! again when the rules have changed, or time has.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio_util::sync::CancellationToken;

use super::access::{Facts, Moment};
use super::admission::Route;
use super::policy::{Dismissal, Numbered};
use super::tls::Credentials;

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Connections {
    there: Mutex<HashMap<u64, Arc<Live>>>,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Live {
    /// Its number in this run.
    pub(super) id: u64,
    pub(super) route: Route,
    known: Mutex<Known>,
    dismissed: CancellationToken,
    why: OnceLock<Dismissal>,
}

/// What has turned out so far.
#[derive(Debug, Default)]
struct Known {
    client: Option<Client>,
    export: Option<String>,
}

#[derive(Debug)]
struct Client {
    credentials: Option<Arc<Credentials>>,
    /// The number of the policy that verified them.
    verified_by: u64,
}

/// A connection's place among all, until this is dropped.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    connections: &'a Connections,
    pub(super) live: Arc<Live>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        lock(&self.connections.there).remove(&self.live.id);
    }
}

impl Connections {
    /// Enters a connection that was let in by its address.
    pub(super) fn enter(&self, id: u64, route: Route) -> Entry<'_> {
        let live = Arc::new(Live {
            id,
            route,
            known: Mutex::default(),
            dismissed: CancellationToken::new(),
            why: OnceLock::new(),
        });
        lock(&self.there).insert(id, Arc::clone(&live));
        Entry { connections: self, live }
    }

    /// Judges all of them; who may not stay is dismissed. Says how many that were.
    pub(super) fn review(&self, policy: &Numbered, now: Moment) -> usize {
        let all: Vec<Arc<Live>> = lock(&self.there).values().cloned().collect();
        all.iter().filter(|live| live.review(policy, now).is_err()).count()
    }
}

impl Live {
    /// Notes who it is. Policies may have changed since these were looked at, so it is
    /// judged at once; later changes are judged by [`Connections::review`].
    pub(super) fn identify(&self, credentials: Option<Arc<Credentials>>, verified_by: u64) {
        lock(&self.known).client = Some(Client { credentials, verified_by });
    }

    /// Notes what it reads.
    pub(super) fn note_export(&self, name: &str) {
        lock(&self.known).export = Some(name.to_owned());
    }

    /// The certificates that it has shown, if it is known.
    pub(super) fn credentials(&self) -> Option<Arc<Credentials>> {
        lock(&self.known).client.as_ref()?.credentials.clone()
    }

    /// What it reads, if it has chosen.
    pub(super) fn export(&self) -> Option<String> {
        lock(&self.known).export.clone()
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
        let Known { client, export } = &mut *known;
        let mut facts = Facts::of_peer(self.route.peer).at(now);
        if let Some(client) = client {
            let credentials = client.credentials.as_deref();
            policy.judge_credentials(credentials, client.verified_by, now)?;
            client.verified_by = policy.number;
            facts = facts.with_identity(credentials.map(Credentials::identity));
        }
        if let Some(export) = export {
            facts = facts.with_export(export);
        }
        policy.policy.rules.judge(&facts).map(|_| ()).map_err(Dismissal::Rules)
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
