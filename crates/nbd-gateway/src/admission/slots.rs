//! Connection limits: a pool of permits for connections that negotiate, another for those that are
//! served. No address, network or identity can take all permits of a pool.
//!
//! A connection that gets no permit to negotiate waits in a queue, since most handshakes take
//! milliseconds: machines of a rack that start together all get in.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::access::{Identity, Peer};
use crate::config::Limits;

/// Both pools of permits.
#[derive(Debug)]
pub(crate) struct Slots {
    handshakes: Arc<Pool>,
    sessions: Arc<Pool>,
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
            handshakes: Pool::new(limits.handshakes, LimitReached::Handshakes),
            sessions: Pool::new(limits.connections, LimitReached::Sessions),
            limits: *limits,
        }
    }

    /// Returns the number of connections that are being served.
    pub(crate) fn active_sessions(&self) -> usize {
        self.limits.connections.saturating_sub(self.sessions.free())
    }

    /// Acquires a handshake permit for `peer`, or queues for one.
    pub(crate) fn handshake(&self, peer: Peer) -> Result<PendingPermit, LimitReached> {
        self.check_sessions()?;
        self.handshakes.acquire_or_queue(self.shares_of(peer), self.limits.queue())
    }

    /// Acquires a handshake permit for a connection whose client the load balancer hasn't named
    /// yet, or queues for one. It counts against the pool alone, because all clients come from the
    /// balancer's address.
    pub(crate) fn unassigned_handshake(&self) -> Result<PendingPermit, LimitReached> {
        self.check_sessions()?;
        self.handshakes.acquire_or_queue(Vec::new(), self.limits.queue())
    }

    /// Charges a handshake permit to `peer`, now that the client is known. If that isn't possible,
    /// returns the permit to the pool and queues for another one.
    pub(crate) fn assign(
        &self,
        mut permit: SlotPermit,
        peer: Peer,
    ) -> Result<PendingPermit, LimitReached> {
        let shares = self.shares_of(peer);
        if permit.charge(&shares).is_ok() {
            return Ok(PendingPermit::Granted(permit));
        }
        drop(permit);
        self.handshakes.acquire_or_queue(shares, self.limits.queue())
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
            shares.push(Share {
                holder: PermitHolder::Client(client),
                most: self.limits.connections_per_address,
                most_queued: 0,
                full: LimitReached::PeerSessions,
            });
        }
        if let Some(identity) = identity {
            shares.push(Share {
                holder: PermitHolder::Identity(identity.to_string()),
                most: self.limits.connections_per_identity,
                most_queued: 0,
                full: LimitReached::IdentitySessions,
            });
        }
        self.sessions.acquire(&shares)
    }

    /// Checks that a client could be served in the end; otherwise it needn't negotiate.
    fn check_sessions(&self) -> Result<(), LimitReached> {
        if self.sessions.free() == 0 { Err(LimitReached::Sessions) } else { Ok(()) }
    }

    /// Returns the holders that a handshake permit of `peer` is charged to.
    fn shares_of(&self, peer: Peer) -> Vec<Share> {
        let Some(client) = client_key(peer) else { return Vec::new() };
        let mut shares = vec![Share {
            holder: PermitHolder::Client(client),
            most: self.limits.handshakes_per_address,
            // More couldn't be served.
            most_queued: self.limits.connections_per_address,
            full: LimitReached::PeerHandshakes,
        }];
        if let ClientKey::Address(address) = client {
            shares.push(Share {
                holder: PermitHolder::Network(network_of(address)),
                most: self.limits.handshakes_per_network,
                most_queued: self.limits.queue_per_network(),
                full: LimitReached::NetworkHandshakes,
            });
        }
        shares
    }
}

/// Key under which permits are counted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum PermitHolder {
    Client(ClientKey),
    Network(IpAddr),
    Identity(String),
}

