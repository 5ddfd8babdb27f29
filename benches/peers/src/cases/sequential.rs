//! Reads of 256 KiB one after the other, where the image has data: holes would flatter
//! those who know of them.

use anyhow::{Context, Result};

use crate::bench::{Bench, Sample, cpu_per_gib, median_of, throughput};
use crate::parts::Parts;
use crate::row::{Aim, Row, Unit};
use crate::servers::{Server, Setup};

/// Nothing is cached but the files themselves: each block is decoded once.
pub(super) fn cold(bench: &Bench) -> Result<Vec<Row>> {
    let setups = [Setup::tls(Server::HexzNbd), Setup::tls(Server::QemuNbd)];
    let samples =
        bench.in_turn(&setups, |_, running| Sample::take(&bench.sequential(), running))?;
    let ours = samples[0].as_deref().context("the gateway is missing")?;
    // All of them read the same, so it doesn't matter whose length is taken.
    let gib = median_of(ours, |sample| sample.outcome.gib());
    let parts = bench.rounds(|| Ok(Parts::measure(&bench.material)?.by(gib)))?;
    let parts = Parts::medians(&parts);
    let sum = Row::new(
        "256 KiB in order, cold, 16 in flight: processor time of the server",
        cpu_per_gib(ours),
        "the sum of its parts",
        Some(Unit::SecondsPerGib.of(parts.sum())),
    );
    let fastest = row("256 KiB in order, cold, 16 in flight", &samples, &setups[1]);
    Ok(vec![
        fastest.aim(Aim::AtLeast(2.0)),
        sum.aim(Aim::AtMost(1.3)).parts(parts.named()).note(parts.to_string()),
    ])
}

/// Everything is in memory.
pub(super) fn warm(bench: &Bench) -> Result<Vec<Row>> {
    let setups = [Setup::tls(Server::HexzNbd).with_room_for_all(), Setup::tls(Server::Nbdkit)];
    let samples = bench.in_turn(&setups, |_, running| {
        bench.warm(running)?;
        Sample::take(&bench.sequential(), running)
    })?;
    let row = row("256 KiB in order, warm, 16 in flight", &samples, &setups[1]);
    Ok(vec![row.aim(Aim::AtLeast(1.0))])
}

fn row(what: &str, samples: &[Option<Vec<Sample>>], other: &Setup) -> Row {
    super::random::row(what, samples, other, throughput).cpu(
        cpu_per_gib(samples[0].as_deref().unwrap_or_default()),
        samples[1].as_deref().map(cpu_per_gib),
    )
}
