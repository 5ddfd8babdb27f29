//! Where it is shown what goes on.

use std::net::{Ipv4Addr, SocketAddr};

use clap::Args;
use hexz_nbd::gateway::listen::ListenAddress;
use hexz_nbd::monitor::{HostName, MONITOR_PORT};

#[derive(Debug, Clone, Args)]
pub(crate) struct Monitoring {
    /// Show by HTTP what goes on: a page for browsers at /, numbers for Prometheus at /metrics,
    /// both as JSON at /status.json, and /healthz and /readyz. On ADDRESS:PORT, on PORT alone of
    /// 127.0.0.1, or on unix:PATH. There is no TLS, and whoever can reach it sees who is
    /// connected
    #[arg(
        long, value_name = "WHERE", value_parser = parse_where, help_heading = "Monitoring"
    )]
    monitor: Option<ListenAddress>,
    /// A DNS name by which browsers and Prometheus ask for it, if they don't ask for an address
    /// or for localhost [comma-separated, repeatable]
    #[arg(long, value_name = "NAME", value_delimiter = ',', help_heading = "Monitoring")]
    monitor_name: Vec<HostName>,
}

impl Monitoring {
    /// Where it listens, if it does.
    pub(crate) fn listen(&self) -> Option<&ListenAddress> {
        self.monitor.as_ref()
    }

    /// By which names it may be asked for.
    pub(crate) fn names(&self) -> &[HostName] {
        &self.monitor_name
    }
}

fn parse_where(text: &str) -> Result<ListenAddress, String> {
    if let Ok(port) = text.parse() {
        return Ok(ListenAddress::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
    }
    if text.starts_with("unix:") {
        return text.parse();
    }
    text.parse().map(ListenAddress::Tcp).map_err(|_| {
        format!(
            "expected PORT such as {MONITOR_PORT}, ADDRESS:PORT such as 192.0.2.7:{MONITOR_PORT}, \
             or unix:PATH"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_one_of_loopback() {
        let at = |text: &str| parse_where(text).map(|address| address.to_string());
        assert_eq!(at("10810").unwrap(), "127.0.0.1:10810");
        assert_eq!(at("[::1]:1").unwrap(), "[::1]:1");
        assert_eq!(at("unix:/run/x").unwrap(), "unix:/run/x");
        for junk in ["", "65536", "127.0.0.1", "localhost:1", "unix:", ":1", "/run/x"] {
            assert!(at(junk).is_err(), "{junk}");
        }
    }
}
