//! Lists the exports, opens one of them, and reads a little from it.

use std::time::{Duration, Instant};

use nbd_server::ReplyMode;
use nbd_server::client::{self, ExportInfo, Transmission};
use nbd_server::wire::option::Rep;

use super::advice;
use super::connect::BoxedStream;
use super::probe::{ExportNames, Probe, ProbeSession};
use super::probe_error::{ProbeError, with_timeout};
use super::report::{Outcome, Report, Step};
use crate::commands::output::{format_seconds, mebibytes_per_second};

/// Length of the first and of the last read, in bytes.
const PROBE_READ_BYTES: u64 = 4096;
/// Length of each read when throughput is measured, in bytes.
const THROUGHPUT_READ_BYTES: u64 = 1024 * 1024;
/// Longest read that a server without advertised block sizes accepts, in bytes ("Size
/// constraints").
const DEFAULT_MAX_READ: u32 = 32 * 1024 * 1024;
/// Maximum number of round trips measured, and the maximum time spent on that.
const MAX_ROUND_TRIPS: usize = 20;
const MAX_LATENCY_TIME: Duration = Duration::from_secs(2);
/// Bounds of the throughput measurement, which ends when either is reached.
const MAX_THROUGHPUT_BYTES: u64 = 64 * 1024 * 1024;
const MAX_THROUGHPUT_TIME: Duration = Duration::from_secs(2);

/// Lists the exports. If the list can't be read to its end, continues on a new connection.
pub(super) async fn list(
    probe: &Probe,
    mut session: ProbeSession,
    report: &mut Report,
) -> Result<(ProbeSession, ExportNames), Step> {
    let listed = match session.listing.take() {
        Some(listed) => listed,
        None => {
            let listed = with_timeout(probe.timeout, client::list(&mut session.stream)).await;
            if !matches!(listed, Ok(_) | Err(ProbeError::OptionRefused { .. })) {
                let again = probe.reconnect(session.tls.is_some()).await;
                (session.stream, session.replies) = again.map_err(|_| list_step(&listed))?;
            }
            listed
        }
    };
    report.add(list_step(&listed));
    Ok((session, listed.unwrap_or_default()))
}

fn list_step(listed: &Result<ExportNames, ProbeError>) -> Step {
    match listed {
        Ok(names) => advice::listed(names),
        Err(failure) => advice::list_failed(failure),
    }
}

/// Opens an export: the wanted one, or else the default export, or else the first listed.
pub(super) async fn open_export(
    probe: &Probe,
    session: ProbeSession,
    wanted: Option<&str>,
    listed: &ExportNames,
    report: &mut Report,
) -> Result<Transmission<BoxedStream>, Step> {
    let ProbeSession { mut stream, flags, replies, .. } = session;
    let mut name = wanted.unwrap_or_default();
    let unopened = |name: &str, failure: &ProbeError| advice::open_failed(name, failure, listed);
    match with_timeout(probe.timeout, client::info(&mut stream, name)).await {
        Ok(_) => {}
        Err(failure) if failure.is_refusal(Rep::ERR_UNSUP) => {}
        Err(failure) if failure.is_refusal(Rep::ERR_UNKNOWN) && wanted.is_none() => {
            let (first, _) = listed.first().ok_or_else(|| unopened(name, &failure))?;
            report.add(Step::warning("default export", "no_default_export", "none").advise(
                advice::Client,
                "clients need to name an export: nbd://HOST/NAME, nbd-client -N NAME",
            ));
            name = first;
        }
        Err(failure) => return Err(unopened(name, &failure)),
    }
    if replies != ReplyMode::Simple {
        let contexts =
            with_timeout(probe.timeout, client::list_contexts(&mut stream, name, &[])).await;
        let step = advice::contexts(contexts.as_deref());
        if step.outcome == Outcome::Bad {
            return Err(step);
        }
        report.add(step);
    }
    let opened = open(probe, stream, name, replies, flags).await;
    let transmission = opened.map_err(|failure| unopened(name, &failure))?;
    report.add(advice::export(name, transmission.export()));
    Ok(transmission)
}

