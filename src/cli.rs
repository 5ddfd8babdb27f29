//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use hexz_nbd::config::{Config, Limits, Memory, Timeouts};
use hexz_nbd::exports::{BlockReader, Catalog, CatalogError, Folder, Named};
use hexz_nbd::gateway::access::{AccessList, Network};
use hexz_nbd::gateway::listen::ListenAddress;
use hexz_nbd::gateway::tls::{TlsFiles, TlsVersion};
use hexz_nbd::snapshot::{IndexPages, OpenOptions, PasswordSource};

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

  Serve many:
    hexz-nbd web=web-server.hexz db.hexz --default-export web
    hexz-nbd --export-dir /srv/snapshots
    nbdinfo --list nbd://localhost

CHANGED BLOCKS
  Clients can ask what differs from a parent or another snapshot that is served:
    nbdinfo --map=hexz:changed:monday.hexz nbd://localhost/tuesday.hexz

PASSWORDS
  The password of an encrypted archive is taken from --password-file, else from the
  systemd credential hexz-nbd.password, else from the environment variable HEXZ_PASSWORD.

EXIT CODES
  0  it was told to end and did
  1  it failed for a reason not named below
  2  the command line is wrong
  3  no snapshot can be opened (with --strict: one of them), or the password can't be used
  4  the certificate or the key can't be used
  5  it can't listen where it should

RUST_LOG takes precedence over -v; see the documentation of the crate tracing-subscriber.";

/// Serves Hexz snapshots read-only over NBD and TLS.
///
/// A client sees disks. Their blocks are read from the compressed, de-duplicated archives
/// and their parents as they are asked for; each is checked before it is sent, and a block
/// that can't be trusted is an I/O error.
///
/// Without --allow only this machine may connect. Other machines are served through TLS
/// alone, unless --insecure-no-tls is given.
#[derive(Debug, Parser)]
#[command(
    version,
    after_long_help = EXAMPLES,
    after_help = "Use --help for examples, passwords and exit codes.",
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    #[command(flatten)]
    pub(crate) serve: Serve,
    #[command(flatten)]
    pub(crate) log: Log,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a small snapshot that is built in, over TLS on loopback, and try it out
    Demo(Demo),
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// End after reading the snapshot back, instead of going on serving
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Log {
    /// How log lines look
    #[arg(long, value_enum, default_value_t, global = true, help_heading = "Log")]
    pub(crate) log_format: LogFormat,
    /// Say more; twice for still more
    #[arg(short, long, action = ArgAction::Count, global = true, help_heading = "Log")]
    pub(crate) verbose: u8,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    #[default]
    Text,
    /// For machines, an object a line
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The archives to serve. The export is called NAME, or like the file; an auxiliary
    /// stream is the export NAME/aux
    #[arg(required_unless_present = "export_dir", value_name = "[NAME=]PATH")]
    snapshots: Vec<Named>,
    /// Serve every .hxz and .hexz archive in this folder too, found when it is asked for
    #[arg(long, value_name = "DIR", help_heading = "Snapshots")]
    export_dir: Option<PathBuf>,
    /// The export for clients that name none [default: the only snapshot, if it is one]
    #[arg(long, value_name = "NAME", help_heading = "Snapshots")]
    default_export: Option<String>,
    /// Don't start if one of the archives given here can't be opened
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) strict: bool,

    /// Look for parent archives in this folder too, besides the archive's own [repeatable]
    #[arg(long, value_name = "DIR", help_heading = "Snapshots")]
    parent_dir: Vec<PathBuf>,
    /// Let an archive name a parent anywhere on this machine
    #[arg(long, help_heading = "Snapshots")]
    allow_parent_anywhere: bool,
    /// A file with the password of an encrypted archive; a line break at its end is ignored
    #[arg(long, value_name = "FILE", help_heading = "Snapshots")]
    pub(crate) password_file: Option<PathBuf>,
    /// Serve the bare stream of an archive that holds a packed directory
    #[arg(long, help_heading = "Snapshots")]
    raw: bool,
    /// Memory for decoded blocks, index pages and answers on their way. The program takes up
    /// to 64 MiB more for itself and its connections
    #[arg(
        long, value_name = "SIZE", default_value = "256MiB",
        value_parser = size, help_heading = "Snapshots"
    )]
    cache_size: ByteSize,
    /// Don't compare decoded blocks with their BLAKE3; CRC-32 and length still have to fit
    #[arg(long, help_heading = "Snapshots")]
    skip_hashes: bool,

    /// The server's certificate in PEM form, followed by those that lead to its root.
    /// With it TLS is required
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = "TLS")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM form (PKCS#8, PKCS#1 or SEC1)
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "TLS")]
    tls_key: Option<PathBuf>,
    /// The oldest TLS version to speak. nbd-client 3.24 speaks 1.2 only
    #[arg(long, value_enum, value_name = "VERSION", default_value_t, help_heading = "TLS")]
    tls_min: TlsMin,
    /// Serve other machines without TLS: anyone on the way can read and change everything
    #[arg(long, conflicts_with = "tls_cert", help_heading = "TLS")]
    insecure_no_tls: bool,

    /// Who may connect: networks such as 10.0.0.0/8 or 2001:db8::/32, or addresses
    /// [comma-separated, repeatable; default: this machine only]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', help_heading = "Network")]
    allow: Vec<Network>,
    /// Who may not connect, even if allowed [comma-separated, repeatable]
    #[arg(long, value_name = "CIDR", value_delimiter = ',', help_heading = "Network")]
    deny: Vec<Network>,
    /// Where to listen: ADDRESS:PORT or unix:PATH [repeatable; default: port 10809 of
    /// every address, or of loopback if only this machine may connect]
    #[arg(long, value_name = "WHERE", help_heading = "Network")]
    listen: Vec<ListenAddress>,

    /// How many clients are served at once
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().connections,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_connections: usize,
    /// How many of them may come from one address, or one IPv6 network of 64 bits
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().connections_per_address,
        value_parser = at_least_one, help_heading = "Limits"
    )]
    max_connections_per_address: usize,
    /// How long a client may take until it has chosen an export, TLS included
    #[arg(
        long, value_name = "TIME", default_value = "30s",
        value_parser = duration, help_heading = "Limits"
    )]
    handshake_timeout: Duration,
    /// How long a client may take for the TLS handshake
    #[arg(
        long, value_name = "TIME", default_value = "10s",
        value_parser = duration, help_heading = "Limits"
    )]
    tls_handshake_timeout: Duration,
    /// How long clients may delay the end, once this program is told to end
    #[arg(
        long, value_name = "TIME", default_value = "10s",
        value_parser = duration, help_heading = "Limits"
    )]
    shutdown_timeout: Duration,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum TlsMin {
    /// TLS 1.2, with its forward-secret AEAD suites alone
    #[default]
    #[value(name = "1.2")]
    V1_2,
    /// TLS 1.3
    #[value(name = "1.3")]
    V1_3,
}

