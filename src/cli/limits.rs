//! How much of everything, and how long it may take.

use std::time::Duration;

use clap::Args;
use hexz_nbd::config::{Limits, Memory, Timeouts};

use super::values::{at_least_one, duration};

#[derive(Debug, Args)]
pub(crate) struct Bounds {
    /// How many clients are served at once
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().connections,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_connections: usize,
    /// How many of them may come from one address, or one IPv6 network of 64 bits
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().connections_per_address,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_connections_per_address: usize,
    /// How long a client may take until it has chosen an export, TLS included
    #[arg(
        long, value_name = "TIME", default_value = "30s",
        value_parser = duration, help_heading = "Limits"
    )]
    handshake_timeout: Duration,
    /// How long a client may take for the TLS handshake
    #[arg(
        long, value_name = "TIME", default_value = "10s",
        value_parser = duration, help_heading = "Limits"
    )]
    tls_handshake_timeout: Duration,
    /// How long clients may delay the end, once this program is told to end
    #[arg(
        long, value_name = "TIME", default_value = "10s",
        value_parser = duration, help_heading = "Limits"
    )]
    shutdown_timeout: Duration,
}

impl Bounds {
    pub(super) fn limits(&self, memory: Memory) -> Limits {
        Limits {
            connections: self.max_connections,
            connections_per_address: self.max_connections_per_address,
            in_flight: memory.in_flight,
            ..Limits::default()
        }
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        Timeouts {
            handshake: self.handshake_timeout,
            tls_handshake: self.tls_handshake_timeout,
            shutdown: self.shutdown_timeout,
            ..Timeouts::default()
        }
    }
}
