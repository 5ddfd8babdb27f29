//! System calls of a read, compared with `benches/costs.txt`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};

use crate::archive_writer::{ArchiveWriter, Piece, noise};
use crate::support::server::Server;

/// Length of a block, in bytes: so small that it is decoded where it is requested.
const BLOCK: u64 = 16 * 1024;
const BLOCKS: u64 = 600;

/// System calls by which threads wait and are woken, which depend on the load of the machine.
const WAITING: [&str; 5] =
    ["epoll_wait", "futex", "sched_yield", "clock_nanosleep", "restart_syscall"];

/// Maximum ratio of a cost to the recorded one.
const TOLERANCE: f64 = 1.05;

/// Distance between blocks that are read one after another: too far for readahead.
const STRIDE: u64 = 101;

/// Serves an archive to a client that reads so many blocks, one at a time, `times` times. Returns
/// the number of system calls by name.
fn system_calls(archive: &Path, blocks: u64, times: u64) -> HashMap<String, u64> {
    let folder = tempfile::tempdir().unwrap();
    let counts = folder.path().join("counts");
    let strace = ["strace", "-f", "-c", "-U", "name,calls", "-o"].map(OsString::from);
    let mut server = Server::builder()
        .within(strace.into_iter().chain([counts.clone().into()]))
        .arg(archive)
        .start();
    let mut client = server.go("");
    for block in (0..times).flat_map(|_| 0..blocks) {
        client.read_ok(block * STRIDE % BLOCKS * BLOCK, 4096);
    }
    client.disconnect();
    let strace = server.pid();
    let children = fs::read_to_string(format!("/proc/{strace}/task/{strace}/children")).unwrap();
    let gateway = Pid::from_raw(children.trim().parse().unwrap()).unwrap();
    kill_process(gateway, Signal::TERM).unwrap();
    assert!(server.wait().success());
    let counts = fs::read_to_string(counts).unwrap();
    let call = |line: &str| {
        let (name, calls) = line.trim().split_once(' ')?;
        Some((name.to_owned(), calls.trim().parse().ok()?))
    };
    counts.lines().filter_map(call).filter(|(name, _)| name != "total").collect()
}

/// Returns the system calls of each read that `more` has beyond `fewer`, besides waiting.
fn each(more: &HashMap<String, u64>, fewer: &HashMap<String, u64>, reads: u64) -> f64 {
    let sum = |counts: &HashMap<String, u64>| -> u64 {
        counts.iter().filter(|(name, _)| !WAITING.contains(&name.as_str())).map(|it| it.1).sum()
    };
    (sum(more) as f64 - sum(fewer) as f64) / reads as f64
}

/// Returns the number of system calls that `benches/costs.txt` records for `what`.
fn recorded(what: &str) -> f64 {
    let costs = include_str!("../../benches/costs.txt");
    let is_wanted = |line: &&str| line.ends_with(&format!(" system calls  {what}"));
    let line = costs.lines().find(is_wanted).unwrap_or_else(|| panic!("{what} isn't recorded"));
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn system_calls_of_a_read_are_as_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.hxz");
    let main = (0..BLOCKS).map(|number| Piece::Data(noise(number, BLOCK as usize))).collect();
    ArchiveWriter { main, ..ArchiveWriter::default() }.write().save(&path);

    // strace makes a read so slow that the program may decide otherwise on a busy machine.
    let attempts = (0..5).map(|_| {
        let [few, all] = [BLOCKS / 6, BLOCKS].map(|blocks| system_calls(&path, blocks, 1));
        let repeated = system_calls(&path, BLOCKS, 5);
        [each(&all, &few, BLOCKS - BLOCKS / 6), each(&repeated, &all, 4 * BLOCKS)]
    });
    let expected = [
        "the first 4 KiB read of a block, one at a time",
        "a 4 KiB read from the cache, one at a time",
    ]
    .map(recorded);
    let mut seen = Vec::new();
    for attempt in attempts {
        seen.push(attempt);
        let ranges = expected.map(|expected| 1.5..=expected * TOLERANCE);
        if ranges.iter().zip(attempt).all(|(range, got)| range.contains(&got)) {
            return;
        }
    }
    panic!(
        "a first read and a cached one take {seen:.2?} system calls instead of {expected:.2?}; if \
         that has a good reason, record it in benches/costs.txt"
    );
}
