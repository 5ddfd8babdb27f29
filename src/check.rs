//! `hexz-nbd check`: asks the rules as the gateway would.

use std::io::Write;
use std::process::ExitCode;

use hexz_nbd::escape;

use crate::cli::check::Check;
use crate::failure::Failure;

/// Says whether that client may open that export, and which rule says so.
pub(crate) fn run(options: &Check) -> Result<ExitCode, Failure> {
    let rules = options.access.rules()?;
    let verdict = options.ask(|facts| rules.judge(facts));
    let mut out = std::io::stdout();
    match &verdict {
        Ok(reason) => writeln!(out, "allowed: {}", escape::text(&reason.to_string()))?,
        Err(reason) => writeln!(out, "not allowed: {}", escape::text(&reason.to_string()))?,
    }
    Ok(if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
