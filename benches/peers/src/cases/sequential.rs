//! Reads of 256 KiB one after the other, where the image has data: holes would flatter those who
//! know of them.

use anyhow::{Context, Result};

use crate::bench::{Bench, LoadClient, Sample, cpu_per_gib, median_of, throughput};
use crate::parts::Parts;
use crate::row::{Aim, Row, Unit};
use crate::servers::{Server, Setup, Transport};

/// Nothing is cached but the files themselves: each block is decoded once.
pub(super) fn cold(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for transport in [Transport::Tls, Transport::Plain] {
        let setups = [Server::HexzNbd, Server::QemuNbd, Server::Nbdkit]
            .map(|server| Setup::new(server, transport));
        for client in LoadClient::ALL {
            let samples = bench.in_turn(&setups, |_, running| {
                Sample::take_by(client, bench, &bench.sequential(), running)
            })?;
            let ours = samples[0].as_deref().context("the gateway is missing")?;
            // All of them read the same, so it doesn't matter whose length is taken.
            let gib = median_of(ours, |sample| sample.outcome.gib());
            let parts = bench.rounds(|| Ok(Parts::measure(&bench.material)?.by(gib)))?;
            let mut parts = Parts::medians(&parts);
            if transport == Transport::Plain {
                parts.encrypt = 0.0;
            }
            let what = format!(
                "256 KiB in order, cold, 16 in flight{}, {}",
                transport.suffix(),
                client.name()
            );
            let fastest = row(&what, &samples[..2], &setups[1]);
            let raw = [samples[0].clone(), samples[2].clone()];
            let raw = row(&what, &raw, &setups[2]);
            let sum = Row::new(
                format!("{what}: processor time of the server"),
                cpu_per_gib(ours),
                "the sum of its parts",
                Some(Unit::SecondsPerGib.of(parts.sum())),
            )
            .parts(parts.named())
            .note(parts.to_string());
            rows.extend(match client {
                LoadClient::Fio => {
                    [fastest.aim(Aim::AtLeast(2.0)), raw, sum.aim(Aim::AtMost(1.25))]
                }
                LoadClient::Own => [fastest, raw, sum],
            });
        }
    }
    Ok(rows)
}

/// Everything is in memory.
pub(super) fn warm(bench: &Bench) -> Result<Vec<Row>> {
    let setups = [Setup::tls(Server::HexzNbd).with_room_for_all(), Setup::tls(Server::Nbdkit)];
    let mut rows = Vec::new();
    for client in LoadClient::ALL {
        let samples = bench.in_turn(&setups, |_, running| {
            bench.warm(running)?;
            Sample::take_by(client, bench, &bench.sequential(), running)
        })?;
        let what = format!("256 KiB in order, warm, 16 in flight, {}", client.name());
        rows.push(row(&what, &samples, &setups[1]).aim(Aim::AtLeast(1.0)));
    }
    Ok(rows)
}

fn row(what: &str, samples: &[Option<Vec<Sample>>], other: &Setup) -> Row {
    super::random::row(what, samples, other, throughput).cpu(
        cpu_per_gib(samples[0].as_deref().unwrap_or_default()),
        samples[1].as_deref().map(cpu_per_gib),
    )
}
