//! Reads from the cache: they cost the same, wherever the archive is.

use std::time::Duration;

use anyhow::Result;

use super::Bench;
use crate::load::{Load, Order, Until};
use crate::measure::median;
use crate::process::Process;
use crate::store::url;
use crate::table::Row;

/// Share of the local archive's rate.
const GOAL: f64 = 0.98;
const PARTS: usize = 4;
const ROUNDS: u64 = 5;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    const CACHE: [&str; 2] = ["--cache-size", "2GiB"];
    let proxy = bench.nginx.behind(bench.link(false))?;
    let remote = bench.gateway(&url(proxy.address(), "image.hxz"), &CACHE)?;
    let local = bench.local_gateway(&CACHE)?;
    for gateway in [&remote, &local] {
        bench.sequential(PARTS).run(&gateway.target())?;
    }
    let mut rates = [Vec::new(), Vec::new()];
    // In turn, so that whatever else the machine does affects both.
    for seed in 0..ROUNDS {
        for (gateway, rates) in [&remote, &local].into_iter().zip(&mut rates) {
            rates.push(read(bench, gateway, seed)?);
        }
    }
    let [remote, local] = rates.map(|rates| median(&rates));
    Ok(vec![
        Row::new("warm random 4 KiB with fio", format!("{remote:.0} reads/s"))
            .compared("a local archive", format!("{local:.0} reads/s"))
            .goal(format!(">= {GOAL} x"), remote >= GOAL * local)
            .note(format!("{:.3} x", remote / local)),
    ])
}

fn read(bench: &Bench, gateway: &Process, seed: u64) -> Result<f64> {
    let load = Load {
        in_flight: 32,
        length: 4096,
        order: Order::Random { seed },
        until: Until::After(Duration::from_secs(3)),
        ..bench.sequential(PARTS)
    };
    Ok(bench.fio.run(&load, &gateway.target())?.per_second())
}
