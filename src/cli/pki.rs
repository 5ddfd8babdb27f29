//! Options of `hexz-nbd pki`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use rcgen::RevocationReason;

use super::values::validate_common_name;

/// Default validity of a CA. Ten years, because replacing a CA means updating every client.
const CA_DAYS: u32 = 3650;
/// Maximum number of names. More would make a certificate that is too large for TLS.
const MAX_NAMES: usize = 100;

const AFTER_HELP: &str = "\
EXAMPLE
  On a machine that is neither the server nor a client:
    hexz-nbd pki init
    hexz-nbd pki server nbd.example.org 192.0.2.7
    hexz-nbd pki client backup.example.org
    hexz-nbd pki show
    hexz-nbd pki revoke backup.example.org

EXIT CODES
  0  it was done
  1  it failed
  2  the command line is wrong";

#[derive(Debug, Args)]
#[command(after_long_help = AFTER_HELP)]
pub(crate) struct Pki {
    #[command(subcommand)]
    pub(crate) command: PkiCommand,
    /// The folder with the CA and everything that it has made
    #[arg(long, value_name = "FOLDER", default_value = "pki", global = true)]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiCommand {
    /// Make a CA: its key, its certificate, and an empty revocation list
    Init(Init),
    /// Make a certificate for a server
    ///
    /// NAME is each DNS name or address by which clients call it. Certificate, key and the
    /// CA's certificate go into the folder servers/NAME.
    Server(Issue),
    /// Make a certificate for a client
    ///
    /// NAME is who the client is: a DNS name with a dot in it, an e-mail address, a URI such
    /// as spiffe://example.org/backup, an address, or any words, which become the common
    /// name. Certificate, key and the CA's certificate go into the folder clients/NAME.
    Client(Issue),
    /// Put a certificate on the revocation list
    Revoke(Revoke),
    /// List the CA and the certificates that it has issued
    Show(Show),
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// The CA's name [default: "hexz-nbd CA" and a number that no other CA has]
    #[arg(long, value_parser = validate_common_name)]
    pub(crate) name: Option<String>,
    /// How long the CA is valid
    #[arg(long, value_name = "N", default_value_t = CA_DAYS, value_parser = days())]
    pub(crate) days: u32,
    #[command(flatten)]
    pub(crate) key: KeyOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Issue {
    /// The names; the folder has the first
    #[arg(value_name = "NAME", required = true, num_args = 1..=MAX_NAMES)]
    pub(crate) names: Vec<String>,
    /// How long the certificate is valid, but no longer than the CA [default: 397 for a
    /// server, 90 for a client]
    #[arg(long, value_name = "N", value_parser = days())]
    pub(crate) days: Option<u32>,
    #[command(flatten)]
    pub(crate) key: KeyOptions,
}

#[derive(Debug, Args)]
pub(crate) struct KeyOptions {
    /// Make an Ed25519 key instead of one on the curve P-256
    #[arg(long)]
    pub(crate) ed25519: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// A name, a serial number, or the file of a certificate
    ///
    /// All certificates of a name are revoked.
    #[arg(value_name = "NAME|SERIAL|FILE")]
    pub(crate) which: String,
    /// Why
    #[arg(long, value_enum, default_value_t)]
    reason: RevocationReasonArg,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum RevocationReasonArg {
    #[default]
    Unspecified,
    /// Somebody else has the key, or may have it
    KeyCompromise,
    /// It belongs to somebody else now
    AffiliationChanged,
    /// There is a new certificate
    Superseded,
    /// It isn't needed any more
    CessationOfOperation,
    /// It shall not come in any more
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

/// Returns a parser for a number of days, at most a century.
fn days() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=36_500)
}
