//! Checks the host name of requests, as a defense against DNS rebinding.
//!
//! A hostile web site can make its own name resolve to an address in a visitor's network. The
//! visitor's browser then lets the site's pages read the monitor's responses. Such a request names
//! the hostile site, so only requests for names that nobody else can own are answered.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// Maximum length of a name in DNS, in bytes.
const LONGEST: usize = 253;

/// A DNS name that requests to the monitor may use, in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostName(String);

/// Error for a text that isn't a DNS name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{:?} is no DNS name: expected letters, digits, hyphens and dots, without a port",
    nbd_telemetry::escape::name(.0)
)]
pub(crate) struct HostNameError(String);

impl FromStr for HostName {
    type Err = HostNameError;

    fn from_str(text: &str) -> Result<Self, HostNameError> {
        let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if text.is_empty() || text.len() > LONGEST || !text.bytes().all(is_known) {
            return Err(HostNameError(text.to_owned()));
        }
        Ok(Self(text.trim_end_matches('.').to_ascii_lowercase()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns true if a request may ask for `host`, the value of its `Host` field: an address,
/// `localhost`, or one of `names`, with any port.
pub(super) fn may_ask(host: &str, names: &[HostName]) -> bool {
    let name = without_port(host);
    let is_address = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        Some(v6) => v6.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6()),
        None => name.parse::<IpAddr>().is_ok_and(|address| address.is_ipv4()),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    is_address || name == "localhost" || names.iter().any(|known| known.0 == name)
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_are_answered_that_nobody_else_can_have() {
        let names = ["Monitor.example.org".parse().unwrap()];
        for host in [
            "127.0.0.1",
            "127.0.0.1:10810",
            "192.0.2.7:1",
            "[::1]",
            "[::1]:10810",
            "localhost",
            "LocalHost:10810",
            "localhost.:10810",
            "monitor.example.org",
            "MONITOR.example.org.:80",
        ] {
            assert!(may_ask(host, &names), "{host}");
        }
        for host in [
            "",
            ":80",
            "evil.example",
            "evil.example:10810",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "monitor.example.org.evil.example",
            "user@localhost",
            "localhost:80:80",
            "::1",
            "[localhost]",
            "[127.0.0.1]",
            "localhost/",
            "2130706433",
            "0x7f.1",
        ] {
            assert!(!may_ask(host, &names), "{host}");
        }
    }

    #[test]
    fn names_have_to_be_names() {
        for junk in ["", "a b", "a:80", "https://a", "*.example.org", &"a".repeat(254)] {
            assert!(junk.parse::<HostName>().is_err(), "{junk}");
        }
    }
}