impl Serve {
    /// What is to be served.
    pub(crate) fn catalog(
        &self,
        password: Option<PasswordSource>,
    ) -> Result<Catalog, CatalogError> {
        let memory = self.memory();
        let options = OpenOptions {
            parent_dirs: self.parent_dir.clone(),
            parents_anywhere: self.allow_parent_anywhere,
            password,
            raw: self.raw,
            verify_hashes: !self.skip_hashes,
            index_pages: IndexPages::new(memory.index),
        };
        let folder = self.export_dir.clone().map(Folder::new);
        let reader = BlockReader::new(memory.blocks);
        let default = self.default_export.clone();
        Catalog::new(self.snapshots.clone(), folder, default, options, reader)
    }

    fn memory(&self) -> Memory {
        Memory::of(self.cache_size.as_u64())
    }

    /// The export for clients that name none.
    pub(crate) fn default_export(&self) -> Option<&str> {
        self.default_export.as_deref()
    }

    /// The folder whose archives are served.
    pub(crate) fn export_dir(&self) -> Option<&Path> {
        self.export_dir.as_deref()
    }

    pub(crate) fn tls(&self) -> Option<(TlsFiles, TlsVersion)> {
        let oldest = match self.tls_min {
            TlsMin::V1_2 => TlsVersion::V1_2,
            TlsMin::V1_3 => TlsVersion::V1_3,
        };
        let (certificate, key) = self.tls_cert.clone().zip(self.tls_key.clone())?;
        Some((TlsFiles { certificate, key }, oldest))
    }

    pub(crate) fn config(&self) -> Config {
        Config {
            listen: self.listen.clone(),
            access: AccessList { allow: self.allow.clone(), deny: self.deny.clone() },
            insecure_no_tls: self.insecure_no_tls,
            limits: Limits {
                connections: self.max_connections,
                connections_per_address: self.max_connections_per_address,
                in_flight: self.memory().in_flight,
                ..Limits::default()
            },
            timeouts: Timeouts {
                handshake: self.handshake_timeout,
                tls_handshake: self.tls_handshake_timeout,
                shutdown: self.shutdown_timeout,
                ..Timeouts::default()
            },
        }
    }
}

/// More connections than a machine has ports for.
const MOST: usize = 1_000_000;

/// Longer than anybody waits; clocks have an end.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(number) if number > MOST => Err(format!("it must be at most {MOST}")),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn size(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(|error| format!("{error}; expected something like 256MiB or 1GiB"))
}

fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(Duration::ZERO) => Err("it must be more than nothing".to_owned()),
        Ok(duration) if duration > LONGEST => Err("it must be at most a year".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(format!("{error}; expected something like 30s or 2min")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_are_those_of_the_settings() {
        let cli = Cli::parse_from(["hexz-nbd", "x.hxz"]);
        assert_eq!(cli.serve.config().timeouts, Timeouts::default());
        assert_eq!(cli.serve.config().limits, Limits::default());
    }

    #[test]
    fn lists_are_separated_by_commas_and_repeated() {
        let cli = Cli::parse_from([
            "hexz-nbd",
            "--allow",
            "10.0.0.0/8,::1",
            "--allow",
            "192.0.2.1",
            "x.hxz",
        ]);
        assert_eq!(cli.serve.allow.len(), 3);
        for junk in ["10.0.0.0/8,", "", "all", "10.0.0.1/8"] {
            assert!(Cli::try_parse_from(["hexz-nbd", "--allow", junk, "x.hxz"]).is_err());
        }
    }
}
