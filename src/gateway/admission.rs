//! Who comes in at all: each connection is judged by where it comes from, or where the load
//! balancer says that it comes from, before a byte is sent to it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::access::{Facts, Peer, Reason};
use super::connection::Connection;
use super::listen::{self, Incoming};
use super::proxy::{self, Header, NoHeader};
use super::slots::{self, Place};
use super::{Shared, story, tell};
use crate::nbd::Offer;

/// Where a client comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    /// Whom the rules judge and limits count: the client.
    pub(super) peer: Peer,
    /// The load balancer that has said so, if one is between.
    pub(super) via: Option<Peer>,
    /// Whether it is a load balancer's own connection, as they begin one every other second to
    /// see whether a server lives.
    pub(super) is_own: bool,
}

impl Route {
    pub(super) fn direct(peer: Peer) -> Self {
        Self { peer, via: None, is_own: false }
    }

    /// What the header from `balancer` says. Addresses that mean a machine itself, or none,
    /// aren't any client's, and must not get what is this machine's by being claimed.
    fn behind(balancer: Peer, header: Header) -> Result<Self, Refusal> {
        match header {
            Header::Local => Ok(Self { is_own: true, ..Self::direct(balancer) }),
            Header::Forwarded(address) => {
                let address = address.to_canonical();
                let is_broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
                let is_special =
                    address.is_loopback() || address.is_unspecified() || address.is_multicast();
                if is_special || is_broadcast {
                    return Err(Refusal::Claim(address));
                }
                Ok(Self { via: Some(balancer), ..Self::direct(Peer::ip(address)) })
            }
        }
    }

    /// Whether it is known to be on this machine. Whoever comes through a load balancer isn't.
    fn is_local(&self) -> bool {
        self.via.is_none() && self.peer.is_local()
    }
}

/// Why a connection is closed before a byte is sent to it.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}")]
    Access(Reason),
    #[error("it is on another machine, and there is no TLS")]
    NotLocal,
    #[error("{0}")]
    Full(#[from] slots::Full),
    #[error("its address begins connections more often than allowed (--connection-rate)")]
    TooOften,
    #[error(
        "it is in --proxy-from, so that a PROXY header of version 2 has to come first, but {0}"
    )]
    NoHeader(#[from] NoHeader),
    #[error("it is in --proxy-from, and forwards {0}, which is no client's address")]
    Claim(IpAddr),
}

impl Refusal {
    /// A label for counters.
    fn label(&self) -> &'static str {
        match self {
            Self::Access(_) => "address",
            Self::NotLocal => "not_local",
            Self::Full(full) => full.label(),
            Self::TooOften => "connection_rate",
            Self::NoHeader(_) => "proxy_header",
            Self::Claim(_) => "proxy_address",
        }
    }
}

/// How far one is when a connection has been accepted.
enum Standing {
    /// It may come in.
    Admitted(Admitted),
    /// A load balancer has yet to say who it is.
    Nameless(Place),
}

/// Somebody who may come in, by where it comes from.
struct Admitted {
    route: Route,
    reason: Reason,
    place: Place,
}

/// Lets a connection in, or closes it before a byte is sent.
pub(super) fn admit<X: Offer>(
    incoming: Incoming,
    shared: &Arc<Shared<X>>,
    connections: &TaskTracker,
    shutdown: &CancellationToken,
) {
    let started = Instant::now();
    let peer = incoming.peer();
    let route = Route::direct(peer);
    let standing = if shared.config.proxies.iter().any(|place| place.contains(peer)) {
        shared.slots.nameless().map(Standing::Nameless).map_err(Refusal::from)
    } else {
        judge(route, None, shared).map(Standing::Admitted)
    };
    let standing = match standing {
        Ok(standing) => standing,
        Err(refusal) => return refuse(route, &refusal, shared),
    };
    let visitor =
        Visitor { peer, standing, started, shared: Arc::clone(shared), shutdown: shutdown.clone() };
    connections.spawn(async move {
        match incoming {
            Incoming::Tcp(stream, _) => match listen::tune(&stream) {
                Ok(()) => visitor.come_in(stream).await,
                Err(error) => tracing::debug!(%peer, "the connection is gone already: {error}"),
            },
            Incoming::Unix(stream) => visitor.come_in(stream).await,
            Incoming::Pipes(stream) => visitor.come_in(stream).await,
            Incoming::Vsock(stream, _) => visitor.come_in(stream).await,
        }
    });
}

