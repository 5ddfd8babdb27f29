//! What is measured, and the goals.

mod boot;
mod crowd;
mod link;
mod nbdkit;
mod outage;
mod random;
mod sequential;
mod throttled;
mod warm;

use std::fs::File;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use object_server::Link;

use crate::fio::Fio;
use crate::load::{Load, Order, PLACE, Random, Until};
use crate::material::Material;
use crate::options::Options;
use crate::process::{self, Process};
use crate::servers::first_line;
use crate::store::Nginx;
use crate::table::Row;

/// Bytes in a MiB.
const MIB: f64 = (1 << 20) as f64;

/// A group of measurements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    /// The proxy, which must not be what limits the others
    Link,
    /// nbdkit's curl plugin, for comparison
    Nbdkit,
    /// A copy of the whole image
    Sequential,
    /// Reads of 4 KiB at random places
    Random,
    /// Many clients that read one image
    Crowd,
    /// A machine that boots
    Boot,
    /// Reads from the cache
    Warm,
    /// A store that is down for a while
    Outage,
    /// A store that refuses 30 % of the requests
    Throttled,
}

impl Case {
    pub(crate) fn run(self, bench: &Bench) -> Result<Vec<Row>> {
        let mut rows = match self {
            Self::Link => link::run(bench),
            Self::Nbdkit => nbdkit::run(bench),
            Self::Sequential => sequential::run(bench),
            Self::Random => random::run(bench),
            Self::Crowd => crowd::run(bench),
            Self::Boot => boot::run(bench),
            Self::Warm => warm::run(bench),
            Self::Outage => outage::run(bench),
            Self::Throttled => throttled::run(bench),
        }?;
        // The benchmark's own image has other data where the recorded machine has read.
        let is_other_disk = self == Self::Boot && bench.options.boot_disk.is_none();
        if bench.options.local || is_other_disk {
            rows.iter_mut().for_each(|row| row.is_met = None);
        }
        Ok(rows)
    }
}

/// What all cases share.
pub(crate) struct Bench {
    options: Options,
    material: Material,
    nginx: Nginx,
    fio: Fio,
    reads_stores: bool,
}

impl Bench {
    /// Creates the image and the archive if they are missing, and starts the store.
    pub(crate) fn prepare(options: &Options) -> Result<Self> {
        let material = Material::make(&options.folder, &options.hexz_nbd, &options.hexz_peer)?;
        let help = Command::new(&options.hexz_nbd).arg("--help").output()?;
        let reads_stores = String::from_utf8_lossy(&help.stdout).contains("--store-endpoint");
        Ok(Self {
            options: options.clone(),
            nginx: Nginx::start(&material.folder)?,
            fio: Fio::new(&material.pki)?,
            material,
            reads_stores,
        })
    }

    /// Returns what the figures depend on, a line each.
    pub(crate) fn describe(&self) -> Vec<String> {
        let versions = [
            ("hexz-nbd", Command::new(&self.options.hexz_nbd).arg("--version")),
            ("nginx", Command::new("nginx").arg("-v")),
            ("nbdkit", Command::new("nbdkit").arg("--version")),
            ("nbdcopy", Command::new("nbdcopy").arg("--version")),
            ("fio", Command::new("fio").arg("--version")),
        ]
        .map(|(name, command)| {
            first_line(command).unwrap_or_else(|_| format!("{name}: not installed"))
        });
        let network = format!(
            "a round trip of {} ms to the store; limited links carry {} Mbit/s",
            self.options.round_trip, self.options.rate
        );
        let mut lines = vec![network];
        lines.extend(versions);
        if self.options.local {
            lines.push("the gateway reads a local file: its figures say nothing".to_owned());
        }
        lines
    }

    /// Returns the link to the store, whose rate may be limited.
    fn link(&self, is_limited: bool) -> Link {
        Link {
            one_way_delay: Duration::from_micros(self.options.round_trip * 500),
            bytes_per_second: is_limited.then(|| self.bytes_per_second()),
        }
    }

    fn bytes_per_second(&self) -> u64 {
        self.options.rate * 1_000_000 / 8
    }

    /// Starts the gateway on the archive at a URL.
    fn gateway(&self, url: &str, options: &[&str]) -> Result<Process> {
        if self.options.local {
            return self.local_gateway(options);
        }
        ensure!(
            self.reads_stores,
            "this hexz-nbd doesn't read from stores; --local tries the rest"
        );
        self.start(url, options)
    }

    /// Starts the gateway on the local archive.
    fn local_gateway(&self, options: &[&str]) -> Result<Process> {
        self.start(&self.material.archive.to_string_lossy(), options)
    }

    fn start(&self, archive: &str, options: &[&str]) -> Result<Process> {
        let mut all: Vec<String> = options.iter().map(ToString::to_string).collect();
        if self.reads_stores {
            all.extend(self.options.gateway_option.iter().cloned());
        }
        process::hexz_nbd(&self.options.hexz_nbd, archive, &all)
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.options.patience)
    }

    /// Returns the length of the archive, in bytes.
    fn archive_length(&self) -> Result<u64> {
        Ok(self.material.archive.metadata()?.len())
    }

    /// Returns the first of `parts` equal parts of the image's data.
    fn first_part(&self, parts: usize) -> Arc<[u32]> {
        let places = &self.material.places;
        places.iter().take((places.len() / parts).max(1)).copied().collect()
    }

    /// Returns the first place with data of each stretch of the image, in order.
    fn spread(&self, stretch: u64) -> Vec<u32> {
        let mut places = self.material.places.to_vec();
        places.dedup_by_key(|place| u64::from(*place) * PLACE / stretch);
        places
    }

    /// Returns reads of all of `places` in order, one after the other.
    fn one_by_one(&self, places: Vec<u32>) -> Load {
        let places = places.into();
        Load { in_flight: 1, length: 4096, places, ..self.sequential(1) }
    }

    /// Returns reads of 256 KiB of the first of `parts` equal parts of the data, in order.
    fn sequential(&self, parts: usize) -> Load {
        Load {
            connections: 1,
            in_flight: 16,
            length: 256 * 1024,
            order: Order::Sequential,
            until: Until::End,
            rate: None,
            urgent: false,
            places: self.first_part(parts),
            image: None,
        }
    }

    /// The same, where every byte is compared with the image.
    fn compared(&self, parts: usize) -> Result<Load> {
        let image = Some(Arc::new(File::open(&self.material.image)?));
        Ok(Load { image, ..self.sequential(parts) })
    }
}

/// Shuffles places, in the same way each time.
fn shuffled(mut places: Vec<u32>) -> Vec<u32> {
    let mut random = Random::new(1, 0);
    for last in (1..places.len()).rev() {
        places.swap(last, random.below(last as u64 + 1) as usize);
    }
    places
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.1} ms", seconds * 1e3)
}
