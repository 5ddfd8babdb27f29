//! Loads hexz-nbd and breaks what is around it, and looks whether anybody notices who should
//! not.
//!
//! 1. `archives`, `authority`, `faults`: what is served, to whom, and from which disk;
//! 2. `server`: the program is started, as it is built for use;
//! 3. `clients`: hundreds of them read, and compare every byte; others come and go;
//! 4. `aggressors`: those who mean ill, from other addresses;
//! 5. `director`: a reload each second, other certificates and rules, other archives, a disk
//!    that fails, a program that is stopped for a while;
//! 6. below: all leave, and nothing may be left behind.
//!
//! What was done and seen is printed; the exit code is 1 if something was that must not be.

mod aggressors;
#[path = "../../integration/archive_writer.rs"]
#[allow(dead_code, reason = "the integration tests need more of it")]
mod archive_writer;
mod archives;
mod authority;
mod clients;
mod director;
mod faults;
mod ledger;
mod options;
mod random;
mod server;
mod session;
mod world;

use std::ffi::OsString;
use std::fs;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::task::JoinSet;

use archives::Archives;
use authority::Authority;
use director::Policy;
use faults::Faults;
use options::Options;
use server::Server;
use world::{People, World};

/// What the server is told, in MiB. Of that, 32 MiB are for answers on their way, and 32 MiB at
/// the least for blocks: not enough for all that is read.
const CACHE_MIB: u64 = 64;

/// What README.md adds to it for the program and its connections, in MiB.
const PROGRAM_MIB: u64 = 64;

/// What a connection that reads may take besides, in KiB: its reserve for answers (128), and
/// what an idle one takes (21).
const CONNECTION_KIB: u64 = 128 + 21;

/// Clients besides those that read all the time.
const OTHERS: u32 = 100;

/// Those that come and go, at once.
const NEWCOMERS: u8 = 16;

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Runtime::new().context("no runtime");
    match runtime.and_then(|runtime| runtime.block_on(run(&options))) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("hexz-nbd-stress: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all was as it has to be.
async fn run(options: &Options) -> Result<bool> {
    raise_descriptor_limit()?;
    let temporary = tempfile::Builder::new().prefix("hexz-nbd-stress-").tempdir()?;
    let folder = temporary.path();
    fs::create_dir_all(&options.folder)?;
    let archives = Archives::prepare(&options.archives, folder)?;
    let faults = Faults::build(folder)?;
    let (servers, guests) = (Authority::new("servers")?, Authority::new("clients")?);
    let people = People::new(&servers, &guests)?;
    fs::create_dir(folder.join("policy"))?;
    let certificates = [servers.server()?, servers.server()?];
    let policy = Policy::prepare(folder.join("policy"), guests, certificates)?;

    let arguments = arguments(options, &policy, &archives);
    let mut server = Server::start(&options.server, arguments, &faults, &options.folder).await?;
    let world = Arc::new(World::new(archives, faults, people, server.address));
    world.shown.set(vec![policy.first_certificate().certificate.clone()]);
    let descriptors = settled_descriptors(&world, &server).await?;

    let mut tasks = JoinSet::new();
    for number in 0..options.clients {
        tasks.spawn(clients::reader(Arc::clone(&world), number));
    }
    let start = Instant::now();
    while world.readers.load(Ordering::Relaxed) < options.clients && start.elapsed().as_secs() < 60
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    eprintln!("{} clients read", world.readers.load(Ordering::Relaxed));
    for number in 0..NEWCOMERS {
        tasks.spawn(clients::newcomers(Arc::clone(&world), number));
    }
    aggressors::spawn(&world, &mut tasks);
    let directed = director::direct(&world, &server, &policy, options.duration()).await;

    world.end();
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            world.ledger.violation(format_args!("this program itself failed: {error}"));
        }
    }
    directed?;
    left_behind(&world, &server, descriptors, options.clients + OTHERS).await?;
    farewell(&world, &mut server).await?;
    proves_something(&world)?;
    Ok(world.ledger.print())
}

