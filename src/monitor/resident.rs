//! Reads the resident memory of the process.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Number of bytes that are read from the file: twice what kernels write today.
const STATUS_BYTES: usize = 4096;

/// Source of the resident memory. The file is opened early, because the sandbox forbids it.
#[derive(Debug)]
pub(super) struct ResidentMemory(Option<File>);

impl ResidentMemory {
    pub(super) fn open() -> Self {
        Self(File::open("/proc/self/status").ok())
    }

    /// Returns the resident memory in bytes, if the kernel reports it.
    pub(super) fn bytes(&self) -> Option<u64> {
        let mut status = [0; STATUS_BYTES];
        let length = self.0.as_ref()?.read_at(&mut status, 0).ok()?;
        parse_vm_rss(&String::from_utf8_lossy(status.get(..length)?))
    }
}

/// Parses `VmRSS` in `/proc/PID/status`, which is in units of 1024 bytes. Returns bytes.
fn parse_vm_rss(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let number: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    number.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        assert_eq!(parse_vm_rss("VmHWM:\t  99 kB\nVmRSS:\t   12 kB\nX:\n"), Some(12 * 1024));
        assert_eq!(
            [parse_vm_rss(""), parse_vm_rss("VmRSS:\t x kB"), parse_vm_rss("VmRSS:\t 1")],
            [None; 3]
        );
        let here = ResidentMemory::open();
        assert!(here.bytes().unwrap() > 100_000);
        let much = vec![1; 64 << 20];
        assert!(here.bytes().unwrap() >= much.len() as u64);
    }
}
