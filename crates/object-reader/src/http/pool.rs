//! Idle connections, kept for further requests.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::Origin;

/// Maximum number of idle connections per origin.
const MAX_IDLE: usize = 64;
/// Time after which an idle connection is closed: less than servers allow, so that few connections
/// are closed by the server while a request is on its way.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for a connection to become ready after its previous response was read.
const READY_TIMEOUT: Duration = Duration::from_millis(100);

pub(super) type RequestSender = SendRequest<Full<Bytes>>;

/// Pool of idle connections, by origin.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    idle: HashMap<Origin, Vec<(RequestSender, Instant)>>,
    /// True while a task closes expired connections.
    has_reaper: bool,
}

impl Pool {
    /// Takes the most recently used connection that is still open.
    pub(super) async fn take(&self, origin: &Origin) -> Option<RequestSender> {
        loop {
            let (mut connection, since) = self.state.lock().idle.get_mut(origin)?.pop()?;
            if since.elapsed() >= IDLE_TIMEOUT {
                continue;
            }
            if let Ok(Ok(())) = tokio::time::timeout(READY_TIMEOUT, connection.ready()).await {
                return Some(connection);
            }
        }
    }

    /// Closes the idle connections to an origin that doesn't respond, since they may be dead, too.
    pub(super) fn clear(&self, origin: &Origin) {
        self.state.lock().idle.remove(origin);
    }

    /// Keeps a connection whose response has been read completely.
    pub(super) fn put(self: &Arc<Self>, origin: Origin, connection: RequestSender) {
        if connection.is_closed() {
            return;
        }
        let mut state = self.state.lock();
        let idle = state.idle.entry(origin).or_default();
        if idle.len() < MAX_IDLE {
            idle.push((connection, Instant::now()));
        }
        if !std::mem::replace(&mut state.has_reaper, true) {
            tokio::spawn(close_expired(Arc::downgrade(self)));
        }
    }
}

/// Closes expired connections until none is left.
async fn close_expired(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(IDLE_TIMEOUT / 4).await;
        let Some(pool) = pool.upgrade() else { return };
        let mut state = pool.state.lock();
        state.idle.retain(|_, idle| {
            idle.retain(|(connection, since)| {
                !connection.is_closed() && since.elapsed() < IDLE_TIMEOUT
            });
            !idle.is_empty()
        });
        if state.idle.is_empty() {
            state.has_reaper = false;
            return;
        }
    }
}
