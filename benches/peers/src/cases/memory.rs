//! How much memory the gateway needs.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::bench::{Bench, median_of};
use crate::client::{Connection, Target};
use crate::load::{Load, Order, PLACE, Until};
use crate::measure::{allow_open_files, memory};
use crate::reader::read_request;
use crate::row::{Aim, Row, Unit};
use crate::servers::{Running, Server, Setup};

const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * KIB;

/// Connections that do nothing.
pub(super) fn idle(bench: &Bench) -> Result<Vec<Row>> {
    let count = bench.scale.idle;
    // Those of the process that measures, which the server inherits.
    allow_open_files(count as u64 + 1000)?;
    let room = ["--max-connections", "2000", "--max-connections-per-address", "2000"];
    let setup = Setup::tls(Server::HexzNbd).with(&room);
    let each = bench.in_turn(&[setup], |_, running| {
        // What the first connections of a process cost isn't the price of the others.
        let mut open = connect(&running.target, 10)?;
        let before = memory(running.group, "VmRSS")?;
        open.extend(connect(&running.target, count)?);
        std::thread::sleep(Duration::from_millis(500));
        let after = memory(running.group, "VmRSS")?;
        Ok(after.saturating_sub(before) as f64 / count as f64)
    })?;
    let each = each.into_iter().next().flatten().context("the gateway is missing")?;
    let row = Row::new(
        format!("{count} idle TLS connections: memory of each"),
        Unit::Bytes.of(median_of(&each, |each| *each)),
        "limit",
        Some(Unit::Bytes.of(64.0 * KIB)),
    );
    Ok(vec![row.aim(Aim::AtMost(1.0))])
}

/// One after the other: only so many of one address may be in their handshake at once.
fn connect(target: &Target, count: usize) -> Result<Vec<Connection>> {
    (0..count).map(|_| Connection::open(target)).collect()
}

/// Clients of each kind; together as many as one address may have.
const SLOW: usize = 16;
const RANDOM: usize = 24;
const SEQUENTIAL: usize = 24;

/// Who asks for much and takes little, who reads here and there, and who reads it all.
pub(super) fn heavy(bench: &Bench) -> Result<Vec<Row>> {
    const CACHE: f64 = 256.0 * MIB;
    let peaks = bench.in_turn(&[Setup::tls(Server::HexzNbd)], |round, running| {
        put_on(bench, round, running)?;
        Ok(memory(running.group, "VmHWM")? as f64)
    })?;
    let peaks = peaks.into_iter().next().flatten().context("the gateway is missing")?;
    let row = Row::new(
        format!(
            "peak of memory: {SLOW} slow clients with reads of 32 MiB, {RANDOM} at random, \
             {SEQUENTIAL} in order"
        ),
        Unit::Bytes.of(median_of(&peaks, |peak| *peak)),
        "the cache of 256 MiB, and 64 MiB",
        Some(Unit::Bytes.of(CACHE + 64.0 * MIB)),
    );
    Ok(vec![row.aim(Aim::AtMost(1.0))])
}

fn put_on(bench: &Bench, round: u64, running: &Running) -> Result<()> {
    // Longer than usual: the cache is to be full, and emptied and filled again.
    let time = 3 * bench.scale.time;
    let until = Until::After(time);
    let mut clients = Vec::new();
    for _ in 0..SLOW {
        let (target, places) = (running.target.clone(), full_places(&bench.material.places));
        clients.push(std::thread::spawn(move || read_slowly(&target, &places, time)));
    }
    let random = Load { connections: RANDOM, until, ..bench.random(round) };
    // Each on its own, so that they decode what the cache doesn't have.
    let order = Order::EachSequential;
    let sequential = Load { connections: SEQUENTIAL, until, order, ..bench.sequential() };
    for load in [random, sequential] {
        let target = running.target.clone();
        clients.push(std::thread::spawn(move || load.run(&target).map(|_| ())));
    }
    for client in clients {
        client.join().map_err(|_| anyhow!("a client panicked"))??;
    }
    Ok(())
}

/// What slow clients ask for at once, in bytes, and how often.
const LENGTH: u32 = 32 << 20;
const REQUESTS: usize = 8;

/// Where most of the data is, at multiples of [`LENGTH`], in bytes.
fn full_places(places: &[u32]) -> Vec<u64> {
    let number = |place: &u32| u64::from(*place) * PLACE / u64::from(LENGTH);
    let mut by_data: Vec<(usize, u64)> = places
        .chunk_by(|one, other| number(one) == number(other))
        .filter_map(|chunk| Some((chunk.len(), number(chunk.first()?) * u64::from(LENGTH))))
        .collect();
    by_data.sort_unstable_by(|one, other| other.cmp(one));
    by_data.into_iter().map(|(_, offset)| offset).take(REQUESTS).collect()
}

/// Asks for 256 MiB and reads some 5 MiB of it in a second: enough not to be in anybody's
/// way for so long that the gateway closes the connection.
fn read_slowly(target: &Target, places: &[u64], time: Duration) -> Result<()> {
    let mut connection = Connection::open(target)?;
    for (cookie, place) in (0..).zip(places) {
        connection.send(&read_request(cookie, *place, LENGTH))?;
    }
    let started = Instant::now();
    while started.elapsed() < time {
        connection.receive()?;
        connection.take(connection.here().len());
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
