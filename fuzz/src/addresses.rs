//! Who may come in: texts of networks, and addresses judged by them, against a judge that
//! compares numbers bit by bit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use arbitrary::{Arbitrary, Unstructured};
use nbd_gateway::access::{
    AccessRequest, CommandLineRules, NetworkError, Origin, Peer, PeerMatcher, PeerMatcherError,
    Reason, Rules,
};

/// An address: of one family or the other, with its bits from the top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    is_v4: bool,
    bits: u128,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Host {
    V4([u8; 4]),
    V6([u8; 16]),
    Mapped([u8; 4]),
    Loopback(bool, u8),
    /// One of a rule's own network, with some bits other than its.
    Near {
        rule: u8,
        flipped: u8,
    },
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Written<'a> {
    /// A network as it should be written.
    Network(Host, u8),
    /// With bits behind its prefix, perhaps.
    Loose(Host, u8),
    Alone(Host),
    /// A network with one character more, or another one, at a place.
    Mistyped {
        network: (Host, u8),
        at: u8,
        character: u8,
        instead: bool,
    },
    Text(&'a str),
}

/// What people may type into a network.
const CHARACTERS: &[u8] = b"0123456789abcfABCF.:/-+x% ,";

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    allow: Vec<Written<'a>>,
    deny: Vec<Written<'a>>,
    hosts: Vec<Host>,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let (allow, allow_rules) = networks(&input.allow);
    let (deny, deny_rules) = networks(&input.deny);
    let said = CommandLineRules { allow, deny, ..CommandLineRules::default() };
    let list = Rules::from_command_line(&said);
    let rules: Vec<Rule> = allow_rules.iter().chain(&deny_rules).copied().collect();

    assert!(list.evaluate(&AccessRequest::from_peer(Peer::Unix)).is_ok());
    for host in &input.hosts {
        let address = host.address(&rules);
        let peer = Peer::ip(address);
        let address = Address::of(address);
        let judged = list.evaluate(&AccessRequest::from_peer(peer));

        let is_denied = deny_rules.iter().any(|rule| rule.contains(address));
        let is_allowed = match allow_rules.as_slice() {
            [] => address.is_loopback(),
            rules => rules.iter().any(|rule| rule.contains(address)),
        };
        assert_eq!(judged.is_ok(), is_allowed && !is_denied, "{peer} by {list}: {judged:?}");
        assert_eq!(peer.is_local(), address.is_loopback());
        match &judged {
            Ok(Reason::Rule(rule)) => match rule.origin {
                Origin::Default => assert!(allow_rules.is_empty()),
                Origin::Allow => assert!(is_allowed && !allow_rules.is_empty()),
                _ => panic!("{rule}"),
            },
            Err(Reason::Rule(rule)) => assert!(is_denied && rule.origin == Origin::Deny),
            Err(Reason::NoRuleForAddress) => assert!(!is_denied),
            other => panic!("{other:?}"),
        }
        // Whoever comes from elsewhere isn't let in by a list for this machine.
        assert!(!list.is_local_only() || judged.is_err() || address.is_loopback());
    }
}

/// What texts mean to the program, and to the judge. Both have to understand the same ones.
fn networks(written: &[Written<'_>]) -> (Vec<PeerMatcher>, Vec<Rule>) {
    let mut pairs = Vec::new();
    for written in written {
        let text = written.text();
        let network = text.parse::<PeerMatcher>();
        let rule = Rule::parse(&text);
        match (&network, rule) {
            (Ok(network), Some(rule)) if rule.is_whole() => {
                assert_eq!(network.to_string().parse::<PeerMatcher>().as_ref(), Ok(network));
                pairs.push((*network, rule));
            }
            (Err(PeerMatcherError::Network(NetworkError::HostBits { .. })), Some(rule))
                if !rule.is_whole() => {}
            (Err(PeerMatcherError::Invalid(_) | PeerMatcherError::InvalidCid(_)), None) => {}
            (Err(PeerMatcherError::Network(NetworkError::Zone(zoned))), None) => {
                assert!(zoned.contains('%'), "{zoned:?}");
            }
            // Words for other places are nobody's on a network.
            (Ok(place @ (PeerMatcher::Unix | PeerMatcher::Vsock(_))), None) => {
                assert!(text == place.to_string(), "{text:?}");
            }
            other => panic!("{text:?}: {other:?}"),
        }
    }
    pairs.into_iter().unzip()
}

/// A network: what its addresses have in common.
#[derive(Debug, Clone, Copy)]
struct Rule {
    address: Address,
    prefix: u32,
}

impl Rule {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        // The standard library's reader has been looked at closely enough.
        let address: IpAddr = address.parse().ok()?;
        let digits = if address.is_ipv4() { 2 } else { 3 };
        let prefix = prefix.map(|prefix| decimal(prefix, digits).ok_or(())).transpose().ok()?;
        let (bits, width) = match address {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
            IpAddr::V6(v6) => (u128::from(v6), 128),
        };
        let prefix = prefix.unwrap_or(width);
        if prefix > width {
            return None;
        }
        let written = Self { address: Address { is_v4: width == 32, bits }, prefix };
        let mapped = Address::of(address);
        // A network of mapped addresses alone is one of IPv4, if it is one at all.
        if mapped.is_v4 && width == 128 && prefix >= 96 && written.is_whole() {
            return Some(Self { address: mapped, prefix: prefix - 96 });
        }
        Some(written)
    }

    /// Whether no bit behind the prefix is set.
    fn is_whole(&self) -> bool {
        (self.prefix..128).all(|bit| self.address.bit(bit) == 0)
    }

    fn contains(&self, address: Address) -> bool {
        self.address.is_v4 == address.is_v4
            && (0..self.prefix).all(|bit| self.address.bit(bit) == address.bit(bit))
    }
}

