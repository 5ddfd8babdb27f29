//! Connections that are made and left again.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::bench::{Bench, median_of};
use crate::client::{Connection, Target};
use crate::measure::cpu_seconds;
use crate::row::{Aim, Row, Unit};
use crate::servers::{Running, Server, Setup, client_tls};

/// Clients at once.
const THREADS: usize = 4;

struct Handshakes {
    per_second: f64,
    /// Processor time of the server for each, in seconds.
    cpu: f64,
    /// The share of those that resumed a session.
    resumed: f64,
}

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (resumption, what) in [
        (false, "TLS handshakes, up to choosing the export"),
        (true, "TLS handshakes of clients that would resume"),
    ] {
        let setups = [Setup::tls(Server::HexzNbd), Setup::tls(Server::Nbdkit)];
        let samples = bench.in_turn(&setups, |_, running| connect(bench, running, resumption))?;
        let rate = |samples: &Vec<Handshakes>| {
            Unit::HandshakesPerSecond.of(median_of(samples, |sample| sample.per_second))
        };
        let cpu = |samples: &Vec<Handshakes>| {
            Unit::SecondsEach.of(median_of(samples, |sample| sample.cpu))
        };
        let resumed = |samples: &Vec<Handshakes>| {
            let share = median_of(samples, |sample| sample.resumed);
            format!("{:.0} %", share * 100.0)
        };
        let [Some(ours), theirs] = [0, 1].map(|which| samples[which].as_ref()) else { continue };
        let row = Row::new(what, rate(ours), setups[1].server.name(), theirs.map(rate))
            .cpu(cpu(ours), theirs.map(cpu))
            .aim(Aim::AtLeast(1.0));
        rows.push(if resumption {
            let theirs = theirs.map_or("none".to_owned(), resumed);
            row.note(format!("resumed: {} of hexz-nbd's, {theirs} of nbdkit's", resumed(ours)))
        } else {
            row
        });
    }
    Ok(rows)
}

fn connect(bench: &Bench, running: &Running, resumption: bool) -> Result<Handshakes> {
    let before = cpu_seconds(running.group)?;
    let started = Instant::now();
    let clients: Vec<_> = (0..THREADS)
        .map(|_| {
            // Each client has its own memory of sessions, as programs have.
            let tls = Some(client_tls(&bench.material.pki, resumption)?);
            let target = Target { tls, ..running.target.clone() };
            let time = bench.scale.time;
            Ok(std::thread::spawn(move || connect_again_and_again(&target, time)))
        })
        .collect::<Result<_>>()?;
    let (mut all, mut resumed) = (0, 0);
    for client in clients {
        let done = client.join().map_err(|_| anyhow!("a client panicked"))??;
        all += done.0;
        resumed += done.1;
    }
    let per_second = f64::from(all) / started.elapsed().as_secs_f64();
    let cpu = (cpu_seconds(running.group)? - before) / f64::from(all);
    Ok(Handshakes { per_second, cpu, resumed: f64::from(resumed) / f64::from(all) })
}

/// How many handshakes there were, and how many of them resumed a session.
fn connect_again_and_again(target: &Target, time: Duration) -> Result<(u32, u32)> {
    let started = Instant::now();
    let (mut all, mut resumed) = (0, 0);
    while started.elapsed() < time {
        let mut connection = Connection::open(target)?;
        all += 1;
        resumed += u32::from(connection.was_resumed());
        connection.leave();
    }
    Ok((all, resumed))
}
