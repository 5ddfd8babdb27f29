//! Implements `hexz-nbd health`: asks a server's monitor for its health, as container engines do.

use std::process::ExitCode;
use std::time::Duration;

use hyper::Uri;

use super::monitor_client::{MonitorClient, MonitorError};
use crate::cli::Health;
use crate::commands::output;
use crate::exit_status::Failure;

/// Timeout of the request. Less than container engines wait, so that they record the reason.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// Prints `ok` if the server is healthy; otherwise, the error says why it isn't.
pub(crate) fn run(options: &Health) -> Result<ExitCode, Failure> {
    let client = MonitorClient::new(&options.monitor, &options.access)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let healthy = runtime.block_on(request(&client, options.ready));
    // A pending name lookup must not delay the exit.
    runtime.shutdown_timeout(Duration::from_millis(100));
    healthy?;
    output::print("ok\n")?;
    Ok(ExitCode::SUCCESS)
}

async fn request(client: &MonitorClient, ready: bool) -> Result<(), MonitorError> {
    let path = Uri::from_static(if ready { "/readyz" } else { "/healthz" });
    let no_response = format!("no response within {} s", REQUEST_TIMEOUT.as_secs());
    let response = tokio::time::timeout(REQUEST_TIMEOUT, client.get(path, "text/plain")).await;
    let response = response.unwrap_or(Err(("timeout", no_response)));
    response.map(drop).map_err(|problem| client.error(problem))
}
