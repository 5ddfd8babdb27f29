//! Other servers and clients, for orientation: nothing is aimed at.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::bench::{Bench, Sample, median_of, reads_per_second, uri};
use crate::row::{Row, Unit};
use crate::servers::{Running, Server, Setup};

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (transport, what) in [
        (Setup::tls as fn(Server) -> Setup, "4 KiB at random, warm, 32 in flight"),
        (Setup::plain, "4 KiB at random, warm, 32 in flight, without TLS"),
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
    let figure = |seconds: &Vec<f64>| Unit::Seconds.of(median_of(seconds, |seconds| *seconds));
    if let [Some(ours), theirs] = seconds.as_slice() {
        let what = "nbdcopy of the whole image, cold";
        let name = setups[1].server.name();
        rows.push(Row::new(what, figure(ours), name, theirs.as_ref().map(figure)));
    }
    Ok(rows)
}

/// Seconds that nbdcopy takes for all of it, into nothing.
fn copy(bench: &Bench, running: &Running) -> Result<f64> {
    let started = Instant::now();
    let output = Command::new("nbdcopy")
        .arg(uri(running, &bench.material.pki))
        .arg("null:")
        .stdin(Stdio::null())
        .output()
        .context("run nbdcopy")?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "nbdcopy fails: {}", why.trim());
    Ok(started.elapsed().as_secs_f64())
}