fn decimal(text: &str, most: usize) -> Option<u32> {
    let is_plain =
        !text.is_empty() && text.len() <= most && text.bytes().all(|c| c.is_ascii_digit());
    is_plain.then(|| text.bytes().fold(0, |n, digit| n * 10 + u32::from(digit - b'0')))
}

impl Address {
    /// A mapped address is that of IPv4.
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self { is_v4: true, bits: u128::from(u32::from(v4)) << 96 },
            IpAddr::V6(v6) => {
                let bits = u128::from(v6);
                if bits >> 32 == 0xffff {
                    Self { is_v4: true, bits: bits << 96 }
                } else {
                    Self { is_v4: false, bits }
                }
            }
        }
    }

    /// A bit, counted from the top.
    fn bit(&self, position: u32) -> u128 {
        self.bits >> (127 - position) & 1
    }

    fn is_loopback(&self) -> bool {
        if self.is_v4 { self.bits >> 120 == 127 } else { self.bits == 1 }
    }
}

impl Host {
    fn address(self, rules: &[Rule]) -> IpAddr {
        match self {
            Self::V4(bytes) => Ipv4Addr::from(bytes).into(),
            Self::V6(bytes) => Ipv6Addr::from(bytes).into(),
            Self::Mapped(bytes) => Ipv4Addr::from(bytes).to_ipv6_mapped().into(),
            Self::Loopback(true, last) => Ipv4Addr::new(127, 0, 0, last).into(),
            Self::Loopback(false, last) => Ipv6Addr::from(u128::from(last % 4)).into(),
            Self::Near { rule, flipped } => {
                let Some(rule) = rules.get(usize::from(rule) % rules.len().max(1)) else {
                    return Ipv4Addr::LOCALHOST.into();
                };
                let bits = rule.address.bits ^ 1 << (127 - flipped % 128);
                if rule.address.is_v4 {
                    Ipv4Addr::from((bits >> 96) as u32).into()
                } else {
                    Ipv6Addr::from(bits).into()
                }
            }
        }
    }
}

impl Written<'_> {
    fn text(&self) -> String {
        match *self {
            Self::Text(text) => text.to_owned(),
            Self::Mistyped { network: (host, prefix), at, character, instead } => {
                let mut text = Written::Network(host, prefix).text();
                let at = usize::from(at) % text.len();
                let character = CHARACTERS[usize::from(character) % CHARACTERS.len()].into();
                if instead {
                    text.remove(at);
                }
                text.insert(at, character);
                text
            }
            Self::Alone(host) => host.address(&[]).to_string(),
            Self::Loose(host, prefix) => format!("{}/{}", host.address(&[]), prefix % 140),
            Self::Network(host, prefix) => match host.address(&[]) {
                IpAddr::V4(v4) => {
                    let prefix = prefix % 33;
                    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                    format!("{}/{prefix}", Ipv4Addr::from(u32::from(v4) & mask))
                }
                IpAddr::V6(v6) => {
                    let prefix = prefix % 129;
                    let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                    format!("{}/{prefix}", Ipv6Addr::from(u128::from(v6) & mask))
                }
            },
        }
    }
}
