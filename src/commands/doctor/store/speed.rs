//! Latency of small reads, and the rate of large ones.

use std::time::{Duration, Instant};

use object_reader::{ByteRange, GetRequest, Response};
use tokio::task::JoinSet;

use super::super::report::{Report, Step};
use super::object::SMALL_READ;
use super::{Session, advice, with_timeout};

/// Number of small reads.
const SMALL_READS: u64 = 10;
/// Size of large reads, in bytes: that of the gateway's random reads, by default.
pub(super) const LARGE_READ: u64 = 1024 * 1024;
/// Number of large reads in flight.
pub(super) const IN_FLIGHT: usize = 8;
/// Maximum number of bytes in large reads.
const MAX_BYTES: u64 = 8 * 1024 * 1024;
/// Time after which no more large reads are started.
const MAX_TIME: Duration = Duration::from_secs(2);

pub(super) async fn examine(
    session: &Session,
    object: &Response,
    measures_rate: bool,
    report: &mut Report,
) -> Result<(), Step> {
    let latency = latency(session, object, report).await?;
    if measures_rate {
        report.add(rate(session, object, latency).await?);
    }
    Ok(())
}

/// Measures small reads, spread over the object. Returns their median time.
async fn latency(
    session: &Session,
    object: &Response,
    report: &mut Report,
) -> Result<Duration, Step> {
    let length = object.version.length;
    let mut times = Vec::new();
    for number in 0..SMALL_READS {
        let start = length / SMALL_READS * number;
        let range = ByteRange::Bounded(start..length.min(start + SMALL_READ));
        let version = Some(object.version.clone());
        let read = session.get(session.url.key(), range, version).await;
        read.result.map_err(|error| {
            advice::failed("latency", &error, read.head.as_ref(), &session.context())
        })?;
        times.push(read.took);
    }
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    report.add(advice::latency(&times, median));
    Ok(median)
}

/// Measures large reads from the beginning of the object, several at a time.
async fn rate(session: &Session, object: &Response, latency: Duration) -> Result<Step, Step> {
    let end = object.version.length.min(MAX_BYTES);
    let mut ranges =
        (0..end.div_ceil(LARGE_READ)).map(|at| at * LARGE_READ..end.min((at + 1) * LARGE_READ));
    let began = Instant::now();
    let (mut reads, mut bytes) = (JoinSet::new(), 0);
    loop {
        while reads.len() < IN_FLIGHT
            && began.elapsed() < MAX_TIME
            && let Some(range) = ranges.next()
        {
            let store = session.store.clone();
            let (key, timeout) = (session.url.key().to_owned(), session.timeout);
            let version = Some(object.version.clone());
            let request =
                GetRequest { range: ByteRange::Bounded(range), version, bypass_caches: false };
            reads.spawn(
                async move { with_timeout(timeout, store.store().get(&key, &request)).await },
            );
        }
        match reads.join_next().await {
            None => break,
            Some(Ok(Ok(read))) => bytes += read.bytes.len() as u64,
            Some(Ok(Err(error))) => {
                let head = session.store.take_response();
                let context = session.context();
                return Err(advice::failed("rate", &error, head.as_ref(), &context));
            }
            // A read neither panics nor is cancelled.
            Some(Err(_)) => {}
        }
    }
    Ok(advice::rate(bytes, began.elapsed(), latency))
}
