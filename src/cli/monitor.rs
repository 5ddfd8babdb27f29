//! Options for the monitor.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use nbd_gateway::listen::{self, BindError, BoundSocket, ListenAddress, SocketPermissions};
use serde::Deserialize;

use super::from_file;
use super::host_name::HostName;
use super::values::{os_text, trimmed};

/// Port that the documentation and `hexz-nbd top` assume for the monitor. Nothing listens there by
/// default.
pub(crate) const MONITOR_PORT: u16 = 10810;

/// Address that the monitor listens on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MonitorAddress {
    /// A port of 127.0.0.1, or of ::1 if there is no 127.0.0.1.
    LoopbackPort(u16),
    Address(ListenAddress),
}

impl MonitorAddress {
    /// Parses an address. The path of a Unix socket need not be UTF-8.
    fn parse(text: &OsStr) -> Result<Self, String> {
        let at = Self::Address;
        match text.to_str() {
            None => ListenAddress::parse(text).map(at),
            Some(text)
                if text.starts_with("unix:") || text.starts_with("[") && text.contains('%') =>
            {
                text.parse().map(at)
            }
            Some(text) => {
                let port = text.parse().map(Self::LoopbackPort).ok();
                let address = || text.parse().map(ListenAddress::Tcp).map(at).ok();
                port.or_else(address).ok_or_else(|| {
                    format!(
                        "expected PORT such as {MONITOR_PORT}, ADDRESS:PORT such as \
                     192.0.2.7:{MONITOR_PORT}, or unix:PATH"
                    )
                })
            }
        }
    }

    /// Binds a socket to this address.
    pub(crate) fn bind(&self) -> Result<BoundSocket, BindError> {
        match self {
            Self::LoopbackPort(port) => listen::bind_loopback(*port),
            Self::Address(address) => BoundSocket::bind(address, &SocketPermissions::default())
                .map_err(|error| BindError { address: address.clone(), error }),
        }
    }

    /// Returns the address, unless only a port was given.
    pub(crate) fn address(&self) -> Option<&ListenAddress> {
        match self {
            Self::LoopbackPort(_) => None,
            Self::Address(address) => Some(address),
        }
    }
}

impl FromStr for MonitorAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text.as_ref())
    }
}

#[derive(Debug, Default, Clone, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Monitoring")]
pub(crate) struct MonitorOptions {
    /// Serve monitoring over HTTP: a page at /, Prometheus metrics at /metrics, the same as JSON at
    /// /status.json, /healthz and /readyz. The address is ADDRESS:PORT, PORT of 127.0.0.1 (or ::1),
    /// or unix:PATH. Anyone who can connect sees all clients, unless there is a token
    #[arg(long, value_name = "WHERE", value_parser = os_text(MonitorAddress::parse))]
    #[serde(deserialize_with = "from_file::text")]
    pub(crate) monitor: Option<MonitorAddress>,
    /// Host names, besides addresses and localhost, that HTTP requests to the monitor may use
    /// [comma-separated, repeatable]
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = trimmed::<HostName>)]
    #[serde(deserialize_with = "from_file::comma_list")]
    pub(crate) monitor_name: Vec<HostName>,
    /// Certificate of the monitor in PEM format, followed by its intermediate CAs. It serves HTTPS
    /// then, except on Unix sockets. The file is read again when it changes
    #[arg(long, value_name = "FILE")]
    pub(crate) monitor_tls_cert: Option<PathBuf>,
    /// Private key of the monitor's certificate, in PEM format
    #[arg(long, value_name = "FILE")]
    pub(crate) monitor_tls_key: Option<PathBuf>,
    /// File with a token that requests to the monitor must have: as bearer token, or as password of
    /// basic authentication with any user name. /healthz and /readyz need none. The file is read
    /// again when it changes
    #[arg(long, value_name = "FILE")]
    pub(crate) monitor_token_file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_port_means_loopback() {
        let at = |text: &str| text.parse::<MonitorAddress>();
        let address = |text: &str| at(text).unwrap().address().unwrap().to_string();
        assert_eq!(at("10810"), Ok(MonitorAddress::LoopbackPort(10810)));
        assert_eq!(address("[::1]:1"), "[::1]:1");
        assert_eq!(address("[fe80::1%lo]:1"), "[fe80::1%1]:1");
        assert_eq!(address("unix:/run/x"), "unix:/run/x");
        for junk in ["", "65536", "127.0.0.1", "localhost:1", "unix:", ":1", "/run/x"] {
            assert!(at(junk).is_err(), "{junk}");
        }
    }
}
