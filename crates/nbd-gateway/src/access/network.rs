//! The origin of connections, and the networks and other origins that rules match.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

use nbd_telemetry::escape;

/// Origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A client on the network; never an IPv4-mapped IPv6 address.
    Ip(IpAddr),
    /// A client on a Unix socket, authorized by the socket's file permissions.
    Unix,
    /// A virtual machine of this host, or its host, with this context ID (vsock).
    Vsock(u32),
}

impl Peer {
    /// Returns the peer at `address`; an IPv4-mapped IPv6 address becomes the IPv4 address.
    pub fn ip(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }

    /// Returns true if data sent to the peer stays within this machine's memory, where nobody can
    /// intercept it. That alone doesn't authorize the peer: a virtual machine is another machine.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Ip(address) => address.is_loopback(),
            Self::Unix | Self::Vsock(_) => true,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
            Self::Vsock(cid) => write!(f, "vsock:{cid}"),
        }
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(PeerMatcher::Unix) => Ok(Self::Unix),
            Ok(PeerMatcher::Vsock(Some(cid))) => Ok(Self::Vsock(cid)),
            // Rules have no zones, so the zone is dropped.
            _ => text
                .split_once('%')
                .filter(|(address, _)| address.parse::<Ipv6Addr>().is_ok())
                .map_or(text, |(address, _)| address)
                .parse()
                .map(Self::ip)
                .map_err(|_| "expected an address such as 10.1.2.3, unix, or vsock:CID".to_owned()),
        }
    }
}

/// A network in CIDR notation, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(IpNet);

impl Network {
    fn contains(&self, address: &IpAddr) -> bool {
        self.0.contains(address)
    }

    /// Returns the loopback networks.
    pub(super) fn loopback() -> [Self; 2] {
        const BITS: u8 = 8;
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), BITS);
        [Self(v4.into()), Self(IpAddr::V6(Ipv6Addr::LOCALHOST).into())]
    }

    /// Returns true if every address in the network is a loopback address.
    pub fn is_loopback(&self) -> bool {
        self.0.network().is_loopback() && self.0.broadcast().is_loopback()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reason why a text isn't a valid network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// The text isn't a network or an address.
    #[error(
        "invalid network {:?}: expected for example 10.0.0.0/8, 192.0.2.7 or 2001:db8::/32",
        escape::name(.0)
    )]
    Invalid(String),
    /// The address has a zone, which names an interface.
    #[error(
        "{:?} has a zone, which rules don't support: without it, the rule applies to the address on \
         every interface; to serve one interface only, listen on its address",
        escape::name(.0)
    )]
    Zone(String),
    /// Bits behind the prefix are set, so it isn't clear what was meant.
    #[error(
        "{:?} has host bits set: use {network} for the network, or {address} for the single address",
        escape::name(.given)
    )]
    HostBits {
        /// Text as given.
        given: String,
        /// Network that contains the address.
        network: IpNet,
        /// The address alone.
        address: IpAddr,
    },
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let unreadable = || NetworkError::Invalid(text.to_owned());
        if let Some((address, _)) = text.split_once('%')
            && address.parse::<Ipv6Addr>().is_ok()
        {
            return Err(NetworkError::Zone(text.to_owned()));
        }
        // `IpNet` reads 010.0.0.0 as 10.0.0.0, other parsers as 8.0.0.0. The address part must
        // therefore be a valid `IpAddr`.
        let address = text.split_once('/').map_or(text, |(address, _)| address);
        let address = address.parse::<IpAddr>().map_err(|_| unreadable())?;
        let network = match text.parse::<IpNet>() {
            Ok(network) => network,
            Err(_) if text.contains('/') => return Err(unreadable()),
            Err(_) => IpNet::from(address),
        };
        if network.trunc() != network {
            return Err(NetworkError::HostBits {
                given: text.to_owned(),
                network: network.trunc(),
                address: network.addr(),
            });
        }
        Ok(Self(canonical(network)))
    }
}