/// Opens an export with GO, or with EXPORT_NAME if the server doesn't support GO.
async fn open(
    probe: &Probe,
    mut stream: BoxedStream,
    name: &str,
    replies: ReplyMode,
    flags: nbd_server::wire::handshake::ClientFlags,
) -> Result<Transmission<BoxedStream>, ProbeError> {
    // The stream is only borrowed, because it stays in negotiation after a refusal.
    let refused =
        match with_timeout(probe.timeout, client::go_with_mode(&mut stream, name, replies)).await {
            Ok(gone) => {
                let export = gone.export().clone();
                return Ok(Transmission::new(stream, export, replies));
            }
            Err(failure) => failure,
        };
    if replies == ReplyMode::Simple && refused.is_refusal(Rep::ERR_UNSUP) {
        return with_timeout(probe.timeout, client::choose_by_export_name(stream, name, flags))
            .await;
    }
    Err(refused)
}

/// Extent and lengths of the test reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ReadPlan {
    /// End of the part that can be read in whole blocks.
    end: u64,
    small: u32,
    large: u32,
}

impl ReadPlan {
    /// Plans the reads of an export. Returns `None` if nothing can be read.
    fn of(info: &ExportInfo) -> Option<Self> {
        let (unit, most) = match info.block_sizes {
            Some(sizes) if sizes.minimum.is_power_of_two() => (sizes.minimum, sizes.maximum),
            _ => (1, DEFAULT_MAX_READ),
        };
        let unit = u64::from(unit);
        let end = info.size - info.size % unit;
        let fit = |wanted: u64| {
            let most = u64::from(most.min(DEFAULT_MAX_READ));
            let length = wanted.max(unit).min(most).min(end);
            u32::try_from(length - length % unit).ok().filter(|&length| length > 0)
        };
        Some(Self { end, small: fit(PROBE_READ_BYTES)?, large: fit(THROUGHPUT_READ_BYTES)? })
    }
}

/// Reads the first and the last bytes, measures latency and optionally throughput, and
/// disconnects.
pub(super) async fn read(
    probe: &Probe,
    mut transmission: Transmission<BoxedStream>,
    with_speed: bool,
    report: &mut Report,
) -> Result<(), Step> {
    let Some(plan) = ReadPlan::of(transmission.export()) else {
        report.add(Step::warning("first read", "nothing_to_read", "nothing to read"));
        return disconnect(probe, transmission, report).await;
    };
    let last = plan.end - u64::from(plan.small);
    for (name, offset) in [("first read", 0), ("last read", last)] {
        let where_ = format!("{} bytes at {offset}", plan.small);
        let began = Instant::now();
        let read = with_timeout(probe.timeout, transmission.read(offset, plan.small)).await;
        match read {
            Ok(_) => report.add(Step::good(name, where_).took(began.elapsed())),
            Err(failure) => {
                let step = advice::read_failed(name, &where_, &failure).took(began.elapsed());
                // A failed request leaves the session usable.
                if !matches!(failure, ProbeError::RequestFailed { .. }) {
                    return Err(step);
                }
                report.add(step);
            }
        }
    }
    if let Some(step) = measure_latency(probe, &mut transmission, plan).await? {
        report.add(step);
    }
    if with_speed {
        report.add(measure_throughput(probe, &mut transmission, plan).await?);
    }
    disconnect(probe, transmission, report).await
}

/// Measures the round-trip time of short reads at an offset that has just been read. Returns
/// `None` if such a read fails with an error.
async fn measure_latency(
    probe: &Probe,
    transmission: &mut Transmission<BoxedStream>,
    plan: ReadPlan,
) -> Result<Option<Step>, Step> {
    let mut times = Vec::new();
    let began = Instant::now();
    while times.len() < MAX_ROUND_TRIPS && began.elapsed() < MAX_LATENCY_TIME {
        let one = Instant::now();
        match with_timeout(probe.timeout, transmission.read(0, plan.small)).await {
            Ok(_) => times.push(one.elapsed()),
            Err(ProbeError::RequestFailed { .. }) => return Ok(None),
            Err(failure) => {
                return Err(advice::read_failed("latency", "a repeated read", &failure));
            }
        }
    }
    times.sort_unstable();
    let (Some(least), Some(median)) = (times.first(), times.get(times.len() / 2)) else {
        return Ok(None);
    };
    let found = format!(
        "{} for {} bytes, minimum {}",
        format_seconds(median.as_secs_f64()),
        plan.small,
        format_seconds(least.as_secs_f64())
    );
    Ok(Some(
        Step::good("latency", found)
            .detail("median_seconds", median.as_secs_f64())
            .detail("least_seconds", least.as_secs_f64()),
    ))
}

