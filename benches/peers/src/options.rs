//! What can be asked of this program.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::cases::Case;

/// Measures hexz-nbd and its peers side by side
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Where image and archives are, or are made: some 2 GiB
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    pub(crate) folder: PathBuf,
    /// The gateway
    #[arg(long, value_name = "FILE", default_value = "target/release/hexz-nbd")]
    pub(crate) hexz_nbd: PathBuf,
    /// Hexz's own packer and server, of benches/hexz-server
    #[arg(long, value_name = "FILE", default_value = "target/release/hexz-peer")]
    pub(crate) hexz_peer: PathBuf,
    /// How often everything is measured; what counts is the median
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// Measure only these
    #[arg(long, value_name = "CASE", num_args = 1.., value_enum)]
    only: Vec<Case>,
    /// Keep the earlier results of all other cases
    #[arg(long, requires = "only")]
    pub(crate) keep_others: bool,
    /// Draw the plots of the earlier results again, and measure nothing
    #[arg(long, conflicts_with_all = ["only", "quick"])]
    pub(crate) redraw: bool,
    /// Measure so little that the figures mean nothing, to see whether it works
    #[arg(long)]
    pub(crate) quick: bool,
    /// Where the table and the plots go
    #[arg(long, value_name = "DIR", default_value = "target/bench/results")]
    pub(crate) output: PathBuf,
}

impl Options {
    /// What is to be measured, in the order of the table.
    pub(crate) fn cases(&self) -> Vec<Case> {
        let wanted = |case: &Case| self.only.is_empty() || self.only.contains(case);
        Case::value_variants().iter().copied().filter(wanted).collect()
    }
}
