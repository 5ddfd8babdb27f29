//! Addresses that names must not resolve to.
//!
//! Whoever controls the DNS of a store's name could otherwise direct the gateway to services that
//! trust this machine: to those on loopback, and to the metadata service of the cloud, which hands
//! out credentials (DNS rebinding, SSRF). Private networks are permitted, since stores run there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Addresses of metadata services that aren't link-local.
const METADATA_SERVICES: [IpAddr; 4] = [
    // AWS
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254)),
    // Google Cloud
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x0254)),
    // Azure
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    // Alibaba Cloud
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
];

/// Returns what is wrong with an address of `host`, if the dialer must not connect to it. An
/// address that is the host itself is permitted, and so is loopback for `localhost`.
pub(crate) fn refusal(host: &str, address: IpAddr) -> Option<&'static str> {
    if host.parse() == Ok(address) {
        return None;
    }
    let embedded = match address {
        IpAddr::V6(address) => embedded_ipv4(address).map(IpAddr::V4),
        IpAddr::V4(_) => None,
    };
    let refusal = kind(address).or_else(|| embedded.and_then(kind))?;
    let is_localhost = host.strip_suffix('.').unwrap_or(host).eq_ignore_ascii_case("localhost");
    (!is_localhost || !address.is_loopback()).then_some(refusal)
}

fn kind(address: IpAddr) -> Option<&'static str> {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let is_this_network =
        matches!(address, IpAddr::V4(address) if address.octets().first() == Some(&0));
    if address.is_loopback() {
        Some("a loopback address")
    } else if is_link_local {
        Some("a link-local address")
    } else if METADATA_SERVICES.contains(&address) {
        Some("the address of a metadata service")
    } else if address.is_unspecified() || is_this_network {
        Some("an unspecified address")
    } else if address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some("a multicast address")
    } else {
        None
    }
}

/// Returns the IPv4 address that an IPv4-mapped, IPv4-compatible, NAT64 (RFC 6052) or 6to4 address
/// leads to.
fn embedded_ipv4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let ipv4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(a, b, c, d)
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            Some(ipv4(high, low))
        }
        [0x2002, high, low, ..] => Some(ipv4(high, low)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_refused(host: &str, address: &str) -> bool {
        refusal(host, address.parse().unwrap()).is_some()
    }

    #[test]
    fn names_must_not_lead_to_this_machine_or_to_metadata_services() {
        for address in [
            "127.0.0.1",
            "127.8.9.10",
            "::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "169.254.169.254",
            "169.254.1.1",
            "fe80::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "168.63.129.16",
            "100.100.100.200",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ] {
            assert!(is_refused("store.example.org", address), "{address}");
            assert!(!is_refused(address, address), "{address}");
        }
    }

    #[test]
    fn other_addresses_are_permitted() {
        for address in
            ["192.0.2.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "2001:db8::1", "fd00::1"]
        {
            assert!(!is_refused("store.example.org", address), "{address}");
        }
    }

    #[test]
    fn localhost_is_loopback_and_nothing_else() {
        for host in ["localhost", "LocalHost", "localhost."] {
            assert!(!is_refused(host, "127.0.0.1") && !is_refused(host, "::1"), "{host}");
            assert!(is_refused(host, "169.254.169.254"), "{host}");
        }
        assert!(is_refused("localhost.example.org", "127.0.0.1"));
        assert!(is_refused("127.0.0.1", "127.0.0.2"));
    }
}
