//! Fetches the status from a status listener.

use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::Uri;

use crate::cli::MonitorEndpoint;
use crate::commands::monitor_client::{self, MonitorError, Problem};
use crate::monitor::Status;

/// Timeout of a request. A healthy server answers within milliseconds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum size of an answer, in bytes. A thousand exports and a thousand connections take half a
/// MiB, or a few MiB if names are long.
const MAX_RESPONSE_BYTES: usize = 8 << 20;

/// Fetches the status.
pub(super) async fn fetch_status(endpoint: &MonitorEndpoint) -> Result<Status, MonitorError> {
    let result = tokio::time::timeout(REQUEST_TIMEOUT, fetch(endpoint)).await;
    let no_response = format!("no response within {} s", REQUEST_TIMEOUT.as_secs());
    result.unwrap_or(Err(("timeout", no_response))).map_err(|(reason, problem)| MonitorError {
        endpoint: endpoint.clone(),
        reason,
        problem,
    })
}

async fn fetch(endpoint: &MonitorEndpoint) -> Result<Status, Problem> {
    let path = Uri::from_static("/status.json");
    let response = monitor_client::get(endpoint, path, "application/json").await?;
    let body = match Limited::new(response.body, MAX_RESPONSE_BYTES).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            let problem = format!("the response is longer than {} MiB", MAX_RESPONSE_BYTES >> 20);
            return Err(("too_long", problem));
        }
        Err(error) => return Err(("truncated", format!("the response was cut off: {error}"))),
    };
    let problem = |error| ("not_a_status", format!("not a status of hexz-nbd: {error}"));
    Status::parse(&body).map_err(problem)
}
