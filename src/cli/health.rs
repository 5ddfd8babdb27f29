//! Options of `hexz-nbd health`.

use clap::Args;

use super::monitor_endpoint::MonitorEndpoint;
use super::top::MonitorAccess;

const EXIT_STATUS: &str = "\
EXIT STATUS
  0  healthy, or ready with --ready
  1  not healthy or ready, or no response within 3 s
  2  invalid command line";

#[derive(Debug, Args)]
#[command(after_long_help = EXIT_STATUS)]
pub(crate) struct Health {
    /// Address of the server's --monitor: ADDRESS:PORT, PORT, unix:PATH, or
    /// https://ADDRESS:PORT
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub(crate) monitor: MonitorEndpoint,
    #[command(flatten)]
    pub(crate) access: MonitorAccess,
    /// Check whether clients can be served (/readyz), not only whether the server is alive
    #[arg(long)]
    pub(crate) ready: bool,
}
