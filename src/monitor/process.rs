//! Figures of the process: memory, CPU time and file descriptors.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::fs::Dir;
use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use super::status::ProcessStatus;

/// Number of bytes that are read from the file: twice what kernels write today.
const STATUS_BYTES: usize = 4096;

/// Sources of the figures in `/proc`. They are opened early, because the sandbox forbids it.
#[derive(Debug)]
pub(super) struct ProcessFiles {
    status: Option<File>,
    descriptors: Option<Mutex<Dir>>,
}

impl ProcessFiles {
    pub(super) fn open() -> Self {
        let descriptors = OpenOptions::new().read(true).open("/proc/self/fd").ok();
        let descriptors = descriptors.and_then(|folder| Dir::new(OwnedFd::from(folder)).ok());
        Self {
            status: File::open("/proc/self/status").ok(),
            descriptors: descriptors.map(Mutex::new),
        }
    }

    /// Returns the resident memory in bytes, if the kernel reports it.
    pub(super) fn resident(&self) -> Option<u64> {
        parse_bytes(&self.status()?, "VmRSS:")
    }

    /// Returns the figures, as far as the kernel reports them.
    pub(super) fn read(&self) -> ProcessStatus {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let seconds = u64::try_from(cpu.tv_sec).unwrap_or_default();
        let cpu = Duration::new(seconds, u32::try_from(cpu.tv_nsec).unwrap_or_default());
        ProcessStatus {
            cpu_seconds: cpu.as_secs_f64(),
            virtual_memory: self.status().and_then(|status| parse_bytes(&status, "VmSize:")),
            open_fds: self
                .descriptors
                .as_ref()
                .and_then(|folder| count_entries(&mut folder.lock())),
            max_fds: getrlimit(Resource::Nofile).current,
        }
    }

    fn status(&self) -> Option<String> {
        let mut status = [0; STATUS_BYTES];
        let length = self.status.as_ref()?.read_at(&mut status, 0).ok()?;
        Some(String::from_utf8_lossy(status.get(..length)?).into_owned())
    }
}

/// Parses a line of `/proc/PID/status` with a size, which is in units of 1024 bytes. Returns bytes.
fn parse_bytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    number.checked_mul(1024)
}

/// Returns the number of entries of `/proc/self/fd`.
fn count_entries(folder: &mut Dir) -> Option<u64> {
    // Since Linux 6.2, it is the size of the folder; older kernels report 0.
    let size = folder.stat().ok().and_then(|it| u64::try_from(it.st_size).ok());
    if let Some(size @ 1..) = size {
        return Some(size);
    }
    list_entries(folder)
}

fn list_entries(folder: &mut Dir) -> Option<u64> {
    folder.rewind();
    let mut count = 0;
    while let Some(entry) = folder.read() {
        let entry = entry.ok()?;
        let is_descriptor = entry.file_name().to_bytes().iter().all(u8::is_ascii_digit);
        count += u64::from(is_descriptor);
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        let status = "VmHWM:\t  99 kB\nVmRSS:\t   12 kB\nX:\n";
        assert_eq!(parse_bytes(status, "VmRSS:"), Some(12 * 1024));
        for status in ["", "VmRSS:\t x kB", "VmRSS:\t 1"] {
            assert_eq!(parse_bytes(status, "VmRSS:"), None);
        }
    }

    #[test]
    fn figures_follow_the_process() {
        let files = ProcessFiles::open();
        let before = files.read();
        assert!(files.resident().unwrap() > 100_000);
        let much = vec![1; 64 << 20];
        assert!(files.resident().unwrap() >= much.len() as u64);
        assert!(files.read().virtual_memory > files.resident());
        // Other tests open and close files, too.
        let opened: Vec<_> = (0..500).map(|_| File::open("/dev/null").unwrap()).collect();
        let now = files.read();
        assert!(now.open_fds.unwrap() >= before.open_fds.unwrap() + 400, "{before:?} {now:?}");
        assert!(now.max_fds > now.open_fds);
        assert!(now.cpu_seconds > before.cpu_seconds);
        drop(opened);
    }

    #[test]
    fn entries_can_be_listed_repeatedly() {
        let path = tempfile::tempdir().unwrap();
        let mut folder = Dir::new(File::open(path.path()).unwrap()).unwrap();
        for (number, name) in (0..).zip(["0", "17", "note"]) {
            assert_eq!(list_entries(&mut folder), Some(number));
            std::fs::write(path.path().join(name), "").unwrap();
        }
        assert_eq!(list_entries(&mut folder), Some(2));
    }
}
