//! Connection limits: a pool of permits for connections that negotiate, another for those that are
//! served. No address, network or identity can take all permits of a pool.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::access::{Identity, Peer};
use crate::config::Limits;

/// Both pools of permits.
#[derive(Debug)]
pub(crate) struct Slots {
    handshakes: Pool,
    sessions: Pool,
    limits: Limits,
}

/// Limit that has been reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LimitReached {
    #[error("limit of negotiating connections per address reached")]
    PeerHandshakes,
    #[error("limit of negotiating connections per network reached")]
    NetworkHandshakes,
    #[error("limit of negotiating connections reached")]
    Handshakes,
    #[error("limit of connections per address reached")]
    PeerSessions,
    #[error("limit of connections per identity reached")]
    IdentitySessions,
    #[error("limit of connections reached")]
    Sessions,
}

impl LimitReached {
    /// Returns the stable label that counters use.
    pub(crate) fn label(self) -> &'static str {
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
    pub(crate) fn new(limits: &Limits) -> Self {
        Self {
            handshakes: Pool::new(limits.handshakes),
            sessions: Pool::new(limits.connections),
            limits: *limits,
        }
    }

    /// Returns the number of connections that are being served.
    pub(crate) fn active_sessions(&self) -> usize {
        self.limits.connections.saturating_sub(self.sessions.free.available_permits())
    }

    /// Acquires a handshake permit for `peer`.
    pub(crate) fn handshake(&self, peer: Peer) -> Result<SlotPermit, LimitReached> {
        self.assign(self.unassigned_handshake()?, peer)
    }

    /// Acquires a handshake permit for a connection whose client the load balancer hasn't named
    /// yet. It counts against the pool alone, because all clients come from the balancer's address.
    pub(crate) fn unassigned_handshake(&self) -> Result<SlotPermit, LimitReached> {
        // A client that couldn't be served in the end needn't negotiate.
        if self.sessions.free.available_permits() == 0 {
            return Err(LimitReached::Sessions);
        }
        self.handshakes.acquire(LimitReached::Handshakes)
    }

    /// Charges a handshake permit to `peer`, now that the client is known.
    pub(crate) fn assign(
        &self,
        permit: SlotPermit,
        peer: Peer,
    ) -> Result<SlotPermit, LimitReached> {
        let mut shares = Vec::new();
        if let Some(client) = client_key(peer) {
            let most = self.limits.handshakes_per_address;
            shares.push((PermitHolder::Client(client), most, LimitReached::PeerHandshakes));
            if let ClientKey::Address(address) = client {
                let most = self.limits.handshakes_per_network;
                shares.push((
                    PermitHolder::Network(network_of(address)),
                    most,
                    LimitReached::NetworkHandshakes,
                ));
            }
        }
        permit.charge(shares)
    }

    /// Exchanges the handshake permit for a session permit.
    pub(crate) fn session(
        &self,
        handshake: SlotPermit,
        peer: Peer,
        identity: Option<&Identity>,
    ) -> Result<SlotPermit, LimitReached> {
        drop(handshake);
        let mut shares = Vec::new();
        if let Some(client) = client_key(peer) {
            let most = self.limits.connections_per_address;
            shares.push((PermitHolder::Client(client), most, LimitReached::PeerSessions));
        }
        if let Some(identity) = identity {
            let most = self.limits.connections_per_identity;
            let holder = PermitHolder::Identity(identity.to_string());
            shares.push((holder, most, LimitReached::IdentitySessions));
        }
        self.sessions.acquire(LimitReached::Sessions)?.charge(shares)
    }
}

/// Key under which permits are counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum PermitHolder {
    Client(ClientKey),
    Network(IpAddr),
    Identity(String),
}

/// Number of permits that each holder has.
type HolderCounts = HashMap<PermitHolder, usize>;

#[derive(Debug)]
struct Pool {
    free: Arc<Semaphore>,
    taken: Arc<Mutex<HolderCounts>>,
}

impl Pool {
    fn new(permits: usize) -> Self {
        let free = Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        Self { free, taken: Arc::default() }
    }

    /// Acquires a permit that isn't charged to a holder yet.
    fn acquire(&self, full: LimitReached) -> Result<SlotPermit, LimitReached> {
        let permit = Arc::clone(&self.free).try_acquire_owned().map_err(|_| full)?;
        Ok(SlotPermit { holders: Vec::new(), taken: Arc::clone(&self.taken), _permit: permit })
    }
}

/// Client as it is counted: an address, a network or a virtual machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ClientKey {
    /// An IPv4 address, or an IPv6 /64 network, since one machine can have every address of it.
    Address(IpAddr),
    /// A virtual machine, identified by its context ID.
    Vsock(u32),
}

