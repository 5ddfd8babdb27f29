//! Options of `hexz-nbd top`.

use std::time::Duration;

use clap::Args;

use super::monitor_endpoint::MonitorEndpoint;
use super::values;

const KEYS: &str = "\
KEYS
  q, Esc, Ctrl-C  end
  s               sort by something else: rate, requests, errors, name
  e               exports, connections, or both
  up, down, PgUp, PgDn, Home   through lists that are longer than the screen

EXIT CODES
    0  it was told to end and did
    1  with --once: the server doesn't answer, or not as expected
    2  the command line is wrong
  130  it was interrupted (143: told to end, 129: the terminal went away)

Characters that could disturb the terminal, or whose width isn't sure, are written as \\u{…}.";

#[derive(Debug, Args)]
#[command(after_long_help = KEYS, after_help = "Use --help for keys and exit codes.")]
pub(crate) struct Top {
    /// Where the server's --monitor listens: ADDRESS:PORT, PORT, unix:PATH, or http://ADDRESS:PORT
    #[arg(value_name = "WHERE", default_value_t)]
    pub(crate) place: MonitorEndpoint,
    /// Print what it says twice asked, as plain text, and end; so does a standard output that is
    /// no terminal
    #[arg(long)]
    pub(crate) once: bool,
    /// How long to wait between two questions, from 200ms to 1h
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    pub(crate) interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    match values::duration(text)? {
        time if time < Duration::from_millis(200) => Err("it must be at least 200ms".to_owned()),
        time if time > Duration::from_secs(3600) => Err("it must be at most 1h".to_owned()),
        time => Ok(time),
    }
}
