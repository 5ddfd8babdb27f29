//! fio's nbd engine as the client. It sends each request on its own when an earlier one completes,
//! as common clients do.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::geteuid;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::Target;
use crate::load::{Load, Order, Outcome, Until, histogram};

/// User without privileges. As root, libnbd would look for certificates in /etc.
const NOBODY: u32 = 65534;

/// Directory from which fio runs: its home, in which libnbd looks for certificates, since fio's
/// URI can't name them.
#[derive(Debug)]
pub(crate) struct Fio {
    home: TempDir,
}

impl Fio {
    /// Creates the home, with the CA certificate of `pki`.
    pub(crate) fn new(pki: &Path) -> Result<Self> {
        let home = tempfile::tempdir()?;
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755))?;
        let certificates = home.path().join(".pki/libnbd");
        fs::create_dir_all(&certificates)?;
        fs::copy(pki.join("ca-cert.pem"), certificates.join("ca-cert.pem"))?;
        Ok(Self { home })
    }

    /// Puts a load on a server. The outcome has no latencies.
    pub(crate) fn run(&self, load: &Load, target: &Target) -> Result<Outcome> {
        let mut command = Command::new("fio");
        if geteuid().is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        let (scheme, port) =
            (if target.tls.is_some() { "nbds" } else { "nbd" }, target.address.port());
        command
            .env("HOME", self.home.path())
            .current_dir(self.home.path())
            .stdin(Stdio::null())
            .args(["--name=load", "--ioengine=nbd", "--output-format=json", "--group_reporting"])
            .arg(format!("--uri={scheme}://localhost:{port}/{}", target.export))
            .arg(format!("--bs={}", load.length))
            .arg(format!("--iodepth={}", load.in_flight))
            .arg(format!("--numjobs={}", load.connections));
        match load.until {
            Until::After(time) => {
                let Order::Random { seed } = load.order else { unreachable!("no such load") };
                // All of the range that has data, which starts at 0.
                let end = load.offsets().last().map_or(0, |last| last + u64::from(load.length));
                command
                    .args(["--rw=randread", "--norandommap", "--time_based"])
                    .arg(format!("--runtime={}", time.as_secs().max(1)))
                    .arg(format!("--randseed={seed}"))
                    .arg(format!("--size={end}"));
            }
            Until::Reads(_) | Until::End => {
                let log = self.home.path().join("reads");
                fs::write(&log, read_log(load)?)?;
                command
                    .args(["--rw=randread", "--size=100%", "--replay_no_stall=1"])
                    .arg(format!("--read_iolog={}", log.display()));
            }
        }
        let output = command.output().context("run fio")?;
        let problem = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "fio fails: {}", problem.trim());
        outcome(&output.stdout)
    }
}

/// Returns the reads of a load in fio's format ("Trace file format v2").
fn read_log(load: &Load) -> Result<String> {
    let mut log = "fio version 2 iolog\nnbd add\nnbd open\n".to_owned();
    for offset in load.planned_reads().context("the load has no end")? {
        writeln!(log, "nbd read {offset} {}", load.length)?;
    }
    log.push_str("nbd close\n");
    Ok(log)
}

/// Parses fio's report.
fn outcome(report: &[u8]) -> Result<Outcome> {
    // The engine writes to the same channel that it has connected.
    let start = report.iter().position(|&byte| byte == b'{').unwrap_or_default();
    let report: Value = serde_json::from_slice(&report[start..]).context("fio's report")?;
    let read = &report["jobs"][0]["read"];
    let number = |name: &str| read[name].as_u64().with_context(|| format!("fio's {name}"));
    let (reads, milliseconds) = (number("total_ios")?, number("runtime")?);
    let bytes = number("io_bytes")?;
    ensure!(reads > 0 && milliseconds > 0, "fio has read nothing");
    Ok(Outcome { reads, bytes, seconds: milliseconds as f64 / 1e3, latency: histogram()? })
}
