//! Reads of 4 KiB in random order.

use anyhow::Result;

use crate::bench::{Bench, LoadClient, Sample, cpu_per_read, reads_per_second};
use crate::load::{Load, Until};
use crate::row::{Aim, Figure, Row, grouped};
use crate::servers::{Server, Setup, Transport};

/// Everything is in memory: what is measured is the path from a request to its reply.
pub(super) fn warm(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for transport in [Transport::Tls, Transport::Plain] {
        for (connections, in_flight, faster, cheaper) in
            [(1, 32, 1.5, 0.5), (4, 32, 1.5, 1.0), (1, 1, 1.0, 0.8)]
        {
            let setups = [Server::HexzNbd, Server::Nbdkit]
                .map(|server| Setup::new(server, transport).with_room_for_all());
            let samples = bench.in_turn(&setups, |round, running| {
                bench.warm(running)?;
                let load = Load { connections, in_flight, ..bench.random(round) };
                let take = |client| Sample::take_by(client, bench, &load, running);
                LoadClient::ALL.map(take).into_iter().collect::<Result<Vec<_>>>()
            })?;
            for (number, client) in LoadClient::ALL.into_iter().enumerate() {
                let samples: Vec<Option<Vec<Sample>>> = samples
                    .iter()
                    .map(|of_server| {
                        let of_client = |both: &Vec<Sample>| both[number].clone();
                        of_server.as_ref().map(|rounds| rounds.iter().map(of_client).collect())
                    })
                    .collect();
                let what = format!(
                    "4 KiB at random, warm, {connections} × {in_flight} in flight{}, {}",
                    transport.suffix(),
                    client.name()
                );
                let rate = row(&what, &samples, &setups[1], reads_per_second);
                let cpu = row_of_cpu(&what, &samples, &setups[1]);
                if (client, connections, in_flight) == (LoadClient::Own, 1, 32)
                    && let Some(ours) = rate.ours
                {
                    bench.warm_rate.get_or_init(|| ours.value);
                }
                rows.extend(match client {
                    LoadClient::Fio => {
                        [rate.aim(Aim::AtLeast(faster)), cpu.aim(Aim::AtMost(cheaper))]
                    }
                    LoadClient::Own => [rate, cpu],
                });
            }
        }
    }
    Ok(rows)
}

/// Only the files themselves are in memory. In the first rows each place is read once, in the next
/// ones each block; in the others, more and more reads find their block decoded.
pub(super) fn cold(bench: &Bench) -> Result<Vec<Row>> {
    type ColdCase<'a> = (String, &'a dyn Fn(u64) -> Load, fn(Setup) -> Setup);
    let mut rows = Vec::new();
    let reads = bench.scale.reads;
    let repeated = |round| Load { until: Until::Reads(reads), ..bench.random(round) };
    let places = bench.scale.reads as usize / 4;
    let first_of_place = |round| bench.places_once(places, round);
    let first_of_block = |round| bench.first_touch(round);
    let cases: [ColdCase<'_>; 4] = [
        (format!("first touch, {} places", grouped(places as f64)), &first_of_place, |setup| setup),
        ("first touch, each in another block".to_owned(), &first_of_block, |setup| setup),
        (
            format!("from cold, {} reads", grouped(reads as f64)),
            &repeated,
            Setup::with_room_for_all,
        ),
        (
            format!("from cold, {} reads, cache of 256 MiB", grouped(reads as f64)),
            &repeated,
            |setup| setup,
        ),
    ];
    for (number, (name, load, setup)) in cases.into_iter().enumerate() {
        for (transport, faster) in [(Transport::Tls, 1.3), (Transport::Plain, 1.1)] {
            let setups = [Server::HexzNbd, Server::QemuNbd]
                .map(|server| setup(Setup::new(server, transport)));
            for client in LoadClient::ALL {
                let samples = bench.in_turn(&setups, |round, running| {
                    Sample::take_by(client, bench, &load(round), running)
                })?;
                let what = format!(
                    "4 KiB at random, {name}, 32 in flight{}, {}",
                    transport.suffix(),
                    client.name()
                );
                let rate = row(&what, &samples, &setups[1], reads_per_second);
                let cpu = row_of_cpu(&what, &samples, &setups[1]);
                rows.extend(match (client, number) {
                    (LoadClient::Fio, 0) => {
                        [rate.aim(Aim::AtLeast(faster)), cpu.aim(Aim::AtMost(1.0))]
                    }
                    _ => [rate, cpu],
                });
            }
        }
    }
    Ok(rows)
}

/// It knows no TLS.
pub(super) fn against_hexz_server(bench: &Bench) -> Result<Vec<Row>> {
    let setups =
        [Setup::plain(Server::HexzNbd).with_room_for_all(), Setup::plain(Server::HexzServer)];
    let samples = bench.in_turn(&setups, |round, running| {
        // The other one keeps nothing that was read.
        if running.server == Server::HexzNbd {
            bench.warm(running)?;
        }
        Sample::take(&bench.random(round), running)
    })?;
    let what = "4 KiB at random, warm, 32 in flight, no TLS, own client";
    let row = row(what, &samples, &setups[1], reads_per_second).aim(Aim::AtLeast(4.0));
    Ok(vec![row.note(
        "hexz-server answers one request after the other, decodes a block for each, and never \
         sets TCP_NODELAY",
    )])
}

/// The first sample is the gateway's, the second the other one's.
pub(super) fn row(
    what: &str,
    samples: &[Option<Vec<Sample>>],
    other: &Setup,
    figure: fn(&[Sample]) -> Figure,
) -> Row {
    let [ours, theirs] = [0, 1].map(|which| samples[which].as_deref());
    let ours = ours.unwrap_or_default();
    Row::new(what, figure(ours), other.server.name(), theirs.map(figure))
        .cpu(cpu_per_read(ours), theirs.map(cpu_per_read))
}

fn row_of_cpu(what: &str, samples: &[Option<Vec<Sample>>], other: &Setup) -> Row {
    let [ours, theirs] = [0, 1].map(|which| samples[which].as_deref());
    let ours = cpu_per_read(ours.unwrap_or_default());
    let what = format!("{what}: processor time of the server");
    Row::new(what, ours, other.server.name(), theirs.map(cpu_per_read))
}