/// Measures sequential throughput from the start of the export, one request at a time.
async fn measure_throughput(
    probe: &Probe,
    transmission: &mut Transmission<BoxedStream>,
    plan: ReadPlan,
) -> Result<Step, Step> {
    let began = Instant::now();
    let mut at: u64 = 0;
    while at < plan.end && at < MAX_THROUGHPUT_BYTES && began.elapsed() < MAX_THROUGHPUT_TIME {
        // The remainder is a multiple of the block size, too.
        let length = u32::try_from(plan.end - at).unwrap_or(u32::MAX).min(plan.large);
        match with_timeout(probe.timeout, transmission.read(at, length)).await {
            Ok(data) => at += data.len() as u64,
            Err(failure) => {
                let where_ = format!("{length} bytes at {at}");
                let step = advice::read_failed("speed", &where_, &failure);
                return if matches!(failure, ProbeError::RequestFailed { .. }) {
                    Ok(step)
                } else {
                    Err(step)
                };
            }
        }
    }
    let took = began.elapsed();
    let rate = mebibytes_per_second(at, took);
    let found = format!(
        "{rate:.0} MiB/s, {at} bytes in {}, one request at a time",
        format_seconds(took.as_secs_f64())
    );
    Ok(Step::good("speed", found)
        .detail("bytes", at)
        .detail("seconds", took.as_secs_f64())
        .detail("request", plan.large))
}

async fn disconnect(
    probe: &Probe,
    transmission: Transmission<BoxedStream>,
    report: &mut Report,
) -> Result<(), Step> {
    const NAME: &str = "goodbye";
    report.add(match with_timeout(probe.timeout, transmission.disconnect_and_wait()).await {
        // Many servers close TLS without a close_notify alert.
        Ok(()) | Err(ProbeError::Closed) => Step::good(NAME, "the server closes after DISC"),
        Err(failure) => Step::warning(NAME, failure.label(), format!("DISC: {failure}")).advise(
            advice::Server,
            "it must close the connection after DISC, or it runs out of connections eventually",
        ),
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_server::wire::info::BlockSizes;

    fn plan(size: u64, sizes: Option<(u32, u32)>) -> Option<(u64, u32, u32)> {
        let block_sizes =
            sizes.map(|(minimum, maximum)| BlockSizes { minimum, preferred: minimum, maximum });
        let info = ExportInfo { size, block_sizes, ..ExportInfo::default() };
        ReadPlan::of(&info).map(|plan| (plan.end, plan.small, plan.large))
    }

    #[test]
    fn reads_keep_to_size_and_block_sizes() {
        assert_eq!(plan(0, None), None);
        assert_eq!(plan(27, None), Some((27, 27, 27)));
        assert_eq!(plan(10_000, None), Some((10_000, 4096, 10_000)));
        assert_eq!(plan(1 << 30, None), Some((1 << 30, 4096, 1 << 20)));
        assert_eq!(plan(10_000, Some((512, 1 << 25))), Some((9728, 4096, 9728)));
        assert_eq!(plan(1 << 30, Some((65536, 1 << 25))), Some((1 << 30, 65536, 1 << 20)));
        assert_eq!(plan(1 << 30, Some((512, 1000))), Some((1 << 30, 512, 512)));
        assert_eq!(plan(100, Some((512, 1 << 25))), None);
        assert_eq!(plan(u64::MAX, Some((1 << 31, u32::MAX))), None);
        assert_eq!(plan(1000, Some((0, 0))), Some((1000, 1000, 1000)));
        assert_eq!(plan(1000, Some((1, 0))), None);
    }
}
