//! Options of `hexz-nbd warm`.

use std::path::PathBuf;

use clap::Args;

use super::archives::OpenArchiveOptions;
use super::location;
use super::stores::{DiskCacheOptions, StoreOptions, TraceOptions};
use super::values::os_text;

#[derive(Debug, Args)]
#[command(mut_arg("disk_cache", |arg| arg.required(true)))]
pub(crate) struct Warm {
    /// URLs of archives
    #[arg(required = true, value_name = "URL", value_parser = os_text(location::archive))]
    pub(crate) archives: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) disk_cache: DiskCacheOptions,
    #[command(flatten)]
    pub(crate) traces: TraceOptions,
    #[command(flatten)]
    pub(crate) opening: OpenArchiveOptions,
    #[command(flatten)]
    pub(crate) stores: StoreOptions,
}
