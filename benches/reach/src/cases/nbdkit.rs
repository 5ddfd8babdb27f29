//! nbdkit's curl plugin on the raw image, which a user without the gateway would run.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{Bench, MIB, milliseconds, shuffled};
use crate::load::{Load, Until};
use crate::process::nbdkit_curl;
use crate::store::url;
use crate::table::Row;

const NAME: &str = "nbdkit curl";
/// Connections of the client, as of nbdcopy; nbdkit serves one request of each at a time.
const CONNECTIONS: usize = 4;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for is_limited in [true, false] {
        let proxy = bench.nginx.behind(bench.link(is_limited))?;
        let server = nbdkit_curl(&url(proxy.address(), "image.raw"))?;
        let until = Until::After(Duration::from_secs(10));
        let load = Load { until, connections: CONNECTIONS, ..bench.sequential(1) };
        let before = bench.nginx.traffic()?;
        let rate = load.run(&server.target()).context(NAME)?.mib_per_second();
        drop(server);
        let after = bench.nginx.traffic()?;
        let link = if is_limited { "limited link" } else { "link without limit" };
        rows.push(
            Row::new(format!("sequential reads of the raw image, {link}"), "")
                .compared(NAME, format!("{rate:.1} MiB/s on {CONNECTIONS} connections"))
                .note(format!(
                    "{} requests, {:.0} MiB",
                    after.requests - before.requests,
                    (after.bytes - before.bytes) as f64 / MIB
                )),
        );
    }
    let proxy = bench.nginx.behind(bench.link(true))?;
    let server = nbdkit_curl(&url(proxy.address(), "image.raw"))?;
    let places = shuffled(bench.spread(4 << 20)).into_iter().take(100).collect();
    let outcome = bench.one_by_one(places).run(&server.target()).context(NAME)?;
    let median = milliseconds(outcome.latency(0.5));
    rows.push(Row::new("random 4 KiB of the raw image, p50", "").compared(NAME, median));
    Ok(rows)
}
