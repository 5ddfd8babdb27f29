//! Load: reads of one size, so many in flight, at random places or one after the other.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use hdrhistogram::Histogram;

use crate::client::{Connection, Target};
use crate::reader::Reader;

/// What is read, and how.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) connections: usize,
    /// Requests of one connection that are under way at once.
    pub(crate) in_flight: usize,
    /// The length of a read, in bytes: [`PLACE`], or a multiple of it.
    pub(crate) length: u32,
    pub(crate) order: Order,
    pub(crate) until: Until,
    /// Reads a second over all connections; without it, as many as the server answers.
    pub(crate) rate: Option<f64>,
    /// Whether its threads shall run before all others, so that it measures how long the
    /// server takes and not how long it waits for a processor itself.
    pub(crate) urgent: bool,
    /// Where to read, in units of [`PLACE`]: where there is data, mostly, as zeros would flatter
    /// who knows of them.
    pub(crate) places: Arc<[u32]>,
    /// What every answer is compared with.
    pub(crate) image: Option<Arc<File>>,
}

/// The granularity at which data is told from zeros, in bytes.
pub(crate) const PLACE: u64 = 4096;

/// Where reads are, at multiples of their length.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    /// At random; one seed gives one order.
    Random { seed: u64 },
    /// One after the other. Connections share the work.
    Sequential,
    /// One after the other, each connection all of it.
    EachSequential,
}

/// When it ends.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    After(Duration),
    /// So many reads over all connections.
    Reads(u64),
    /// Once everything has been read.
    End,
}

/// What came of it.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) reads: u64,
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    /// Nanoseconds from when a request was due until its answer was there.
    pub(crate) latency: Histogram<u64>,
}

impl Outcome {
    pub(crate) fn per_second(&self) -> f64 {
        self.reads as f64 / self.seconds
    }

    pub(crate) fn mib_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1024.0 / 1024.0
    }

    pub(crate) fn gib(&self) -> f64 {
        self.bytes as f64 / (1 << 30) as f64
    }

    /// Seconds that this part of all reads took at the most.
    pub(crate) fn latency(&self, part: f64) -> f64 {
        self.latency.value_at_quantile(part) as f64 / 1e9
    }
}

impl Load {
    /// Puts the load on a server.
    pub(crate) fn run(&self, target: &Target) -> Result<Outcome> {
        let offsets = self.offsets();
        ensure!(!offsets.is_empty(), "there is nothing to read");
        let shared = Arc::new(AtomicU64::new(0));
        let readers: Vec<_> = (0..self.connections)
            .map(|number| {
                let connection = Connection::open(target)?;
                let next = match self.order {
                    Order::EachSequential => Arc::default(),
                    _ => Arc::clone(&shared),
                };
                Reader::new(self, connection, number, next, Arc::clone(&offsets))
            })
            .collect::<Result<_>>()?;
        let started = Instant::now();
        let threads: Vec<_> =
            readers.into_iter().map(|reader| std::thread::spawn(|| reader.run())).collect();
        let mut outcome = Outcome { reads: 0, bytes: 0, seconds: 0.0, latency: histogram()? };
        for thread in threads {
            let latency = thread.join().map_err(|_| anyhow!("a reader panicked"))??;
            outcome.reads += latency.len();
            outcome.latency.add(&latency)?;
        }
        outcome.seconds = started.elapsed().as_secs_f64();
        outcome.bytes = outcome.reads * u64::from(self.length);
        Ok(outcome)
    }

    /// Returns the offsets of all reads in order, in bytes; `None` for a load that ends by the
    /// clock.
    pub(crate) fn planned_reads(&self) -> Option<Vec<u64>> {
        let offsets = self.offsets();
        match (self.until, self.order) {
            (Until::After(_), _) => None,
            (Until::Reads(reads), Order::Random { seed }) => {
                let mut random = Random::new(seed, 0);
                let mut offset = || offsets[random.below(offsets.len() as u64) as usize];
                Some((0..reads).map(|_| offset()).collect())
            }
            (Until::Reads(reads), _) => {
                Some(offsets.iter().copied().cycle().take(reads as usize).collect())
            }
            (Until::End, _) => Some(offsets.to_vec()),
        }
    }

    /// Where reads may begin, in bytes.
    pub(crate) fn offsets(&self) -> Arc<[u64]> {
        let length = u64::from(self.length);
        let mut offsets: Vec<u64> =
            self.places.iter().map(|&place| u64::from(place) * PLACE / length * length).collect();
        offsets.dedup();
        offsets.into()
    }
}

/// xorshift64*: fast, and the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    /// Creates the generator of one of several connections.
    pub(crate) fn new(seed: u64, connection: usize) -> Self {
        Self((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (connection as u64 + 1))
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// Latencies of up to a minute, in nanoseconds, to three digits.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    const MINUTE: u64 = 60_000_000_000;
    Ok(Histogram::new_with_bounds(1, MINUTE, 3)?)
}
