//! The command line.
//!
//! The options for serving are grouped by topic: [`archives`], certificates ([`tls`]), [`access`],
//! [`sockets`], [`limits`] and timeouts, and privileges ([`sandbox`]). This module knows nothing of
//! the rest of the program. Options in [`Changeable`] are replaced on reload; all others are fixed at start.

mod access;
mod archives;
mod audit;
pub(crate) mod check;
mod doctor;
mod from_file;
mod host_name;
mod inspect;
mod limits;
mod man;
mod monitor;
mod monitor_endpoint;
pub(crate) mod pki;
mod sandbox;
pub(crate) mod server_target;
mod sockets;
mod tls;
mod top;
pub(crate) mod values;
mod verify;

use std::path::PathBuf;

use clap::{Arg, ArgAction, Args, Parser, Subcommand, ValueEnum};
use hexz_exports::MemoryPlan;
use hexz_exports::{BlockReader, Catalog, CatalogError};
use hexz_reader::{IndexPageCache, OpenOptions};
use nbd_gateway::audit::Audit;
use nbd_gateway::config::Config;
use serde::Deserialize;

pub(crate) use access::Access;
use archives::ReadOptions;
pub(crate) use archives::{OpenArchiveOptions, SnapshotOptions};
pub(crate) use audit::{AuditDestination, AuditOptions};
use check::Check;
pub(crate) use doctor::Doctor;
pub(crate) use host_name::HostName;
pub(crate) use inspect::Inspect;
use limits::LimitOptions;
pub(crate) use man::{Completions, Man, Shell};
pub(crate) use monitor::MonitorAddress;
use monitor::MonitorOptions;
pub(crate) use monitor_endpoint::MonitorEndpoint;
use pki::Pki;
use sandbox::Sandbox;
use sockets::Network;
pub(crate) use tls::TlsOptions;
pub(crate) use top::Top;
pub(crate) use verify::{Digest, Verify};

