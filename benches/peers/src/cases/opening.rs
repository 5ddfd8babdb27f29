//! An archive of 1 TiB.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use hexz_reader::{OpenOptions, Snapshot, StreamKind};

use super::big;
use crate::bench::{Bench, median_of};
use crate::load::{Load, Order, Until};
use crate::measure::memory;
use crate::row::{Aim, Row, Unit};
use crate::servers::{Server, Setup};

/// What an open archive costs that has 16 million blocks, and nobody reads more than one
/// of them.
pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    const MIB: f64 = 1024.0 * 1024.0;
    let [big, tiny] = ["terabyte.hxz", "tiny.hxz"].map(|name| bench.material.folder.join(name));
    big::write(&big, big::PAGES)?;
    big::write(&tiny, 1)?;
    // One more than what is counted: the first one warms the page cache.
    opening_time(&big)?;
    let times = bench.rounds(|| opening_time(&big))?;
    let memories = bench.rounds(|| {
        let [big, tiny] = [&big, &tiny].map(|archive| resident(bench, archive));
        Ok(big? - tiny?)
    })?;
    let time = Row::new(
        "opening an archive of 1 TiB and 16 million blocks",
        Unit::Seconds.of(median_of(&times, |time| *time)),
        "limit",
        Some(Unit::Seconds.of(0.05)),
    );
    let memory = Row::new(
        "serving it: memory beyond that for an archive of 256 MiB",
        Unit::Bytes.of(median_of(&memories, |memory| *memory)),
        "limit",
        Some(Unit::Bytes.of(16.0 * MIB)),
    );
    Ok([time, memory].map(|row| row.aim(Aim::AtMost(1.0))).into())
}

fn opening_time(archive: &Path) -> Result<f64> {
    let started = Instant::now();
    let snapshot = Snapshot::open(archive, &OpenOptions::default())?;
    let time = started.elapsed().as_secs_f64();
    let size = snapshot.size(StreamKind::Main);
    ensure!(size == big::size(big::PAGES), "the archive has {size} bytes");
    Ok(time)
}

/// The memory of a gateway that serves it and has answered a read.
fn resident(bench: &Bench, archive: &Path) -> Result<f64> {
    let running = bench.start(&Setup::tls(Server::HexzNbd).of(archive))?;
    let order = Order::Sequential;
    let load = Load { order, until: Until::Reads(1), places: [0].into(), ..bench.random(0) };
    load.run(&running.target)?;
    Ok(memory(running.group, "VmRSS")? as f64)
}
