//! Other servers and clients, for orientation: nothing is aimed at.

use std::process::Command;
use std::time::Instant;

use anyhow::Result;

use crate::bench::{Bench, Sample, median_of, reads_per_second, run_client, uri};
use crate::row::{Row, Unit};
use crate::servers::{Running, Server, Setup};

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (transport, what) in [
        (Setup::tls as fn(Server) -> Setup, "4 KiB at random, warm, 32 in flight"),
        (Setup::plain, "4 KiB at random, warm, 32 in flight, no TLS"),
    ] {
        let setups = [transport(Server::HexzNbd).with_room_for_all(), transport(Server::NbdServer)];
        let samples = bench.in_turn(&setups, |round, running| {
            bench.warm(running)?;
            Sample::take(&bench.random(round), running)
        })?;
        rows.push(super::random::row(what, &samples, &setups[1], reads_per_second));
    }
    let setups = [Setup::tls(Server::HexzNbd), Setup::tls(Server::Nbdkit)];
    let seconds = bench.in_turn(&setups, |_, running| copy(bench, running))?;
    let figure = |seconds: &Vec<Option<f64>>| {
        let all: Option<Vec<f64>> = seconds.iter().copied().collect();
        all.map(|all| Unit::Seconds.of(median_of(&all, |seconds| *seconds)))
    };
    if let [Some(ours), theirs] = seconds.as_slice()
        && let Some(ours) = figure(ours)
    {
        let what = "nbdcopy of the whole image, cold";
        let theirs = theirs.as_ref().and_then(figure);
        rows.push(Row::new(what, ours, setups[1].server.name(), theirs));
    }
    Ok(rows)
}

/// Seconds that nbdcopy takes for all of it, into nothing; `None` if it isn't installed.
fn copy(bench: &Bench, running: &Running) -> Result<Option<f64>> {
    let started = Instant::now();
    let uri = uri(running, &bench.material.pki);
    let output = run_client(Command::new("nbdcopy").arg(uri).arg("null:"))?;
    Ok(output.map(|_| started.elapsed().as_secs_f64()))
}
