//! A store that can't be reached for a while, under load.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nbd_server::client::{self, ClientError};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::{Bench, milliseconds, shuffled};
use crate::load::{Load, Order, PLACE, Until};
use crate::store::url;
use crate::table::Row;

/// Part of the image that is in the cache.
const PARTS: usize = 8;
/// Reads per second from the cache.
const RATE: f64 = 2000.0;
/// Time before and after the outage.
const MARGIN: Duration = Duration::from_secs(3);
/// Time that a read beyond the cache may take at most; the gateway gives up earlier.
const PATIENCE: Duration = Duration::from_secs(120);

const CACHED: f64 = 0.005;
const RECOVERY: f64 = 2.0;

/// A read of what isn't in the cache.
struct Probe {
    answered: Instant,
    succeeded: bool,
}

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let proxy = bench.nginx.behind(bench.link(true))?;
    let gateway = bench.gateway(&url(proxy.address(), "image.hxz"), &[])?;
    let target = gateway.target();
    bench.sequential(PARTS).run(&target).context("fill the cache")?;
    let outage = Duration::from_secs(bench.options.outage);

    let cached = Load {
        connections: 4,
        in_flight: 64,
        length: 4096,
        order: Order::Random { seed: 1 },
        until: Until::After(outage + MARGIN * 2),
        rate: Some(RATE),
        urgent: true,
        ..bench.sequential(PARTS)
    };
    let reader = std::thread::spawn(move || cached.run(&target));
    let places = bench.spread(1 << 20);
    let beyond = places[places.len() / 2..].to_vec();
    let is_over = Arc::new(AtomicBool::new(false));
    let (address, flag) = (gateway.address(), Arc::clone(&is_over));
    let prober = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(probe(address, shuffled(beyond), &flag))
    });

    std::thread::sleep(MARGIN);
    proxy.refuse();
    std::thread::sleep(outage);
    proxy.accept()?;
    let restored = Instant::now();
    std::thread::sleep(MARGIN);
    is_over.store(true, Ordering::Relaxed);
    let cached = reader.join().map_err(|_| anyhow!("a reader panicked"))?;
    let probes = prober.join().map_err(|_| anyhow!("the prober panicked"))?;
    let lost = [cached.as_ref().err(), probes.as_ref().err()].into_iter().flatten().count();
    let (cached, probes) = (cached.context("reads from the cache"), probes.context("other reads"));

    let what = |rest: &str| format!("store down for {} s: {rest}", outage.as_secs());
    let clients = Row::new(what("connections lost"), lost.to_string()).goal("0", lost == 0);
    let (cached, probes) = match (cached, probes) {
        (Ok(cached), Ok(probes)) => (cached, probes),
        (Err(error), _) | (_, Err(error)) => return Ok(vec![clients.note(format!("{error:#}"))]),
    };
    let latency = cached.latency(0.99);
    let recovery = probes
        .iter()
        .find(|probe| probe.succeeded && probe.answered > restored)
        .map(|probe| (probe.answered - restored).as_secs_f64());
    let failed = probes.iter().filter(|probe| !probe.succeeded).count();
    Ok(vec![
        Row::new(what("cached 4 KiB, p99"), milliseconds(latency))
            .goal(format!("< {}", milliseconds(CACHED)), latency < CACHED)
            .note(format!("{RATE:.0} reads/s; p50 {}", milliseconds(cached.latency(0.5)))),
        Row::new(
            what("recovery"),
            recovery.map_or("none".to_owned(), |seconds| format!("{seconds:.2} s")),
        )
        .goal(format!("< {RECOVERY} s"), recovery.is_some_and(|seconds| seconds < RECOVERY))
        .note(format!("{failed} of {} other reads failed", probes.len())),
        clients,
    ])
}

/// Reads places one at a time until told to stop. Errors that the server reports are noted.
async fn probe(address: SocketAddr, places: Vec<u32>, is_over: &AtomicBool) -> Result<Vec<Probe>> {
    let mut stream = TcpStream::connect(address).await?;
    client::greet(&mut stream).await?;
    let mut transmission = client::go(stream, "").await?;
    let mut probes = Vec::new();
    for place in places {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let read = transmission.read(u64::from(place) * PLACE, 4096);
        let succeeded = match timeout(PATIENCE, read).await.context("no reply")? {
            Ok(_) => true,
            Err(ClientError::Failed(_) | ClientError::FailedWithMessage { .. }) => false,
            Err(error) => bail!(error),
        };
        probes.push(Probe { answered: Instant::now(), succeeded });
        sleep(Duration::from_millis(50)).await;
    }
    transmission.disconnect().await?;
    Ok(probes)
}