/// A holder that a permit is charged to, with its limits.
#[derive(Debug)]
struct Share {
    holder: PermitHolder,
    /// Maximum number of permits.
    most: usize,
    /// Maximum number of connections in the queue.
    most_queued: usize,
    /// Error if the holder has `most` permits.
    full: LimitReached,
}

#[derive(Debug)]
struct Pool {
    state: Mutex<PoolState>,
    /// Error if there is no permit left.
    full: LimitReached,
}

#[derive(Debug)]
struct PoolState {
    /// Number of permits that nobody has.
    free: usize,
    /// Number of permits that each holder has.
    taken: HashMap<PermitHolder, usize>,
    /// Connections that wait for a permit, in the order of their arrival. As soon as one of them
    /// could have a permit, it gets it.
    queue: VecDeque<QueuedConnection>,
}

#[derive(Debug)]
struct QueuedConnection {
    shares: Vec<Share>,
    granted: oneshot::Sender<SlotPermit>,
}

impl Pool {
    fn new(permits: usize, full: LimitReached) -> Arc<Self> {
        let state = PoolState { free: permits, taken: HashMap::new(), queue: VecDeque::new() };
        Arc::new(Self { state: Mutex::new(state), full })
    }

    fn free(&self) -> usize {
        self.state.lock().free
    }

    /// Acquires a permit that is charged to each holder.
    fn acquire(self: &Arc<Self>, shares: &[Share]) -> Result<SlotPermit, LimitReached> {
        let holders = self.state.lock().take(shares, self.full)?;
        Ok(SlotPermit { holders, pool: Arc::clone(self) })
    }

    /// Acquires a permit, or queues for one if the queue has fewer than `most_queued` connections
    /// and each holder fewer than its share of them.
    fn acquire_or_queue(
        self: &Arc<Self>,
        shares: Vec<Share>,
        most_queued: usize,
    ) -> Result<PendingPermit, LimitReached> {
        let mut state = self.state.lock();
        let reached = match state.take(&shares, self.full) {
            Ok(holders) => {
                let permit = SlotPermit { holders, pool: Arc::clone(self) };
                return Ok(PendingPermit::Granted(permit));
            }
            Err(reached) => reached,
        };
        state.queue.retain(|queued| !queued.granted.is_closed());
        let has_room = |share: &Share| {
            let is_holder = |queued: &&QueuedConnection| {
                queued.shares.iter().any(|other| other.holder == share.holder)
            };
            state.queue.iter().filter(is_holder).count() < share.most_queued
        };
        if state.queue.len() >= most_queued || !shares.iter().all(has_room) {
            return Err(reached);
        }
        let (granted, permit) = oneshot::channel();
        state.queue.push_back(QueuedConnection { shares, granted });
        Ok(PendingPermit::Queued { permit, reached })
    }

    /// Returns a permit to the pool, and grants it to the first connection in the queue that can
    /// have it. There is at most one more that can.
    fn release(self: &Arc<Self>, holders: &[PermitHolder]) {
        let mut state = self.state.lock();
        state.put_back(holders);
        let Some((queued, holders)) = state.take_for_queued(self.full) else { return };
        // Sending may drop the permit, which takes the lock.
        drop(state);
        let permit = SlotPermit { holders, pool: Arc::clone(self) };
        // If the connection has just given up, dropping the permit grants it to the next one.
        drop(queued.granted.send(permit));
    }
}

impl PoolState {
    /// Takes a permit and charges it, unless there is none or a holder has reached its limit.
    fn take(
        &mut self,
        shares: &[Share],
        full: LimitReached,
    ) -> Result<Vec<PermitHolder>, LimitReached> {
        if self.free == 0 {
            return Err(full);
        }
        let holders = self.charge(shares)?;
        self.free -= 1;
        Ok(holders)
    }

