//! Reads the resident memory of the process.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Number of bytes that are read from the file: twice what kernels write today.
const STATUS: usize = 4096;

/// Source of the resident memory. The file is opened early, because the sandbox forbids it.
#[derive(Debug)]
pub(super) struct Resident(Option<File>);

impl Resident {
    pub(super) fn open() -> Self {
        Self(File::open("/proc/self/status").ok())
    }

    /// Returns the resident memory in bytes, if the kernel reports it.
    pub(super) fn bytes(&self) -> Option<u64> {
        let mut status = [0; STATUS];
        let length = self.0.as_ref()?.read_at(&mut status, 0).ok()?;
        resident(&String::from_utf8_lossy(status.get(..length)?))
    }
}

/// Parses `VmRSS` in `/proc/PID/status`, which is in units of 1024 bytes. Returns bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let number: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory() {
        assert_eq!(resident("VmHWM:\t  99 kB\nVmRSS:\t   12 kB\nX:\n"), Some(12 * 1024));
        assert_eq!([resident(""), resident("VmRSS:\t x kB"), resident("VmRSS:\t 1")], [None; 3]);
        let here = Resident::open();
        assert!(here.bytes().unwrap() > 100_000);
        let much = vec![1; 64 << 20];
        assert!(here.bytes().unwrap() >= much.len() as u64);
    }
}
