//! The program as a child process: its address, memory and processor time.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Process {
    /// Starts it on some port of loopback.
    pub(crate) fn start(program: &Path, arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["--log-format", "json", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .env_remove("RUST_LOG")
            .env("HEXZ_PASSWORD", "wrong")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} can't be run", program.display()))?;
        let stderr = child.stderr.take().context("no log")?;
        let mut lines = BufReader::new(stderr).lines();
        let address = loop {
            let line = lines.next().context("it didn't start")??;
            let fields: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(address) = fields["listen"].as_str().and_then(|text| text.parse().ok()) {
                break address;
            }
        };
        // Its log must not fill a pipe that nobody reads.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { child, address })
    }

    /// Forgets the peak of its memory.
    pub(crate) fn reset_peak(&self) -> Result<()> {
        Ok(fs::write(self.proc("clear_refs"), "5")?)
    }

    /// Peak of its memory since then, in MiB.
    pub(crate) fn peak_mib(&self) -> Result<u64> {
        let status = fs::read_to_string(self.proc("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let number = line.and_then(|line| line.split_ascii_whitespace().next());
        Ok(number.context("no VmHWM")?.parse::<u64>()? / 1024)
    }

    /// Processor time that it takes in `duration`, for each second of it.
    pub(crate) async fn busy(&self, duration: Duration) -> Result<f64> {
        let before = self.processor_time()?;
        tokio::time::sleep(duration).await;
        Ok((self.processor_time()? - before) / duration.as_secs_f64())
    }

    /// Its processor time so far, in seconds.
    fn processor_time(&self) -> Result<f64> {
        let stat = fs::read_to_string(self.proc("stat"))?;
        let fields = stat.rsplit_once(')').context("no process")?.1;
        let ticks: u64 =
            fields.split_ascii_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
        Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        self.child.wait().map(drop).unwrap_or_default();
    }
}
