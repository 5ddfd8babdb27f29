//! Who may come in: a pure judgement of an address, with its reason.

use std::fmt;
use std::net::IpAddr;
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
        let network = match text.parse::<IpNet>() {
            Ok(network) => network,
            Err(_) => IpNet::from(text.parse::<IpAddr>().map_err(|_| unreadable())?),
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

/// Which networks may come in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessList {
    /// Who may; if there is none, only this machine may.
    pub allow: Vec<Network>,
    /// Who may not, even if allowed.
    pub deny: Vec<Network>,
}

/// Why somebody may or may not come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The Unix socket's file permissions let it in.
    UnixSocket,
    /// It is on this machine, and nobody else was allowed.
    Loopback,
    /// `--allow` names its network.
    Allowed(Network),
    /// `--deny` names its network.
    Denied(Network),
    /// No `--allow` names its network.
    NotAllowed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnixSocket => f.write_str("it came by a Unix socket"),
            Self::Loopback => f.write_str("it is on this machine"),
            Self::Allowed(network) => write!(f, "allowed by {network}"),
            Self::Denied(network) => write!(f, "denied by {network}"),
            Self::NotAllowed => f.write_str("not in any allowed network"),
        }
    }
}

/// The judgement: `Ok` may come in, `Err` may not.
pub type Verdict = Result<Reason, Reason>;

impl AccessList {
    /// Judges a client by its address. Deny wins; nobody is let in for want of a rule.
    pub fn judge(&self, peer: Peer) -> Verdict {
        let address = match peer {
            Peer::Unix => return Ok(Reason::UnixSocket),
            Peer::Ip(address) => address,
        };
        if let Some(network) = self.deny.iter().find(|network| network.contains(&address)) {
            return Err(Reason::Denied(*network));
        }
        if self.allow.is_empty() && address.is_loopback() {
            return Ok(Reason::Loopback);
        }
        match self.allow.iter().find(|network| network.contains(&address)) {
            Some(network) => Ok(Reason::Allowed(*network)),
            None => Err(Reason::NotAllowed),
        }
    }

    /// Whether nobody but this machine may come in.
    pub fn is_loopback_only(&self) -> bool {
        self.allow.iter().all(Network::is_loopback)
    }
}

impl fmt::Display for AccessList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |networks: &[Network]| {
            networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        match self.allow.as_slice() {
            [] => f.write_str("this machine only")?,
            allow => f.write_str(&list(allow))?,
        }
        match self.deny.as_slice() {
            [] => Ok(()),
            deny => write!(f, " except {}", list(deny)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(texts: &[&str]) -> Vec<Network> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn admits(allow: &[&str], deny: &[&str], address: &str) -> bool {
        let list = AccessList { allow: networks(allow), deny: networks(deny) };
        list.judge(Peer::ip(address.parse().unwrap())).is_ok()
    }

    #[test]
    fn without_a_rule_only_this_machine_comes_in() {
        for address in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(admits(&[], &[], address), "{address}");
        }
        for address in ["10.0.0.1", "0.0.0.0", "::", "fe80::1", "::ffff:10.0.0.1", "::127.0.0.1"] {
            assert!(!admits(&[], &[], address), "{address}");
        }
    }

    #[test]
    fn with_a_rule_loopback_needs_one_too() {
        assert!(!admits(&["10.0.0.0/8"], &[], "127.0.0.1"));
    }

    // nbd-server CVE-2013-6410: partial address match in the access list.
    #[test]
    fn addresses_match_whole() {
        assert!(admits(&["10.1.2.3"], &[], "10.1.2.3"));
        for address in ["10.1.2.30", "10.1.2.2", "110.1.2.3", "10.1.2.31"] {
            assert!(!admits(&["10.1.2.3"], &[], address), "{address}");
        }
    }

    #[test]
    fn prefixes_at_their_ends() {
        assert!(admits(&["0.0.0.0/0"], &[], "255.255.255.255"));
        assert!(!admits(&["0.0.0.0/0"], &[], "::1"));
        assert!(admits(&["::/0"], &[], "2001:db8::1"));
        assert!(!admits(&["::/0"], &[], "10.0.0.1"));
        assert!(admits(&["10.0.0.2/31"], &[], "10.0.0.3"));
        assert!(!admits(&["10.0.0.2/31"], &[], "10.0.0.4"));
        assert!(admits(&["10.0.0.2/32"], &[], "10.0.0.2"));
        assert!(admits(&["2001:db8::7/128"], &[], "2001:db8::7"));
        assert!(!admits(&["2001:db8::7/128"], &[], "2001:db8::8"));
    }

    #[test]
    fn deny_wins() {
        let (allow, deny) = (&["10.0.0.0/8"], &["10.66.0.0/16"]);
        assert!(admits(allow, deny, "10.65.1.1"));
        assert!(!admits(allow, deny, "10.66.1.1"));
        assert!(!admits(&["10.66.1.1"], deny, "10.66.1.1"));
        assert!(!admits(&[], &["127.0.0.0/8"], "127.0.0.1"));
    }

    // nbdkit's ip filter before 1.40: another spelling of the address was let in.
    #[test]
    fn mapped_addresses_meet_the_ipv4_rules() {
        assert!(admits(&["10.0.0.0/8"], &[], "::ffff:10.1.2.3"));
        assert!(!admits(&["::/0"], &["10.0.0.0/8"], "::ffff:10.1.2.3"));
        assert!(!admits(&["0.0.0.0/0"], &["::ffff:10.0.0.0/104"], "10.1.2.3"));
        assert!(admits(&["::ffff:10.1.2.3"], &[], "10.1.2.3"));
    }

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
        ] {
            assert!(junk.parse::<Network>().is_err(), "{junk}");
        }
        assert!(matches!("10.1.2.3/8".parse::<Network>(), Err(NetworkError::HostBits { .. })));
    }

    #[test]
    fn who_may_come_in_is_said_in_words() {
        assert_eq!(AccessList::default().to_string(), "this machine only");
        let list = AccessList {
            allow: networks(&["10.0.0.0/8", "::1"]),
            deny: networks(&["10.6.0.0/16"]),
        };
        assert_eq!(list.to_string(), "10.0.0.0/8, ::1/128 except 10.6.0.0/16");
        assert!(!list.is_loopback_only());
        let local = AccessList { allow: networks(&["127.0.0.0/8", "::1"]), deny: vec![] };
        assert!(local.is_loopback_only());
    }
}
