//! Admission of connections.
//!
//! Each connection is checked against the address rules and the connection limits before a byte is
//! sent to it, and waits for a while if too many others negotiate. Behind a load balancer, the
//! address is the one in the PROXY header.

pub(crate) mod rates;
pub(crate) mod slots;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::time::Instant;

use crate::access::{AccessRequest, Peer, PeerMatcher, Reason};
use crate::config::{Config, QUEUE_TIMEOUT};
use crate::observer::Observer;
use crate::outcome::Refusal;
use crate::policy::ActivePolicy;
use crate::proxy;
use crate::route::Route;
use rates::ConnectionRateLimiter;
use slots::{PendingPermit, SlotPermit, Slots, client_key};

/// Decides which connections are served, and hands out handshake permits to them.
#[derive(Debug)]
pub(crate) struct AdmissionControl {
    policy: Arc<ActivePolicy>,
    slots: Arc<Slots>,
    rates: ConnectionRateLimiter,
    observer: Arc<Observer>,
    /// Load balancers, whose connections start with a PROXY header.
    proxies: Vec<PeerMatcher>,
    insecure_no_tls: bool,
    header_timeout: Duration,
    queue_timeout: Duration,
    next_id: AtomicU64,
}

/// Result of the checks made as soon as a connection is accepted.
pub(crate) enum Admission {
    /// The client may negotiate as soon as it has a permit.
    Client(Candidate),
    /// The peer is a load balancer whose PROXY header hasn't been read yet.
    AwaitingProxyHeader {
        /// Address of the load balancer.
        balancer: Peer,
        /// Handshake permit that isn't charged to a client yet.
        permit: PendingPermit,
    },
}

/// A connection whose address is admitted, with the reason. It may have to wait for its handshake
/// permit.
pub(crate) struct Candidate {
    route: Route,
    reason: Reason,
    permit: PendingPermit,
}

/// A connection that passed admission, with the reason and its handshake permit.
pub(crate) struct Admitted {
    pub(crate) route: Route,
    pub(crate) reason: Reason,
    pub(crate) permit: SlotPermit,
}

impl AdmissionControl {
    pub(crate) fn new(
        config: &Config,
        policy: Arc<ActivePolicy>,
        slots: Arc<Slots>,
        observer: Arc<Observer>,
    ) -> Self {
        Self {
            policy,
            slots,
            rates: ConnectionRateLimiter::new(config.limits.connection_rate),
            observer,
            proxies: config.proxies.clone(),
            insecure_no_tls: config.insecure_no_tls,
            header_timeout: proxy::HEADER_TIMEOUT.min(config.timeouts.handshake),
            // The other half of the time is for the handshake itself.
            queue_timeout: QUEUE_TIMEOUT.min(config.timeouts.handshake / 2),
            next_id: AtomicU64::new(1),
        }
    }

    /// Checks a connection that has just been accepted. Records the refusal and returns `None` if
    /// it isn't admitted.
    pub(crate) fn check(&self, peer: Peer) -> Option<Admission> {
        let route = Route::direct(peer);
        let admission = if self.proxies.iter().any(|proxy| proxy.contains(peer)) {
            let permit = self.slots.unassigned_handshake().map_err(Refusal::from);
            permit.map(|permit| Admission::AwaitingProxyHeader { balancer: peer, permit })
        } else {
            self.check_client(route, None).map(Admission::Client)
        };
        admission.inspect_err(|refusal| self.refuse(route, refusal)).ok()
    }

    /// Reads the PROXY header of a load balancer, and checks the client that it names. Records the
    /// refusal and returns `None` if the client isn't admitted.
    pub(crate) async fn read_forwarded_client<S>(
        &self,
        balancer: Peer,
        permit: PendingPermit,
        started: Instant,
        stream: &mut S,
    ) -> Option<Candidate>
    where
        S: AsyncRead + Unpin,
    {
        let named = async {
            let permit = permit.granted(started + self.queue_timeout).await?;
            let header = proxy::read_header(stream, self.header_timeout).await?;
            let route = Route::behind(balancer, header).map_err(Refusal::ForwardedAddress)?;
            Ok((route, permit))
        };
        let (route, permit) = match named.await {
            Ok(named) => named,
            Err(refusal) => {
                self.refuse(Route::direct(balancer), &refusal);
                return None;
            }
        };
        let checked = self.check_client(route, Some(permit));
        checked.inspect_err(|refusal| self.refuse(route, refusal)).ok()
    }

    /// Waits until a client that connected at the time `started` has its handshake permit. Records
    /// the refusal and returns `None` if it gets none.
    pub(crate) async fn wait_for_permit(
        &self,
        candidate: Candidate,
        started: Instant,
    ) -> Option<Admitted> {
        let Candidate { route, reason, permit } = candidate;
        let limit = permit.limit();
        if let Some(limit) = limit {
            tracing::debug!(peer = %route.peer, "waiting to negotiate: {limit}");
        }
        let admitted = async {
            let permit = permit.granted(started + self.queue_timeout).await?;
            // The policy may have changed meanwhile.
            let reason = if limit.is_some() { self.check_address(route)? } else { reason };
            Ok(Admitted { route, reason, permit })
        };
        admitted.await.inspect_err(|refusal| self.refuse(route, refusal)).ok()
    }

    /// Returns the number for the next connection.
    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Checks a client's address against the policy, the connection rate and the limits. `held` is
    /// the handshake permit that the connection holds already, if any.
    fn check_client(&self, route: Route, held: Option<SlotPermit>) -> Result<Candidate, Refusal> {
        let reason = self.check_address(route)?;
        let peer = route.peer;
        if client_key(peer).is_some_and(|client| !self.rates.allow(client)) {
            return Err(Refusal::ConnectionRate);
        }
        let permit = match held {
            Some(permit) => self.slots.assign(permit, peer)?,
            None => self.slots.handshake(peer)?,
        };
        Ok(Candidate { route, reason, permit })
    }

    /// Checks a client's address against the policy, and returns the reason for admitting it.
    fn check_address(&self, route: Route) -> Result<Reason, Refusal> {
        let active = self.policy.load();
        let policy = &active.policy;
        let request = AccessRequest::from_peer(route.peer);
        let reason = policy.rules.evaluate(&request).map_err(Refusal::Access)?;
        // The configuration was validated against this. A remote client can still arrive some
        // other way, such as through an address added to the machine later, and is refused.
        if policy.tls.is_none() && !self.insecure_no_tls && !route.is_local() {
            return Err(Refusal::NotLocal);
        }
        Ok(reason)
    }

    /// Records a refusal. The connection is closed when its socket is dropped.
    fn refuse(&self, route: Route, refusal: &Refusal) {
        self.observer.refused(route, refusal, || self.next_id());
    }
}
