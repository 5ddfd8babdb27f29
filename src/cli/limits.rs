//! Options for limits and timeouts.

use std::num::{NonZeroU32, NonZeroU64};
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use nbd_gateway::config::{Limits, Rate, Timeouts};
use nbd_server::NegotiationLimits;
use nbd_server::budget::RESERVE;
use nbd_server::wire::MAX_PAYLOAD;
use serde::Deserialize;

use super::from_file;
use super::values::{MAX_COUNT, count, duration, duration_or_zero, number, size};

/// Minimum of `--max-option-bytes`: the longest name. With less, some exports couldn't be chosen.
const MIN_OPTION_BYTES: u64 = 4096;

/// Minimum of `--max-in-flight`: the longest reply. With less, that reply could never be sent.
const MIN_IN_FLIGHT: u64 = MAX_PAYLOAD as u64;

/// Minimum of `--max-in-flight-per-connection`: the memory that is reserved for each connection.
/// With less, requests would wait for nothing.
const MIN_PER_CONNECTION: u64 = RESERVE as u64;

/// Maximum of a size that is stored in 32 bits.
const MAX_SIZE: u64 = u32::MAX as u64;

/// Minimum of `--max-bandwidth`, in bytes per second: a rate at which the longest read takes
/// minutes. Until it ends, nobody notices that the client has gone.
const MIN_BANDWIDTH: u64 = 64 * 1024;

/// Maximum of `--max-bandwidth`, in bytes per second.
const MAX_BANDWIDTH: u64 = 1 << 50;

#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitOptions {
    /// Number of clients that are served at the same time
    #[arg(long, value_name = "N", default_value = "256", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    max_connections: usize,
    /// Number of served clients per address, or per IPv6 network of 64 bits
    #[arg(long, value_name = "N", default_value = "64", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    max_connections_per_address: usize,
    /// Number of served clients per identity, according to their certificates
    #[arg(long, value_name = "N", default_value = "64", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    max_connections_per_identity: usize,
    /// Number of clients that negotiate at the same time, besides those that are served. Others
    /// wait for up to 10 seconds, as many as may be served
    #[arg(long, value_name = "N", default_value = "128", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    max_handshakes: usize,
    /// Number of negotiating clients per address, or per IPv6 network of 64 bits
    #[arg(long, value_name = "N", default_value = "32", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    max_handshakes_per_address: usize,
    /// Number of negotiating clients per network: 24 bits of IPv4, 48 bits of IPv6. Three
    /// quarters of those that wait may be from one network
    #[arg(long, value_name = "N", default_value = "64", value_parser = count)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    max_handshakes_per_network: usize,
    /// Rate limit for new connections per address, or per IPv6 network of 64 bits: connections per
    /// second, averaged over ten seconds
    #[arg(
        long, value_name = "N", default_value = "100",
        value_parser = number::<u32, 1, MAX_COUNT>
    )]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_COUNT>")]
    connection_rate: u32,
    /// Memory for replies in flight to all clients, which is a part of --cache-size
    #[arg(
        long, value_name = "SIZE", default_value = "32MiB",
        value_parser = size::<MIN_IN_FLIGHT, MAX_SIZE>
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, MIN_IN_FLIGHT, MAX_SIZE>")]
    max_in_flight: ByteSize,
    /// Memory for replies in flight per connection; a single larger reply may exceed it
    #[arg(
        long, value_name = "SIZE", default_value = "8MiB",
        value_parser = size::<MIN_PER_CONNECTION, MAX_SIZE>
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, MIN_PER_CONNECTION, MAX_SIZE>")]
    max_in_flight_per_connection: ByteSize,
    /// Bandwidth per client, in bytes per second; short bursts may exceed it [default: unlimited]
    #[arg(long, value_name = "SIZE", value_parser = size::<MIN_BANDWIDTH, MAX_BANDWIDTH>)]
    #[serde(deserialize_with = "from_file::size::<_, _, MIN_BANDWIDTH, MAX_BANDWIDTH>")]
    max_bandwidth: Option<ByteSize>,
    /// Requests per client and second; short bursts may exceed it [default: unlimited]
    #[arg(long, value_name = "N", value_parser = number::<NonZeroU32, 1, { u32::MAX }>)]
    #[serde(deserialize_with = "from_file::optional_number::<_, _, 1, { u32::MAX }>")]
    max_requests: Option<NonZeroU32>,
    /// Number of options that a client may send before it has chosen an export. Some clients send
    /// two per export
    #[arg(long, value_name = "N", default_value = "4096", value_parser = number::<u32, 1, { u32::MAX }>)]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, { u32::MAX }>")]
    max_options: u32,
    /// Total size of these options
    #[arg(
        long, value_name = "SIZE", default_value = "1MiB",
        value_parser = size::<MIN_OPTION_BYTES, MAX_SIZE>
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, MIN_OPTION_BYTES, MAX_SIZE>")]
    max_option_bytes: ByteSize,
    /// Time until a client must have chosen an export, including the TLS handshake
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    handshake_timeout: Duration,
    /// Time limit for the TLS handshake
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    tls_handshake_timeout: Duration,
    /// Time for which a client may stop reading while its replies occupy memory that others need
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    stall_timeout: Duration,
    /// Time for which a served client may send no request [default: unlimited]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    idle_timeout: Option<Duration>,
    /// Time after SIGTERM for which connections are still accepted, while /readyz of the monitor
    /// fails: load balancers need some seconds to notice [default: none]
    #[arg(long, value_name = "TIME", value_parser = duration_or_zero)]
    #[serde(deserialize_with = "from_file::duration_or_zero")]
    pub(crate) drain_delay: Option<Duration>,
    /// Time limit for draining in-flight requests at shutdown
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    #[serde(deserialize_with = "from_file::duration")]
    shutdown_timeout: Duration,
}

impl LimitOptions {
    /// Returns the limit on memory for replies in flight, in bytes.
    pub(super) fn in_flight(&self) -> u32 {
        bytes(self.max_in_flight)
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            connections: self.max_connections,
            connections_per_address: self.max_connections_per_address,
            connections_per_identity: self.max_connections_per_identity,
            handshakes: self.max_handshakes,
            handshakes_per_address: self.max_handshakes_per_address,
            handshakes_per_network: self.max_handshakes_per_network,
            connection_rate: self.connection_rate,
            negotiation: NegotiationLimits {
                options: self.max_options,
                option_bytes: self.max_option_bytes.as_u64(),
            },
            rate: Rate {
                bandwidth: self.max_bandwidth.and_then(|size| NonZeroU64::new(size.as_u64())),
                requests: self.max_requests.map(NonZeroU64::from),
            },
            in_flight: self.in_flight(),
            in_flight_per_connection: bytes(self.max_in_flight_per_connection),
        }
    }

    pub(super) fn timeouts(&self) -> Timeouts {
        Timeouts {
            handshake: self.handshake_timeout,
            tls_handshake: self.tls_handshake_timeout,
            stall: self.stall_timeout,
            idle: self.idle_timeout,
            shutdown: self.shutdown_timeout,
        }
    }
}

/// Converts a size that is known to fit into 32 bits.
fn bytes(size: ByteSize) -> u32 {
    u32::try_from(size.as_u64()).unwrap_or(u32::MAX)
}