    fn charge(&mut self, shares: &[Share]) -> Result<Vec<PermitHolder>, LimitReached> {
        let is_full = |share: &&Share| {
            self.taken.get(&share.holder).is_some_and(|count| *count >= share.most)
        };
        if let Some(share) = shares.iter().find(is_full) {
            return Err(share.full);
        }
        let holders: Vec<_> = shares.iter().map(|share| share.holder.clone()).collect();
        for holder in &holders {
            *self.taken.entry(holder.clone()).or_default() += 1;
        }
        Ok(holders)
    }

    fn put_back(&mut self, holders: &[PermitHolder]) {
        self.free += 1;
        for holder in holders {
            if let Some(count) = self.taken.get_mut(holder) {
                *count -= 1;
                if *count == 0 {
                    self.taken.remove(holder);
                }
            }
        }
    }

    /// Takes a permit for the first connection in the queue that still waits and can have it.
    fn take_for_queued(
        &mut self,
        full: LimitReached,
    ) -> Option<(QueuedConnection, Vec<PermitHolder>)> {
        let mut queue = std::mem::take(&mut self.queue);
        queue.retain(|queued| !queued.granted.is_closed());
        let taken = queue
            .iter()
            .enumerate()
            .find_map(|(position, queued)| Some((position, self.take(&queued.shares, full).ok()?)));
        let granted = taken
            .and_then(|(position, holders)| queue.remove(position).map(|queued| (queued, holders)));
        self.queue = queue;
        granted
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

/// A permit, or a place in the queue for one.
#[derive(Debug)]
pub(crate) enum PendingPermit {
    Granted(SlotPermit),
    Queued {
        permit: oneshot::Receiver<SlotPermit>,
        /// Limit that keeps it waiting.
        reached: LimitReached,
    },
}

impl PendingPermit {
    /// Returns the limit that keeps the connection waiting, if it does.
    pub(crate) fn limit(&self) -> Option<LimitReached> {
        match self {
            Self::Granted(_) => None,
            Self::Queued { reached, .. } => Some(*reached),
        }
    }

    /// Waits until the permit is granted, but not beyond `deadline`.
    ///
    /// # Errors
    /// The limit that was reached when the connection arrived.
    pub(crate) async fn granted(self, deadline: Instant) -> Result<SlotPermit, LimitReached> {
        match self {
            Self::Granted(permit) => Ok(permit),
            Self::Queued { permit, reached } => match timeout_at(deadline, permit).await {
                Ok(Ok(permit)) => Ok(permit),
                Ok(Err(_)) | Err(_) => Err(reached),
            },
        }
    }
}

/// A permit; dropping it returns it to its pool.
#[derive(Debug)]
pub(crate) struct SlotPermit {
    holders: Vec<PermitHolder>,
    pool: Arc<Pool>,
}

impl SlotPermit {
    /// Charges a permit without holders to each of these, unless one has reached its limit.
    fn charge(&mut self, shares: &[Share]) -> Result<(), LimitReached> {
        self.holders = self.pool.state.lock().charge(shares)?;
        Ok(())
    }
}

impl Drop for SlotPermit {
    fn drop(&mut self) {
        self.pool.release(&self.holders);
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

    /// The permit, if it was granted at once.
    fn at_once(pending: Result<PendingPermit, LimitReached>) -> Result<SlotPermit, LimitReached> {
        match pending? {
            PendingPermit::Granted(permit) => Ok(permit),
            PendingPermit::Queued { reached, .. } => Err(reached),
        }
    }

    fn handshake(slots: &Slots, address: &str) -> Result<SlotPermit, LimitReached> {
        at_once(slots.handshake(peer(address)))
    }

    fn peer(address: &str) -> Peer {
        Peer::ip(address.parse().unwrap())
    }

    #[test]
    fn one_address_cannot_take_all_handshake_permits() {
        let slots = slots(10, 3, 2);
        let first = handshake(&slots, "10.0.0.1").unwrap();
        let _second = handshake(&slots, "10.0.0.1").unwrap();
        assert_eq!(handshake(&slots, "10.0.0.1").unwrap_err(), LimitReached::PeerHandshakes);
        let _other = handshake(&slots, "10.0.0.2").unwrap();
        assert_eq!(handshake(&slots, "10.0.0.3").unwrap_err(), LimitReached::Handshakes);
        drop(first);
        assert!(handshake(&slots, "10.0.0.1").is_ok());
    }

    #[test]
    fn one_network_cannot_take_all_handshake_permits() {
        let limits = Limits { handshakes_per_network: 2, ..Limits::default() };
        let slots = Slots::new(&limits);
        let _taken = ["10.0.0.1", "10.0.0.2", "2001:db8:1:1::", "2001:db8:1:2::"]
            .map(|address| handshake(&slots, address).unwrap());
        for address in ["10.0.0.3", "2001:db8:1:3::"] {
            assert_eq!(handshake(&slots, address).unwrap_err(), LimitReached::NetworkHandshakes);
        }
        for address in ["10.0.1.1", "2001:db8:2:1::"] {
            assert!(handshake(&slots, address).is_ok());
        }
    }

    #[test]
    fn one_address_cannot_take_all_session_permits() {
        let slots = slots(3, 9, 2);
        let served =
            |address| slots.session(handshake(&slots, address).unwrap(), peer(address), None);
        assert_eq!(slots.active_sessions(), 0);
        let first = served("10.0.0.1").unwrap();
        let _second = served("10.0.0.1").unwrap();
        assert_eq!(served("10.0.0.1").unwrap_err(), LimitReached::PeerSessions);
        assert_eq!(slots.active_sessions(), 2);
        let _other = served("10.0.0.2").unwrap();
        assert_eq!(handshake(&slots, "10.0.0.3").unwrap_err(), LimitReached::Sessions);
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
            slots.session(handshake(&slots, address).unwrap(), peer(address), Some(who))
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
        let _one = handshake(&slots, "2001:db8::1").unwrap();
        assert_eq!(handshake(&slots, "2001:db8::2:1").unwrap_err(), LimitReached::PeerHandshakes);
        assert!(handshake(&slots, "2001:db8:0:1::1").is_ok());
        let unix = [(); 2].map(|()| at_once(slots.handshake(Peer::Unix)));
        assert!(unix.iter().all(Result::is_ok));
    }

    #[test]
    fn virtual_machines_are_counted_separately() {
        let slots = slots(10, 10, 1);
        let handshake = |cid| at_once(slots.handshake(Peer::Vsock(cid)));
        let _one = handshake(3).unwrap();
        assert_eq!(handshake(3).unwrap_err(), LimitReached::PeerHandshakes);
        assert!(handshake(4).is_ok());
    }

    /// Behind a load balancer, the holder is known only after the permit was acquired.
    #[test]
    fn unassigned_permit_is_charged_once_the_client_is_known() {
        let slots = slots(10, 4, 2);
        let acquire = || at_once(slots.unassigned_handshake());
        let mut unassigned = [(); 4].map(|()| acquire().unwrap()).into_iter();
        assert_eq!(acquire().unwrap_err(), LimitReached::Handshakes);
        let mut count = |address| at_once(slots.assign(unassigned.next().unwrap(), peer(address)));
        let first = count("10.0.0.1").unwrap();
        let _second = count("10.0.0.1").unwrap();
        assert_eq!(count("10.0.0.1").unwrap_err(), LimitReached::PeerHandshakes);
        let _other = count("10.0.0.2").unwrap();
        // The refused permit was returned, and is charged to no holder.
        drop(first);
        assert!(handshake(&slots, "10.0.0.1").is_ok());
        assert_eq!(slots.handshakes.free(), 2);
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
        drop(handshake(&slots, "10.0.0.1").unwrap());
        assert!(slots.handshakes.state.lock().taken.is_empty());
    }

    const SECOND: std::time::Duration = std::time::Duration::from_secs(1);

    /// Returns true if the permit is granted within a second of the paused clock.
    async fn is_granted(pending: PendingPermit) -> Option<SlotPermit> {
        pending.granted(Instant::now() + SECOND).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn permits_are_granted_in_the_order_of_arrival() {
        let slots = slots(10, 1, 5);
        let first = handshake(&slots, "10.0.0.1").unwrap();
        let [second, third] =
            ["10.0.0.2", "10.0.0.3"].map(|address| slots.handshake(peer(address)).unwrap());
        assert_eq!(third.limit(), Some(LimitReached::Handshakes));
        drop(first);
        // It was granted before anybody else could take it.
        assert!(handshake(&slots, "10.0.0.4").is_err());
        let second = is_granted(second).await.unwrap();
        drop(second);
        assert!(is_granted(third).await.is_some());
        assert!(handshake(&slots, "10.0.0.4").is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_at_its_limit_keeps_nobody_else_waiting() {
        let limits = Limits { handshakes: 3, handshakes_per_network: 2, ..Limits::default() };
        let slots = Slots::new(&limits);
        let _first = handshake(&slots, "10.0.0.1").unwrap();
        let second = handshake(&slots, "10.0.0.2").unwrap();
        let same = slots.handshake(peer("10.0.0.3")).unwrap();
        assert_eq!(same.limit(), Some(LimitReached::NetworkHandshakes));
        let other = handshake(&slots, "10.0.1.1").unwrap();
        let behind = slots.handshake(peer("10.0.2.1")).unwrap();
        // The first in the queue can't have it.
        drop(other);
        assert!(is_granted(behind).await.is_some());
        drop(second);
        assert!(is_granted(same).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_at_the_deadline() {
        let slots = slots(10, 1, 5);
        let first = handshake(&slots, "10.0.0.1").unwrap();
        let queue = || slots.handshake(peer("10.0.0.2")).unwrap();
        let (gone, second, third) = (queue(), queue(), queue());
        drop(gone);
        let began = Instant::now();
        let ended = second.granted(began + SECOND).await;
        assert_eq!((ended.unwrap_err(), began.elapsed()), (LimitReached::Handshakes, SECOND));
        // The permit passes by those that don't wait any more.
        drop(first);
        assert!(is_granted(third).await.is_some());
        assert!(handshake(&slots, "10.0.0.1").is_ok());
    }

    #[test]
    fn the_queue_is_bounded_in_total_per_network_and_per_address() {
        let limits = Limits {
            connections: 8,
            connections_per_address: 2,
            handshakes: 1,
            ..Limits::default()
        };
        let slots = Slots::new(&limits);
        let _taken = handshake(&slots, "10.0.0.1").unwrap();
        let mut queued = Vec::new();
        let mut queue = |address: &str| {
            let pending = slots.handshake(peer(address));
            pending.map(|pending| queued.push(pending)).is_ok()
        };
        assert_eq!([(); 3].map(|()| queue("10.0.0.1")), [true, true, false]);
        assert_eq!([(); 2].map(|()| queue("10.0.0.2")), [true, true]);
        assert_eq!([(); 2].map(|()| queue("10.0.0.3")), [true, true]);
        assert!(!queue("10.0.0.4"));
        assert_eq!([(); 2].map(|()| queue("10.0.1.1")), [true, true]);
        assert!(!queue("10.0.2.1"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_behind_a_balancer_queues_without_a_permit() {
        let slots = slots(10, 2, 1);
        let first = handshake(&slots, "10.0.0.1").unwrap();
        let unassigned = at_once(slots.unassigned_handshake()).unwrap();
        let pending = slots.assign(unassigned, peer("10.0.0.1")).unwrap();
        assert_eq!(pending.limit(), Some(LimitReached::PeerHandshakes));
        let _other = handshake(&slots, "10.0.0.2").unwrap();
        drop(first);
        assert!(is_granted(pending).await.is_some());
    }
}
