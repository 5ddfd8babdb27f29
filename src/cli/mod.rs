//! The command line.
//!
//! The options for serving are grouped by topic: [`archives`], certificates ([`tls`]), [`access`],
//! [`sockets`], [`limits`] and timeouts, and privileges ([`sandbox`]). A reload replaces
//! [`ReloadableOptions`]; all other options are fixed at startup. This module doesn't depend on the
//! rest of the program.

mod access;
mod archives;
mod audit;
#[cfg(feature = "remote")]
mod cache;
pub(crate) mod check;
mod doctor;
pub(crate) mod escaped_error;
mod from_file;
mod health;
mod host_name;
mod inspect;
mod limits;
pub(crate) mod location;
mod man;
mod monitor;
mod monitor_endpoint;
pub(crate) mod pki;
mod reload;
mod sandbox;
pub(crate) mod server_target;
mod sockets;
mod stores;
mod tls;
mod top;
mod trace;
pub(crate) mod values;
mod verify;
#[cfg(feature = "remote")]
mod warm;

use std::path::PathBuf;
use std::time::Duration;

use crate::hints::HINTS;
use clap::{Arg, ArgAction, Args, Parser, Subcommand, ValueEnum};
use hexz_exports::{BlockReader, Catalog, CatalogError};
use hexz_exports::{MemoryPlan, PrefetchOptions};
use hexz_reader::{IndexPageCache, OpenOptions};
use nbd_gateway::audit::Audit;
use nbd_gateway::config::Config;
use serde::Deserialize;

pub(crate) use access::Access;
use archives::ReadOptions;
pub(crate) use archives::{OpenArchiveOptions, SnapshotOptions};
pub(crate) use audit::{AuditDestination, AuditOptions};
#[cfg(feature = "remote")]
pub(crate) use cache::{Cache, CacheCommand};
use check::Check;
pub(crate) use doctor::Doctor;
pub(crate) use health::Health;
pub(crate) use host_name::HostName;
pub(crate) use inspect::Inspect;
use limits::LimitOptions;
pub(crate) use man::{Completions, Man, Shell};
pub(crate) use monitor::{MonitorAddress, MonitorOptions};
pub(crate) use monitor_endpoint::MonitorEndpoint;
use pki::Pki;
pub(crate) use reload::Reload;
use sandbox::Sandbox;
use sockets::Network;
pub(crate) use stores::{DiskCacheOptions, StoreOptions};
#[cfg(feature = "remote")]
pub(crate) use stores::{
    ReadyWhen, SecretUrl, SecretUrls, StoreSettings, StoreStyle, TraceOptions,
};
pub(crate) use tls::TlsOptions;
pub(crate) use top::{MonitorAccess, Top};
pub(crate) use trace::{Trace, TraceCommand, TraceMerge, TraceRecord};
pub(crate) use verify::{Digest, Tree, Verify};
#[cfg(feature = "remote")]
pub(crate) use warm::Warm;

