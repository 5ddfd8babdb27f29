//! Address of a status listener, as `hexz-nbd top` takes it.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use nbd_telemetry::escape;

use super::monitor::MONITOR_PORT;
use super::server_target::parse_host_and_port;

/// Address of a status listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MonitorEndpoint {
    /// Host name or address without brackets, and port.
    Tcp(String, u16),
    /// The same, with TLS.
    Https(String, u16),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

impl MonitorEndpoint {
    /// Returns the value for the `Host` header.
    pub(crate) fn host_header(&self) -> String {
        match self {
            // The zone of a link-local address means nothing to another machine.
            Self::Tcp(host, port) | Self::Https(host, port) if host.contains(':') => {
                format!("[{}]:{port}", host.split('%').next().unwrap_or(host))
            }
            Self::Tcp(host, port) | Self::Https(host, port) => format!("{host}:{port}"),
            Self::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl Default for MonitorEndpoint {
    fn default() -> Self {
        Self::Tcp(Ipv4Addr::LOCALHOST.to_string(), MONITOR_PORT)
    }
}

impl fmt::Display for MonitorEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp(..) => f.write_str(&self.host_header()),
            Self::Https(host, port) if host.contains(':') => write!(f, "https://[{host}]:{port}"),
            Self::Https(..) => write!(f, "https://{}", self.host_header()),
            Self::Unix(path) => write!(f, "unix:{}", escape::name(path)),
        }
    }
}

impl FromStr for MonitorEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("a path has to follow unix:".to_owned()),
                path => Ok(Self::Unix(path.into())),
            };
        }
        let (kind, endpoint): (fn(String, u16) -> Self, &str) = match text.strip_prefix("https://")
        {
            Some(endpoint) => (Self::Https, endpoint),
            None => (Self::Tcp, text.strip_prefix("http://").unwrap_or(text)),
        };
        let endpoint = endpoint.strip_suffix('/').unwrap_or(endpoint);
        if let Ok(port) = endpoint.parse::<u16>() {
            return Ok(kind(Ipv4Addr::LOCALHOST.to_string(), port));
        }
        parse_host_and_port(endpoint, MONITOR_PORT).map(|(host, port)| kind(host, port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_forms_of_addresses_are_parsed() {
        let tcp = |host: &str, port| MonitorEndpoint::Tcp(host.to_owned(), port);
        for (text, endpoint) in [
            ("9000", tcp("127.0.0.1", 9000)),
            ("192.0.2.7:9000", tcp("192.0.2.7", 9000)),
            ("192.0.2.7", tcp("192.0.2.7", MONITOR_PORT)),
            ("http://localhost:9000/", tcp("localhost", 9000)),
            ("http://nbd.example.org", tcp("nbd.example.org", MONITOR_PORT)),
            ("[::1]:9000", tcp("::1", 9000)),
            ("http://[::1]:9000", tcp("::1", 9000)),
            ("::1", tcp("::1", MONITOR_PORT)),
            ("[fe80::1%lo]:99", MonitorEndpoint::Tcp("fe80::1%lo".into(), 99)),
            ("https://localhost:9000/", MonitorEndpoint::Https("localhost".into(), 9000)),
            ("https://[::1]", MonitorEndpoint::Https("::1".into(), MONITOR_PORT)),
            ("unix:/run/monitor.sock", MonitorEndpoint::Unix("/run/monitor.sock".into())),
        ] {
            assert_eq!(text.parse(), Ok(endpoint.clone()), "{text}");
            assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
        }
        for junk in
            ["", "unix:", "https://", "https://a/b", "http://a/b", "a b:1", "localhost:x", ":1"]
        {
            assert!(junk.parse::<MonitorEndpoint>().is_err(), "{junk}");
        }
    }
}
