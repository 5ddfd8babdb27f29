//! Admission of connections.
//!
//! Each connection is checked against the address rules and the connection limits before a byte is
//! sent to it. Behind a load balancer, the address is the one in the PROXY header.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::access::{AccessRequest, Peer, Reason};
use super::connection::Connection;
use super::listen::{self, IncomingConnection};
use super::proxy::{self, ProxyHeader, ReadHeaderError};
use super::slots::{self, Place};
use super::{Shared, story, tell};
use nbd_server::ExportCatalog;

/// Network origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    /// Address of the client, which the access rules and the limits apply to.
    pub(super) peer: Peer,
    /// Load balancer that forwarded the connection and reported `peer`, if any.
    pub(super) via: Option<Peer>,
    /// True for a load balancer's own connection (the PROXY command `LOCAL`): a health check,
    /// typically opened every other second.
    pub(super) is_own: bool,
}

impl Route {
    pub(super) fn direct(peer: Peer) -> Self {
        Self { peer, via: None, is_own: false }
    }

    /// Derives the route from a PROXY header sent by `balancer`.
    ///
    /// Loopback, unspecified, multicast and broadcast addresses are refused. They belong to no
    /// remote client, and claiming one must not grant what is reserved for this machine.
    fn behind(balancer: Peer, header: ProxyHeader) -> Result<Self, Refusal> {
        match header {
            ProxyHeader::Local => Ok(Self { is_own: true, ..Self::direct(balancer) }),
            ProxyHeader::Forwarded(address) => {
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

    /// Returns true if the client is known to be on this machine. A forwarded client never is.
    fn is_local(&self) -> bool {
        self.via.is_none() && self.peer.is_local()
    }
}

/// Reason for closing a connection before a byte is sent to it.
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
    NoHeader(#[from] ReadHeaderError),
    #[error("it is in --proxy-from, and forwards {0}, which is no client's address")]
    Claim(IpAddr),
}

impl Refusal {
    /// Returns the stable label that counters and audit events use.
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

/// Result of the checks made as soon as a connection is accepted.
enum Standing {
    /// The connection is admitted.
    Admitted(Admitted),
    /// The peer is a load balancer whose PROXY header hasn't been read yet.
    Nameless(Place),
}

/// A connection that passed admission, with the reason and its handshake permit.
struct Admitted {
    route: Route,
    reason: Reason,
    place: Place,
}

/// Admits a connection and spawns the task that serves it, or closes it before a byte is sent.
pub(super) fn admit<X: ExportCatalog>(
    incoming: IncomingConnection,
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
            IncomingConnection::Tcp(stream, _) => match listen::configure_tcp_stream(&stream) {
                Ok(()) => visitor.come_in(stream).await,
                Err(error) => tracing::debug!(%peer, "the connection is gone already: {error}"),
            },
            IncomingConnection::Unix(stream) => visitor.come_in(stream).await,
            IncomingConnection::Pipes(stream) => visitor.come_in(stream).await,
            IncomingConnection::Vsock(stream, _) => visitor.come_in(stream).await,
        }
    });
}

/// Records a refusal in the counters, the audit and the log. The connection is closed when its
/// socket is dropped.
fn refuse<X>(route: Route, refusal: &Refusal, shared: &Shared<X>) {
    let Route { peer, via, is_own } = route;
    let via = via.map(tracing::field::display);
    // Health checks arrive every other second, and most of them only connect.
    if is_own || matches!(refusal, Refusal::NoHeader(ReadHeaderError::ClosedAtOnce)) {
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

/// Checks a client's address against the policy, the connection rate and the limits. `held` is the
/// handshake permit that the connection holds already, if any.
fn judge<X>(route: Route, held: Option<Place>, shared: &Shared<X>) -> Result<Admitted, Refusal> {
    let peer = route.peer;
    let in_force = shared.policy.now();
    let policy = &in_force.policy;
    let reason = policy.rules.evaluate(&AccessRequest::from_peer(peer)).map_err(Refusal::Access)?;
    // The configuration was validated against this. A remote client can still arrive some other
    // way, such as through an address added to the machine later, and is refused.
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

/// An accepted connection that is about to be served by its own task.
struct Visitor<X> {
    peer: Peer,
    standing: Standing,
    started: Instant,
    shared: Arc<Shared<X>>,
    shutdown: CancellationToken,
}

impl<X: ExportCatalog> Visitor<X> {
    /// Reads the PROXY header first where one is expected, then serves the connection.
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
        // Identity and export are recorded once they are known. The span has level ERROR so that
        // log lines of all levels carry its fields.
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

/// Reads the PROXY header of a load balancer and checks the client that it forwards.
async fn named<S, X>(
    balancer: Peer,
    place: Place,
    stream: &mut S,
    shared: &Shared<X>,
) -> Option<Admitted>
where
    S: AsyncRead + Unpin,
{
    let patience = proxy::HEADER_TIMEOUT.min(shared.config.timeouts.handshake);
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