/// Says that somebody may not come in. It is closed when its socket is dropped.
fn refuse<X>(route: Route, refusal: &Refusal, shared: &Shared<X>) {
    let Route { peer, via, is_own } = route;
    let via = via.map(tracing::field::display);
    // They come every other second, for ever, and mostly want no more than to connect.
    if is_own || matches!(refusal, Refusal::NoHeader(NoHeader::Gone)) {
        tracing::debug!(%peer, via, "the load balancer's own connection: {refusal}");
        return;
    }
    shared.refusals.count(refusal.label());
    let id = shared.next_connection.fetch_add(1, Ordering::Relaxed);
    story::refused(&shared.config.audit, id, route, refusal.label(), refusal);
    tell(&shared.chatter.refusals, |held_back| {
        tracing::warn!(id, %peer, via, held_back, "refused: {refusal}");
    });
}

/// Judges a client by where it comes from; `held` is the place that it has already.
fn judge<X>(route: Route, held: Option<Place>, shared: &Shared<X>) -> Result<Admitted, Refusal> {
    let peer = route.peer;
    let in_force = shared.policy.now();
    let policy = &in_force.policy;
    let reason = policy.rules.judge(&Facts::of_peer(peer)).map_err(Refusal::Access)?;
    // The settings were checked for this; a client that got here by some other way, such
    // as an address that was added to the machine later, is refused all the same.
    if policy.tls.is_none() && !shared.config.insecure_no_tls && !route.is_local() {
        return Err(Refusal::NotLocal);
    }
    if slots::counted_as(peer).is_some_and(|client| !shared.rates.allow(client)) {
        return Err(Refusal::TooOften);
    }
    let place = match held {
        Some(place) => shared.slots.count(place, peer)?,
        None => shared.slots.handshake(peer)?,
    };
    Ok(Admitted { route, reason, place })
}

/// A connection that has been accepted.
struct Visitor<X> {
    peer: Peer,
    standing: Standing,
    started: Instant,
    shared: Arc<Shared<X>>,
    shutdown: CancellationToken,
}

impl<X: Offer> Visitor<X> {
    /// Finds out who it is, if that isn't known, and serves it.
    async fn come_in<S>(self, mut stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Self { peer, standing, started, shared, shutdown } = self;
        let admitted = match standing {
            Standing::Admitted(admitted) => Some(admitted),
            Standing::Nameless(place) => {
                let named = named(peer, place, &mut stream, &shared);
                shutdown.run_until_cancelled(named).await.flatten()
            }
        };
        let Some(Admitted { route, reason, place: slot }) = admitted else { return };
        let id = shared.next_connection.fetch_add(1, Ordering::Relaxed);
        let via = route.via.map(tracing::field::display);
        // Who it is and what it reads are recorded when they are known. Lines of all levels are
        // to have them.
        let span = tracing::error_span!(
            "connection",
            id,
            peer = %route.peer,
            via,
            identity = tracing::field::Empty,
            export = tracing::field::Empty,
        );
        let serve = async {
            tracing::debug!("accepted: {reason}");
            let entry = shared.connections.enter(id, route);
            let live = &entry.live;
            let connection =
                Connection { shared: &shared, live, slot, started, shutdown: &shutdown };
            connection.serve(stream).await;
        };
        serve.instrument(span).await;
    }
}

/// Reads from a load balancer which client it forwards, and judges that one.
async fn named<S, X>(
    balancer: Peer,
    place: Place,
    stream: &mut S,
    shared: &Shared<X>,
) -> Option<Admitted>
where
    S: AsyncRead + Unpin,
{
    let patience = proxy::PATIENCE.min(shared.config.timeouts.handshake);
    let header = proxy::read_header(stream, patience).await.map_err(Refusal::from);
    let route = match header.and_then(|header| Route::behind(balancer, header)) {
        Ok(route) => route,
        Err(refusal) => {
            refuse(Route::direct(balancer), &refusal, shared);
            return None;
        }
    };
    let judged = judge(route, Some(place), shared);
    judged.inspect_err(|refusal| refuse(route, refusal, shared)).ok()
}
