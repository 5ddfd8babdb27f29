//! Options of `hexz-nbd doctor`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::server_target::ServerTarget;
#[cfg(feature = "remote")]
use super::stores::StoreToCheck;
use super::values::duration;

const LONG_HELP: &str = "\
Connects as a client, performs one check after another, and prints for each problem what to change,
and on which side. It works with any NBD server, and never writes.

Without --tls-ca or --tls-dir, the server's certificate is shown but not verified: it proves
nothing. --tls-ca /etc/ssl/certs/ca-certificates.crt verifies it with the CAs of the system.

TLS is used if the server offers it. It is required with --tls-ca, --tls-dir, nbds:// and
nbds+unix://, and not used with nbd:// and nbd+unix://. Supported parts of a URI are the export,
tls-certificates, tls-hostname and socket.

With --store, it checks a store as the gateway would use it: name resolution, connection, TLS,
credentials, this machine's clock, permissions, ranges, whether a replaced object is noticed, the
archive with its parents and its tree file, latency and rate. It takes the same --store options as
the gateway, and shows no secrets.

With --json, the output is one object: target, outcome (good, warning, bad), and steps, each with
step, outcome, reasons (labels of its problems), found, lines, details,
advice [{side (client, server, network), reason, text}] and seconds. With --store, this machine is
the client, and the store the server.

EXIT STATUS
  0  everything works, possibly with warnings
  1  a check failed
  2  invalid command line";

#[derive(Debug, Args)]
#[command(after_long_help = LONG_HELP, after_help = "Use --help for more, and for exit codes.")]
pub(crate) struct Doctor {
    /// Server to check: HOST, HOST:PORT, [IPV6]:PORT, unix:PATH, or an NBD URI such as
    /// nbds://HOST/EXPORT
    #[cfg_attr(feature = "remote", arg(value_name = "SERVER", required_unless_present = "store"))]
    #[cfg_attr(not(feature = "remote"), arg(value_name = "SERVER", required = true))]
    pub(crate) server: Option<ServerTarget>,
    #[cfg(feature = "remote")]
    #[command(flatten)]
    pub(crate) remote: StoreToCheck,
    /// Export to check [default: the default export, or else the first one listed]
    #[arg(long, value_name = "NAME")]
    pub(crate) export: Option<String>,
    /// Time limit for each step
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    pub(crate) timeout: Duration,
    /// Don't measure the read speed, which takes two seconds or reads 64 MiB (8 MiB from a store)
    #[arg(long)]
    pub(crate) no_speed: bool,
    /// Print a JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// CAs to verify the server's certificate with, in PEM format
    #[arg(long, value_name = "FILE", help_heading = "TLS", conflicts_with = "tls_dir")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Client certificate for servers that request one, in PEM format, followed by its
    /// intermediate CAs
    #[arg(
        long,
        value_name = "FILE",
        help_heading = "TLS",
        requires = "tls_key",
        requires = "tls_ca"
    )]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert, in PEM format
    #[arg(long, value_name = "FILE", help_heading = "TLS", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Folder with ca-cert.pem and, optionally, client-cert.pem and client-key.pem, as for libnbd
    /// and qemu
    #[arg(long, value_name = "DIR", help_heading = "TLS")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Name that the server's certificate must contain [default: that of the server; localhost for
    /// a Unix socket]
    #[arg(long, value_name = "NAME", help_heading = "TLS")]
    pub(crate) tls_hostname: Option<String>,
    /// Don't use TLS, even if the server offers it
    #[arg(long, help_heading = "TLS", conflicts_with_all = ["require_tls", "tls_ca", "tls_dir"])]
    pub(crate) no_tls: bool,
    /// Fail if the server doesn't offer TLS
    #[arg(long, help_heading = "TLS")]
    pub(crate) require_tls: bool,
}
