//! Many clients that read one image at the same time.

use anyhow::{Result, ensure};

use super::{Bench, MIB};
use crate::load::{Load, Order};
use crate::store::{Traffic, url};
use crate::table::Row;

/// Multiple of the bytes that one client needs from the store.
const GOAL: f64 = 1.02;
/// Only this part of the image is read: the rest would take longer and show the same.
const PARTS: usize = 4;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let clients = bench.options.clients;
    let (one, _) = read(bench, 1)?;
    let (all, seconds) = read(bench, clients)?;
    let ratio = all.bytes as f64 / one.bytes.max(1) as f64;
    let shown = |traffic: Traffic| {
        format!("{:.1} MiB in {} requests", traffic.bytes as f64 / MIB, traffic.requests)
    };
    Ok(vec![
        Row::new(format!("{clients} clients read one image, cold: from the store"), shown(all))
            .compared("one client", shown(one))
            .goal(format!("<= {GOAL} x"), ratio <= GOAL)
            .note(format!("{ratio:.3} x; {seconds:.1} s")),
    ])
}

/// Lets clients read the same from a new gateway. Returns what that took from the store, and how
/// many seconds it took.
fn read(bench: &Bench, clients: usize) -> Result<(Traffic, f64)> {
    let proxy = bench.nginx.behind(bench.link(false))?;
    let before = bench.nginx.traffic()?;
    let gateway = bench.gateway(&url(proxy.address(), "image.hxz"), &["--cache-size", "2GiB"])?;
    // One client compares the bytes; the others would only be slower.
    let load = if clients == 1 { bench.compared(PARTS)? } else { bench.sequential(PARTS) };
    let order = Order::EachSequential;
    let load = Load { connections: clients, in_flight: 4, order, ..load };
    let seconds = load.run(&gateway.target())?.seconds;
    drop(gateway);
    let after = bench.nginx.traffic()?;
    let bytes = after.bytes - before.bytes;
    ensure!(bytes > 0 || bench.options.local, "the gateway read nothing from the store");
    Ok((Traffic { requests: after.requests - before.requests, bytes }, seconds))
}
