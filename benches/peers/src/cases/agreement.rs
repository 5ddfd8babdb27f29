//! Whether fio measures what this program measures: one request at a time, so that the
//! client isn't what limits either.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::geteuid;
use serde_json::Value;
use tempfile::TempDir;

use crate::bench::{Bench, median_of, run_client};
use crate::load::{Load, PLACE};
use crate::measure::own_cpu_seconds;
use crate::row::{Row, Unit};
use crate::servers::{Running, Server, Setup};

/// What a client counts, and what it takes itself: one request at a time waits for both
/// the server and the client.
#[derive(Debug, Clone, Copy)]
struct Client {
    per_second: f64,
    /// Its own processor time for each read, in seconds.
    cpu: f64,
}

impl Client {
    fn median(all: impl Iterator<Item = Self>) -> Self {
        let all: Vec<Self> = all.collect();
        let per_second = median_of(&all, |client| client.per_second);
        Self { per_second, cpu: median_of(&all, |client| client.cpu) }
    }
}

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (setup, how) in
        [(Setup::plain(Server::HexzNbd), "without TLS"), (Setup::tls(Server::HexzNbd), "with TLS")]
    {
        let samples = bench.in_turn(&[setup.with_room_for_all()], |round, running| {
            bench.warm(running)?;
            let size = bench.material.image.metadata()?.len();
            let load = Load {
                in_flight: 1,
                // fio knows nothing of where there is data.
                places: (0..u32::try_from(size / PLACE)?).collect(),
                ..bench.random(round)
            };
            Ok((this_program(&load, running)?, fio(bench, running)?))
        })?;
        let samples = samples.into_iter().next().flatten().unwrap_or_default();
        let rate = |client: &Client| Unit::ReadsPerSecond.of(client.per_second);
        let ours = Client::median(samples.iter().map(|(ours, _)| *ours));
        let fio: Option<Vec<Client>> = samples.iter().map(|(_, fio)| *fio).collect();
        let fio = fio.map(|all| Client::median(all.into_iter()));
        let row = Row::new(
            format!(
                "hexz-nbd as this program and as fio see it: 4 KiB at random, one at a time, {how}"
            ),
            rate(&ours),
            "fio's engine nbd",
            fio.as_ref().map(rate),
        );
        rows.push(match fio {
            Some(fio) => row.note(format!(
                "processor time of the client itself for each read, {how}: {:.1} µs here, \
                 {:.1} µs in fio",
                ours.cpu * 1e6,
                fio.cpu * 1e6
            )),
            None => row,
        });
    }
    Ok(rows)
}

fn this_program(load: &Load, running: &Running) -> Result<Client> {
    let before = own_cpu_seconds();
    let outcome = load.run(&running.target)?;
    let cpu = (own_cpu_seconds() - before) / outcome.reads as f64;
    Ok(Client { per_second: outcome.per_second(), cpu })
}

/// The user that everything runs as that shall have no rights.
const NOBODY: u32 = 65534;

/// fio doesn't let a URI name certificates, so they have to be where libnbd looks for them:
/// in a home.
fn home_with_ca(bench: &Bench) -> Result<TempDir> {
    let home = tempfile::tempdir()?;
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755))?;
    let pki = home.path().join(".pki/libnbd");
    fs::create_dir_all(&pki)?;
    fs::copy(bench.material.pki.join("ca-cert.pem"), pki.join("ca-cert.pem"))?;
    Ok(home)
}

/// What fio counts; `None` if it isn't installed.
fn fio(bench: &Bench, running: &Running) -> Result<Option<Client>> {
    let time = bench.scale.time.as_secs().max(1);
    let home = home_with_ca(bench)?;
    let mut command = Command::new("fio");
    if geteuid().is_root() {
        // For root libnbd would look in /etc.
        command.uid(NOBODY).gid(NOBODY).current_dir("/");
    }
    let port = running.target.address.port();
    let scheme = if running.target.tls.is_some() { "nbds" } else { "nbd" };
    command
        .env("HOME", home.path())
        .args(["--name=read", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--iodepth=1"])
        .args(["--time_based", "--output-format=json", "--norandommap"])
        .arg(format!("--runtime={time}"))
        .arg(format!("--uri={scheme}://localhost:{port}/"));
    let Some(output) = run_client(&mut command)? else { return Ok(None) };
    // Its engine says on the same channel that it has connected.
    let json = output.stdout.iter().position(|&byte| byte == b'{').unwrap_or_default();
    let result: Value = serde_json::from_slice(&output.stdout[json..]).context("fio's result")?;
    let number = |value: &Value| value.as_f64().context("a number is missing in fio's result");
    let job = &result["jobs"][0];
    let per_second = number(&job["read"]["iops"])?;
    let percent = number(&job["usr_cpu"])? + number(&job["sys_cpu"])?;
    Ok(Some(Client { per_second, cpu: percent / 100.0 / per_second }))
}
