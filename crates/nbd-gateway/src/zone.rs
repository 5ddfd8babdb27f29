//! IPv6 addresses with a zone, such as `fe80::1%eth0`. A link-local address is meaningful only on
//! one interface (RFC 4007, section 11).

use std::net::Ipv6Addr;

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

use nbd_telemetry::escape;

/// Reason why an address with a zone can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ZoneError {
    /// The text isn't `ADDRESS%INTERFACE` with an IPv6 address.
    #[error("invalid address {:?}: expected an IPv6 address with an interface, such as fe80::1%eth0", escape::name(.0))]
    Malformed(String),
    /// The address isn't link-local, so it takes no interface.
    #[error("{0} is not a link-local address (fe80::/10): omit the interface after %")]
    NotLinkLocal(Ipv6Addr),
    /// There is no interface of that name.
    #[error("no network interface named {:?} (ip link lists them)", escape::name(.0))]
    NoInterface(String),
}

/// Parses `ADDRESS%INTERFACE` into the address and the interface index. The interface is given by
/// name or index.
///
/// # Errors
/// See [`ZoneError`]. Interface names can't be looked up inside the sandbox.
pub fn parse(text: &str) -> Result<(Ipv6Addr, u32), ZoneError> {
    let malformed = || ZoneError::Malformed(text.to_owned());
    let (address, zone) = text.split_once('%').ok_or_else(malformed)?;
    let address: Ipv6Addr = address.parse().map_err(|_| malformed())?;
    if !address.is_unicast_link_local() {
        return Err(ZoneError::NotLinkLocal(address));
    }
    let number = match zone.bytes().all(|digit| digit.is_ascii_digit()) {
        true => zone.parse().ok(),
        false => interface_index(zone),
    };
    // The kernel reads index 0 as no interface.
    match number {
        Some(number @ 1..) => Ok((address, number)),
        _ => Err(ZoneError::NoInterface(zone.to_owned())),
    }
}

fn interface_index(interface: &str) -> Option<u32> {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    name_to_index(socket, interface).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_parsed_as_interfaces() {
        let address: Ipv6Addr = "fe80::1".parse().unwrap();
        assert_eq!(parse("fe80::1%lo"), Ok((address, 1)));
        assert_eq!(parse("fe80::1%7"), Ok((address, 7)));
        for bad in ["fe80::1", "fe80::1%", "%lo", "10.0.0.1%lo", "fe80::1%lo/64", "::1%lo"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(parse("::1%lo"), Err(ZoneError::NotLinkLocal(Ipv6Addr::LOCALHOST)));
        for none in ["no-such-one", "0", "4294967296", "a-name-that-is-too-long-for-any", "lo\0"] {
            let error = parse(&format!("fe80::1%{none}"));
            assert_eq!(error, Err(ZoneError::NoInterface(none.to_owned())));
        }
    }
}
