//! Connection limits: a pool of permits for connections that negotiate, another for those that are
//! served. No address, network or identity can take all permits of a pool.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::access::{Identity, Peer};
use crate::config::Limits;

/// Both pools of permits.
#[derive(Debug)]
pub(super) struct Slots {
    handshakes: Pool,
    sessions: Pool,
    limits: Limits,
}

/// Limit that has been reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    #[error(
        "too many connections from its address are still negotiating (--max-handshakes-per-address)"
    )]
    PeerHandshakes,
    #[error(
        "too many connections from its network are still negotiating (--max-handshakes-per-network)"
    )]
    NetworkHandshakes,
    #[error("too many connections are still negotiating (--max-handshakes)")]
    Handshakes,
    #[error(
        "as many connections from its address as allowed (--max-connections-per-address) are \
         being served"
    )]
    PeerSessions,
    #[error(
        "as many connections of its identity as allowed (--max-connections-per-identity) are \
         being served"
    )]
    IdentitySessions,
    #[error("as many connections as allowed (--max-connections) are being served")]
    Sessions,
}

impl Full {
    /// Returns the stable label that counters use.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::PeerHandshakes => "handshakes_per_address",
            Self::NetworkHandshakes => "handshakes_per_network",
            Self::Handshakes => "handshakes",
            Self::PeerSessions => "connections_per_address",
            Self::IdentitySessions => "connections_per_identity",
            Self::Sessions => "connections",
        }
    }
}

impl Slots {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            handshakes: Pool::new(limits.handshakes),
            sessions: Pool::new(limits.connections),
            limits: *limits,
        }
    }

    /// Returns the number of connections that are being served.
    pub(super) fn sessions(&self) -> usize {
        self.limits.connections.saturating_sub(self.sessions.free.available_permits())
    }

    /// Acquires a handshake permit for `peer`.
    pub(super) fn handshake(&self, peer: Peer) -> Result<Place, Full> {
        self.count(self.nameless()?, peer)
    }

    /// Acquires a handshake permit for a connection whose client the load balancer hasn't named
    /// yet. It counts against the pool alone, because all clients come from the balancer's address.
    pub(super) fn nameless(&self) -> Result<Place, Full> {
        // A client that couldn't be served in the end needn't negotiate.
        if self.sessions.free.available_permits() == 0 {
            return Err(Full::Sessions);
        }
        self.handshakes.place(Full::Handshakes)
    }

    /// Charges a handshake permit to `peer`, now that the client is known.
    pub(super) fn count(&self, place: Place, peer: Peer) -> Result<Place, Full> {
        let mut shares = Vec::new();
        if let Some(client) = counted_as(peer) {
            let most = self.limits.handshakes_per_address;
            shares.push((Holder::Client(client), most, Full::PeerHandshakes));
            if let Counted::Address(address) = client {
                let most = self.limits.handshakes_per_network;
                shares.push((Holder::Network(network_of(address)), most, Full::NetworkHandshakes));
            }
        }
        place.count_for(shares)
    }

    /// Exchanges the handshake permit for a session permit.
    pub(super) fn session(
        &self,
        handshake: Place,
        peer: Peer,
        identity: Option<&Identity>,
    ) -> Result<Place, Full> {
        drop(handshake);
        let mut shares = Vec::new();
        if let Some(client) = counted_as(peer) {
            let most = self.limits.connections_per_address;
            shares.push((Holder::Client(client), most, Full::PeerSessions));
        }
        if let Some(identity) = identity {
            let most = self.limits.connections_per_identity;
            let holder = Holder::Identity(identity.to_string());
            shares.push((holder, most, Full::IdentitySessions));
        }
        self.sessions.place(Full::Sessions)?.count_for(shares)
    }
}

/// Key under which permits are counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Holder {
    Client(Counted),
    Network(IpAddr),
    Identity(String),
}

/// Number of permits that each holder has.
type Taken = HashMap<Holder, usize>;

#[derive(Debug)]
struct Pool {
    free: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
}

impl Pool {
    fn new(places: usize) -> Self {
        let free = Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS)));
        Self { free, taken: Arc::default() }
    }

    /// Acquires a permit that isn't charged to a holder yet.
    fn place(&self, full: Full) -> Result<Place, Full> {
        let permit = Arc::clone(&self.free).try_acquire_owned().map_err(|_| full)?;
        Ok(Place { holders: Vec::new(), taken: Arc::clone(&self.taken), _permit: permit })
    }
}

/// Client as it is counted: an address, a network or a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Counted {
    /// An IPv4 address, or an IPv6 /64 network, since one machine can have every address of it.
    Address(IpAddr),
    /// A virtual machine, identified by its context ID.
    Vsock(u32),
}

/// Returns the key that a peer is counted under. Peers of a Unix socket aren't counted: the
/// socket's permissions control who can connect.
pub(super) fn counted_as(peer: Peer) -> Option<Counted> {
    const NETWORK: u128 = !0 << 64;
    Some(match peer {
        Peer::Unix => return None,
        Peer::Vsock(cid) => Counted::Vsock(cid),
        Peer::Ip(IpAddr::V4(address)) => Counted::Address(address.into()),
        Peer::Ip(IpAddr::V6(address)) => {
            Counted::Address(Ipv6Addr::from_bits(address.to_bits() & NETWORK).into())
        }
    })
}

/// Returns the network of an address, at the size that one customer typically gets: IPv4 /24, IPv6
/// /48.
fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & (!0 << 8)).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (!0 << 80)).into(),
    }
}

