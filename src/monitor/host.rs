//! Checks the host name of requests, as a defense against DNS rebinding.
//!
//! A hostile web site can make its own name resolve to an address in a visitor's network. The
//! visitor's browser then lets the site's pages read the monitor's responses. Such a request names
//! the hostile site, so only requests for names that nobody else can own are answered.

use std::net::IpAddr;

use crate::cli::HostName;

/// Returns true if a request may ask for `host`, the value of its `Host` field: an address,
/// `localhost`, or one of `names`, with any port.
pub(super) fn is_host_allowed(host: &str, names: &[HostName]) -> bool {
    let name = without_port(host);
    let is_address = match name.strip_prefix('[').and_then(|name| name.strip_suffix(']')) {
        Some(v6) => v6.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6()),
        None => name.parse::<IpAddr>().is_ok_and(|address| address.is_ipv4()),
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    is_address || name == "localhost" || names.iter().any(|allowed| allowed.as_str() == name)
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
    fn only_addresses_and_configured_names_are_accepted() {
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
            assert!(is_host_allowed(host, &names), "{host}");
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
            assert!(!is_host_allowed(host, &names), "{host}");
        }
    }
}
