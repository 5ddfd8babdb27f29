//! Logging to the standard error stream or to the systemd journal.

mod journal;
mod json;
mod text;

use std::io::{self, IsTerminal, stderr};

use hexz_nbd::monitor::RecentErrors;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

use crate::cli::{Log, LogFormat};
use journal::Journal;

/// Reason why logging can't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    #[error("RUST_LOG: {0}")]
    Filter(#[from] ParseError),
    #[error(
        "--log-format journal: there is no journal at {socket}: {error}; with --log-format text \
         lines go to the standard error stream",
        socket = journal::SOCKET
    )]
    Journal {
        #[source]
        error: io::Error,
    },
}

/// Starts logging. The latest errors are remembered in `recent`.
///
/// # Errors
/// `RUST_LOG` is invalid, or there is no journal.
pub(crate) fn start(options: &Log, recent: &RecentErrors) -> Result<(), LogError> {
    let level = match options.verbose {
        0 => "info",
        1 => "hexz_nbd=debug,info",
        _ => "hexz_nbd=trace,debug",
    };
    let filter = match std::env::var("RUST_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::builder().parse(wanted)?,
        _ => EnvFilter::new(level),
    };
    let lines = || {
        fmt::layer()
            // If a line can't be written, as on a full disk, neither can a message about that,
            // and trying to would panic in the thread that logs.
            .log_internal_errors(false)
            .with_writer(stderr)
    };
    let registry = registry().with(filter).with(recent.layer());
    match options.log_format {
        LogFormat::Text if text::is_read_by_the_journal() => {
            registry
                .with(
                    lines()
                        .fmt_fields(text::OneLine)
                        .with_ansi(false)
                        .event_format(text::WithPriority::new()),
                )
                .init();
        }
        LogFormat::Text => {
            let ansi = stderr().is_terminal();
            registry
                .with(lines().fmt_fields(text::OneLine).with_target(false).with_ansi(ansi))
                .init();
        }
        LogFormat::Json => {
            let fields = lines().fmt_fields(JsonFields::new());
            registry.with(fields.event_format(json::Flat)).init();
        }
        LogFormat::Journal => {
            registry.with(Journal::connect().map_err(|error| LogError::Journal { error })?).init();
        }
    }
    Ok(())
}
