//! Addresses to listen on, and their notation.

use std::ffi::OsStr;
use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use super::vsock;
use crate::zone;
use nbd_telemetry::escape;

/// Port that IANA assigned to NBD.
pub const NBD_PORT: u16 = 10809;

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// A TCP address and port; port 0 picks any free one.
    Tcp(SocketAddr),
    /// Path of a Unix socket.
    Unix(PathBuf),
    /// A vsock port; port 0 picks any free one.
    Vsock {
        /// Context ID to bind; `None` binds all those of this machine.
        cid: Option<u32>,
        /// Port number; 0 picks any free one.
        port: u32,
    },
}

impl ListenAddress {
    /// Parses an address. The path of a Unix socket need not be UTF-8.
    ///
    /// # Errors
    /// The text is malformed; the message says what is expected.
    pub fn parse(text: &OsStr) -> Result<Self, String> {
        match (text.to_str(), text.as_bytes().strip_prefix(b"unix:")) {
            (Some(text), _) => text.parse(),
            (None, Some(path)) => Ok(Self::Unix(OsStr::from_bytes(path).into())),
            (None, None) => Err(format!("{:?} isn't UTF-8", escape::name(text))),
        }
    }

    /// Returns true if only this machine, including its virtual machines, can reach the address.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) | Self::Vsock { .. } => true,
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", escape::name(path)),
            Self::Vsock { cid: None, port } => write!(f, "vsock:{port}"),
            Self::Vsock { cid: Some(cid), port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("missing path after unix:".to_owned()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let expected = || {
            format!(
                "invalid address {:?}: expected ADDRESS:PORT such as 192.0.2.7:{NBD_PORT} or \
                 [::]:{NBD_PORT}, unix:PATH, vsock:PORT or vsock:CID:PORT",
                escape::name(text)
            )
        };
        if let Some(vsock) = text.strip_prefix("vsock:") {
            return parse_vsock(vsock).ok_or_else(expected);
        }
        if text.contains('%') {
            return parse_zoned(text).map(Self::Tcp);
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Tcp(address));
        }
        // An address without a port. Host names are refused, because one may resolve to several
        // addresses.
        text.trim_matches(['[', ']'])
            .parse::<IpAddr>()
            .map(|address| Self::Tcp(SocketAddr::new(address, NBD_PORT)))
            .map_err(|_| expected())
    }
}

/// Parses `[ADDRESS%INTERFACE]:PORT`, or `ADDRESS%INTERFACE` with or without brackets.
fn parse_zoned(text: &str) -> Result<SocketAddr, String> {
    let (address, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, "")) => (address, NBD_PORT),
        Some((address, behind)) => {
            let port = behind.strip_prefix(':').and_then(|port| port.parse().ok());
            let expected = || {
                format!(
                    "invalid address {:?}: expected [ADDRESS%INTERFACE]:PORT, such as \
                     [fe80::1%eth0]:{NBD_PORT}",
                    escape::name(text)
                )
            };
            (address, port.ok_or_else(expected)?)
        }
        None => (text, NBD_PORT),
    };
    let (address, interface) = zone::parse(address).map_err(|error| error.to_string())?;
    Ok(SocketAddrV6::new(address, port, 0, interface).into())
}

/// Parses `PORT` or `CID:PORT`. The highest number of either is refused: the kernel reads it as a
/// wildcard.
fn parse_vsock(text: &str) -> Option<ListenAddress> {
    let number = |text: &str| {
        let is_plain = text.bytes().all(|digit| digit.is_ascii_digit());
        is_plain.then(|| text.parse().ok()).flatten().filter(|number| *number != vsock::WILDCARD)
    };
    let (cid, port) = match text.split_once(':') {
        Some((cid, port)) => (Some(number(cid)?), number(port)?),
        None => (None, number(text)?),
    };
    Some(ListenAddress::Vsock { cid, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_are_parsed() {
        let tcp = |text: &str| ListenAddress::Tcp(text.parse().unwrap());
        for (text, address) in [
            ("127.0.0.1:1234", tcp("127.0.0.1:1234")),
            ("[::]:10809", tcp("[::]:10809")),
            ("192.0.2.7", tcp("192.0.2.7:10809")),
            ("::1", tcp("[::1]:10809")),
            ("[::1]", tcp("[::1]:10809")),
            ("unix:/run/x", ListenAddress::Unix("/run/x".into())),
            ("vsock:10809", ListenAddress::Vsock { cid: None, port: 10809 }),
            ("vsock:2:0", ListenAddress::Vsock { cid: Some(2), port: 0 }),
            ("[fe80::1%lo]:1234", tcp("[fe80::1%1]:1234")),
            ("[fe80::1%lo]", tcp("[fe80::1%1]:10809")),
            ("fe80::1%1", tcp("[fe80::1%1]:10809")),
        ] {
            assert_eq!(text.parse(), Ok(address), "{text}");
        }
        for junk in [
            "",
            "unix:",
            ":10809",
            "127.0.0.1:",
            "127.0.0.1:65536",
            "a b:1",
            "vsock",
            "vsock:",
            "vsock:+1",
            "vsock:1:",
            "vsock::1",
            "vsock:1:2:3",
            "vsock:4294967295",
            "vsock:4294967295:1",
            "vsock:any:1",
            "[fe80::1%lo]1",
            "[fe80::1%lo]:",
            "fe80::1%none-such",
            "[::1%lo]:1",
            "127.0.0.1%lo:1",
        ] {
            assert!(junk.parse::<ListenAddress>().is_err(), "{junk}");
        }
    }
}
