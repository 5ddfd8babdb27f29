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
use crate::row::{Row, Unit};
use crate::servers::{Running, Server, Setup};

pub(super) fn run(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (setup, how) in
        [(Setup::plain(Server::Nbdkit), "without TLS"), (Setup::tls(Server::Nbdkit), "with TLS")]
    {
        if !bench.has(setup.server) {
            continue;
        }
        let samples = bench.in_turn(&[setup], |round, running| {
            bench.warm(running)?;
            let size = bench.material.image.metadata()?.len();
            let load = Load {
                in_flight: 1,
                // fio knows nothing of where there is data.
                places: (0..u32::try_from(size / PLACE)?).collect(),
                ..bench.random(round)
            };
            Ok((load.run(&running.target)?.per_second(), fio(bench, running)?))
        })?;
        let samples = samples.into_iter().next().flatten().unwrap_or_default();
        let ours = median_of(&samples, |sample| sample.0);
        let fio: Option<Vec<f64>> = samples.iter().map(|sample| sample.1).collect();
        let fio = fio.map(|rates| median_of(&rates, |rate| *rate));
        rows.push(Row::new(
            format!("this program and fio: nbdkit, 4 KiB at random, one at a time, {how}"),
            Unit::ReadsPerSecond.of(ours),
            "fio's engine nbd",
            fio.map(|rate| Unit::ReadsPerSecond.of(rate)),
        ));
    }
    Ok(rows)
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

/// The reads a second that fio counts; `None` if it isn't installed.
fn fio(bench: &Bench, running: &Running) -> Result<Option<f64>> {
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
    let rate = result["jobs"][0]["read"]["iops"].as_f64();
    Ok(Some(rate.context("fio counts no reads")?))
}
