//! Log lines go to the standard error stream.

use std::io::{IsTerminal, stderr};

use hexz_nbd::monitor::RecentErrors;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cli::{Log, LogFormat};

/// Begins to log; the last errors are remembered.
///
/// # Errors
/// RUST_LOG makes no sense.
pub(crate) fn start(options: &Log, recent: &RecentErrors) -> Result<(), ParseError> {
    let level = match options.verbose {
        0 => "info",
        1 => "hexz_nbd=debug,info",
        _ => "hexz_nbd=trace,debug",
    };
    let filter = match std::env::var("RUST_LOG") {
        Ok(wanted) if !wanted.is_empty() => EnvFilter::builder().parse(wanted)?,
        _ => EnvFilter::new(level),
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(stderr().is_terminal())
        // Where a line can't be written, as on a full disk, saying so can't either, and
        // trying it would end whoever wanted to log.
        .log_internal_errors(false)
        .with_writer(stderr);
    match options.log_format {
        LogFormat::Text => lines.finish().with(recent.layer()).init(),
        LogFormat::Json => {
            lines.json().flatten_event(true).finish().with(recent.layer()).init();
        }
    }
    Ok(())
}
