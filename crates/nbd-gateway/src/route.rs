//! Network origin of a connection.

use std::net::IpAddr;

use crate::access::Peer;
use crate::proxy::ProxyHeader;

/// Network origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    /// Address of the client, which the access rules and the limits apply to.
    pub(crate) peer: Peer,
    /// Load balancer that forwarded the connection and reported `peer`, if any.
    pub(crate) via: Option<Peer>,
    /// True for a load balancer's own connection (the PROXY command `LOCAL`): a health check,
    /// typically opened every other second.
    pub(crate) is_health_check: bool,
}

impl Route {
    pub(crate) fn direct(peer: Peer) -> Self {
        Self { peer, via: None, is_health_check: false }
    }

    /// Derives the route from a PROXY header sent by `balancer`.
    ///
    /// # Errors
    /// Loopback, unspecified, multicast and broadcast addresses are returned as the error. They
    /// belong to no remote client, and claiming one must not grant what is reserved for this
    /// machine.
    pub(crate) fn behind(balancer: Peer, header: ProxyHeader) -> Result<Self, IpAddr> {
        match header {
            ProxyHeader::Local => Ok(Self { is_health_check: true, ..Self::direct(balancer) }),
            ProxyHeader::Forwarded(address) => {
                let address = address.to_canonical();
                let is_broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
                let is_special =
                    address.is_loopback() || address.is_unspecified() || address.is_multicast();
                if is_special || is_broadcast {
                    return Err(address);
                }
                Ok(Self { via: Some(balancer), ..Self::direct(Peer::ip(address)) })
            }
        }
    }

    /// Returns true if the client is known to be on this machine. A forwarded client never is.
    pub(crate) fn is_local(&self) -> bool {
        self.via.is_none() && self.peer.is_local()
    }
}
