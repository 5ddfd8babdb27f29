//! Decides when it is pointless to go on connecting to a server.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Origin;
use crate::store::{StoreError, StoreErrorKind};

/// State of the servers to which connections were made or attempted. A client has few of them.
pub(super) struct FirstConnections {
    patience: Duration,
    servers: Mutex<HashMap<Origin, FirstConnection>>,
}

enum FirstConnection {
    Made,
    /// Holds the time of the first failure.
    Failed(Instant),
}

impl FirstConnections {
    pub(super) fn new(patience: Duration) -> Self {
        Self { patience, servers: Mutex::default() }
    }

    /// Takes note of an attempt to connect. Its failure becomes final if the first one was long ago
    /// and no connection was ever made.
    pub(super) fn judge<T>(&self, origin: &Origin, result: &mut Result<T, StoreError>) {
        let mut servers = self.servers.lock();
        let error = match result {
            Ok(_) => {
                servers.insert(origin.clone(), FirstConnection::Made);
                return;
            }
            Err(error) if error.kind.is_transient() => error,
            Err(_) => return,
        };
        let server = servers.entry(origin.clone());
        let server = server.or_insert_with(|| FirstConnection::Failed(Instant::now()));
        if let FirstConnection::Failed(since) = server
            && since.elapsed() >= self.patience
        {
            error.kind = StoreErrorKind::NeverReached;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn failures_are_final_after_a_while_unless_there_was_a_connection() {
        let connections = FirstConnections::new(Duration::from_secs(3));
        let [wrong, good] = ["wrong", "good"].map(|host| Origin {
            is_https: true,
            host: host.to_owned(),
            port: 443,
        });
        let fail = |origin: &Origin, kind| {
            let mut result = Err::<(), _>(StoreError::new(kind, ""));
            connections.judge(origin, &mut result);
            result.unwrap_err().kind
        };
        let unreachable = StoreErrorKind::Unreachable;
        connections.judge(&good, &mut Ok(()));
        for origin in [&wrong, &good] {
            assert_eq!(fail(origin, unreachable), unreachable);
        }
        tokio::time::advance(Duration::from_millis(2900)).await;
        assert_eq!(fail(&wrong, unreachable), unreachable);
        tokio::time::advance(Duration::from_millis(200)).await;
        for kind in [unreachable, StoreErrorKind::TimedOut] {
            assert_eq!(fail(&wrong, kind), StoreErrorKind::NeverReached);
            assert_eq!(fail(&good, kind), kind);
        }
        assert_eq!(fail(&wrong, StoreErrorKind::Denied), StoreErrorKind::Denied);
    }
}
