//! The reads of a machine that boots, one after another, as fast as they are answered.
//!
//! `boot.trace` was recorded by `record-boot.sh`. A machine computes between its reads; here it
//! doesn't, so what is measured is the time for which a machine waits for its disk.

use std::collections::HashSet;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use hexz_exports::Trace;
use hexz_reader::{Lookup, OpenOptions, Snapshot, StreamKind};
use nbd_server::client;
use object_server::DelayProxy;
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::{Bench, MIB};
use crate::process::Process;
use crate::store::{Nginx, Traffic, url};
use crate::table::Row;

const TRACE: &str = include_str!("../../boot.trace");
/// Maximum size of the machine's reads: that of Linux's readahead.
const READ: u64 = 128 * 1024;

/// Multiple of the stored bytes that the machine reads.
const BYTES: f64 = 1.5;
/// Multiple of the speed without a trace.
const SPEED: f64 = 3.0;

/// A boot from a gateway.
struct Boot {
    seconds: f64,
    traffic: Traffic,
}

/// The disk, its archive in a store, and what the machine reads of it.
struct Machine<'a> {
    bench: &'a Bench,
    folder: TempDir,
    nginx: Nginx,
    image: PathBuf,
    trace: Trace,
}

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let machine = Machine::new(bench)?;
    let stored = machine.stored_bytes()? as f64;
    let cold = machine.boot_from(&machine.link()?, &[])?;
    fs::write(machine.folder.path().join("disk.hxz.trace"), TRACE)?;
    let traced = machine.boot_from(&machine.link()?, &[])?;

    let cache = tempfile::tempdir()?;
    let folder = cache.path().to_string_lossy().into_owned();
    let options = ["--disk-cache", &folder, "--disk-cache-size", "2GiB"];
    // Another URL would be another archive.
    let proxy = machine.link()?;
    let gateway = machine.gateway(&proxy, &options)?;
    let (first, second) = (machine.boot(&gateway)?, machine.boot(&gateway)?);
    drop(gateway);
    let restarted = machine.boot_from(&proxy, &options)?;

    let row = |what: &str, boot: &Boot| {
        let Traffic { requests, bytes } = boot.traffic;
        let what = format!("boot of {}: {what}", machine.describe());
        Row::new(what, format!("{:.2} s", boot.seconds))
            .note(format!("{requests} requests, {:.1} MiB", bytes as f64 / MIB))
    };
    let within = |boot: &Boot| boot.traffic.bytes as f64 <= BYTES * stored;
    let needed = format!("{:.1} MiB", stored / MIB);
    let bytes_goal = format!("<= {BYTES} x the stored bytes");
    let speedup = cold.seconds / traced.seconds;
    Ok(vec![
        row("cold", &cold).compared("stored", &needed).goal(&bytes_goal, within(&cold)),
        row("cold, with a trace", &traced)
            .compared("without", format!("{:.2} s, {speedup:.1} x", cold.seconds))
            .goal(
                format!(">= {SPEED} x as fast, {bytes_goal}"),
                speedup >= SPEED && within(&traced),
            ),
        row("first time, with a disk cache and a trace", &first),
        row("second time", &second).goal("0 bytes", second.traffic.bytes == 0),
        row("after a restart", &restarted).goal("0 bytes", restarted.traffic.bytes == 0),
    ])
}

impl<'a> Machine<'a> {
    fn new(bench: &'a Bench) -> Result<Self> {
        let (image, archive) = match &bench.options.boot_disk {
            Some(folder) => (folder.join("disk.raw"), folder.join("disk.hxz")),
            None => (bench.material.image.clone(), bench.material.archive.clone()),
        };
        let folder = tempfile::tempdir()?;
        let archive = fs::canonicalize(&archive).with_context(|| format!("{archive:?}"))?;
        symlink(archive, folder.path().join("disk.hxz"))?;
        let nginx = Nginx::start(folder.path())?;
        Ok(Self { bench, folder, nginx, image, trace: TRACE.parse()? })
    }

    fn describe(&self) -> &'static str {
        match self.bench.options.boot_disk {
            Some(_) => "its own disk",
            None => "the benchmark's image",
        }
    }

    /// Returns the bytes in the archive from which the machine's reads are decoded.
    fn stored_bytes(&self) -> Result<u64> {
        let archive = fs::canonicalize(self.folder.path().join("disk.hxz"))?;
        let snapshot = Snapshot::open(&archive, &OpenOptions::default())?;
        let mut places = HashSet::new();
        for range in &self.trace.ranges {
            let mut at = range.offset;
            while at < range.offset + range.length {
                let block = snapshot.locate(StreamKind::Main, at)?;
                at = block.end();
                // The index page is in memory since the block was located.
                if let Lookup::Found(stored) = snapshot.stored_block(&block)? {
                    places.insert((stored.offset(), stored.length()));
                }
            }
        }
        Ok(places.iter().map(|(_, length)| u64::from(*length)).sum())
    }

    fn link(&self) -> Result<DelayProxy> {
        self.nginx.behind(self.bench.link(true))
    }

    fn gateway(&self, proxy: &DelayProxy, options: &[&str]) -> Result<Process> {
        let options = [&["--cache-size", "1GiB"], options].concat();
        self.bench.gateway(&url(proxy.address(), "disk.hxz"), &options)
    }

    /// Boots from a gateway that has just been started.
    fn boot_from(&self, proxy: &DelayProxy, options: &[&str]) -> Result<Boot> {
        let before = self.nginx.traffic()?;
        let gateway = self.gateway(proxy, options)?;
        let Boot { seconds, .. } = self.boot(&gateway)?;
        drop(gateway);
        // What it reads at the start counts, too.
        Ok(Boot { seconds, traffic: self.nginx.traffic()?.since(before) })
    }

    fn boot(&self, gateway: &Process) -> Result<Boot> {
        let (started, before) = (Instant::now(), self.nginx.traffic()?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(read(gateway.address(), &self.trace, &self.image))?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(Boot { seconds, traffic: self.nginx.traffic()?.since(before) })
    }
}

/// Reads the ranges of a trace, and compares them with the image.
async fn read(address: SocketAddr, trace: &Trace, image: &Path) -> Result<()> {
    let image = File::open(image)?;
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    client::greet(&mut stream).await?;
    let mut transmission = client::go(stream, "").await?;
    let mut wanted = Vec::new();
    for range in &trace.ranges {
        let end = range.offset + range.length;
        for offset in (range.offset..end).step_by(READ as usize) {
            let length = READ.min(end - offset);
            let bytes = transmission.read(offset, u32::try_from(length)?).await?;
            wanted.resize(bytes.len(), 0);
            image.read_exact_at(&mut wanted, offset)?;
            ensure!(bytes == wanted, "other bytes at {offset}");
        }
    }
    transmission.disconnect().await?;
    Ok(())
}
