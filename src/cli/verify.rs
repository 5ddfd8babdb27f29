//! Options of `hexz-nbd verify` and `hexz-nbd digest`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::archives::OpenArchiveOptions;

const EXIT_CODES: &str = "\
A block that lives in a parent is checked there. What a parent holds beyond that is checked
when the parent is given as an ARCHIVE itself. Blocks of zeros that are known by their index
entry or their hash are not read, as they never are.

With --json there is one object per line. Lengths are in bytes:
  event unopened: archive, file, reason, problem
  event fault: archive, file, file_offset, reason, problem, stream, blocks, bytes,
    ranges [{offset, length}]
  event summary: archive, is_complete, is_sound, faults, size, bytes, unreadable_bytes, blocks,
    zero_blocks, blocks_in_parents, shared_blocks, seconds
docs/check-archives.md lists the reasons.

EXIT CODES
  0    every block of every archive can be read
  1    there are faults, or it failed for a reason not named below
  2    the command line is wrong
  3    one of the archives can't be opened at all, or the password, a key or a list of digests
       can't be used
  130  it was interrupted (143: told to end, 141: nobody reads its output any more); what it has
       printed is true, but not all";

#[derive(Debug, Args)]
#[command(after_long_help = EXIT_CODES, after_help = "Use --help for exit codes.")]
pub(crate) struct Verify {
    /// The archives to check
    #[arg(required = true, value_name = "ARCHIVE")]
    pub(crate) archives: Vec<PathBuf>,
    /// How many threads check [default: as many as there are cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Print the results for machines, an object a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Don't say how far it has come
    #[arg(short = 'q', long)]
    pub(crate) no_progress: bool,
    #[command(flatten)]
    pub(crate) opening: OpenArchiveOptions,
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
    /// The files; give the parents of thin archives, too
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}
