//! Places for connections: a pool for those that still negotiate, another for those that
//! are served. No address may take all of either.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::access::Peer;
use crate::config::Limits;

/// Both pools.
#[derive(Debug)]
pub(super) struct Slots {
    handshakes: Pool,
    sessions: Pool,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error("too many connections from its address are still negotiating")]
    PeerHandshakes,
    #[error("too many connections are still negotiating")]
    Handshakes,
    #[error(
        "as many connections from its address as allowed (--max-connections-per-address) are \
         being served"
    )]
    PeerSessions,
    #[error("as many connections as allowed (--max-connections) are being served")]
    Sessions,
}

impl Slots {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            handshakes: Pool::new(limits.handshakes, limits.handshakes_per_address),
            sessions: Pool::new(limits.connections, limits.connections_per_address),
        }
    }

    /// A place to negotiate.
    pub(super) fn handshake(&self, peer: Peer) -> Result<Place, Full> {
        // Whoever can't be served in the end needn't negotiate.
        if self.sessions.free.available_permits() == 0 {
            return Err(Full::Sessions);
        }
        self.handshakes.take(peer, Full::Handshakes, Full::PeerHandshakes)
    }

    /// A place to be served, in exchange for the one to negotiate.
    pub(super) fn session(&self, handshake: Place) -> Result<Place, Full> {
        let peer = handshake.peer;
        drop(handshake);
        self.sessions.take(peer, Full::Sessions, Full::PeerSessions)
    }
}

/// How many places each address has.
type Taken = Arc<Mutex<HashMap<IpAddr, usize>>>;

#[derive(Debug)]
struct Pool {
    free: Arc<Semaphore>,
    taken: Taken,
    per_address: usize,
}

impl Pool {
    fn new(places: usize, per_address: usize) -> Self {
        let free = Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS)));
        Self { free, taken: Arc::default(), per_address }
    }

    fn take(&self, peer: Peer, full: Full, peer_full: Full) -> Result<Place, Full> {
        let permit = Arc::clone(&self.free).try_acquire_owned().map_err(|_| full)?;
        let Some(address) = counted_as(peer) else {
            return Ok(Place { peer, counted: None, _permit: permit });
        };
        let mut taken = self.taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let count = taken.entry(address).or_default();
        if *count >= self.per_address {
            return Err(peer_full);
        }
        *count += 1;
        let counted = Some((address, Arc::clone(&self.taken)));
        Ok(Place { peer, counted, _permit: permit })
    }
}

/// Whose places a peer's count among: an IPv4 address's, or an IPv6 network's of 64 bits,
/// of which one machine can have every address. The socket's permissions have let in who
/// comes by a Unix socket; they aren't counted apart.
fn counted_as(peer: Peer) -> Option<IpAddr> {
    match peer {
        Peer::Unix => None,
        Peer::Ip(IpAddr::V4(address)) => Some(address.into()),
        Peer::Ip(IpAddr::V6(address)) => {
            const NETWORK: u128 = !0 << 64;
            Some(Ipv6Addr::from_bits(address.to_bits() & NETWORK).into())
        }
    }
}

/// A place, until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    peer: Peer,
    counted: Option<(IpAddr, Taken)>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((address, taken)) = &self.counted else { return };
        let mut taken = taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(count) = taken.get_mut(address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(connections: usize, handshakes: usize, per_address: usize) -> Slots {
        Slots::new(&Limits {
            connections,
            connections_per_address: per_address,
            handshakes,
            handshakes_per_address: per_address,
            ..Limits::default()
        })
    }

    fn peer(address: &str) -> Peer {
        Peer::ip(address.parse().unwrap())
    }

    #[test]
    fn one_address_can_not_take_all_places_to_negotiate() {
        let slots = slots(10, 3, 2);
        let first = slots.handshake(peer("10.0.0.1")).unwrap();
        let _second = slots.handshake(peer("10.0.0.1")).unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.1")).unwrap_err(), Full::PeerHandshakes);
        let _other = slots.handshake(peer("10.0.0.2")).unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.3")).unwrap_err(), Full::Handshakes);
        drop(first);
        assert!(slots.handshake(peer("10.0.0.1")).is_ok());
    }

    #[test]
    fn one_address_can_not_take_all_places_to_be_served() {
        let slots = slots(3, 9, 2);
        let served = |address| slots.session(slots.handshake(peer(address)).unwrap());
        let first = served("10.0.0.1").unwrap();
        let _second = served("10.0.0.1").unwrap();
        assert_eq!(served("10.0.0.1").unwrap_err(), Full::PeerSessions);
        let _other = served("10.0.0.2").unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.3")).unwrap_err(), Full::Sessions);
        drop(first);
        assert!(served("10.0.0.1").is_ok());
    }

    #[test]
    fn an_ipv6_network_counts_as_one_address() {
        let slots = slots(10, 10, 1);
        let _one = slots.handshake(peer("2001:db8::1")).unwrap();
        assert_eq!(slots.handshake(peer("2001:db8::2:1")).unwrap_err(), Full::PeerHandshakes);
        assert!(slots.handshake(peer("2001:db8:0:1::1")).is_ok());
        assert!(slots.handshake(Peer::Unix).is_ok() && slots.handshake(Peer::Unix).is_ok());
    }

    #[test]
    fn nothing_is_left_behind() {
        let slots = slots(1, 1, 1);
        drop(slots.handshake(peer("10.0.0.1")).unwrap());
        assert!(slots.handshakes.taken.lock().unwrap().is_empty());
    }
}
