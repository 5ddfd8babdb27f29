//! Places for connections: a pool for those that still negotiate, another for those that
//! are served.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::access::Peer;
use crate::config::Limits;

/// Both pools.
#[derive(Debug)]
pub(super) struct Slots {
    handshakes: Arc<Semaphore>,
    sessions: Arc<Semaphore>,
    by_peer: Arc<Mutex<HashMap<Peer, usize>>>,
    per_peer: usize,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error("too many connections from its address are still negotiating")]
    Peer,
    #[error("too many connections are still negotiating")]
    Handshakes,
    #[error("as many clients as allowed (--max-connections) are being served")]
    Sessions,
}

impl Slots {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            handshakes: Arc::new(Semaphore::new(limits.handshakes)),
            sessions: Arc::new(Semaphore::new(limits.connections)),
            by_peer: Arc::default(),
            per_peer: limits.handshakes_per_address,
        }
    }

    /// A place to negotiate.
    pub(super) fn handshake(&self, peer: Peer) -> Result<Handshake, Full> {
        // Whoever can't be served in the end needn't negotiate.
        if self.sessions.available_permits() == 0 {
            return Err(Full::Sessions);
        }
        let permit =
            Arc::clone(&self.handshakes).try_acquire_owned().map_err(|_| Full::Handshakes)?;
        let mut by_peer = self.by_peer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let count = by_peer.entry(peer).or_default();
        if *count >= self.per_peer {
            return Err(Full::Peer);
        }
        *count += 1;
        Ok(Handshake { peer, by_peer: Arc::clone(&self.by_peer), _permit: permit })
    }

    /// A place to be served, in exchange for the one to negotiate.
    pub(super) fn session(&self, handshake: Handshake) -> Result<OwnedSemaphorePermit, Full> {
        drop(handshake);
        Arc::clone(&self.sessions).try_acquire_owned().map_err(|_| Full::Sessions)
    }
}

/// A place to negotiate, until this is dropped.
#[derive(Debug)]
pub(super) struct Handshake {
    peer: Peer,
    by_peer: Arc<Mutex<HashMap<Peer, usize>>>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut by_peer = self.by_peer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(count) = by_peer.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                by_peer.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(connections: usize, handshakes: usize, handshakes_per_address: usize) -> Slots {
        let limits =
            Limits { connections, handshakes, handshakes_per_address, ..Limits::default() };
        Slots::new(&limits)
    }

    fn peer(last: u8) -> Peer {
        Peer::ip([10, 0, 0, last].into())
    }

    #[test]
    fn one_address_can_not_take_all_places() {
        let slots = slots(10, 3, 2);
        let first = slots.handshake(peer(1)).unwrap();
        let _second = slots.handshake(peer(1)).unwrap();
        assert_eq!(slots.handshake(peer(1)).unwrap_err(), Full::Peer);
        let _other = slots.handshake(peer(2)).unwrap();
        assert_eq!(slots.handshake(peer(3)).unwrap_err(), Full::Handshakes);
        drop(first);
        assert!(slots.handshake(peer(1)).is_ok());
    }

    #[test]
    fn the_served_do_not_take_places_of_those_that_negotiate() {
        let slots = slots(2, 1, 1);
        let first = slots.session(slots.handshake(peer(1)).unwrap()).unwrap();
        let _second = slots.session(slots.handshake(peer(1)).unwrap()).unwrap();
        assert_eq!(slots.handshake(peer(1)).unwrap_err(), Full::Sessions);
        drop(first);
        assert!(slots.handshake(peer(1)).is_ok());
    }

    #[test]
    fn nothing_is_left_behind() {
        let slots = slots(1, 1, 1);
        drop(slots.handshake(peer(1)).unwrap());
        assert!(slots.by_peer.lock().unwrap().is_empty());
    }
}
