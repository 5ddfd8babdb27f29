//! Options for limits and timeouts.

use std::num::{NonZeroU32, NonZeroU64};
use std::ops::RangeInclusive;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use nbd_gateway::config::{Limits, Rate, Timeouts};
use nbd_server::NegotiationLimits;
use nbd_server::budget::RESERVE;
use nbd_server::wire::MAX_PAYLOAD;

use super::values::{at_least_one, duration, size_within};

/// Range of `--max-option-bytes`. It starts at the longest name: with less, some exports couldn't
/// be chosen.
const OPTION_BYTES_RANGE: RangeInclusive<u64> = 4096..=u32::MAX as u64;

/// Range of `--max-in-flight`. It starts at the longest reply: with less, that reply could never be
/// sent.
const IN_FLIGHT: RangeInclusive<u64> = MAX_PAYLOAD as u64..=u32::MAX as u64;

/// Range of `--max-in-flight-per-connection`. It starts at the memory that is reserved for each
/// connection anyway: with less, requests would wait for nothing.
const IN_FLIGHT_PER_CONNECTION: RangeInclusive<u64> = RESERVE as u64..=u32::MAX as u64;

/// Range of `--max-bandwidth`, in bytes per second. It starts at a rate that pays for the longest
/// read within minutes: until then, nobody notices that the client has gone.
const BANDWIDTH: RangeInclusive<u64> = 64 * 1024..=1 << 50;

#[derive(Debug, Args)]
pub(crate) struct LimitOptions {
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
    /// How many of them may have the same identity, by its certificate
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().connections_per_identity,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_connections_per_identity: usize,
    /// How many clients may negotiate at once, besides those that are served
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().handshakes,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_handshakes: usize,
    /// How many of them may come from one address, or one IPv6 network of 64 bits
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().handshakes_per_address,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_handshakes_per_address: usize,
    /// How many of them may come from one network: 24 bits of IPv4, 48 of IPv6
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().handshakes_per_network,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_handshakes_per_network: usize,
    /// How many connections an address, or an IPv6 network of 64 bits, may begin in a
    /// second, averaged over ten
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().connection_rate,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Limits"
    )]
    connection_rate: u32,
    /// Memory for answers on their way, of all clients. It is a part of --cache-size
    #[arg(
        long, value_name = "SIZE", default_value = "32MiB",
        value_parser = size_within(IN_FLIGHT), help_heading = "Limits"
    )]
    max_in_flight: ByteSize,
    /// How much of that one connection may take, but for one larger answer at a time
    #[arg(
        long, value_name = "SIZE", default_value = "8MiB",
        value_parser = size_within(IN_FLIGHT_PER_CONNECTION), help_heading = "Limits"
    )]
    max_in_flight_per_connection: ByteSize,
    /// How much a client may ask to read a second, in short bursts more [default: no limit]
    #[arg(
        long, value_name = "SIZE", value_parser = size_within(BANDWIDTH), help_heading = "Limits"
    )]
    max_bandwidth: Option<ByteSize>,
    /// How many requests a client may send a second, in short bursts more [default: no limit]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    max_requests: Option<NonZeroU32>,
    /// How many options a client may send until it has chosen an export. Some send two for
    /// each export that there is
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().negotiation.options,
        value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits"
    )]
    max_options: u32,
    /// How many bytes of data these options may have in all
    #[arg(
        long, value_name = "SIZE", default_value = "1MiB",
        value_parser = size_within(OPTION_BYTES_RANGE), help_heading = "Limits"
    )]
    max_option_bytes: ByteSize,
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
    /// How long a client may read nothing while its answers keep memory from others
    #[arg(
        long, value_name = "TIME", default_value = "10s",
        value_parser = duration, help_heading = "Limits"
    )]
    stall_timeout: Duration,
    /// How long a client that is served may ask for nothing [default: as long as it likes]
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    idle_timeout: Option<Duration>,
    /// How long clients may delay the end, once this program is told to end
    #[arg(
        long, value_name = "TIME", default_value = "10s",
        value_parser = duration, help_heading = "Limits"
    )]
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