/// A permit; dropping it returns it to its pool.
#[derive(Debug)]
pub(super) struct Place {
    holders: Vec<Holder>,
    taken: Arc<Mutex<Taken>>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Charges the permit to each holder, unless one of them has reached its limit.
    fn count_for(mut self, shares: Vec<(Holder, usize, Full)>) -> Result<Self, Full> {
        let all = Arc::clone(&self.taken);
        let mut taken = lock(&all);
        for (holder, most, full) in &shares {
            if taken.get(holder).is_some_and(|count| count >= most) {
                // Dropping the permit takes the same lock.
                drop(taken);
                return Err(*full);
            }
        }
        for (holder, ..) in shares {
            *taken.entry(holder.clone()).or_default() += 1;
            self.holders.push(holder);
        }
        drop(taken);
        Ok(self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        for holder in &self.holders {
            if let Some(count) = taken.get_mut(holder) {
                *count -= 1;
                if *count == 0 {
                    taken.remove(holder);
                }
            }
        }
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{IdentityName, NameKind};

    fn slots(connections: usize, handshakes: usize, each: usize) -> Slots {
        Slots::new(&Limits {
            connections,
            connections_per_address: each,
            connections_per_identity: each,
            handshakes,
            handshakes_per_address: each,
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
    fn one_network_can_not_take_all_places_to_negotiate() {
        let limits = Limits { handshakes_per_network: 2, ..Limits::default() };
        let slots = Slots::new(&limits);
        let _taken = ["10.0.0.1", "10.0.0.2", "2001:db8:1:1::", "2001:db8:1:2::"]
            .map(|address| slots.handshake(peer(address)).unwrap());
        for address in ["10.0.0.3", "2001:db8:1:3::"] {
            assert_eq!(slots.handshake(peer(address)).unwrap_err(), Full::NetworkHandshakes);
        }
        for address in ["10.0.1.1", "2001:db8:2:1::"] {
            assert!(slots.handshake(peer(address)).is_ok());
        }
    }

    #[test]
    fn one_address_can_not_take_all_places_to_be_served() {
        let slots = slots(3, 9, 2);
        let served =
            |address| slots.session(slots.handshake(peer(address)).unwrap(), peer(address), None);
        assert_eq!(slots.sessions(), 0);
        let first = served("10.0.0.1").unwrap();
        let _second = served("10.0.0.1").unwrap();
        assert_eq!(served("10.0.0.1").unwrap_err(), Full::PeerSessions);
        assert_eq!(slots.sessions(), 2);
        let _other = served("10.0.0.2").unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.3")).unwrap_err(), Full::Sessions);
        drop(first);
        assert_eq!(slots.sessions(), 2);
        assert!(served("10.0.0.1").is_ok());
    }

    #[test]
    fn one_identity_can_not_take_all_places_by_many_addresses() {
        let slots = slots(9, 9, 2);
        let identity = |name: &str| {
            Identity::new(vec![IdentityName { kind: NameKind::Dns, text: name.into() }])
        };
        let (alice, bob) = (identity("alice"), identity("bob"));
        let served = |address, who| {
            slots.session(slots.handshake(peer(address)).unwrap(), peer(address), Some(who))
        };
        let _first = served("10.0.0.1", &alice).unwrap();
        let second = served("10.0.0.2", &alice).unwrap();
        assert_eq!(served("10.0.0.3", &alice).unwrap_err(), Full::IdentitySessions);
        assert!(served("10.0.0.3", &bob).is_ok());
        drop(second);
        assert!(served("10.0.0.3", &alice).is_ok());
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
    fn a_virtual_machine_counts_by_itself() {
        let slots = slots(10, 10, 1);
        let _one = slots.handshake(Peer::Vsock(3)).unwrap();
        assert_eq!(slots.handshake(Peer::Vsock(3)).unwrap_err(), Full::PeerHandshakes);
        assert!(slots.handshake(Peer::Vsock(4)).is_ok());
    }

    /// Behind a load balancer, the holder is known only after the permit was acquired.
    #[test]
    fn a_place_is_counted_when_it_is_known_whose_it_is() {
        let slots = slots(10, 4, 2);
        let mut nameless = [(); 4].map(|()| slots.nameless().unwrap()).into_iter();
        assert_eq!(slots.nameless().unwrap_err(), Full::Handshakes);
        let mut count = |address| slots.count(nameless.next().unwrap(), peer(address));
        let first = count("10.0.0.1").unwrap();
        let _second = count("10.0.0.1").unwrap();
        assert_eq!(count("10.0.0.1").unwrap_err(), Full::PeerHandshakes);
        let _other = count("10.0.0.2").unwrap();
        // The refused permit was returned, and is charged to no holder.
        drop(first);
        assert!(slots.handshake(peer("10.0.0.1")).is_ok());
        assert_eq!(slots.handshakes.free.available_permits(), 2);
    }

    #[test]
    fn each_reason_has_a_label_of_its_own() {
        let reasons = [
            (Full::PeerHandshakes, "handshakes_per_address"),
            (Full::NetworkHandshakes, "handshakes_per_network"),
            (Full::Handshakes, "handshakes"),
            (Full::PeerSessions, "connections_per_address"),
            (Full::IdentitySessions, "connections_per_identity"),
            (Full::Sessions, "connections"),
        ];
        assert!(reasons.iter().all(|(reason, label)| reason.label() == *label));
    }

    #[test]
    fn nothing_is_left_behind() {
        let slots = slots(1, 1, 1);
        drop(slots.handshake(peer("10.0.0.1")).unwrap());
        assert!(slots.handshakes.taken.lock().unwrap().is_empty());
    }
}
