//! Parses the server to examine: a host with an optional port, a Unix socket, or an NBD URI. Pure.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

use nbd_gateway::listen::NBD_PORT;
use nbd_telemetry::escape;

/// Maximum length of a host name in DNS, in bytes. Longer names aren't looked up.
const MAX_HOST: usize = 253;

/// Address of the server, as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ServerEndpoint {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

/// Use of TLS that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TlsUse {
    /// TLS if the server offers it.
    IfOffered,
    Never,
    Always,
}

/// A server to examine, with everything that an NBD URI can specify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerTarget {
    pub(crate) endpoint: ServerEndpoint,
    pub(crate) tls: TlsUse,
    pub(crate) export: Option<String>,
    pub(crate) certificates: Option<PathBuf>,
    pub(crate) hostname: Option<String>,
}

impl fmt::Display for ServerEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", escape::name(path)),
        }
    }
}

impl FromStr for ServerTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some((scheme, rest)) = text.split_once("://") {
            return parse_uri(scheme, rest);
        }
        let endpoint = match text.strip_prefix("unix:") {
            Some("") => return Err("a path has to follow unix:".to_owned()),
            Some(path) => ServerEndpoint::Unix(path.into()),
            None => tcp(text)?,
        };
        let tls = TlsUse::IfOffered;
        Ok(Self { endpoint, tls, export: None, certificates: None, hostname: None })
    }
}

fn parse_uri(scheme: &str, rest: &str) -> Result<ServerTarget, String> {
    let (tls, is_unix) = match scheme {
        "nbd" => (TlsUse::Never, false),
        "nbds" => (TlsUse::Always, false),
        "nbd+unix" => (TlsUse::Never, true),
        "nbds+unix" => (TlsUse::Always, true),
        other => {
            return Err(format!(
                "{:?} is no scheme known here: expected nbd://, nbds://, nbd+unix:// or nbds+unix://; \
                 --store checks object stores",
                escape::name(other)
            ));
        }
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let mut socket = None;
    let (mut certificates, mut hostname) = (None, None);
    for pair in query.split(['&', ';']).filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = percent_decode(value)?;
        match key {
            "socket" => socket = Some(value),
            "tls-certificates" => certificates = Some(PathBuf::from(value)),
            "tls-hostname" => hostname = Some(value),
            "tls-verify-peer" | "tls-username" | "tls-psk-file" => {
                return Err(format!("{:?} of the URI can't be tried here", escape::name(key)));
            }
            // Unknown parameters are extensions for other tools.
            _ => {}
        }
    }
    let endpoint = match (is_unix, socket) {
        (true, Some(path)) if !path.is_empty() => ServerEndpoint::Unix(path.into()),
        (true, _) => {
            return Err(format!(
                "{scheme}:// has no ?socket=PATH, such as {scheme}:///?socket=/run/nbd.sock"
            ));
        }
        (false, _) => match authority.rsplit_once('@').map_or(authority, |(_, host)| host) {
            "" => ServerEndpoint::Tcp { host: "localhost".to_owned(), port: NBD_PORT },
            // A URI encodes the % in front of the zone (RFC 6874).
            authority if authority.starts_with('[') => tcp(&percent_decode(authority)?)?,
            authority => tcp(authority)?,
        },
    };
    Ok(ServerTarget { endpoint, tls, export: Some(percent_decode(path)?), certificates, hostname })
}

fn tcp(text: &str) -> Result<ServerEndpoint, String> {
    let (host, port) = parse_host_and_port(text, NBD_PORT)?;
    Ok(ServerEndpoint::Tcp { host, port })
}

/// Parses a host or address, with an optional port.
pub(super) fn parse_host_and_port(text: &str, default: u16) -> Result<(String, u16), String> {
    let tcp = |host: &str, port: u16| Ok((host.to_owned(), port));
    // The query of a URL may be a secret.
    let shown = |text: &str| format!("{:?}", escape::name(text.split('?').next().unwrap_or(text)));
    let port = |text: &str| match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("{} is no port: expected a number from 1 to 65535", shown(text))),
    };
    if let Some(rest) = text.strip_prefix('[') {
        let (address, behind) = rest
            .split_once(']')
            .ok_or_else(|| format!("{} has no ] behind the address", shown(text)))?;
        if !is_ipv6(address) {
            return Err(format!("{} is no IPv6 address", shown(address)));
        }
        return match behind.strip_prefix(':') {
            Some(number) => tcp(address, port(number)?),
            None if behind.is_empty() => tcp(address, default),
            None => Err(format!("{} behind the address is no port", shown(behind))),
        };
    }
    // An IPv6 address without brackets has no port.
    if is_ipv6(text) {
        return tcp(text, default);
    }
    let (host, number) = match text.split_once(':') {
        Some((host, number)) => (host, port(number)?),
        None => (text, default),
    };
    let is_odd = |character: char| {
        character.is_whitespace() || character.is_control() || "/?#@[]".contains(character)
    };
    if host.is_empty() || host.len() > MAX_HOST || host.contains(is_odd) {
        return Err(format!(
            "{} is no host: expected HOST, HOST:PORT, [IPV6]:PORT, unix:PATH or an NBD URI",
            shown(host)
        ));
    }
    tcp(host, number)
}

