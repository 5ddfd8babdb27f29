//! Options of `hexz-nbd doctor`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::server_target::ServerTarget;
use super::values::duration;

const LONG_HELP: &str = "\
It connects as a client would, tries one thing after another, and says of whatever doesn't work
what to change, and on which side. It works with any NBD server. Nothing is written.

Without --tls-ca or --tls-dir the server's certificate is shown but not verified: anybody could
have made it. --tls-ca /etc/ssl/certs/ca-certificates.crt verifies it by the CAs of the system.

TLS is used if the server offers it; with --tls-ca or --tls-dir, nbds:// and nbds+unix:// it has
to be offered, with nbd:// and nbd+unix:// it isn't used. The parts of a URI that are known are
the export, tls-certificates, tls-hostname and socket.

With --json there is one object: target, outcome (good, warning, bad), and steps, each with step,
outcome, reasons (labels of its problems), found, lines, details,
advice [{side (client, server, network), reason, text}] and seconds.

EXIT CODES
  0  it works, perhaps with warnings
  1  something doesn't work
  2  the command line is wrong";

#[derive(Debug, Args)]
#[command(after_long_help = LONG_HELP, after_help = "Use --help for more, and for exit codes.")]
pub(crate) struct Doctor {
    /// The server: HOST, HOST:PORT, [IPV6]:PORT, unix:PATH, or an NBD URI such as
    /// nbds://HOST/EXPORT
    #[arg(value_name = "SERVER")]
    pub(crate) server: ServerTarget,
    /// The export to look at [default: the default export, or else the first that is listed]
    #[arg(long, value_name = "NAME")]
    pub(crate) export: Option<String>,
    /// How long each step may take
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    pub(crate) timeout: Duration,
    /// Don't measure how fast the export can be read, which takes two seconds or 64 MiB
    #[arg(long)]
    pub(crate) no_speed: bool,
    /// Print one object for machines
    #[arg(long)]
    pub(crate) json: bool,
    /// Verify the server's certificate by these CAs, in PEM form
    #[arg(long, value_name = "FILE", help_heading = "TLS", conflicts_with = "tls_dir")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Show this certificate to the server if it asks for one, in PEM form, followed by those
    /// that lead to its root
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "TLS",
        requires = "tls_key",
        requires = "tls_ca"
    )]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, in PEM form
    #[arg(long, value_name = "FILE", help_heading = "TLS", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Take ca-cert.pem, client-cert.pem and client-key.pem from this folder, as libnbd and qemu
    /// do; the last two needn't be there
    #[arg(long, value_name = "DIR", help_heading = "TLS")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// The name that the server's certificate has to have [default: that of the server; of a
    /// Unix socket: localhost]
    #[arg(long, value_name = "NAME", help_heading = "TLS")]
    pub(crate) tls_hostname: Option<String>,
    /// Don't use TLS, even if the server offers it
    #[arg(long, help_heading = "TLS", conflicts_with_all = ["require_tls", "tls_ca", "tls_dir"])]
    pub(crate) no_tls: bool,
    /// Fail if the server doesn't offer TLS
    #[arg(long, help_heading = "TLS")]
    pub(crate) require_tls: bool,
}
