//! Many clients that read the same at the same time, as when machines start together.

use anyhow::{Context, Result};

use crate::bench::{Bench, median_of};
use crate::load::{Load, Order};
use crate::row::{Aim, Row, Unit};
use crate::servers::{Running, Server, Setup};

/// Seconds that it took, and blocks that were decoded for it.
struct Read {
    seconds: f64,
    decoded: f64,
}

/// One round: one client and all of them, cold and warm.
struct Round {
    one: Read,
    crowd: Read,
    one_warm: f64,
    crowd_warm: f64,
}

/// There is room for all blocks: what is measured is that nobody decodes what somebody else
/// is decoding, not how long a cache keeps what the slowest client is still to read.
pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let crowd = bench.scale.crowd;
    let rounds = bench.rounds(|| {
        let [one, one_warm] = cold_then_warm(bench, 1)?;
        let [crowd, crowd_warm] = cold_then_warm(bench, crowd)?;
        Ok(Round { one, crowd, one_warm: one_warm.seconds, crowd_warm: crowd_warm.seconds })
    })?;
    let decoded = Row::new(
        format!("{crowd} clients read all of it at once: blocks decoded"),
        Unit::Blocks.of(median_of(&rounds, |round| round.crowd.decoded)),
        "one client",
        Some(Unit::Blocks.of(median_of(&rounds, |round| round.one.decoded))),
    );
    // What sending it to so many costs, which is no matter of decoding.
    let sockets = |round: &Round| round.crowd_warm - round.one_warm;
    let seconds = Row::new(
        format!("{crowd} clients read all of it at once, cold"),
        Unit::Seconds.of(median_of(&rounds, |round| round.crowd.seconds)),
        "one client, and sending it to the others",
        Some(Unit::Seconds.of(median_of(&rounds, |round| round.one.seconds + sockets(round)))),
    );
    let note = format!(
        "one client cold {:.2} s, warm {:.2} s; {crowd} warm {:.2} s",
        median_of(&rounds, |round| round.one.seconds),
        median_of(&rounds, |round| round.one_warm),
        median_of(&rounds, |round| round.crowd_warm),
    );
    Ok(vec![decoded.aim(Aim::AtMost(1.0)), seconds.aim(Aim::AtMost(1.3)).note(note)])
}

/// So many clients read everything on a fresh server, and on another one that has it all.
fn cold_then_warm(bench: &Bench, clients: usize) -> Result<[Read; 2]> {
    let setup = Setup::tls(Server::HexzNbd).with_room_for_all();
    let load = Load {
        connections: clients,
        in_flight: 4,
        order: Order::EachSequential,
        ..bench.sequential()
    };
    let read = |running: Running| -> Result<Read> {
        let seconds = load.run(&running.target)?.seconds;
        let decoded = decoded(&running.end(&bench.material)?)?;
        Ok(Read { seconds, decoded })
    };
    let cold = read(bench.start(&setup)?)?;
    let running = bench.start(&setup)?;
    bench.warm(&running)?;
    Ok([cold, read(running)?])
}

/// What the gateway says at its end.
fn decoded(log: &str) -> Result<f64> {
    let number = log.rsplit_once("decoded=").map(|(_, rest)| {
        rest.split(|letter: char| !letter.is_ascii_digit()).next().unwrap_or_default()
    });
    let number = number.context("the gateway doesn't log decoded=N when it ends")?;
    number.parse().with_context(|| format!("decoded={number}"))
}
