//! What all cases have in common: what is served, who serves, how much is measured.

use std::cell::OnceCell;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::fio::Fio;
use crate::load::{Load, Order, Outcome, PLACE, Random, Until};
use crate::material::Material;
use crate::measure::{cpu_seconds, median, progress};
use crate::options::Options;
use crate::row::{Figure, Unit};
use crate::servers::{Running, Server, Setup, first_line};

pub(crate) struct Bench {
    pub(crate) material: Material,
    pub(crate) scale: Scale,
    /// The servers and what they say their versions are; none for those that are missing.
    servers: Vec<(Server, Option<String>)>,
    rounds: u32,
    fio: Fio,
    /// The reads a second that a warm gateway answers one client.
    pub(crate) warm_rate: OnceCell<f64>,
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    /// For loads that end by the clock.
    pub(crate) time: Duration,
    /// For those that end by count.
    pub(crate) reads: u64,
    /// Clients of the same snapshot.
    pub(crate) crowd: usize,
    /// Connections that do nothing.
    pub(crate) idle: usize,
}

const WHOLE: Scale = Scale { time: Duration::from_secs(4), reads: 100_000, crowd: 20, idle: 1000 };
const QUICK: Scale = Scale { time: Duration::from_millis(500), reads: 12_000, crowd: 3, idle: 100 };

/// Program that puts a load on a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LoadClient {
    /// fio's nbd engine, which sends each request on its own.
    Fio,
    /// This program, which sends requests together and takes little time itself.
    Own,
}

impl LoadClient {
    pub(crate) const ALL: [Self; 2] = [Self::Fio, Self::Own];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::Own => "own client",
        }
    }
}

/// What a load came to, and what it cost the server.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) outcome: Outcome,
    /// Seconds of processor time.
    pub(crate) cpu: f64,
}

impl Bench {
    /// Makes what isn't there yet, and looks who is installed.
    pub(crate) fn prepare(options: &Options) -> Result<Self> {
        let material = Material::make(&options.folder, &options.hexz_nbd, &options.hexz_peer)?;
        let mut servers = Vec::new();
        for server in Server::ALL {
            let version = server.version(&material);
            if let Err(error) = &version {
                eprintln!("without {}: {error:#}", server.name());
            }
            servers.push((server, version.ok()));
        }
        let scale = if options.quick { QUICK } else { WHOLE };
        let rounds = options.rounds;
        let fio = Fio::new(&material.pki)?;
        let bench = Self { material, scale, servers, rounds, fio, warm_rate: OnceCell::new() };
        ensure!(bench.has(Server::HexzNbd), "without the gateway there is nothing to measure");
        Ok(bench)
    }

    pub(crate) fn has(&self, server: Server) -> bool {
        self.servers.iter().any(|(other, version)| *other == server && version.is_some())
    }

    /// Each server and client with its version, or what is said of one that is missing.
    pub(crate) fn versions(&self) -> Vec<String> {
        let version = |(server, version): &(Server, Option<String>)| {
            let missing = || format!("{}: not installed", server.name());
            version.clone().unwrap_or_else(missing)
        };
        let clients = ["fio", "nbdcopy"].map(|client| {
            let version = first_line(Command::new(client).arg("--version"));
            version.unwrap_or_else(|_| format!("{client}: not installed"))
        });
        self.servers.iter().map(version).chain(clients).collect()
    }

    /// Reads the whole image through the gateway, and compares it byte by byte: no figure
    /// shall be for wrong bytes.
    pub(crate) fn verify(&self) -> Result<()> {
        progress("comparing what is served with the image");
        let running = self.start(&Setup::tls(Server::HexzNbd))?;
        let size = self.material.image.metadata()?.len();
        let load = Load {
            until: Until::End,
            places: (0..u32::try_from(size / PLACE)?).collect(),
            image: Some(Arc::new(File::open(&self.material.image)?)),
            ..self.sequential()
        };
        let outcome = load.run(&running.target).context("hexz-nbd serves the image")?;
        ensure!(outcome.bytes == size, "the gateway serves {} of {size} bytes", outcome.bytes);
        Ok(())
    }

    pub(crate) fn start(&self, setup: &Setup) -> Result<Running> {
        Running::start(setup, &self.material)
    }

    /// Measures on a fresh server of each kind in turn, A B A B, so that whatever else the
    /// machine does hits all of them. `None` for those that aren't installed.
    pub(crate) fn in_turn<T>(
        &self,
        setups: &[Setup],
        measure: impl Fn(u64, &Running) -> Result<T>,
    ) -> Result<Vec<Option<Vec<T>>>> {
        let mut all: Vec<Option<Vec<T>>> =
            setups.iter().map(|setup| self.has(setup.server).then(Vec::new)).collect();
        for round in 0..u64::from(self.rounds) {
            for (setup, samples) in setups.iter().zip(&mut all) {
                if let Some(samples) = samples {
                    progress(&format!("  round {}: {}", round + 1, setup.server.name()));
                    let running = self.start(setup)?;
                    let sample = measure(round, &running);
                    samples.push(sample.with_context(|| setup.server.name())?);
                }
            }
        }
        Ok(all)
    }

