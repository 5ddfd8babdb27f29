//! What a process costs, as the system counts it.

use std::fs;
use std::sync::LazyLock;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Says what is being done, and when.
pub(crate) fn progress(what: &str) {
    static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
    eprintln!("{:5} s  {what}", STARTED.elapsed().as_secs());
}

/// Seconds of processor time that a process group has used so far.
pub(crate) fn cpu_seconds(group: u32) -> Result<f64> {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let mut all = 0.0;
    for process in fs::read_dir("/proc")? {
        let Ok(stat) = fs::read_to_string(process?.path().join("stat")) else { continue };
        // Behind the name, which may hold anything: state, parent, group, …
        let Some((_, fields)) = stat.rsplit_once(')') else { continue };
        let fields: Vec<&str> = fields.split_whitespace().collect();
        if fields.get(2).and_then(|field| field.parse().ok()) == Some(group) {
            // User and system time, its own and that of children that have ended.
            for field in fields.get(11..15).context("a process without times")? {
                all += field.parse::<f64>()? / ticks;
            }
        }
    }
    Ok(all)
}

/// A line of /proc/PID/status, in bytes.
pub(crate) fn memory(process: u32, line: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let value = status
        .lines()
        .find_map(|text| text.strip_prefix(line)?.strip_prefix(':')?.trim().strip_suffix(" kB"))
        .with_context(|| format!("{line} isn't in its status"))?;
    Ok(value.parse::<u64>()? * 1024)
}

/// How much sooner threads that measure run than others, and what the system must allow.
const HURRY: i32 = -10;

/// Lets this thread run before those of normal priority. Only root may; see [`may_hurry`].
pub(crate) fn hurry() -> Result<()> {
    if may_hurry() {
        // Linux has a priority for each thread; "none" is the one that calls.
        rustix::process::setpriority_process(None, HURRY).context("raise the priority")?;
    }
    Ok(())
}

/// Whether [`hurry`] does anything.
pub(crate) fn may_hurry() -> bool {
    rustix::process::geteuid().is_root()
}

/// Lets this process, and what it starts, have so many files open.
pub(crate) fn allow_open_files(wanted: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        let maximum = limit.maximum.map(|maximum| maximum.max(wanted));
        let raised = Rlimit { current: Some(wanted), maximum };
        setrlimit(Resource::Nofile, raised)
            .with_context(|| format!("it takes {wanted} open files: ulimit -n"))?;
    }
    Ok(())
}

/// The middle one.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => (sorted[even / 2 - 1] + sorted[even / 2]) / 2.0,
    }
}
