//! The program as a child process: its log, and what the kernel says of it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::faults::Faults;
use crate::session::PATIENCE;

pub(crate) struct Server {
    child: Child,
    pid: Pid,
    pub(crate) address: SocketAddr,
    seen: watch::Receiver<Seen>,
    reader: Option<JoinHandle<()>>,
}

/// What the log has said so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    listen: Option<SocketAddr>,
    /// When it was said for the last time that all was reloaded, and how often that was.
    reloaded: u64,
    refused: u64,
    at: Option<Instant>,
    /// How many connections were dropped by reloads.
    pub(crate) dropped: u64,
    /// Lines that only a fault of the program can have caused.
    pub(crate) panics: Vec<String>,
    pub(crate) lines: u64,
}

/// How a reload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reload {
    Done(Instant),
    Refused,
}

impl Server {
    /// Starts it on some port of loopback, with a disk that can fail, and its log in `folder`.
    pub(crate) async fn start(
        program: &Path,
        arguments: Vec<OsString>,
        faults: &Faults,
        folder: &Path,
    ) -> Result<Self> {
        let mut child = Command::new(program)
            .args(["--log-format", "json", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .env_remove("RUST_LOG")
            .env("LD_PRELOAD", &faults.library)
            .env("HEXZ_STRESS_EIO", &faults.control)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} can't be run", program.display()))?;
        let stderr = child.stderr.take().context("no log")?;
        let log = File::create(folder.join("server.log"))?;
        let (tell, seen) = watch::channel(Seen::default());
        let reader = std::thread::spawn(move || follow(stderr, log, &tell));
        let pid = Pid::from_child(&child);
        let mut server = Self {
            child,
            pid,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            seen,
            reader: Some(reader),
        };
        let ready = timeout(PATIENCE, server.seen.wait_for(|seen| seen.listen.is_some())).await;
        let ready = ready.context("it doesn't get ready")?.context("it didn't start; see its log");
        server.address = ready?.listen.context("it listens nowhere")?;
        Ok(server)
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill_process(self.pid, signal)?)
    }

    /// Has it read everything anew.
    pub(crate) async fn reload(&self) -> Result<Reload> {
        let mut seen = self.seen.clone();
        let before = seen.borrow().clone();
        self.signal(Signal::HUP)?;
        let news = seen
            .wait_for(|seen| (seen.reloaded, seen.refused) != (before.reloaded, before.refused));
        let now = timeout(PATIENCE, news).await.context("nothing in the log of a reload")??;
        match now.at {
            Some(at) if now.reloaded > before.reloaded => Ok(Reload::Done(at)),
            _ => Ok(Reload::Refused),
        }
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// How many descriptors it has open.
    pub(crate) fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(self.proc("fd"))?.count())
    }

    /// A field of its status, as VmRSS, in KiB.
    pub(crate) fn status_kib(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(self.proc("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let number = line.and_then(|line| line.split_ascii_whitespace().next());
        Ok(number.with_context(|| format!("no {field}"))?.parse()?)
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.pid)
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn terminate(&mut self) -> Result<(ExitStatus, Duration)> {
        let asked = Instant::now();
        self.signal(Signal::TERM)?;
        while asked.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                let took = asked.elapsed();
                let reader = self.reader.take().map(JoinHandle::join);
                ensure!(!matches!(reader, Some(Err(_))), "reading its log failed");
                return Ok((status, took));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bail!("it doesn't end")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended already can't be killed, and that is as well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Keeps the log, and tells what it says.
fn follow(stderr: ChildStderr, mut log: File, tell: &watch::Sender<Seen>) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        if writeln!(log, "{line}").is_err() {
            return;
        }
        let json: Value = serde_json::from_str(&line).unwrap_or_default();
        let message = json["message"].as_str().unwrap_or_default();
        tell.send_modify(|seen| {
            seen.lines += 1;
            if message.starts_with("ready") {
                seen.listen = json["listen"].as_str().and_then(|listen| listen.parse().ok());
            } else if message.starts_with("reloaded") {
                seen.reloaded += 1;
                seen.dropped += json["dropped"].as_u64().unwrap_or_default();
                seen.at = Some(Instant::now());
            } else if json["reason"] == "reload_failed" {
                seen.refused += 1;
            } else if json.is_null() || line.contains("panicked") {
                seen.panics.push(line.clone());
            }
        });
    }
}