/// Returns true for an IPv6 address, with or without a zone: `fe80::1%eth0`.
fn is_ipv6(text: &str) -> bool {
    let is_name = |zone: &str| {
        !zone.is_empty() && !zone.contains(|it: char| it.is_whitespace() || "/%[]".contains(it))
    };
    match text.split_once('%') {
        Some((address, zone)) => address.parse::<Ipv6Addr>().is_ok() && is_name(zone),
        None => text.parse::<Ipv6Addr>().is_ok(),
    }
}

/// Decodes the percent-encoding of URIs.
fn percent_decode(text: &str) -> Result<String, String> {
    let bad = || format!("{:?} isn't encoded as a URI has to be", escape::name(text));
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let mut digit = || {
                let digit = char::from(bytes.next()?).to_digit(16)?;
                u8::try_from(digit).ok()
            };
            let (high, low) = (digit(), digit());
            out.push(high.zip(low).map(|(high, low)| high << 4 | low).ok_or_else(bad)?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> ServerTarget {
        text.parse().unwrap()
    }

    fn endpoint(text: &str) -> String {
        parse(text).endpoint.to_string()
    }

    #[test]
    fn hosts_and_ports_are_parsed() {
        for (text, meant) in [
            ("nbd.example.org", "nbd.example.org:10809"),
            ("nbd.example.org:99", "nbd.example.org:99"),
            ("192.0.2.7", "192.0.2.7:10809"),
            ("[2001:db8::7]:99", "[2001:db8::7]:99"),
            ("[2001:db8::7]", "[2001:db8::7]:10809"),
            ("2001:db8::7", "[2001:db8::7]:10809"),
            ("fe80::7%eth0", "[fe80::7%eth0]:10809"),
            ("[fe80::7%eth0]:99", "[fe80::7%eth0]:99"),
            ("unix:/run/a b", "unix:/run/a b"),
        ] {
            assert_eq!(endpoint(text), meant);
            assert_eq!(parse(text).tls, TlsUse::IfOffered);
        }
    }

    #[test]
    fn nbd_uris_are_parsed() {
        let target =
            parse("nbds://nbd.example.org:99/a%2Fb%20c?tls-certificates=/p%C3%A4&tls-hostname=x");
        assert_eq!(target.endpoint.to_string(), "nbd.example.org:99");
        assert_eq!((target.tls, target.export.as_deref()), (TlsUse::Always, Some("a/b c")));
        assert_eq!(target.certificates, Some("/pä".into()));
        assert_eq!(target.hostname.as_deref(), Some("x"));

        assert_eq!(endpoint("nbd://"), "localhost:10809");
        assert_eq!(endpoint("nbd://[::1]:7/"), "[::1]:7");
        assert_eq!(endpoint("nbd://[fe80::1%25eth0]:7/x"), "[fe80::1%eth0]:7");
        assert_eq!(endpoint("nbds://alice@host"), "host:10809");
        assert_eq!(endpoint("nbd+unix:///x?socket=/run/nbd.sock"), "unix:/run/nbd.sock");
        assert_eq!(parse("nbd+unix:///?socket=/s").export.as_deref(), Some(""));
        assert_eq!(parse("nbds+unix:///?socket=/s").tls, TlsUse::Always);
        assert_eq!(parse("nbd://h").tls, TlsUse::Never);
    }

    #[test]
    fn invalid_targets_are_rejected() {
        let junk = ["", ":1", "a:", "a:0", "a:65536", "a:x", "a b", "a/b", "a\u{7}", "[::1", "[x]"];
        let more = ["[::1]x", "[fe80::1%]", "unix:", "http://a", "nbd://a/%", "nbd://a/%f"];
        let uris = ["fe80::1%a b", "nbd+unix:///x", "nbd+unix:///x?socket=", "nbd://a/%ff"];
        let bad = junk.iter().chain(&more).chain(&uris).chain(&["nbd://a?tls-psk-file=/x"]);
        for bad in bad {
            assert!(bad.parse::<ServerTarget>().is_err(), "{bad}");
        }
        assert!("x".repeat(300).parse::<ServerTarget>().is_err());
    }
}
