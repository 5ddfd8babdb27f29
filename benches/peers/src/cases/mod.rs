//! What is measured, and what is aimed at.

mod big;
mod crowd;
mod handshakes;
mod latency;
mod memory;
mod opening;
mod others;
mod random;
mod sequential;

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bench::Bench;
use crate::measure::progress;
use crate::row::Row;

/// In the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
pub(crate) enum Case {
    /// 4 KiB at random from a warm cache, against nbdkit on the raw image
    RandomWarm,
    /// In order, nothing cached, against qemu-nbd on a compressed qcow2 and the parts' sum
    SequentialCold,
    /// In order from a warm cache, against nbdkit on the raw image
    SequentialWarm,
    /// 4 KiB at random, first touch and repeated, against qemu-nbd on a compressed qcow2
    RandomCold,
    /// 4 KiB at random, against Hexz's own server
    HexzServer,
    /// What a client that reads a lot does to the latency of others
    Latency,
    /// Many clients that read the same at the same time
    Crowd,
    /// TLS handshakes
    Handshakes,
    /// Memory of connections that do nothing
    Idle,
    /// Memory under the heaviest of loads
    Memory,
    /// Opening an archive of 1 TiB
    Opening,
    /// Other servers and clients, for orientation
    Others,
}

impl Case {
    pub(crate) fn run(self, bench: &Bench) -> Result<Vec<Row>> {
        progress(&format!("{self:?}"));
        match self {
            Self::RandomWarm => random::warm(bench),
            Self::SequentialCold => sequential::cold(bench),
            Self::SequentialWarm => sequential::warm(bench),
            Self::RandomCold => random::cold(bench),
            Self::HexzServer => random::against_hexz_server(bench),
            Self::Latency => latency::run(bench),
            Self::Crowd => crowd::run(bench),
            Self::Handshakes => handshakes::run(bench),
            Self::Idle => memory::idle(bench),
            Self::Memory => memory::heavy(bench),
            Self::Opening => opening::run(bench),
            Self::Others => others::run(bench),
        }
    }
}
