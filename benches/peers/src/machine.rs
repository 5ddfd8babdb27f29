//! What all figures depend on.

use std::fs;
use std::num::NonZeroUsize;

use anyhow::Result;

use crate::measure::may_hurry;

/// The machine in a line each: processor, cores, memory, kernel.
pub(crate) fn describe() -> Result<Vec<String>> {
    let processor = field("/proc/cpuinfo", "model name")?;
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let memory = field("/proc/meminfo", "MemTotal")?;
    let kib: f64 = memory.trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut lines = vec![
        format!("{processor}, {cores} cores for server and client together"),
        format!("{:.0} GiB of memory, Linux {}", kib / 1024.0 / 1024.0, kernel.trim()),
    ];
    if !may_hurry() {
        lines.push("not root: the client of the latency case runs at normal priority".to_owned());
    }
    Ok(lines)
}

/// The first value of that name.
fn field(file: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(file)?;
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    });
    Ok(value.unwrap_or_else(|| format!("unknown {name}")))
}
