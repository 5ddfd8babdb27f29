//! Implements `hexz-nbd check`, which evaluates the rules as the gateway would.

use std::process::ExitCode;

use nbd_telemetry::escape;

use crate::cli::check::Check;
use crate::commands::output;
use crate::exit_status::Failure;
use crate::service::access::AccessError;

/// Prints whether the client may open the export, and which rule decides.
pub(crate) fn run(options: &Check) -> Result<ExitCode, Failure> {
    let rules = options.access.rules().map_err(AccessError::from)?;
    let verdict = options.with_request(|facts| rules.evaluate(facts));
    let answer = match &verdict {
        Ok(reason) => format!("allowed: {reason}"),
        Err(reason) => format!("not allowed: {reason}"),
    };
    output::print(format!("{}\n", escape::text(&answer)))?;
    Ok(if verdict.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
