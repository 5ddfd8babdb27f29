//! Options of `hexz-nbd inspect`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use hexz_reader::limits::DEFAULT_KDF_ITERATIONS;

use super::values::os_text;
use super::{OpenArchiveOptions, StoreOptions, location};

const LONG_HELP: &str = "\
The information comes from the header, the master index and the index pages, so the password of an
encrypted archive isn't needed. Of the blocks, only the first is read, to recognize a raw disk. Use
\"hexz-nbd verify\" to check that all blocks can be read.

With --json, the output is one object. Lengths are in bytes; fields that don't apply are null:
  archive, file_length, format, layout, writers, compression, dictionary, encryption {iterations},
  blocks {nominal, vary, chunking {average, smallest, largest}}, signature (none, unchecked,
  valid, invalid), manifest {length, files, bytes, list with --files},
  metadata {length, text}, image, remarks [{reason, text}],
  index {pages, page_bytes, master_index}, streams {main, auxiliary: {size, pages, blocks,
  lengths {smallest, median, mean, largest, is_rounded, histogram [{up_to, blocks}]}, and each
  with blocks and bytes: stored, zeros, stored_zeros, in_parents, ambiguous, unresolvable,
  contradictory, unknown}}, stored {blocks, bytes, unshared, copies, copy_bytes, duplicates, saved,
  is_estimate}, parents [{child, name, found}], chain [{file, depth, blocks, bytes}],
  logical_bytes, faults [{file, file_offset, reason, problem}], more_faults
\"stored\" counts blocks of both streams that are stored in this file; \"chain\" counts the blocks
other than zeros by file, and parents are identified by their positions in it.

EXIT STATUS
  0  header and index are intact
  1  an index page is damaged, a parent or a block in it is missing, a signature is invalid, or
     any other error
  2  invalid command line
  3  the archive can't be opened, or a key can't be used";

#[derive(Debug, Args)]
#[command(after_long_help = LONG_HELP, after_help = "Use --help for the fields of --json and exit codes.")]
pub(crate) struct Inspect {
    /// Archive to describe: a file or a URL
    #[arg(value_name = "ARCHIVE", value_parser = os_text(location::archive))]
    pub(crate) archive: PathBuf,
    /// Print a JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// List the files of a packed directory
    #[arg(long)]
    pub(crate) files: bool,
    /// Search this folder or URL for parent archives, besides the archive's own folder [repeatable]
    #[arg(
        long, value_name = "DIR|URL", value_parser = os_text(location::folder),
        help_heading = "Snapshots"
    )]
    parent_dir: Vec<PathBuf>,
    /// Allow parent archives anywhere on this machine
    #[arg(long, help_heading = "Snapshots")]
    allow_parent_anywhere: bool,
    /// Verify the archive's signature with this Ed25519 key: a file (32 bytes, 64 hexadecimal
    /// digits or PEM) or the digits [repeatable: any of the keys]
    #[arg(long, value_name = "FILE|HEX", help_heading = "Integrity")]
    verify_key: Vec<OsString>,
    #[command(flatten)]
    pub(crate) stores: StoreOptions,
}

impl Inspect {
    /// Returns the options for opening the archive.
    pub(crate) fn opening(&self) -> OpenArchiveOptions {
        OpenArchiveOptions {
            parent_dir: self.parent_dir.clone(),
            allow_parent_anywhere: self.allow_parent_anywhere,
            password_file: None,
            max_key_iterations: DEFAULT_KDF_ITERATIONS,
            raw: true,
            resolve_references: Vec::new(),
            zero_uncovered: false,
            verify_key: self.verify_key.clone(),
            digest: Vec::new(),
        }
    }
}