/// Converts an IPv4-mapped network to IPv4, since IPv4-mapped addresses are treated as IPv4.
fn canonical(network: IpNet) -> IpNet {
    const MAPPED_PREFIX: u8 = 96;
    if let IpNet::V6(mapped) = network
        && let Some(address) = mapped.network().to_ipv4_mapped()
        && let Some(prefix) = mapped.prefix_len().checked_sub(MAPPED_PREFIX)
        && let Ok(v4) = Ipv4Net::new(address, prefix)
    {
        return IpNet::V4(v4);
    }
    network
}

/// Origin of connections that a rule matches: a network, this machine's Unix sockets, or the
/// virtual machines on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerMatcher {
    /// A network, or a single address.
    Network(Network),
    /// The Unix sockets, whose file permissions determine which local users can connect.
    Unix,
    /// Virtual machines and their host, by vsock: the one with this context ID, or all of them.
    Vsock(Option<u32>),
}

impl PeerMatcher {
    /// Returns true if `peer` comes from this origin.
    pub fn contains(&self, peer: Peer) -> bool {
        match (self, peer) {
            (Self::Network(network), Peer::Ip(address)) => network.contains(&address),
            (Self::Unix, Peer::Unix) => true,
            (Self::Vsock(cid), Peer::Vsock(from)) => cid.is_none_or(|cid| cid == from),
            _ => false,
        }
    }

    /// Returns true if all matching peers are local, in the sense of [`Peer::is_local`].
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Network(network) => network.is_loopback(),
            Self::Unix | Self::Vsock(_) => true,
        }
    }
}

impl fmt::Display for PeerMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Unix => f.write_str("unix"),
            Self::Vsock(None) => f.write_str("vsock"),
            Self::Vsock(Some(cid)) => write!(f, "vsock:{cid}"),
        }
    }
}

impl From<Network> for PeerMatcher {
    fn from(network: Network) -> Self {
        Self::Network(network)
    }
}

/// Reason why a text isn't a valid origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerMatcherError {
    /// The text is neither a network nor one of the keywords.
    #[error("{0}, or unix, vsock, vsock:CID")]
    Invalid(NetworkError),
    /// The text is a network with a zone, or with bits set behind its prefix.
    #[error(transparent)]
    Network(NetworkError),
    /// The text after `vsock:` isn't a context ID.
    #[error(
        "invalid context ID in {:?}: expected for example vsock:3, or vsock for all of them",
        escape::name(.0)
    )]
    InvalidCid(String),
}

impl FromStr for PeerMatcher {
    type Err = PeerMatcherError;

    fn from_str(text: &str) -> Result<Self, PeerMatcherError> {
        if let Some(cid) = text.strip_prefix("vsock:") {
            // The kernel uses the highest number as a wildcard; no machine has it.
            let cid = parse_cid(cid).filter(|cid| *cid != u32::MAX);
            return cid
                .map(|cid| Self::Vsock(Some(cid)))
                .ok_or_else(|| PeerMatcherError::InvalidCid(text.to_owned()));
        }
        match text {
            "unix" => Ok(Self::Unix),
            "vsock" => Ok(Self::Vsock(None)),
            network => match network.parse() {
                Ok(network) => Ok(Self::Network(network)),
                Err(error @ NetworkError::Invalid(_)) => Err(PeerMatcherError::Invalid(error)),
                Err(error) => Err(PeerMatcherError::Network(error)),
            },
        }
    }
}

