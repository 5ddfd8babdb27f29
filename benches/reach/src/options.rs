//! Command line options.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::cases::Case;

/// Measures hexz-nbd on archives in an object store, across a network
#[derive(Debug, Clone, Parser)]
pub(crate) struct Options {
    /// Folder of the image and the archive, which are created if they are missing: some 4 GiB
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) folder: PathBuf,
    /// The gateway
    #[arg(long, value_name = "FILE", default_value = "target/release/hexz-nbd")]
    pub(crate) hexz_nbd: PathBuf,
    /// Hexz's own packer, of benches/hexz-server
    #[arg(long, value_name = "FILE", default_value = "target/release/hexz-peer")]
    pub(crate) hexz_peer: PathBuf,
    /// Round-trip time to the store, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 20)]
    pub(crate) round_trip: u64,
    /// Rate of the limited link to the store, in Mbit/s
    #[arg(long, value_name = "MBIT", default_value_t = 1000)]
    pub(crate) rate: u64,
    /// Time for which the store is down, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) outage: u64,
    /// Number of clients that read one image at once
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) clients: usize,
    /// Time limit for each read of the whole image, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) patience: u64,
    /// Folder with the disk from which boot.trace was recorded, as disk.raw and disk.hxz; without it,
    /// the same parts of the benchmark's image are read
    #[arg(long, value_name = "DIR")]
    pub(crate) boot_disk: Option<PathBuf>,
    /// Measure only these cases
    #[arg(long, value_name = "CASE", num_args = 1.., value_enum)]
    only: Vec<Case>,
    /// Let the gateway read a local file instead of the store, to try the benchmark
    #[arg(long)]
    pub(crate) local: bool,
    /// Another option for the gateway, such as --gateway-option=--fetch-size=256KiB [repeatable]
    #[arg(long, value_name = "OPTION")]
    pub(crate) gateway_option: Vec<String>,
    /// Write the table to this file too
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

impl Options {
    /// Returns the selected cases, in the order of the table.
    pub(crate) fn cases(&self) -> Vec<Case> {
        let is_selected = |case: &Case| self.only.is_empty() || self.only.contains(case);
        Case::value_variants().iter().copied().filter(is_selected).collect()
    }
}
