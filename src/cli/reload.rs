//! Options of `hexz-nbd reload`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values;

const EXIT_STATUS: &str = "\
EXIT STATUS
  0  the new settings are active, and the archives are open or still being opened
  1  no server listens on the socket, or it doesn't answer
  2  invalid command line; or the server rejected the configuration file or the rules
  3  the server can't use an archive, a password, a key or a list of digests
  4  the server can't use a certificate or a key";

#[derive(Debug, Args)]
#[command(after_long_help = EXIT_STATUS, after_help = "Use --help for exit codes.")]
pub(crate) struct Reload {
    /// Path of the server's --control-socket
    #[arg(value_name = "SOCKET", default_value = "/run/hexz-nbd/control.sock")]
    pub(crate) socket: PathBuf,
    /// Maximum time to wait for the server, and then for archives that take long to open
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = values::duration)]
    pub(crate) timeout: Duration,
}