const EXAMPLES: &str = "\
EXAMPLES
  Try it without any setup:
    hexz-nbd demo

  Serve a snapshot to this machine:
    hexz-nbd snap.hexz
    nbdinfo nbd://localhost

  Serve it over TLS to an untrusted network:
    hexz-nbd --tls-cert server-cert.pem --tls-key server-key.pem --allow 10.0.0.0/8 snap.hexz
    nbdinfo 'nbds://server.example.org/?tls-certificates=/etc/pki/libnbd'

  Issue the certificates for that, and for clients:
    hexz-nbd pki init
    hexz-nbd pki server server.example.org
    hexz-nbd pki client backup.example.org

  Require client certificates, and admit only some of them:
    hexz-nbd --tls-cert server-cert.pem --tls-key server-key.pem --tls-client-ca ca-cert.pem \\
        --tls-client-crl crl.pem --allow-identity 'uri:spiffe://example.org/backup/*' snap.hexz
    hexz-nbd check --rules rules.toml --from 10.1.2.3 --as dns:backup.example.org snap.hexz

  Serve several archives, or a folder of them:
    hexz-nbd web=web-server.hexz db.hexz --default-export web
    hexz-nbd --export-dir /srv/snapshots
    nbdinfo --list nbd://localhost

  Serve an archive from an object store:
    hexz-nbd web=s3://golden/web.hxz

  Let the client start the server, without a socket that others could connect to:
    nbdinfo [ hexz-nbd snap.hexz ]
    nbdsh -c 'h.connect_command([\"ssh\", \"host\", \"hexz-nbd\", \"--stdio\", \"snap.hexz\"])'

  Keep the options in a file, and check it before use:
    hexz-nbd --config hexz-nbd.toml --check-config
    hexz-nbd --config hexz-nbd.toml

  Monitor connections and rates in a browser (http://localhost:10810) or in a terminal:
    hexz-nbd --monitor 10810 snap.hexz
    hexz-nbd top

  Verify an archive, describe it, or serve it only if it is unchanged:
    hexz-nbd verify snap.hexz
    hexz-nbd inspect snap.hexz
    hexz-nbd tree base.hexz snap.hexz > digests
    hexz-nbd --digest digests snap.hexz

  Find out why a client can't connect or read:
    hexz-nbd doctor --tls-ca ca-cert.pem server.example.org

CHANGED BLOCKS
  Clients can query the differences from a parent or another served snapshot:
    nbdinfo --map=hexz:changed:monday.hexz nbd://localhost/tuesday.hexz

CONFIGURATION FILE
  The file of --config has a key for each option except those that are useful on the command
  line only. Relative paths are relative to the working directory. The command line takes
  precedence: an option replaces the one in the file, including lists, and overrides options in
  the file that conflict with it; archives replace the table [exports]. A reload (SIGHUP) can't
  change all options; the log names those that require a restart.

CERTIFICATE AND KEY
  Without --tls-cert and --tls-key, the server uses the systemd credentials hexz-nbd.tls-cert
  and hexz-nbd.tls-key if both exist.

PASSWORDS
  The password of encrypted archives comes from --password-file, else from the systemd
  credential hexz-nbd.password, else from the environment variable HEXZ_PASSWORD.

SERVICES
  Sockets that a service manager passes (LISTEN_FDS) replace --listen, which can't be used with
  them. The service manager is notified of startup, reloads, shutdown and the served exports,
  and, if it has a watchdog, that the server is alive (NOTIFY_SOCKET). A SIGHUP reloads, and the
  log has the result; \"hexz-nbd reload\" reports it (--control-socket).

SANDBOX
  After binding its sockets, the program can only read the folders of the archives, of their
  parents and of the files named here, and append to files in the folder of --audit. If a
  parent is a link into another folder, name that folder with --parent-dir.

EXIT STATUS
  0  clean shutdown
  1  any other error
  2  invalid command line or configuration file
  3  no snapshot could be opened (with --strict: one couldn't), or the password, a key of
     --verify-key or a list of --digest can't be used
  4  the certificate or its key can't be used
  5  the server can't listen, or can't use the sockets that it was passed
  6  can't change to --user, or the kernel lacks what --sandbox require needs
  7  can't append to the file of --audit
  141  the reader of a command's output closed it, as with \"| head\"
  For \"hexz-nbd verify\", \"inspect\" and \"doctor\", see their --help

ENVIRONMENT
  HEXZ_PASSWORD  the password, unless a file or a credential contains it
  LISTEN_FDS     number of sockets passed by the service manager, with LISTEN_PID and
                 LISTEN_FDNAMES
  NOTIFY_SOCKET  socket of the service manager, with WATCHDOG_USEC
  RUST_LOG       filter for log lines, which overrides -v and -q: error, hexz_nbd=debug, or any other
                 directive of the crate tracing-subscriber";

/// The most used options, by their IDs, with their descriptions in `-h`, which omits all others.
const FIRST_OPTIONS: [(&str, &str); 9] = [
    ("named", "Archives to serve, files or URLs; the export is called NAME, or like the file"),
    ("config", "Read options from this TOML file"),
    ("check_config", "Check all options and files, print what would be served, and exit"),
    ("export_dir", "Serve all archives in this folder"),
    ("tls_cert", "Certificate of the server, in PEM format; requires clients to use TLS"),
    ("tls_key", "Private key of the certificate, in PEM format"),
    ("allow", "Peers that may connect: CIDR, unix or vsock:CID [default: this machine]"),
    ("listen", "Listen on ADDRESS:PORT, unix:PATH or vsock:PORT [default: port 10809]"),
    ("verbose", "Increase verbosity; repeat for more (-q logs only warnings and errors)"),
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
/// Each snapshot is a disk to clients. Blocks are read on demand from the compressed,
/// deduplicated archives and their parents, and verified before they are sent; a block that
/// fails verification is an I/O error.
///
/// By default, only this machine may connect; --allow, --allow-identity and --rules admit
/// others. Other machines must use TLS, unless --insecure-no-tls is set.
#[derive(Debug, Parser)]
#[command(
    version = env!("HEXZ_NBD_VERSION"),
    after_long_help = EXAMPLES,
    after_help = "Use --help for all options, examples, passwords and exit codes.",
    mut_args(shorten_help),
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) file: ConfigFileOptions,
    #[command(flatten)]
    pub(crate) serve: ServeOptions,
    #[command(flatten)]
    pub(crate) log: LogOptions,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigFileOptions {
    /// Read options from this TOML file: max-connections = 100 means --max-connections 100, and
    /// the table [exports] lists archives as NAME = "PATH". The command line takes precedence.
    /// A reload (SIGHUP) reads the file again. See examples/hexz-nbd.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Check all options and the files that they name, open all archives, print what would be
    /// served, and exit with the status that the start would have
    #[arg(long)]
    pub(crate) check_config: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a small built-in snapshot over TLS on loopback, and read it back
    Demo(Demo),
    /// Manage a small CA in a folder: issue and revoke certificates for servers and clients
    Pki(Pki),
    /// Check whether the access rules admit a client, and which rule decides
    ///
    /// The exit status is 0 if the client is admitted, and 1 if it isn't.
    Check(Check),
    /// Diagnose problems with an NBD server, as a client of it, or with an object store
    ///
    /// Checks name resolution, connection, greeting, TLS, certificates, exports, reads and speed,
    /// one after another. If one fails, it prints what to change, and on which side.
    Doctor(Box<Doctor>),
    /// Show rates, exports and connections of a running server in the terminal
    ///
    /// Queries the monitor of a server that was started with --monitor.
    Top(Top),
    /// Reload a running server, and report what changed or why nothing did
    ///
    /// The server must have been started with --control-socket, as the systemd unit does. Waits
    /// until the new settings are active and the archives are open.
    Reload(Reload),
    /// Check whether a running server is healthy, as health checks of containers do
    ///
    /// Queries the monitor of a server that was started with --monitor, and prints one line: "ok", or
    /// the reason why it isn't healthy.
    Health(Health),
    /// Describe an archive: streams, blocks, duplicates, parents, signature
    ///
    /// Reads only the header and the index, not the blocks.
    Inspect(Inspect),
    /// Verify every block of archives, and print the ranges of the disk that faults affect
    ///
    /// Reads everything that the disk consists of, in the archive and its parents, on all cores,
    /// and checks index pages, CRC-32, decryption, decompression, length and BLAKE3. For each
    /// fault, it prints the cause, the file, and all byte ranges of the disk that can't be read.
    Verify(Verify),
    /// Print the BLAKE3 digests of files, as a list for --digest
    ///
    /// Prints a line "BLAKE3  PATH" for each file, as b3sum does.
    Digest(Digest),
    /// Write tree files, which save --digest from reading whole archives
    ///
    /// Writes FILE.tree beside each file, and prints a line "BLAKE3  PATH" like "hexz-nbd digest". A
    /// tree file has the hashes of all parts of a file. With --digest, the gateway then verifies
    /// what it reads, instead of hashing all of an archive when it opens it. A tree file needs no
    /// protection: it is only used if its hashes add up to the digest.
    Tree(Tree),
    /// Show, check or empty the folder of --disk-cache
    #[cfg(feature = "remote")]
    Cache(Cache),
    /// Record, merge and show traces, which name the parts of a disk that clients read
    ///
    /// A trace NAME.trace beside a remote archive NAME tells the server what to fetch when it opens
    /// the archive: the disk of a machine that boots is then read from the cache.
    Trace(Trace),
    /// Fill a disk cache with remote archives, or with what their traces name
    ///
    /// Opens the archives and fetches what is missing in the cache. Prints a line for each. The cache
    /// must not be in use.
    #[cfg(feature = "remote")]
    Warm(Box<Warm>),
    /// Print the manual page, or write all manual pages into a folder
    Man(Man),
    /// Print a completion script for bash, zsh or fish
    Completions(Completions),
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Exit after reading the snapshot back
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Default, Args, Deserialize)]
#[command(next_help_heading = "Log")]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct LogOptions {
    /// Format of log lines
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t, global = true)]
    #[serde(deserialize_with = "from_file::choice")]
    pub(crate) log_format: LogFormat,
    /// Increase verbosity; repeat for more
    #[arg(short, long, action = ArgAction::Count, global = true)]
    #[serde(deserialize_with = "from_file::number::<_, _, 0, 9>")]
    pub(crate) verbose: u8,
    /// Log only warnings and errors, and show no progress. It is the default if a client starts the
    /// server: with --stdio or LISTEN_FDS, unless a service manager does, or -v or another
    /// --log-format is given
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// One flat JSON object per line
    Json,
    /// Entries of the systemd journal with fields such as HEXZ_NBD_PEER, HEXZ_NBD_IDENTITY and
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
    pub(crate) stores: StoreOptions,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) disk_cache: DiskCacheOptions,
    #[cfg(feature = "remote")]
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) traces: TraceOptions,
    /// When the server is ready, for /readyz of --monitor: when the archives of the command line or
    /// of [exports] are open, or when what their traces name has been fetched, too
    #[cfg(feature = "remote")]
    #[arg(long, value_enum, value_name = "STATE", default_value_t, help_heading = "Object stores")]
    #[serde(deserialize_with = "from_file::choice")]
    pub(crate) ready_when: ReadyWhen,
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) network: Network,
    #[command(flatten)]
    #[serde(flatten)]
    limits: LimitOptions,
    /// Reload when certificates, keys, client CAs, revocation lists, rules, digests or the file of
    /// --config have changed. They are checked every second. SIGHUP reloads at once
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

