//! Options of `hexz-nbd trace`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::monitor_endpoint::MonitorEndpoint;
use super::top::MonitorAccess;
use super::values;

#[derive(Debug, Args)]
pub(crate) struct Trace {
    #[command(subcommand)]
    pub(crate) command: TraceCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TraceCommand {
    /// Record what clients read of an export, until it is interrupted or --for has passed
    ///
    /// Prints the trace to the standard output while it is recorded. The export need not be open
    /// yet. The server has to be started with --monitor.
    ///
    /// The exit status is 1 if nothing was read.
    Record(TraceRecord),
    /// Print a trace of what several traces have in common
    Merge(TraceMerge),
    /// Describe traces
    Show(TraceShow),
}

#[derive(Debug, Args)]
pub(crate) struct TraceRecord {
    /// Export to record
    #[arg(value_name = "EXPORT")]
    pub(crate) export: String,
    /// Address of the server's --monitor: ADDRESS:PORT, PORT, unix:PATH, or
    /// https://ADDRESS:PORT
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub(crate) monitor: MonitorEndpoint,
    #[command(flatten)]
    pub(crate) access: MonitorAccess,
    /// End after this time, counted from the first read; at most an hour
    #[arg(long = "for", value_name = "DURATION", value_parser = values::duration)]
    pub(crate) duration: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct TraceMerge {
    /// Traces of the same disk
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
    /// Number of traces that have to contain a part [default: more than half of them]
    #[arg(long, value_name = "N", value_parser = values::count)]
    pub(crate) at_least: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct TraceShow {
    /// Traces
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}
