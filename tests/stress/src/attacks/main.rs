//! Measures what an honest reader notices of hostile archives and clients.
//!
//! For each attack the program is started anew. An honest client reads alone for a while, then
//! beside the attack: the time of uncached reads and the 99th percentile of cached reads may
//! grow by a factor of [`MAX_RATIO`] at most. The program's memory has to stay within its
//! budget, and soon after the attackers have left it may not be busy any more.
//!
//! The exit code is 1 if anything of that doesn't hold. It isn't part of the tests: it takes
//! minutes, and a machine that does nothing else.

#[path = "../../../integration/archive_writer.rs"]
#[allow(dead_code, reason = "the integration tests need more of it")]
mod archive_writer;
mod hostile;
mod process;
mod reader;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinSet;

use hostile::{ATTACKS, Attack, Material};
use process::Process;
use reader::Times;

/// Growth of an honest client's times that an attack may cause.
const MAX_RATIO: f64 = 5.0;
/// Memory for blocks, index pages and replies, in MiB (`--cache-size`).
const CACHE_MIB: u64 = 96;
/// Memory of the program and of connections besides, in MiB: 64, and 149 KiB for each of a
/// hundred connections.
const PROGRAM_MIB: u64 = 64 + 15;
/// Time after the attackers have left until the program may not be busy any more.
const GRACE: Duration = Duration::from_secs(2);
/// Processor time that it may take for each second after that.
const MAX_IDLE_BUSY: f64 = 0.1;
/// Niceness of the attackers' threads. Real attackers have machines of their own: here, they must
/// not take processor time from the honest client itself.
const ATTACKERS_NICENESS: i32 = 10;

/// Measures what an honest reader notices of hostile archives and clients
#[derive(Debug, Parser)]
struct Options {
    /// The program
    #[arg(long, default_value = "target/release/hexz-nbd")]
    server: PathBuf,
    /// Duration of each measurement, in seconds
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Run this attack only
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match runtimes().and_then(|(own, attackers)| own.block_on(run(&options, attackers.handle()))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hexz-nbd-attacks: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts a runtime for the honest client, and one for the attackers.
fn runtimes() -> Result<(Runtime, Runtime)> {
    let own = Builder::new_current_thread().enable_all().build()?;
    let attackers = Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(|| {
            // The measurement is valid with any priority, only noisier.
            let _ = rustix::process::nice(ATTACKERS_NICENESS);
        })
        .build()?;
    Ok((own, attackers))
}

/// Runs the attacks. Returns true if every bound holds.
async fn run(options: &Options, attackers: &Handle) -> Result<bool> {
    let folder = tempfile::Builder::new().prefix("hexz-nbd-attacks-").tempdir()?;
    let material = Material::prepare(folder.path())?;
    println!(
        "| attack | uncached alone, beside (median, us) | ratio | cached p99 alone, beside (us) | \
         ratio | peak MiB | busy after | |\n| --- | --- | ---: | --- | ---: | ---: | ---: | --- |"
    );
    let mut is_sound = true;
    for attack in ATTACKS {
        if options.only.as_ref().is_none_or(|only| only == attack.name) {
            is_sound &= measure(options, attackers, &material, attack)
                .await
                .with_context(|| format!("the attack {}", attack.name))?;
        }
    }
    Ok(is_sound)
}

async fn measure(
    options: &Options,
    attackers: &Handle,
    material: &Material,
    attack: &Attack,
) -> Result<bool> {
    let cache = format!("{CACHE_MIB}MiB");
    let arguments = ["--cache-size", &cache].map(str::to_owned);
    let arguments = arguments.into_iter().chain(material.arguments(attack));
    let process = Process::start(&options.server, arguments)?;
    let address = process.address;
    let duration = Duration::from_secs(options.seconds);

    let alone = reader::measure(address, duration, 0).await?;
    process.reset_peak()?;
    let mut attacks = JoinSet::new();
    {
        let _entered = attackers.enter();
        (attack.start)(address, &mut attacks);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let beside = reader::measure(address, duration, 1).await?;
    let peak = process.peak_mib()?;
    attacks.shutdown().await;
    tokio::time::sleep(GRACE).await;
    let busy = process.busy(Duration::from_secs(1)).await?;

    let uncached = ratio(beside.uncached, alone.uncached);
    let cached = ratio(beside.cached_p99, alone.cached_p99);
    let failures = [
        (uncached > MAX_RATIO, "uncached reads"),
        (cached > MAX_RATIO, "cached reads"),
        (peak > CACHE_MIB + PROGRAM_MIB, "memory"),
        (busy > MAX_IDLE_BUSY, "busy for nobody"),
    ];
    let failures: Vec<&str> =
        failures.iter().filter(|(failed, _)| *failed).map(|(_, what)| *what).collect();
    let verdict = if failures.is_empty() { "ok".to_owned() } else { failures.join(", ") };
    let times = |a: Duration, b: Duration| format!("{}, {}", a.as_micros(), b.as_micros());
    println!(
        "| {} | {} | {uncached:.1} | {} | {cached:.1} | {peak} | {busy:.2} | {verdict} |",
        attack.name,
        times(alone.uncached, beside.uncached),
        times(alone.cached_p99, beside.cached_p99),
    );
    Ok(failures.is_empty())
}

fn ratio(beside: Duration, alone: Duration) -> f64 {
    beside.as_secs_f64() / alone.as_secs_f64().max(1e-6)
}

/// Both figures of one measurement.
impl Times {
    fn of(mut uncached: Vec<Duration>, mut cached: Vec<Duration>) -> Result<Self> {
        uncached.sort_unstable();
        cached.sort_unstable();
        let median = uncached.get(uncached.len() / 2).context("no uncached read was answered")?;
        let p99 = cached.get(cached.len() * 99 / 100).context("no cached read was answered")?;
        Ok(Self { uncached: *median, cached_p99: *p99 })
    }
}