    /// The same for what is no server: `measure` is called once for each round.
    pub(crate) fn rounds<T>(&self, measure: impl Fn() -> Result<T>) -> Result<Vec<T>> {
        let numbered = |round| {
            progress(&format!("  round {}", round + 1));
            measure()
        };
        (0..self.rounds).map(numbered).collect()
    }

    /// Reads of 4 KiB at random, 32 in flight, of one client.
    pub(crate) fn random(&self, round: u64) -> Load {
        Load {
            connections: 1,
            in_flight: 32,
            length: 4096,
            order: Order::Random { seed: round },
            until: Until::After(self.scale.time),
            rate: None,
            urgent: false,
            places: Arc::clone(&self.material.places),
            image: None,
        }
    }

    /// Reads of 4 KiB, 32 in flight, of one client, of which each is the first of its block: they
    /// are 256 KiB apart, farther than most blocks are long, in random order.
    pub(crate) fn first_touch(&self, round: u64) -> Load {
        const APART: u64 = 256 * 1024 / PLACE;
        let mut places: Vec<u32> = self.material.places.to_vec();
        places.dedup_by_key(|place| u64::from(*place) / APART);
        self.each_once(places, round)
    }

    /// Reads of 4 KiB, 32 in flight, of one client, at so many places in random order, each once.
    pub(crate) fn places_once(&self, count: usize, round: u64) -> Load {
        let mut load = self.each_once(self.material.places.to_vec(), round);
        load.places = load.places.iter().copied().take(count).collect();
        load
    }

    fn each_once(&self, mut places: Vec<u32>, round: u64) -> Load {
        let mut random = Random::new(round, 0);
        for last in (1..places.len()).rev() {
            places.swap(last, random.below(last as u64 + 1) as usize);
        }
        let (order, until) = (Order::Sequential, Until::End);
        Load { order, until, places: places.into(), ..self.random(round) }
    }

    /// Reads of 256 KiB in order, 16 in flight, of one client, over all there is.
    pub(crate) fn sequential(&self) -> Load {
        Load {
            in_flight: 16,
            length: 256 * 1024,
            order: Order::Sequential,
            until: Until::End,
            ..self.random(0)
        }
    }

    /// Has the server read everything once.
    pub(crate) fn warm(&self, running: &Running) -> Result<()> {
        self.sequential().run(&running.target).context("warm the cache")?;
        Ok(())
    }
}

impl Sample {
    /// Puts a load on a server.
    pub(crate) fn take(load: &Load, running: &Running) -> Result<Self> {
        Self::during(running, || load.run(&running.target))
    }

    /// Has a client put a load on a server.
    pub(crate) fn take_by(
        client: LoadClient,
        bench: &Bench,
        load: &Load,
        running: &Running,
    ) -> Result<Self> {
        match client {
            LoadClient::Fio => Self::during(running, || bench.fio.run(load, &running.target)),
            LoadClient::Own => Self::take(load, running),
        }
    }

    fn during(running: &Running, load: impl FnOnce() -> Result<Outcome>) -> Result<Self> {
        let before = cpu_seconds(running.group)?;
        let outcome = load()?;
        Ok(Self { outcome, cpu: cpu_seconds(running.group)? - before })
    }
}

/// The median of one property of all samples.
pub(crate) fn median_of<T>(samples: &[T], property: impl Fn(&T) -> f64) -> f64 {
    median(&samples.iter().map(property).collect::<Vec<_>>())
}

pub(crate) fn reads_per_second(samples: &[Sample]) -> Figure {
    Unit::ReadsPerSecond.of(median_of(samples, |sample| sample.outcome.per_second()))
}

pub(crate) fn throughput(samples: &[Sample]) -> Figure {
    Unit::MibPerSecond.of(median_of(samples, |sample| sample.outcome.mib_per_second()))
}

/// Processor time of a server for each read.
pub(crate) fn cpu_per_read(samples: &[Sample]) -> Figure {
    let each = |sample: &Sample| sample.cpu / sample.outcome.reads as f64;
    Unit::SecondsEach.of(median_of(samples, each))
}

/// Processor time of a server for each GiB.
pub(crate) fn cpu_per_gib(samples: &[Sample]) -> Figure {
    Unit::SecondsPerGib.of(median_of(samples, |sample| sample.cpu / sample.outcome.gib()))
}

/// Runs another client to its end. `None` if it isn't installed.
pub(crate) fn run_client(command: &mut Command) -> Result<Option<Output>> {
    let output = match command.stdin(Stdio::null()).output() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        output => output.with_context(|| format!("run {command:?}"))?,
    };
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} fails: {}", why.trim());
    Ok(Some(output))
}

/// The URI of a server for programs that use libnbd.
pub(crate) fn uri(running: &Running, pki: &Path) -> String {
    let target = &running.target;
    let (port, export) = (target.address.port(), &target.export);
    match target.tls {
        None => format!("nbd://localhost:{port}/{export}"),
        Some(_) => {
            let pki = pki.display();
            format!("nbds://localhost:{port}/{export}?tls-certificates={pki}")
        }
    }
}
