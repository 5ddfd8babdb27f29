//! What the run is started with.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Loads hexz-nbd and breaks what is around it, and looks whether anybody notices
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// The program
    #[arg(long, default_value = "target/release/hexz-nbd")]
    pub(crate) server: PathBuf,
    /// Archives that the Hexz tools wrote
    #[arg(long, default_value = "tests/archives")]
    pub(crate) archives: PathBuf,
    /// Where the server's log goes
    #[arg(long, default_value = "target/stress")]
    pub(crate) folder: PathBuf,
    /// How long everything goes on, in seconds
    #[arg(long, env = "STRESS_SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(30..))]
    seconds: u64,
    /// How many clients read all the time
    #[arg(long, env = "STRESS_CLIENTS", default_value_t = 500, value_parser = clap::value_parser!(u32).range(50..))]
    pub(crate) clients: u32,
}

impl Options {
    pub(crate) fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }
}
