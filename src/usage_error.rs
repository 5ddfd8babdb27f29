//! Reports errors of the command line and the configuration file, and ends the program.

use std::io::{Write, stderr};

use clap::error::ErrorKind;
use clap::{CommandFactory, Error};

use crate::cli::Cli;
use crate::cli::escaped_error::{escape_lines, escape_values};
use crate::exit_status;
use crate::log::{self, LogSetupError};
use crate::monitor::RecentErrors;
use crate::settings::SettingsError;

/// Reports an error of the settings. Help and the version are printed here as well.
pub(crate) fn report_and_exit(error: SettingsError) -> ! {
    let (options, problems) = match error {
        SettingsError::CommandLine(error) => print_and_exit(error),
        SettingsError::File { log, problems } => (log, problems),
    };
    if let Err(error) = log::start(&options, false, &RecentErrors::default()) {
        log_unavailable(&error);
    }
    for problem in problems {
        tracing::error!(reason = problem.label(), "{problem}");
    }
    std::process::exit(exit_status::USAGE.into())
}

/// Reports that logging can't start.
pub(crate) fn log_unavailable(error: &LogSetupError) -> ! {
    print_and_exit(Cli::command().error(ErrorKind::InvalidValue, error))
}

/// Prints clap's error, and ends the program.
fn print_and_exit(error: Error) -> ! {
    if !error.use_stderr() {
        error.exit();
    }
    let error = escape_values(error);
    let plain = error.render().to_string();
    let escaped = escape_lines(&plain);
    if escaped == plain {
        error.exit();
    }
    let code = error.exit_code();
    // If writing fails, the exit code still reports the error.
    stderr().write_all(escaped.as_bytes()).unwrap_or_default();
    std::process::exit(code)
}
