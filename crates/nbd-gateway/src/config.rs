//! Validated settings, and limits with their reasons.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use humantime::format_duration;

use crate::access::{PeerMatcher, Rules};
use crate::audit::Audit;
use crate::listen::ListenAddress;
use nbd_server::{NegotiationLimits, Throttle};

/// Settings of the gateway. By default it listens on the NBD port, has no load balancers, doesn't
/// serve other machines without TLS, and emits no audit events.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Addresses to listen on. If empty: the NBD port of every address from which the rules admit
    /// clients.
    pub listen: Vec<ListenAddress>,
    /// Load balancers. A connection from one must start with a PROXY header that names the
    /// client, which is then authorized in its place.
    pub proxies: Vec<PeerMatcher>,
    /// True if clients on other machines may be served without TLS.
    pub insecure_no_tls: bool,
    /// Resource limits.
    pub limits: Limits,
    /// Timeouts.
    pub timeouts: Timeouts,
    /// Receiver of audit events.
    pub audit: Audit,
}

/// Limits on the resources that clients use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of sessions, which are connections that have chosen an export.
    pub connections: usize,
    /// Maximum number of sessions per address, or per /64 network of IPv6.
    pub connections_per_address: usize,
    /// Maximum number of sessions per identity, from any address.
    pub connections_per_identity: usize,
    /// Maximum number of handshakes, which are connections that haven't chosen an export yet.
    /// They have a separate pool, so that silent peers can't block sessions. Beyond this limit, and
    /// those per address and network, connections wait for up to [`QUEUE_TIMEOUT`] in a
    /// [queue](Self::queue).
    pub handshakes: usize,
    /// Maximum number of handshakes per address, or per /64 network of IPv6.
    pub handshakes_per_address: usize,
    /// Maximum number of handshakes per network: /24 of IPv4, /48 of IPv6.
    pub handshakes_per_network: usize,
    /// Maximum rate of new connections per address, or per /64 network of IPv6, in connections
    /// per second averaged over ten seconds.
    pub connection_rate: u32,
    /// Memory for replies in flight, over all connections, in bytes. In addition, each connection
    /// has a reserve of [`RESERVE`](nbd_server::budget::RESERVE) bytes.
    pub in_flight: u32,
    /// Maximum share of that memory per connection, in bytes. A single larger request is admitted
    /// if the connection holds nothing else of it.
    pub in_flight_per_connection: u32,
    /// Limits on the options that a client may send before it chooses an export.
    pub negotiation: NegotiationLimits,
    /// Rate limits per client.
    pub rate: Rate,
}

/// Maximum time that a connection waits for others to finish their handshakes. Longer than a rack of
/// machines that start together needs, and no longer than silent peers may take for TLS.
pub const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

impl Limits {
    /// Returns the maximum number of connections that wait to negotiate: as many as could be served.
    pub fn queue(&self) -> usize {
        self.connections
    }

    /// Returns the maximum number of them per network: with the defaults, all addresses of a /24
    /// network can connect at once.
    pub fn queue_per_network(&self) -> usize {
        self.connections.saturating_sub(self.connections / 4)
    }
}

/// Rate limits of one client, over all of its connections; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Read bandwidth, in requested bytes per second.
    pub bandwidth: Option<NonZeroU64>,
    /// Requests per second.
    pub requests: Option<NonZeroU64>,
}

impl Rate {
    /// Creates a throttle that enforces the limits; `None` if there are none.
    pub fn throttle(self) -> Option<Arc<Throttle>> {
        let is_limited = self != Self::default();
        is_limited.then(|| Arc::new(Throttle::new(self.bandwidth, self.requests)))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            connections_per_address: 64,
            connections_per_identity: 64,
            handshakes: 128,
            handshakes_per_address: 32,
            handshakes_per_network: 64,
            connection_rate: 100,
            in_flight: 32 * 1024 * 1024,
            in_flight_per_connection: 8 * 1024 * 1024,
            negotiation: NegotiationLimits::default(),
            rate: Rate::default(),
        }
    }
}