/// Returns the key that a peer is counted under. Peers of a Unix socket aren't counted: the
/// socket's permissions control who can connect.
pub(crate) fn client_key(peer: Peer) -> Option<ClientKey> {
    const NETWORK: u128 = !0 << 64;
    Some(match peer {
        Peer::Unix => return None,
        Peer::Vsock(cid) => ClientKey::Vsock(cid),
        Peer::Ip(IpAddr::V4(address)) => ClientKey::Address(address.into()),
        Peer::Ip(IpAddr::V6(address)) => {
            ClientKey::Address(Ipv6Addr::from_bits(address.to_bits() & NETWORK).into())
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
pub(crate) struct SlotPermit {
    holders: Vec<PermitHolder>,
    taken: Arc<Mutex<HolderCounts>>,
    _permit: OwnedSemaphorePermit,
}

impl SlotPermit {
    /// Charges the permit to each holder, unless one of them has reached its limit.
    fn charge(
        mut self,
        shares: Vec<(PermitHolder, usize, LimitReached)>,
    ) -> Result<Self, LimitReached> {
        let all = Arc::clone(&self.taken);
        let mut taken = all.lock();
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

impl Drop for SlotPermit {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
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
    fn one_address_cannot_take_all_handshake_permits() {
        let slots = slots(10, 3, 2);
        let first = slots.handshake(peer("10.0.0.1")).unwrap();
        let _second = slots.handshake(peer("10.0.0.1")).unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.1")).unwrap_err(), LimitReached::PeerHandshakes);
        let _other = slots.handshake(peer("10.0.0.2")).unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.3")).unwrap_err(), LimitReached::Handshakes);
        drop(first);
        assert!(slots.handshake(peer("10.0.0.1")).is_ok());
    }

    #[test]
    fn one_network_cannot_take_all_handshake_permits() {
        let limits = Limits { handshakes_per_network: 2, ..Limits::default() };
        let slots = Slots::new(&limits);
        let _taken = ["10.0.0.1", "10.0.0.2", "2001:db8:1:1::", "2001:db8:1:2::"]
            .map(|address| slots.handshake(peer(address)).unwrap());
        for address in ["10.0.0.3", "2001:db8:1:3::"] {
            assert_eq!(
                slots.handshake(peer(address)).unwrap_err(),
                LimitReached::NetworkHandshakes
            );
        }
        for address in ["10.0.1.1", "2001:db8:2:1::"] {
            assert!(slots.handshake(peer(address)).is_ok());
        }
    }

    #[test]
    fn one_address_cannot_take_all_session_permits() {
        let slots = slots(3, 9, 2);
        let served =
            |address| slots.session(slots.handshake(peer(address)).unwrap(), peer(address), None);
        assert_eq!(slots.active_sessions(), 0);
        let first = served("10.0.0.1").unwrap();
        let _second = served("10.0.0.1").unwrap();
        assert_eq!(served("10.0.0.1").unwrap_err(), LimitReached::PeerSessions);
        assert_eq!(slots.active_sessions(), 2);
        let _other = served("10.0.0.2").unwrap();
        assert_eq!(slots.handshake(peer("10.0.0.3")).unwrap_err(), LimitReached::Sessions);
        drop(first);
        assert_eq!(slots.active_sessions(), 2);
        assert!(served("10.0.0.1").is_ok());
    }

    #[test]
    fn one_identity_cannot_take_all_session_permits_from_many_addresses() {
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
        assert_eq!(served("10.0.0.3", &alice).unwrap_err(), LimitReached::IdentitySessions);
        assert!(served("10.0.0.3", &bob).is_ok());
        drop(second);
        assert!(served("10.0.0.3", &alice).is_ok());
    }

    #[test]
    fn an_ipv6_network_counts_as_one_address() {
        let slots = slots(10, 10, 1);
        let _one = slots.handshake(peer("2001:db8::1")).unwrap();
        assert_eq!(
            slots.handshake(peer("2001:db8::2:1")).unwrap_err(),
            LimitReached::PeerHandshakes
        );
        assert!(slots.handshake(peer("2001:db8:0:1::1")).is_ok());
        assert!(slots.handshake(Peer::Unix).is_ok() && slots.handshake(Peer::Unix).is_ok());
    }

    #[test]
    fn virtual_machines_are_counted_separately() {
        let slots = slots(10, 10, 1);
        let _one = slots.handshake(Peer::Vsock(3)).unwrap();
        assert_eq!(slots.handshake(Peer::Vsock(3)).unwrap_err(), LimitReached::PeerHandshakes);
        assert!(slots.handshake(Peer::Vsock(4)).is_ok());
    }

    /// Behind a load balancer, the holder is known only after the permit was acquired.
    #[test]
    fn unassigned_permit_is_charged_once_the_client_is_known() {
        let slots = slots(10, 4, 2);
        let mut unassigned = [(); 4].map(|()| slots.unassigned_handshake().unwrap()).into_iter();
        assert_eq!(slots.unassigned_handshake().unwrap_err(), LimitReached::Handshakes);
        let mut count = |address| slots.assign(unassigned.next().unwrap(), peer(address));
        let first = count("10.0.0.1").unwrap();
        let _second = count("10.0.0.1").unwrap();
        assert_eq!(count("10.0.0.1").unwrap_err(), LimitReached::PeerHandshakes);
        let _other = count("10.0.0.2").unwrap();
        // The refused permit was returned, and is charged to no holder.
        drop(first);
        assert!(slots.handshake(peer("10.0.0.1")).is_ok());
        assert_eq!(slots.handshakes.free.available_permits(), 2);
    }

    #[test]
    fn each_limit_has_a_distinct_label() {
        let reasons = [
            (LimitReached::PeerHandshakes, "handshakes_per_address"),
            (LimitReached::NetworkHandshakes, "handshakes_per_network"),
            (LimitReached::Handshakes, "handshakes"),
            (LimitReached::PeerSessions, "connections_per_address"),
            (LimitReached::IdentitySessions, "connections_per_identity"),
            (LimitReached::Sessions, "connections"),
        ];
        assert!(reasons.iter().all(|(reason, label)| reason.label() == *label));
    }

    #[test]
    fn dropped_permits_leave_no_counts() {
        let slots = slots(1, 1, 1);
        drop(slots.handshake(peer("10.0.0.1")).unwrap());
        assert!(slots.handshakes.taken.lock().is_empty());
    }
}
