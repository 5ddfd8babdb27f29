//! Options of `hexz-nbd verify`, `hexz-nbd digest` and `hexz-nbd tree`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::archives::OpenArchiveOptions;
use super::location;
use super::stores::StoreOptions;
use super::values::{number, os_text};

const EXIT_CODES: &str = "\
A block that is stored in a parent is verified there. Other blocks of a parent are verified only
if the parent is an ARCHIVE on the command line. Blocks whose index entry or hash shows that they
are zeros are never read.

With --json, the output is one object per line. Lengths are in bytes:
  event unopened: archive, file, reason, problem
  event fault: archive, file, file_offset, reason, problem, stream, blocks, bytes,
    ranges [{offset, length}]
  event summary: archive, is_complete, is_sound, faults, size, bytes, unreadable_bytes, blocks,
    zero_blocks, blocks_in_parents, shared_blocks, seconds
docs/check-archives.md lists the reasons.

EXIT STATUS
  0    every block of every archive can be read
  1    faults were found, or any other error
  2    invalid command line
  3    an archive can't be opened, or the password, a key or a list of digests can't be used
  130  interrupted (143: terminated, 141: the reader of its output closed it); the output is
       correct but incomplete";

#[derive(Debug, Args)]
#[command(after_long_help = EXIT_CODES, after_help = "Use --help for exit codes.")]
pub(crate) struct Verify {
    /// Archives to verify: files or URLs
    #[arg(required = true, value_name = "ARCHIVE", value_parser = os_text(location::archive))]
    pub(crate) archives: Vec<PathBuf>,
    /// Number of threads [default: number of cores]
    #[arg(long, value_name = "N", value_parser = number::<u16, 1, 1024>)]
    jobs: Option<u16>,
    /// Print results as JSON, one object per line
    #[arg(long)]
    pub(crate) json: bool,
    /// Don't show progress
    #[arg(long)]
    pub(crate) no_progress: bool,
    #[command(flatten)]
    pub(crate) opening: OpenArchiveOptions,
    #[command(flatten)]
    pub(crate) stores: StoreOptions,
}

impl Verify {
    /// Returns the number of threads that check. The default is the number of cores.
    pub(crate) fn threads(&self) -> NonZeroUsize {
        self.jobs
            .and_then(|jobs| NonZeroUsize::new(jobs.into()))
            .or_else(|| std::thread::available_parallelism().ok())
            .unwrap_or(NonZeroUsize::MIN)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Digest {
    /// Files or URLs to read; include the parents of thin archives
    #[arg(required = true, value_name = "FILE", value_parser = os_text(location::archive))]
    pub(crate) files: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) stores: StoreOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Tree {
    /// Files to read; include the parents of thin archives
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}
