//! Logging to the standard error stream or to the systemd journal.

mod journal;
mod json;
mod text;

use std::io::{self, IsTerminal, stderr};

use crate::monitor::RecentErrors;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

use crate::cli::{LogFormat, LogOptions};
use journal::Journal;

/// Reason why logging can't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogSetupError {
    #[error("RUST_LOG: {0}")]
    Filter(#[from] ParseError),
    #[error(
        "--log-format journal: can't connect to the journal at {socket}: {error}; use --log-format \
         text to log to standard error",
        socket = journal::SOCKET
    )]
    Journal {
        #[source]
        error: io::Error,
    },
}

/// Packages of the program, which `hexz_nbd` in `RUST_LOG` stands for.
const PACKAGES: [&str; 7] = [
    "hexz_nbd",
    "hexz_exports",
    "hexz_reader",
    "nbd_gateway",
    "nbd_sandbox",
    "nbd_server",
    "nbd_telemetry",
];

/// Returns the directives of a filter with those for `hexz_nbd` repeated for each package.
fn of_all_packages(directives: &str) -> String {
    let expand = |directive: &str| match directive.strip_prefix(PACKAGES[0]) {
        Some(rest) if rest.is_empty() || rest.starts_with('=') => {
            PACKAGES.map(|package| format!("{package}{rest}")).join(",")
        }
        _ => directive.to_owned(),
    };
    directives.split(',').map(expand).collect::<Vec<_>>().join(",")
}

/// Returns true if the process that started this server is a client, which shares its standard
/// error stream with the server: log lines would mix with the client's output.
///
/// Sockets that are passed to the program mean the same unless a service manager passes them.
pub(crate) fn is_started_by_client(is_stdio: bool) -> bool {
    let own = std::process::id().to_string();
    let names_this_process = |variable| std::env::var(variable).is_ok_and(|id| id == own);
    let is_service = std::env::var_os("NOTIFY_SOCKET").is_some()
        || names_this_process("SYSTEMD_EXEC_PID")
        || text::is_journal_stream();
    (is_stdio || names_this_process("LISTEN_PID")) && !is_service
}

/// Returns the filter that options ask for. Programs collect the other formats than
/// [`LogFormat::Text`], so these are complete by default.
fn level(options: &LogOptions, is_started_by_client: bool) -> &'static str {
    let is_for_client = is_started_by_client && matches!(options.log_format, LogFormat::Text);
    match options.verbose {
        0 if options.quiet || is_for_client => "warn",
        0 => "info",
        1 => "hexz_nbd=debug,info",
        _ => "hexz_nbd=trace,debug",
    }
}

/// Starts logging. The latest errors are remembered in `recent`.
///
/// # Errors
/// `RUST_LOG` is invalid, or there is no journal.
pub(crate) fn start(
    options: &LogOptions,
    is_started_by_client: bool,
    recent: &RecentErrors,
) -> Result<(), LogSetupError> {
    let directives = std::env::var("RUST_LOG").ok().filter(|wanted| !wanted.is_empty());
    let level = level(options, is_started_by_client);
    let directives = of_all_packages(directives.as_deref().unwrap_or(level));
    let filter = EnvFilter::builder().parse(directives)?;
    let lines = || {
        fmt::layer()
            // If a line can't be written, as on a full disk, neither can a message about that,
            // and trying to would panic in the thread that logs.
            .log_internal_errors(false)
            .with_writer(stderr)
    };
    let registry = registry().with(filter).with(recent.layer());
    match options.log_format {
        LogFormat::Text if text::is_journal_stream() => {
            registry
                .with(
                    lines()
                        .fmt_fields(text::SingleLineFields)
                        .with_ansi(false)
                        .event_format(text::JournalLine::new()),
                )
                .init();
        }
        LogFormat::Text => {
            let ansi = stderr().is_terminal();
            registry
                .with(lines().fmt_fields(text::SingleLineFields).with_target(false).with_ansi(ansi))
                .init();
        }
        LogFormat::Json => {
            let fields = lines().fmt_fields(JsonFields::new());
            registry.with(fields.event_format(json::FlatJson)).init();
        }
        LogFormat::Journal => {
            registry
                .with(Journal::connect().map_err(|error| LogSetupError::Journal { error })?)
                .init();
        }
    }
    Ok(())
}