const EXAMPLES: &str = "\
EXAMPLES
  Look at it first; nothing needs to be set up:
    hexz-nbd demo

  Serve a snapshot to this machine:
    hexz-nbd snap.hexz
    nbdinfo nbd://localhost

  Serve it across a network that nobody trusts:
    hexz-nbd --tls-cert server-cert.pem --tls-key server-key.pem --allow 10.0.0.0/8 snap.hexz
    nbdinfo 'nbds://server.example.org/?tls-certificates=/etc/pki/libnbd'

  Make the certificates for that, and for clients:
    hexz-nbd pki init
    hexz-nbd pki server server.example.org
    hexz-nbd pki client backup.example.org

  Let in only who has a certificate, or only some of them:
    hexz-nbd --tls-cert server-cert.pem --tls-key server-key.pem --tls-client-ca ca-cert.pem \\
        --tls-client-crl crl.pem --allow-identity 'uri:spiffe://example.org/backup/*' snap.hexz
    hexz-nbd check --rules rules.toml --from 10.1.2.3 --as dns:backup.example.org snap.hexz

  Serve many:
    hexz-nbd web=web-server.hexz db.hexz --default-export web
    hexz-nbd --export-dir /srv/snapshots
    nbdinfo --list nbd://localhost

  Let a client start it, without any socket that others could find:
    nbdinfo [ hexz-nbd snap.hexz ]
    nbdsh -c 'h.connect_command([\"ssh\", \"host\", \"hexz-nbd\", \"--stdio\", \"snap.hexz\"])'

  Keep all options in a file, and see whether it is sound:
    hexz-nbd --config hexz-nbd.toml --check-config
    hexz-nbd --config hexz-nbd.toml

  See who reads what, how fast, in a browser (http://localhost:10810) or a terminal:
    hexz-nbd --monitor 10810 snap.hexz
    hexz-nbd top

  Check an archive, say what it holds, or serve only what is known to be the file that it was:
    hexz-nbd verify snap.hexz
    hexz-nbd inspect snap.hexz
    hexz-nbd digest base.hexz snap.hexz > digests
    hexz-nbd --digest digests snap.hexz

  Find out why a client can't connect, or can't read:
    hexz-nbd doctor --tls-ca ca-cert.pem server.example.org

CHANGED BLOCKS
  Clients can ask what differs from a parent or another snapshot that is served:
    nbdinfo --map=hexz:changed:monday.hexz nbd://localhost/tuesday.hexz

CONFIGURATION FILE
  Each option has its place in the file of --config, but those that only make sense on the
  command line. Relative paths are relative to the working directory, as they are here. An
  option that is given here replaces the file's, lists too, and whatever of the file
  contradicts it; archives that are named here replace [exports]. What SIGHUP can't change
  while it runs is named in the log: it takes a restart.

CERTIFICATE AND KEY
  Unless --tls-cert or --tls-key is given, they are taken from the systemd credentials
  hexz-nbd.tls-cert and hexz-nbd.tls-key, if there are both.

PASSWORDS
  The password of an encrypted archive is taken from --password-file, else from the
  systemd credential hexz-nbd.password, else from the environment variable HEXZ_PASSWORD.

SERVICES
  Sockets that a service manager hands over (LISTEN_FDS) are listened on; --listen can't be
  given then. It is told when clients are served, what of, of reloads, and, if it has a
  watchdog, that all is well (NOTIFY_SOCKET).

SANDBOX
  Once its sockets are bound, the program can read the folders of the archives, of parents
  and of the files that are given here, and nothing else; and append to files in the folder
  of --audit. If a parent is a link into another folder, name that one with --parent-dir.

EXIT CODES
  0  it was told to end and did
  1  it failed for a reason not named below
  2  the command line or the configuration file is wrong
  3  no snapshot can be opened (with --strict: one of them), or the password, a key of
     --verify-key or a list of --digest can't be used
  4  the certificate or the key can't be used
  5  it can't listen where it should, or can't use the sockets that were handed over
  6  it can't go on as --user, or --sandbox require asks for more than the kernel has
  7  the file of --audit can't be appended to
  141  whoever reads the output of a command has ended, as behind \"| head\"
  Those of \"hexz-nbd verify\", \"inspect\" and \"doctor\" are in their --help

ENVIRONMENT
  HEXZ_PASSWORD  the password, if neither a file nor a credential has it
  LISTEN_FDS     how many sockets are handed over; LISTEN_PID and LISTEN_FDNAMES go with it
  NOTIFY_SOCKET  where the service manager listens; WATCHDOG_USEC goes with it
  RUST_LOG       which lines there are in the log, whatever -v says: error, hexz_nbd=debug,
                 or as the documentation of the crate tracing-subscriber has it";

/// Options of the first hour, by their IDs, with what `-h` says of them. It leaves out all others.
const FIRST_OPTIONS: [(&str, &str); 10] = [
    ("named", "The archives to serve; the export is called NAME, or like the file"),
    ("config", "Take options from this TOML file, too"),
    ("check_config", "Check all options and files, and say what would be served"),
    ("export_dir", "Serve every archive in this folder, too"),
    ("password_file", "A file with the password of encrypted archives"),
    ("tls_cert", "The server's certificate, in PEM form; TLS is required then"),
    ("tls_key", "The certificate's private key, in PEM form"),
    ("allow", "Who may connect: networks, addresses, unix, vsock:CID [default: this machine]"),
    ("listen", "Where to listen: ADDRESS:PORT, unix:PATH or vsock:PORT [default: port 10809]"),
    ("verbose", "Say more; twice for still more"),
];

/// Hides an option from `-h`, or replaces its text there; `--help` keeps both.
fn shorten_help(arg: Arg) -> Arg {
    match FIRST_OPTIONS.iter().find(|(id, _)| arg.get_id() == id) {
        Some((_, short)) => {
            let long = arg.get_long_help().or(arg.get_help()).cloned().unwrap_or_default();
            arg.help(*short).long_help(long)
        }
        None => arg.hide_short_help(true),
    }
}

/// Serves Hexz snapshots read-only over NBD and TLS.
///
/// A client sees disks. Their blocks are read from the compressed, de-duplicated archives
/// and their parents as they are asked for; each is checked before it is sent, and a block
/// that can't be trusted is an I/O error.
///
/// Only this machine may connect, unless --allow, --allow-identity or --rules say who else.
/// Other machines are served through TLS alone, unless --insecure-no-tls is given.
#[derive(Debug, Parser)]
#[command(
    version = env!("HEXZ_NBD_VERSION"),
    after_long_help = EXAMPLES,
    after_help = "--help has all options, examples, passwords and exit codes.",
    mut_args(shorten_help),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) file: ConfigFile,
    #[command(flatten)]
    pub(crate) serve: ServeOptions,
    #[command(flatten)]
    pub(crate) log: LogOptions,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigFile {
    /// Take options from this TOML file, too: max-connections = 100 is --max-connections 100,
    /// and the table [exports] has archives as NAME = "PATH". What is given here as well, or
    /// contradicts it, counts instead. Read anew with everything else (SIGHUP). See
    /// examples/hexz-nbd.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Check options and all files that they name, open the archives, say what would be
    /// served, and end with the exit code that the start would have
    #[arg(long)]
    pub(crate) check_config: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a small snapshot that is built in, over TLS on loopback, and try it out
    Demo(Demo),
    /// Make certificates: a small CA in a folder, for servers and clients
    Pki(Pki),
    /// Say whether a client would be let in, and which rule says so
    ///
    /// Ends with 0 if it would, and with 1 if it wouldn't.
    Check(Check),
    /// Connect to an NBD server, any one, as a client would, and say what works and what doesn't
    ///
    /// Name, connection, greeting, TLS, certificates, exports, reads, speed: one step after
    /// another, and where one fails, what to change on which side.
    Doctor(Doctor),
    /// Show in the terminal what a running server does: rates, exports, connections
    ///
    /// It asks the status listener of a server that was started with --monitor.
    Top(Top),
    /// Say what an archive holds: streams, blocks, duplicates, parents, signature
    ///
    /// Reads its header and index alone, not the blocks.
    Inspect(Inspect),
    /// Check every block of archives, and say which bytes of the disk a fault touches
    ///
    /// Reads everything that the disk needs, in the archive and its parents, on all cores:
    /// index pages, CRC-32, decryption, decompression, length and BLAKE3. For each fault it
    /// prints what is wrong, in which file, and all byte ranges of the disk that can't be
    /// read because of it.
    Verify(Verify),
    /// Print the BLAKE3 of whole files, as --digest takes them
    ///
    /// Prints a line "BLAKE3  PATH" for each, as b3sum does.
    Digest(Digest),
    /// Print the manual page, or write all pages into a folder
    Man(Man),
    /// Print what bash, zsh or fish needs to complete commands and options
    Completions(Completions),
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// End after reading the snapshot back, instead of going on serving
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Default, Args, Deserialize)]
#[command(next_help_heading = "Log")]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct LogOptions {
    /// How log lines look
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t, global = true)]
    #[serde(deserialize_with = "from_file::choice")]
    pub(crate) log_format: LogFormat,
    /// Say more; twice for still more
    #[arg(short, long, action = ArgAction::Count, global = true)]
    #[serde(deserialize_with = "from_file::number::<_, _, 0, 9>")]
    pub(crate) verbose: u8,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// For machines: a flat JSON object a line
    Json,
    /// To the systemd journal itself, with fields such as HEXZ_NBD_PEER, HEXZ_NBD_IDENTITY and
    /// HEXZ_NBD_EXPORT
    Journal,
}

