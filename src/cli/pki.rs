//! Options of `hexz-nbd pki`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use rcgen::RevocationReason;

use super::values::{MAX_VALIDITY_DAYS, number, validate_common_name, validity};

/// Default validity of a CA. Ten years, because replacing a CA means updating every client.
const CA_DAYS: u32 = 3650;
/// Maximum number of names. More would make a certificate that is too large for TLS.
const MAX_NAMES: usize = 100;

const AFTER_HELP: &str = "\
EXAMPLE
  On a machine that is neither a server nor a client:
    hexz-nbd pki init
    hexz-nbd pki server nbd.example.org 192.0.2.7
    hexz-nbd pki client backup.example.org
    hexz-nbd pki show
    hexz-nbd pki renew backup.example.org
    hexz-nbd pki revoke backup.example.org

EXIT STATUS
  0  success
  1  failure
  2  invalid command line
  3  show --expiring has found certificates";

const SHOW_AFTER_HELP: &str = "\
EXIT STATUS
  0  success; with --expiring, no certificate expires within that time
  1  failure
  2  invalid command line
  3  with --expiring: certificates expire within that time";

#[derive(Debug, Args)]
#[command(after_long_help = AFTER_HELP)]
pub(crate) struct Pki {
    #[command(subcommand)]
    pub(crate) command: PkiCommand,
    /// Folder of the CA and of all files that it creates
    #[arg(long, value_name = "FOLDER", default_value = "pki", global = true)]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Create a CA: its key, its certificate, and an empty revocation list
    Init(Init),
    /// Issue a certificate for a server
    ///
    /// Each NAME is a DNS name or an address that clients use for it. The certificate, its key and
    /// the CA's certificate are written to the folder servers/NAME.
    Server(Issue),
    /// Issue a certificate for a client
    ///
    /// NAME identifies the client: a DNS name with a dot, an e-mail address, a URI such as
    /// spiffe://example.org/backup, an address, or other text, which becomes the common name. The
    /// certificate, its key and the CA's certificate are written to the folder clients/NAME.
    Client(Issue),
    /// Issue new certificates with the names of existing ones
    ///
    /// The new certificate has the names, purpose, kind of key and lifetime of the newest one that
    /// isn't revoked, and a new key. It replaces the files in servers/NAME or clients/NAME. The
    /// former certificate stays valid until it expires or is revoked (revoke --reason superseded).
    Renew(Renew),
    /// Add a certificate to the revocation list
    Revoke(Revoke),
    /// List the CA and the certificates that it has issued
    #[command(after_long_help = SHOW_AFTER_HELP)]
    Show(Show),
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// Name of the CA [default: "hexz-nbd CA" and a unique number]
    #[arg(long, value_parser = validate_common_name)]
    pub(crate) name: Option<String>,
    /// Validity of the CA, in days
    #[arg(long, value_name = "N", default_value_t = CA_DAYS, value_parser = days())]
    pub(crate) days: u32,
    #[command(flatten)]
    pub(crate) key: KeyOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Issue {
    /// Names for the certificate; the folder is named after the first
    #[arg(value_name = "NAME", required = true, num_args = 1..=MAX_NAMES)]
    pub(crate) names: Vec<String>,
    /// Validity of the certificate in days, limited by that of the CA [default: 397 for a server,
    /// 90 for a client]
    #[arg(long, value_name = "N", value_parser = days())]
    pub(crate) days: Option<u32>,
    #[command(flatten)]
    pub(crate) key: KeyOptions,
}

#[derive(Debug, Args)]
pub(crate) struct KeyOptions {
    /// Create an Ed25519 key instead of an ECDSA key on P-256
    #[arg(long)]
    pub(crate) ed25519: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("certificates")
    .args(["which", "expiring"])
    .required(true)
    .multiple(true))]
pub(crate) struct Renew {
    /// Name, serial number, or file of a certificate
    ///
    /// With --expiring, the default is all certificates that haven't expired yet.
    #[arg(value_name = "NAME|SERIAL|FILE")]
    pub(crate) which: Vec<String>,
    /// Renew only certificates that expire within this time, such as 30d
    #[arg(long, value_name = "TIME", value_parser = validity)]
    pub(crate) expiring: Option<Duration>,
    /// Validity of the new certificate in days, limited by that of the CA [default: that of the
    /// former one]
    #[arg(long, value_name = "N", value_parser = days())]
    pub(crate) days: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Name, serial number, or file of a certificate
    ///
    /// A name revokes all its certificates; with --reason superseded, all but the newest.
    #[arg(value_name = "NAME|SERIAL|FILE")]
    pub(crate) which: String,
    /// Reason for the revocation
    #[arg(long, value_enum, default_value_t)]
    reason: RevocationReasonArg,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// List only certificates that expire within this time, such as 30d, or have expired
    ///
    /// The exit code is 3 if there are any. Certificates that are revoked, or that newer ones with
    /// the same names supersede, don't count.
    #[arg(long, value_name = "TIME", value_parser = validity)]
    pub(crate) expiring: Option<Duration>,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum RevocationReasonArg {
    #[default]
    Unspecified,
    /// The key is known to others, or may be
    KeyCompromise,
    /// The owner has changed
    AffiliationChanged,
    /// A new certificate replaces it; the newest one of a name is never revoked
    Superseded,
    /// It is no longer needed
    CessationOfOperation,
    /// The client is no longer authorized
    PrivilegeWithdrawn,
}

impl Revoke {
    /// Returns the reason for the revocation, unless it is unspecified.
    pub(crate) fn reason(&self) -> Option<RevocationReason> {
        match self.reason {
            RevocationReasonArg::Unspecified => None,
            RevocationReasonArg::KeyCompromise => Some(RevocationReason::KeyCompromise),
            RevocationReasonArg::AffiliationChanged => Some(RevocationReason::AffiliationChanged),
            RevocationReasonArg::Superseded => Some(RevocationReason::Superseded),
            RevocationReasonArg::CessationOfOperation => {
                Some(RevocationReason::CessationOfOperation)
            }
            RevocationReasonArg::PrivilegeWithdrawn => Some(RevocationReason::PrivilegeWithdrawn),
        }
    }
}

/// Returns a parser for a number of days.
fn days() -> fn(&str) -> Result<u32, String> {
    number::<u32, 1, MAX_VALIDITY_DAYS>
}