fn arguments(options: &Options, policy: &Policy, archives: &Archives) -> Vec<OsString> {
    let connections = (options.clients + OTHERS).to_string();
    let cache = format!("{CACHE_MIB}MiB");
    let mut arguments: Vec<String> = [
        ["--cache-size", &cache],
        ["--max-connections", &connections],
        ["--max-connections-per-identity", &connections],
        // More than those who mean ill can take from their networks.
        ["--max-handshakes", "512"],
        ["--handshake-timeout", "10s"],
        ["--stall-timeout", "3s"],
    ]
    .concat()
    .into_iter()
    .map(str::to_owned)
    .collect();
    arguments.push("--strict".into());
    // Only root can look into a process that hides its memory.
    if !rustix::process::geteuid().is_root() {
        arguments.extend(["--sandbox".into(), "off".into()]);
    }
    arguments.extend(policy.arguments());
    arguments.extend(archives.arguments.iter().cloned());
    arguments.into_iter().map(OsString::from).collect()
}

/// How many descriptors the server has when all archives are open and nobody is there.
async fn settled_descriptors(world: &World, server: &Server) -> Result<usize> {
    let config = &world.people.readers[0];
    for expected in &world.archives.steady {
        world.session([127, 1, 200, 1].into(), config, expected, true).await?.leave().await;
    }
    world.turning([127, 1, 200, 1].into(), config, true).await?.leave().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    server.descriptors()
}

/// What nobody uses any more has to be gone, and memory to have been enough.
async fn left_behind(
    world: &World,
    server: &Server,
    descriptors: usize,
    connections: u32,
) -> Result<()> {
    let start = Instant::now();
    while server.descriptors()? > descriptors && start.elapsed().as_secs() < 30 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let after = server.descriptors()?;
    world.ledger.note("descriptors: before, after", format_args!("{descriptors}, {after}"));
    world.ledger.require(after <= descriptors, "descriptors are left over");

    let [peak, rest] = ["VmHWM:", "VmRSS:"].map(|field| server.status_kib(field));
    let (peak, rest) = (peak? / 1024, rest? / 1024);
    let idle = CACHE_MIB + PROGRAM_MIB;
    let busy = idle + u64::from(connections) * CONNECTION_KIB / 1024;
    world.ledger.note("memory: peak", format_args!("{peak} MiB of {busy}"));
    world.ledger.note("memory: when all have left", format_args!("{rest} MiB of {idle}"));
    world.ledger.require(peak <= busy, "it took more memory than it may");
    world.ledger.require(rest <= idle, "memory is left over");
    Ok(())
}

/// It ends when it is asked to, and its log is sound.
async fn farewell(world: &World, server: &mut Server) -> Result<()> {
    let (status, took) = server.terminate().await?;
    world.ledger.note("the end", format_args!("{status}, after {took:.3?}"));
    world.ledger.require(status.code() == Some(0), format_args!("it ended with {status}"));
    let seen = server.seen();
    world.ledger.note("log: lines", seen.lines);
    world.ledger.note("log: connections dropped by reloads", seen.dropped);
    for line in &seen.panics {
        world.ledger.violation(format_args!("in the log: {line}"));
    }
    Ok(())
}

/// A run in which nothing happened would find nothing.
fn proves_something(world: &World) -> Result<()> {
    let (reads, failed) = world.faults.counts()?;
    world.ledger.note("disk: reads, of which failed", format_args!("{reads}, {failed}"));
    for what in [
        "attacks: garbage, and closed",
        "attacks: handshakes broken off",
        "attacks: handshakes without a good certificate",
        "attacks: resets in the middle of answers",
        "attacks: slow drips that were closed",
        "attacks: stalled readers",
        "clients: denied an export, and dropped",
        "clients: revoked, and dropped",
        "clients: stayed to the end",
        "clients: tried in vain to come back",
        "newcomers: longest way in",
        "newcomers: looked at the server's certificate",
        "reads: failed, as the disk did",
        "reads: right after one that failed",
    ] {
        world.ledger.require_some(what);
    }
    Ok(())
}

/// Each client is a socket here and another one in the server, which inherits the limit.
fn raise_descriptor_limit() -> Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}
