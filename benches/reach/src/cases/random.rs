//! Cold reads of 4 KiB at random places, one at a time.

use anyhow::Result;

use super::{Bench, milliseconds, shuffled};
use crate::load::{PLACE, histogram};
use crate::store::url;
use crate::table::Row;

/// Distance of reads that share no request to the store, in bytes.
const APART: u64 = 4 << 20;
/// Distance of reads that share no index page, in bytes.
const PAGES_APART: u64 = 384 << 20;
/// Distance of reads that together touch all index pages, in bytes.
const EACH_PAGE: u64 = 32 << 20;

const READS: usize = 100;
const ROUNDS: usize = 6;

/// Latencies in units of the round-trip time: 35 and 60 ms at 20 ms.
const KNOWN: f64 = 1.75;
const UNKNOWN: f64 = 3.0;

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let proxy = bench.nginx.behind(bench.link(true))?;
    let archive = url(proxy.address(), "image.hxz");
    let mut unknown = histogram()?;
    for _ in 0..ROUNDS {
        let gateway = bench.gateway(&archive, &[])?;
        let places = shuffled(bench.spread(PAGES_APART));
        unknown.add(&bench.one_by_one(places).run(&gateway.target())?.latency)?;
    }
    let gateway = bench.gateway(&archive, &[])?;
    let touched = bench.spread(EACH_PAGE);
    bench.one_by_one(touched.clone()).run(&gateway.target())?;
    let stretch = |place: &u32| u64::from(*place) * PLACE / APART;
    let untouched = |place: &u32| !touched.iter().any(|other| stretch(other) == stretch(place));
    let places = shuffled(bench.spread(APART)).into_iter().filter(untouched).take(READS).collect();
    let known = bench.one_by_one(places).run(&gateway.target())?.latency;
    let round_trip = bench.options.round_trip as f64 / 1e3;
    let rows = [("known", known, KNOWN), ("unknown", unknown, UNKNOWN)];
    Ok(rows
        .into_iter()
        .map(|(name, latency, goal)| {
            let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1e9;
            let what = format!("cold random 4 KiB, index page {name}, p50, limited link");
            let limit = goal * round_trip;
            Row::new(what, milliseconds(at(0.5)))
                .goal(format!("<= {}", milliseconds(limit)), at(0.5) <= limit)
                .note(format!("p90 {}; {} reads", milliseconds(at(0.9)), latency.len()))
        })
        .collect())
}