/// Parses a decimal number without a sign or leading zeros.
fn parse_cid(text: &str) -> Option<u32> {
    let is_plain = text.bytes().all(|digit| digit.is_ascii_digit());
    let is_padded = text.len() > 1 && text.starts_with('0');
    (is_plain && !is_padded).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_networks_are_rejected() {
        for junk in [
            "",
            " ",
            "all",
            "*",
            "10",
            "10.0.0",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0.0/-1",
            "10.0.0.0/8 ",
            "10.0.0.0/255.0.0.0",
            "::/129",
            "fe80::1%eth0",
            "localhost",
            "010.0.0.1",
            "010.0.0.0/8",
            "::01.2.3.4/128",
        ] {
            assert!(junk.parse::<Network>().is_err(), "{junk}");
        }
        for zoned in ["fe80::1%eth0", "fe80::%eth0/10", "fe80::1%2"] {
            assert_eq!(zoned.parse::<Network>(), Err(NetworkError::Zone(zoned.to_owned())));
        }
        let without_zone = Peer::ip("fe80::1".parse().unwrap());
        assert_eq!("fe80::1%eth0".parse(), Ok(without_zone));
        assert!(matches!("10.1.2.3/8".parse::<Network>(), Err(NetworkError::HostBits { .. })));
    }

    #[test]
    fn loopback_unix_and_vsock_peers_are_local() {
        let is_local = |text: &str| text.parse::<Peer>().unwrap().is_local();
        for local in ["127.0.0.1", "127.255.255.255", "::1", "::ffff:127.0.0.1", "unix", "vsock:3"]
        {
            assert!(is_local(local), "{local}");
        }
        for remote in ["126.255.255.255", "128.0.0.0", "10.0.0.1", "::", "::2", "fe80::1"] {
            assert!(!is_local(remote), "{remote}");
        }
    }

    #[test]
    fn network_is_loopback_only_if_all_addresses_are() {
        let is_loopback = |text: &str| text.parse::<Network>().unwrap().is_loopback();
        for loopback in ["127.0.0.0/8", "127.0.0.1", "127.255.255.255", "::1"] {
            assert!(is_loopback(loopback), "{loopback}");
        }
        for wider in ["126.0.0.0/7", "0.0.0.0/0", "::/127", "::/0", "10.0.0.0/8"] {
            assert!(!is_loopback(wider), "{wider}");
        }
    }

    #[test]
    fn peer_matchers_round_trip_through_text() {
        for (text, matcher) in [
            ("unix", PeerMatcher::Unix),
            ("vsock", PeerMatcher::Vsock(None)),
            ("vsock:0", PeerMatcher::Vsock(Some(0))),
            ("vsock:3", PeerMatcher::Vsock(Some(3))),
            ("vsock:4294967294", PeerMatcher::Vsock(Some(u32::MAX - 1))),
            ("10.0.0.0/8", PeerMatcher::Network("10.0.0.0/8".parse().unwrap())),
        ] {
            assert_eq!(text.parse(), Ok(matcher));
            assert_eq!(matcher.to_string(), text);
        }
        for junk in ["vsock:", "vsock:a", "vsock:03", "vsock:+3", "vsock:-1", "vsock:4294967295"] {
            assert_eq!(
                junk.parse::<PeerMatcher>(),
                Err(PeerMatcherError::InvalidCid(junk.to_owned()))
            );
            assert!(junk.parse::<Peer>().is_err());
        }
        for junk in ["", "Unix", "unix:", "vsock 3", "vsocks", "10.0.0.1/8", "hv:3"] {
            assert!(junk.parse::<PeerMatcher>().is_err(), "{junk}");
        }
        assert_eq!("vsock:3".parse(), Ok(Peer::Vsock(3)));
        assert_eq!("unix".parse(), Ok(Peer::Unix));
        assert!("vsock".parse::<Peer>().is_err() && "10.0.0.0/8".parse::<Peer>().is_err());
    }

    #[test]
    fn vsock_peers_match_only_vsock() {
        let is_in =
            |matcher: &str, cid| matcher.parse::<PeerMatcher>().unwrap().contains(Peer::Vsock(cid));
        assert!(is_in("vsock", 2) && is_in("vsock", 77) && is_in("vsock:77", 77));
        assert!(!is_in("vsock:77", 2) && !is_in("vsock:2", 77));
        for other in ["unix", "0.0.0.0/0", "::/0", "127.0.0.0/8", "::1"] {
            assert!(!is_in(other, 1) && !is_in(other, 77), "{other}");
        }
        let [unix, ip] = [Peer::Unix, Peer::ip(Ipv4Addr::LOCALHOST.into())];
        assert!(!PeerMatcher::Vsock(None).contains(unix) && !PeerMatcher::Vsock(None).contains(ip));
    }
}
