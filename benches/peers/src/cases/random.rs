//! Reads of 4 KiB at random places.

use anyhow::Result;

use crate::bench::{Bench, Sample, cpu_per_read, reads_per_second};
use crate::load::{Load, Until};
use crate::row::{Aim, Row, grouped};
use crate::servers::{Server, Setup};

/// All of it is in memory: what counts is the way from a request to its reply.
pub(super) fn warm(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (connections, what) in [
        (1, "4 KiB at random, warm, 32 in flight"),
        (4, "4 KiB at random, warm, 4 times 32 in flight"),
    ] {
        let setups = [Setup::tls(Server::HexzNbd).with_room_for_all(), Setup::tls(Server::Nbdkit)];
        let samples = bench.in_turn(&setups, |round, running| {
            bench.warm(running)?;
            Sample::take(&Load { connections, ..bench.random(round) }, running)
        })?;
        let row = row(what, &samples, &setups[1], reads_per_second);
        if connections == 1
            && let Some(ours) = row.ours
        {
            bench.warm_rate.get_or_init(|| ours.value);
        }
        rows.push(row.aim(Aim::AtLeast(1.5)));
        let what = format!("{what}: processor time of the server");
        rows.push(row_of_cpu(&what, &samples, &setups[1]).aim(Aim::AtMost(1.0)));
    }
    Ok(rows)
}

/// Nothing is in memory at first but the files themselves: nearly every early read decodes
/// a whole block, and every later one finds more of them decoded.
pub(super) fn cold(bench: &Bench) -> Result<Vec<Row>> {
    let few = bench.scale.reads / 10;
    let many = bench.scale.reads;
    let cached = |setup: Setup| setup.with_room_for_all();
    let mut rows = Vec::new();
    for (what, reads, setup, aim) in [
        ("4 KiB at random, cold", many, cached as fn(Setup) -> Setup, true),
        ("4 KiB at random, cold", few, cached, false),
        ("4 KiB at random, cache of 256 MiB", many, |setup| setup, false),
    ] {
        let setups = [Setup::tls, Setup::plain]
            .map(|transport| [setup(transport(Server::HexzNbd)), transport(Server::QemuNbd)]);
        let setups: Vec<Setup> = setups.into_iter().flatten().collect();
        let samples = bench.in_turn(&setups, |round, running| {
            Sample::take(&Load { until: Until::Reads(reads), ..bench.random(round) }, running)
        })?;
        let [tls, plain] = [&samples[..2], &samples[2..]];
        let what = format!("{what}, {} reads", grouped(reads as f64));
        let tls = row(&what, tls, &setups[1], reads_per_second);
        let plain = row(&format!("{what}, no TLS"), plain, &setups[3], reads_per_second);
        rows.extend(if aim {
            [tls.aim(Aim::AtLeast(5.0)), plain.aim(Aim::AtLeast(3.0))]
        } else {
            [tls, plain]
        });
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
    let what = "4 KiB at random, warm, 32 in flight, no TLS";
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
    figure: fn(&[Sample]) -> crate::row::Figure,
) -> Row {
    let [ours, theirs] = [0, 1].map(|which| samples[which].as_deref());
    let ours = ours.unwrap_or_default();
    Row::new(what, figure(ours), other.server.name(), theirs.map(figure))
        .cpu(cpu_per_read(ours), theirs.map(cpu_per_read))
}

fn row_of_cpu(what: &str, samples: &[Option<Vec<Sample>>], other: &Setup) -> Row {
    let [ours, theirs] = [0, 1].map(|which| samples[which].as_deref());
    let ours = cpu_per_read(ours.unwrap_or_default());
    Row::new(what, ours, other.server.name(), theirs.map(cpu_per_read))
}
