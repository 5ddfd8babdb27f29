//! A cold copy of the whole image.

use anyhow::Result;

use super::{Bench, MIB};
use crate::measure::cpu_seconds;
use crate::process::{idle_seconds, nbdcopy};
use crate::store::url;
use crate::table::Row;

/// Multiple of the link's time for the stored bytes.
const LIMITED: f64 = 1.5;
/// Stored MiB/s, or else the share of the processors that is in use: by the gateway, the client,
/// the store and the link, which share this machine.
const UNLIMITED: f64 = 200.0;
const BUSY: f64 = 0.9;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    Ok(vec![limited(bench)?, unlimited(bench)?])
}

fn limited(bench: &Bench) -> Result<Row> {
    let proxy = bench.nginx.behind(bench.link(true))?;
    let before = bench.nginx.traffic()?;
    let gateway = bench.gateway(&url(proxy.address(), "image.hxz"), &[])?;
    let seconds = nbdcopy(&gateway, bench.patience())?;
    drop(gateway);
    let after = bench.nginx.traffic()?;
    let link = bench.archive_length()? as f64 / bench.bytes_per_second() as f64;
    Ok(Row::new("cold copy with nbdcopy, limited link", format!("{seconds:.2} s"))
        .compared("the link alone", format!("{link:.2} s"))
        .goal(format!("<= {LIMITED} x"), seconds <= LIMITED * link)
        .note(format!(
            "{:.2} x; {} requests, {:.0} MiB of {:.0} MiB stored",
            seconds / link,
            after.requests - before.requests,
            (after.bytes - before.bytes) as f64 / MIB,
            bench.archive_length()? as f64 / MIB
        )))
}

fn unlimited(bench: &Bench) -> Result<Row> {
    let proxy = bench.nginx.behind(bench.link(false))?;
    let gateway = bench.gateway(&url(proxy.address(), "image.hxz"), &[])?;
    let before = cpu_seconds(gateway.group())?;
    let idle_before = idle_seconds()?;
    let seconds = nbdcopy(&gateway, bench.patience())?;
    let capacity = seconds * std::thread::available_parallelism()?.get() as f64;
    let busy = 1.0 - (idle_seconds()? - idle_before) / capacity;
    let gateway_share = (cpu_seconds(gateway.group())? - before) / capacity;
    let rate = bench.archive_length()? as f64 / MIB / seconds;
    Ok(Row::new(
        "cold copy with nbdcopy, link without limit",
        format!("{rate:.0} MiB/s of stored bytes"),
    )
    .goal(
        format!(">= {UNLIMITED} MiB/s, or processors >= {:.0} % busy", BUSY * 100.0),
        rate >= UNLIMITED || busy >= BUSY,
    )
    .note(format!(
        "{seconds:.2} s; processors {:.0} % busy, {:.0} % with the gateway",
        busy * 100.0,
        gateway_share * 100.0
    )))
}
