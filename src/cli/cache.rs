//! Options of `hexz-nbd cache`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct Cache {
    #[command(subcommand)]
    pub(crate) command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List the objects in a disk cache, also while it is in use
    Show(CacheFolder),
    /// Compare everything in a disk cache with its hashes
    ///
    /// The exit status is 0 if all parts are good, and 1 if some are bad. Those are fetched anew
    /// when they are read.
    Check(CacheFolder),
    /// Empty a disk cache that isn't in use
    Clear(CacheFolder),
}

#[derive(Debug, Args)]
pub(crate) struct CacheFolder {
    /// Folder of --disk-cache
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
}
