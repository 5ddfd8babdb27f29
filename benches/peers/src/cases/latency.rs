//! What a client that reads a lot does to the latency of others.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};

use crate::bench::{Bench, median_of};
use crate::load::{Load, Order, Outcome, Until};
use crate::row::{Aim, Row, Unit};
use crate::servers::{Running, Server, Setup};

/// One client reads 4 KiB at half the rate that it could reach, by the clock, so that an
/// answer that comes late counts for the requests that wait behind it.
///
/// Both clients read one archive, with the default cache of 256 MiB. What the first one
/// reads is a sixteenth of the image's data, some 60 MiB: each of its blocks is read
/// several times a second, so the cache keeps it whatever the other one does. What the
/// other one reads, over and over, is everything: four times what there is room for, so
/// that by the time it begins anew nothing of it is left, and it is always cold. An archive
/// of other content for the second client would measure the same with more memory.
pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let rate = match bench.warm_rate.get() {
        Some(rate) => *rate,
        None => warm_rate(bench)?,
    } / 2.0;
    let pairs = bench.in_turn(&[Setup::tls(Server::HexzNbd)], |round, running| {
        let measured = Load {
            rate: Some(rate),
            urgent: true,
            // The clock decides, not the answers that are still to come.
            in_flight: 256,
            places: bench.material.places.iter().take(few(bench)).copied().collect(),
            ..bench.random(round)
        };
        Load { rate: None, ..measured.clone() }.run(&running.target).context("warm")?;
        let alone = measured.run(&running.target)?;
        Ok((alone, beside_a_reader(bench, &measured, running)?))
    })?;
    let pairs = pairs.into_iter().next().flatten().context("the gateway is missing")?;
    let latency = |part: f64| {
        let alone = Unit::Seconds.of(median_of(&pairs, |(alone, _)| alone.latency(part)));
        let beside = Unit::Seconds.of(median_of(&pairs, |(_, (beside, _))| beside.latency(part)));
        (alone, beside)
    };
    let cold = median_of(&pairs, |(_, (_, cold))| cold.mib_per_second());
    let rows = [(0.5, "median"), (0.99, "99th percentile"), (0.999, "99.9th percentile")];
    Ok(rows
        .into_iter()
        .map(|(part, name)| {
            let (alone, beside) = latency(part);
            let what = format!("latency of 4 KiB at half load beside a cold reader: {name}");
            let row = Row::new(what, beside, "alone", Some(alone));
            if part == 0.99 {
                row.aim(Aim::AtMost(3.0)).note(format!(
                    "{rate:.0} reads/s by the clock; the other client reads {cold:.0} MiB/s"
                ))
            } else {
                row
            }
        })
        .collect())
}

/// How many places the client whose latency counts reads.
fn few(bench: &Bench) -> usize {
    (bench.material.places.len() / 16).max(1)
}

/// What one warm client reaches, if that hasn't been measured.
fn warm_rate(bench: &Bench) -> Result<f64> {
    let running = bench.start(&Setup::tls(Server::HexzNbd).with_room_for_all())?;
    bench.warm(&running)?;
    Ok(bench.random(0).run(&running.target)?.per_second())
}

/// The measured load, and the other one.
fn beside_a_reader(bench: &Bench, load: &Load, running: &Running) -> Result<(Outcome, Outcome)> {
    // It begins first and ends last.
    let time = bench.scale.time + bench.scale.time / 2;
    let other = Load {
        order: Order::Sequential,
        until: Until::After(time),
        places: Arc::clone(&bench.material.places),
        ..bench.sequential()
    };
    let target = running.target.clone();
    let other = std::thread::spawn(move || other.run(&target));
    std::thread::sleep(bench.scale.time / 4);
    let measured = load.run(&running.target)?;
    let other = other.join().map_err(|_| anyhow!("the other client panicked"))??;
    Ok((measured, other))
}