impl fmt::Display for Limits {
    /// Writes all limits, by the names of their options.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes: u64| ByteSize(bytes).display().iec();
        write!(
            f,
            "max-connections {}, max-connections-per-address {}, max-connections-per-identity {}, \
             max-handshakes {}, max-handshakes-per-address {}, max-handshakes-per-network {}, \
             connection-rate {}/s, max-in-flight {}, max-in-flight-per-connection {}, \
             max-options {}, max-option-bytes {}",
            self.connections,
            self.connections_per_address,
            self.connections_per_identity,
            self.handshakes,
            self.handshakes_per_address,
            self.handshakes_per_network,
            self.connection_rate,
            size(self.in_flight.into()),
            size(self.in_flight_per_connection.into()),
            self.negotiation.options,
            size(self.negotiation.option_bytes),
        )?;
        match self.rate.bandwidth {
            Some(bytes) => write!(f, ", max-bandwidth {}/s", size(bytes.get()))?,
            None => f.write_str(", max-bandwidth none")?,
        }
        match self.rate.requests {
            Some(requests) => write!(f, ", max-requests {requests}/s"),
            None => f.write_str(", max-requests none"),
        }
    }
}

/// Timeouts of the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Time from accepting a connection until it has chosen an export, including TLS.
    pub handshake: Duration,
    /// Time for the TLS handshake alone.
    pub tls_handshake: Duration,
    /// Time for a client to read something while its unread replies hold memory that others need,
    /// and for a leaving client to read its last replies.
    pub stall: Duration,
    /// Time for a client to send a request while no reply is pending.
    pub idle: Option<Duration>,
    /// Time from the shutdown signal to the end of the process, whatever clients do.
    pub shutdown: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(30),
            tls_handshake: Duration::from_secs(10),
            stall: Duration::from_secs(10),
            idle: None,
            shutdown: Duration::from_secs(10),
        }
    }
}

impl fmt::Display for Timeouts {
    /// Writes all timeouts, by the names of their options.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { handshake, tls_handshake, stall, idle, shutdown } = *self;
        write!(
            f,
            "handshake-timeout {}, tls-handshake-timeout {}, stall-timeout {}, idle-timeout ",
            format_duration(handshake),
            format_duration(tls_handshake),
            format_duration(stall),
        )?;
        match idle {
            Some(idle) => format_duration(idle).fmt(f)?,
            None => f.write_str("none")?,
        }
        write!(f, ", shutdown-timeout {}", format_duration(shutdown))
    }
}

/// Settings that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The rules admit clients on other machines, but there is no TLS.
    #[error("the rules admit remote clients ({0}), but TLS is not configured")]
    AllowWithoutTls(String),
    /// A socket can be reached from other machines, but there is no TLS.
    #[error("{0} is reachable from other machines, but TLS is not configured")]
    ListenWithoutTls(ListenAddress),
}

impl ConfigError {
    /// Returns the stable label for log fields.
    pub fn label(&self) -> &'static str {
        match self {
            Self::AllowWithoutTls(_) => "remote_clients_without_tls",
            Self::ListenWithoutTls(_) => "remote_listener_without_tls",
        }
    }
}

impl Config {
    /// Checks that other machines aren't served without TLS, unless explicitly allowed.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn check(&self, rules: &Rules, has_tls: bool) -> Result<(), ConfigError> {
        if has_tls || self.insecure_no_tls {
            return Ok(());
        }
        if let Some(exposed) = self.listen.iter().find(|address| !address.is_local()) {
            return Err(ConfigError::ListenWithoutTls(exposed.clone()));
        }
        if !rules.is_local_only() {
            return Err(ConfigError::AllowWithoutTls(rules.to_string()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::CommandLineRules;

    fn may_serve(listen: &[&str], allow: &[&str], insecure_no_tls: bool, has_tls: bool) -> bool {
        let config = Config {
            listen: listen.iter().map(|text| text.parse().unwrap()).collect(),
            proxies: Vec::new(),
            insecure_no_tls,
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            audit: Audit::disabled(),
        };
        let allow = allow.iter().map(|text| text.parse().unwrap()).collect();
        let options = CommandLineRules { allow, ..CommandLineRules::default() };
        config.check(&Rules::from_command_line(&options), has_tls).is_ok()
    }

    #[test]
    fn remote_clients_need_tls_or_an_explicit_exception() {
        assert!(may_serve(&[], &[], false, false));
        assert!(may_serve(&["unix:/x"], &[], false, false));
        assert!(!may_serve(&["0.0.0.0:1"], &[], false, false));
        assert!(may_serve(&["[::ffff:127.0.0.1]:1"], &[], false, false));
        assert!(!may_serve(&[], &["10.0.0.0/8"], false, false));
        assert!(!may_serve(&["127.0.0.1:1"], &["10.0.0.0/8"], false, false));
        assert!(may_serve(&["0.0.0.0:1"], &["10.0.0.0/8"], true, false));
        assert!(may_serve(&["0.0.0.0:1"], &["10.0.0.0/8"], false, true));
    }
}