#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct ServeOptions {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) changeable: ReloadableOptions,
    #[command(flatten)]
    #[serde(flatten)]
    reading: ReadOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) network: Network,
    #[command(flatten)]
    #[serde(flatten)]
    limits: LimitOptions,
    /// Look every second whether certificates, keys, client CAs, revocation lists, rules or
    /// digests, or the file of --config, have changed, and read all of them anew when they
    /// have. SIGHUP does the same at once
    #[arg(long, help_heading = "Access")]
    pub(crate) watch: bool,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) sandbox: Sandbox,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) audit: AuditOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) monitoring: MonitorOptions,
}

/// What is exchanged, all of it at once, when files are read anew. An option that isn't here
/// takes a restart; a reload says so where the file has changed it.
#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct ReloadableOptions {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) snapshots: SnapshotOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) tls: TlsOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) access: Access,
}

impl ServeOptions {
    pub(crate) fn config(&self) -> Config {
        Config {
            listen: self.network.listen.clone(),
            proxies: self.network.proxy_from.clone(),
            insecure_no_tls: self.network.insecure_no_tls,
            limits: self.limits.limits(),
            timeouts: self.limits.timeouts(),
            audit: Audit::disabled(),
        }
    }

    /// Opens the catalog of exports with `options`.
    pub(crate) fn catalog(&self, options: OpenOptions) -> Result<Catalog, CatalogError> {
        let memory = self.memory();
        let options = OpenOptions {
            verify_hashes: !self.reading.skip_hashes,
            index_pages: IndexPageCache::new(memory.index),
            ..options
        };
        Catalog::new(self.changeable.snapshots.choice(), options, BlockReader::new(memory.blocks))
    }

    /// Returns the division of the memory budget.
    pub(crate) fn memory(&self) -> MemoryPlan {
        self.reading.memory(self.limits.in_flight())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use nbd_gateway::config::{Limits, Timeouts};

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_short_help_has_the_first_options() {
        let mut command = Cli::command();
        let help = command.render_help().to_string();
        for (id, short) in FIRST_OPTIONS {
            assert!(command.get_arguments().any(|arg| arg.get_id() == id), "{id}");
            assert!(help.split_whitespace().collect::<Vec<_>>().join(" ").contains(short), "{id}");
        }
        assert!(help.lines().count() <= 46, "{help}");
        assert!(!help.contains("--max-connections"));
        assert!(command.render_long_help().to_string().contains("--max-connections"));
    }

    #[test]
    fn defaults_match_those_of_config() {
        let cli = Cli::parse_from(["hexz-nbd", "x.hxz"]);
        assert_eq!(cli.serve.config().timeouts, Timeouts::default());
        assert_eq!(cli.serve.config().limits, Limits::default());
    }

    #[test]
    fn lists_accept_commas_and_repetition() {
        let cli = Cli::parse_from([
            "hexz-nbd",
            "--allow",
            "10.0.0.0/8, ::1",
            "--allow",
            "192.0.2.1",
            "x.hxz",
        ]);
        assert_eq!(
            cli.serve.changeable.access.rules().unwrap().to_string(),
            "10.0.0.0/8, ::1/128, 192.0.2.1/32"
        );
        for junk in ["10.0.0.0/8,", "", " ", "all", "10.0.0.1/8", "10.0.0.0/8 ::1"] {
            assert!(Cli::try_parse_from(["hexz-nbd", "--allow", junk, "x.hxz"]).is_err());
        }
    }
}
