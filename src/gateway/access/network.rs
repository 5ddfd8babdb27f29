//! Where clients come from.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// A client on the network; never an IPv4-mapped IPv6 address.
    Ip(IpAddr),
    /// A client on a Unix socket, whom the socket's file permissions have let in.
    Unix,
}

impl Peer {
    /// A client at `address`; an IPv4-mapped IPv6 address is the IPv4 address in it.
    pub fn ip(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }

    /// Whether it is on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Ip(address) => address.is_loopback(),
            Self::Unix => true,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
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

    /// Loopback's networks.
    pub(super) fn loopback() -> [Self; 2] {
        const BITS: u8 = 8;
        let v4 = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), BITS);
        [Self(v4.into()), Self(IpAddr::V6(Ipv6Addr::LOCALHOST).into())]
    }

    /// Whether every address in it is on this machine.
    pub fn is_loopback(&self) -> bool {
        self.0.network().is_loopback() && self.0.broadcast().is_loopback()
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// It can't be read.
    #[error(
        "\"{0}\" is no network: expected something like 10.0.0.0/8, 192.0.2.7 or 2001:db8::/32"
    )]
    Unreadable(String),
    /// There are bits behind the prefix, so it isn't clear what was meant.
    #[error(
        "\"{given}\" has bits set behind its prefix: write {network} for the network or {address} for the one address"
    )]
    HostBits {
        /// What was written.
        given: String,
        /// The network that it is in.
        network: IpNet,
        /// The address alone.
        address: IpAddr,
    },
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let unreadable = || NetworkError::Unreadable(text.to_owned());
        // The reader of networks takes 010.0.0.0 for 10.0.0.0, others take it for 8.0.0.0: what
        // isn't an address by itself is none in a network.
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

/// IPv4-mapped addresses are judged as IPv4, so a mapped network is an IPv4 network.
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

/// Where a rule lets clients come from: a network, or this machine's Unix sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A network, or a single address.
    Network(Network),
    /// The Unix sockets, whose file permissions say who of this machine can use them.
    Unix,
}

impl Place {
    /// Whether `peer` is there.
    pub fn contains(&self, peer: Peer) -> bool {
        match (self, peer) {
            (Self::Network(network), Peer::Ip(address)) => network.contains(&address),
            (Self::Unix, Peer::Unix) => true,
            _ => false,
        }
    }

    /// Whether only this machine is meant.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Network(network) => network.is_loopback(),
            Self::Unix => true,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

impl FromStr for Place {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        match text {
            "unix" => Ok(Self::Unix),
            network => network.parse().map(Self::Network),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junk_is_never_a_rule() {
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
        assert!(matches!("10.1.2.3/8".parse::<Network>(), Err(NetworkError::HostBits { .. })));
    }
}
