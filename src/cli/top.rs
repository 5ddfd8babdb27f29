//! Options of `hexz-nbd top`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::monitor_endpoint::MonitorEndpoint;
use super::values;

const KEYS: &str = "\
KEYS
  q, Esc, Ctrl-C  quit
  s               change the sort order: rate, requests, errors, name
  e               show exports, connections, or both
  up, down, PgUp, PgDn, Home   scroll

EXIT STATUS
    0  quit with a key
    1  with --once: the server doesn't answer, or its answer is invalid
    2  invalid command line
  130  interrupted (143: terminated, 129: the terminal was closed)

Characters that could disturb the terminal, or whose width is uncertain, are shown as \\u{…}.";

#[derive(Debug, Args)]
#[command(after_long_help = KEYS, after_help = "Use --help for keys and exit codes.")]
pub(crate) struct Top {
    /// Address of the server's --monitor: ADDRESS:PORT, PORT, unix:PATH, http://ADDRESS:PORT or
    /// https://ADDRESS:PORT
    #[arg(value_name = "WHERE", default_value_t)]
    pub(crate) place: MonitorEndpoint,
    /// Query twice, print plain text, and exit; also the default if the standard output isn't a
    /// terminal
    #[arg(long)]
    pub(crate) once: bool,
    /// Time between two queries, from 200ms to 1h
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    pub(crate) interval: Duration,
    #[command(flatten)]
    pub(crate) access: MonitorAccess,
}

/// What a monitor may require of a client.
#[derive(Debug, Args)]
pub(crate) struct MonitorAccess {
    /// File with the token of the server's --monitor-token-file
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// CAs to verify the certificate of an https:// address with, in PEM format, such as
    /// /etc/ssl/certs/ca-certificates.crt
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
}

fn interval(text: &str) -> Result<Duration, String> {
    match values::duration(text)? {
        time if time < Duration::from_millis(200) => Err("it must be at least 200ms".to_owned()),
        time if time > Duration::from_secs(3600) => Err("it must be at most 1h".to_owned()),
        time => Ok(time),
    }
}
