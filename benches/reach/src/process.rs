//! Servers as child processes.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::client::Target;

/// Time in which a server has to accept connections, and to end.
const START: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(5);

/// A server process, which ends when this is dropped.
pub(crate) struct Process {
    child: Child,
    address: SocketAddr,
    log: tempfile::NamedTempFile,
}

impl Process {
    /// Starts a server that listens on `port` of 127.0.0.1, and waits until it accepts
    /// connections.
    pub(crate) fn start(command: &Command, port: u16) -> Result<Self> {
        Self::start_with(command, port, Stdio::null())
    }

    /// Starts a server with a standard input.
    pub(crate) fn start_with(command: &Command, port: u16, input: Stdio) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        // In a group of its own, it doesn't get Ctrl-C; it ends with this program all the same.
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program());
        wrapped.args(command.get_args()).stdin(input).process_group(0);
        wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        wrapped.stdout(log.reopen()?).stderr(log.reopen()?);
        let child = wrapped.spawn().with_context(|| format!("run {command:?}"))?;
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let mut process = Self { child, address, log };
        let deadline = Instant::now() + START;
        while TcpStream::connect(address).is_err() {
            if process.child.try_wait()?.is_some() || Instant::now() > deadline {
                bail!("{command:?} doesn't start: {}", process.log()?);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(process)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the server's default export, without TLS.
    pub(crate) fn target(&self) -> Target {
        Target { address: self.address, tls: None, export: String::new() }
    }

    /// Returns the process group, by which its processor time is counted.
    pub(crate) fn group(&self) -> u32 {
        self.child.id()
    }

    fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.log.path())?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(group) = group {
            let _ = kill_process_group(group, Signal::TERM);
            let deadline = Instant::now() + END;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

/// Returns a port that was free a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Starts the gateway on an archive: a URL or a path.
pub(crate) fn hexz_nbd(program: &Path, archive: &str, options: &[String]) -> Result<Process> {
    let port = free_port()?;
    let mut command = Command::new(program);
    command.arg("--listen").arg(format!("127.0.0.1:{port}"));
    command.args(["--connection-rate", "1000000"]).args(options).arg(archive);
    Process::start(&command, port)
}

/// Starts nbdkit's curl plugin on a raw image.
pub(crate) fn nbdkit_curl(url: &str) -> Result<Process> {
    let port = free_port()?;
    let mut command = Command::new("nbdkit");
    command.args(["--foreground", "--readonly", "--ipaddr", "127.0.0.1", "--port"]);
    command.arg(port.to_string()).arg("curl").arg(format!("url={url}"));
    Process::start(&command, port)
}

/// Seconds for which the machine's processors had nothing to do so far, all added up.
pub(crate) fn idle_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    // "cpu", user, nice, system, idle, …
    let ticks = stat.split_whitespace().nth(4).context("/proc/stat without times")?;
    Ok(ticks.parse::<f64>()? / rustix::param::clock_ticks_per_second() as f64)
}

/// Copies the whole export to nowhere with nbdcopy. Returns the seconds that it took.
pub(crate) fn nbdcopy(server: &Process, patience: Duration) -> Result<f64> {
    let started = Instant::now();
    let problems = tempfile::NamedTempFile::new()?;
    let status = Command::new("timeout")
        .arg(patience.as_secs().to_string())
        .args(["nbdcopy", &format!("nbd://{}", server.address()), "null:"])
        .stdin(Stdio::null())
        .stderr(File::create(problems.path())?)
        .status()
        .context("run nbdcopy")?;
    if !status.success() {
        bail!("nbdcopy fails ({status}): {}", std::fs::read_to_string(problems.path())?.trim());
    }
    Ok(started.elapsed().as_secs_f64())
}