/// Options that a reload replaces, all together. Changes to any other option require a restart,
/// and a reload logs them.
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
    /// Moves URLs with queries, which may be secrets, to the options of stores, and removes the
    /// queries elsewhere.
    #[cfg(feature = "remote")]
    pub(crate) fn take_queries(&mut self) {
        let SnapshotOptions { named, export_dir, opening, .. } = &mut self.changeable.snapshots;
        let archives = named.iter_mut().map(|named| &mut named.path);
        let folders = export_dir.iter_mut().chain(&mut opening.parent_dir);
        let folders = folders.chain(&mut self.traces.traces);
        self.stores.secret_urls = SecretUrls::take_from(archives, folders);
    }

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

    /// Returns the time for which connections are accepted after SIGTERM.
    pub(crate) fn drain_delay(&self) -> Duration {
        self.limits.drain_delay.unwrap_or_default()
    }

    /// Creates the catalog of exports. What their traces name is fetched as `prefetch` says.
    pub(crate) fn catalog(
        &self,
        options: OpenOptions,
        prefetch: Option<PrefetchOptions>,
    ) -> Result<Catalog, CatalogError> {
        let memory = self.memory();
        let options = OpenOptions {
            verify_hashes: !self.reading.skip_hashes,
            index_pages: IndexPageCache::new(memory.index),
            ..options
        };
        let reader = BlockReader::with_prefetch(memory.blocks, HINTS, prefetch);
        Catalog::new(self.changeable.snapshots.choice(), options, reader)
    }

    /// Returns what is fetched in advance. An archive may have half of the cache.
    #[cfg(feature = "remote")]
    pub(crate) fn prefetch(&self) -> Option<PrefetchOptions> {
        /// More than machines read when they boot. A list of the parts takes 4 MiB of memory.
        const MAX_BYTES: u64 = 16 << 30;
        let cache = match self.disk_cache.disk_cache {
            Some(_) => self.disk_cache.disk_cache_size.as_u64(),
            // A quarter of the memory is for responses in flight.
            None => self.memory().fetched / 4 * 3,
        };
        Some(PrefetchOptions {
            traces: self.traces.place(),
            rate: self.traces.prefetch_rate.as_u64(),
            max_bytes: (cache / 2).min(MAX_BYTES),
            ready_when_warm: self.ready_when == ReadyWhen::Warm,
        })
    }

    /// Local archives have nothing to fetch.
    #[cfg(not(feature = "remote"))]
    pub(crate) fn prefetch(&self) -> Option<PrefetchOptions> {
        None
    }

    /// Returns the division of the memory budget.
    pub(crate) fn memory(&self) -> MemoryPlan {
        let has_urls = self.changeable.snapshots.urls().next().is_some();
        self.reading.memory(self.limits.in_flight(), has_urls)
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
        assert!(help.lines().count() <= 50, "{help}");
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
