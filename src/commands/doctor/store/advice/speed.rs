//! Advice on latency and rate.

use std::time::Duration;

use super::{Client, Network, Server};
use crate::commands::doctor::report::{Outcome, Step};
use crate::commands::doctor::store::speed::{IN_FLIGHT, LARGE_READ};
use crate::commands::output::{format_seconds, mebibytes_per_second};

/// Latency above which there is a warning.
const HIGH_LATENCY: Duration = Duration::from_millis(100);
/// Rate below which there is a warning, in MiB per second.
const LOW_RATE: f64 = 10.0;

/// Builds the step about small reads, with their times in ascending order.
pub(crate) fn latency(times: &[Duration], median: Duration) -> Step {
    let format =
        |time: Option<&Duration>| format_seconds(time.copied().unwrap_or_default().as_secs_f64());
    let found = format!(
        "median {}, from {} to {}, of {} small reads",
        format(Some(&median)),
        format(times.first()),
        format(times.last()),
        times.len()
    );
    let step = Step::good("latency", found).detail("median_seconds", median.as_secs_f64());
    if median < HIGH_LATENCY {
        return step;
    }
    step.problem(Outcome::Warning, "high_latency")
        .advise(Network, "run the gateway nearer to the store: in the same region or data centre")
        .advise(
            Client,
            "or give the gateway more memory (--cache-size), so that it asks less often",
        )
}

pub(crate) fn rate(bytes: u64, took: Duration, latency: Duration) -> Step {
    let rate = mebibytes_per_second(bytes, took);
    let megabytes = LARGE_READ / (1024 * 1024);
    let found = format!(
        "{rate:.0} MiB/s, {bytes} bytes in {}, {IN_FLIGHT} requests of {megabytes} MiB at a time",
        format_seconds(took.as_secs_f64())
    );
    let step = Step::good("rate", found)
        .detail("bytes", bytes)
        .detail("seconds", took.as_secs_f64())
        .detail("in_flight", IN_FLIGHT);
    if bytes < LARGE_READ {
        return step.line("that is too little data to tell the rate");
    }
    let random = latency.as_secs_f64() + 1.0 / rate.max(1e-6);
    let step = step.detail("random_read_seconds", random).line(format!(
        "a random read of data that isn't in memory takes about {}",
        format_seconds(random)
    ));
    if rate >= LOW_RATE {
        return step;
    }
    step.problem(Outcome::Warning, "low_rate")
        .advise(Network, "check the path to the store: bandwidth, proxies, the region")
        .advise(Server, "or its limits on the rate, for each connection or in all")
}
