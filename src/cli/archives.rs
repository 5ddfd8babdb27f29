//! Options for the archives that are served, and for opening and reading archives, which several
//! commands share.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::Args;
use hexz_exports::{ExportFolder, ExportSelection, MemoryPlan, NamedArchive};
use hexz_reader::ReferenceChoice;
use hexz_reader::limits::{DEFAULT_KDF_ITERATIONS, MAX_KDF_ITERATIONS};
use serde::Deserialize;

use super::from_file;
use super::values::{number, os_text, size};

#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct SnapshotOptions {
    /// The archives to serve. The export is called NAME, or like the file; an auxiliary
    /// stream is the export NAME/aux
    #[arg(
        required_unless_present_any = ["export_dir", "config"], value_name = "[NAME=]PATH",
        value_parser = os_text(NamedArchive::parse)
    )]
    #[serde(skip)]
    pub(crate) named: Vec<NamedArchive>,
    /// Serve every .hxz and .hexz archive in this folder too, found when it is asked for
    #[arg(long, value_name = "DIR", help_heading = "Snapshots")]
    pub(crate) export_dir: Option<PathBuf>,
    /// The export for clients that name none [default: the only snapshot, if it is one]
    #[arg(long, value_name = "NAME", help_heading = "Snapshots")]
    pub(crate) default_export: Option<String>,
    /// Don't start if one of the archives given here can't be opened
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) strict: bool,

    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) opening: OpenArchiveOptions,
}

/// Options for opening archives, common to several commands.
#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct OpenArchiveOptions {
    /// Look for parent archives in this folder too, besides the archive's own [repeatable]
    #[arg(long, value_name = "DIR", help_heading = "Snapshots")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) parent_dir: Vec<PathBuf>,
    /// Let an archive name a parent anywhere on this machine
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) allow_parent_anywhere: bool,
    /// A file with the password of an encrypted archive; a line break at its end is ignored
    #[arg(long, value_name = "FILE", help_heading = "Snapshots")]
    pub(crate) password_file: Option<PathBuf>,
    /// Iterations of the key derivation that an encrypted archive may ask for. The Hexz tools use
    /// 600000; each million takes some 0.3 s of a processor when the archive is opened
    #[arg(
        long, value_name = "N", default_value_t = DEFAULT_KDF_ITERATIONS,
        value_parser = number::<u32, 1, MAX_KDF_ITERATIONS>,
        help_heading = "Snapshots"
    )]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_KDF_ITERATIONS>")]
    pub(crate) max_key_iterations: u32,
    /// Use the bare stream of an archive that holds a packed directory
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) raw: bool,
    /// Decide what ambiguous references to parents mean, in all archives or in FILE [repeatable].
    ///
    /// Thin archives of Hexz 0.5 to 0.7 refer to a parent's blocks by offset or by hash, and
    /// nothing in them tells which. Where that matters, a block can't be read until it is
    /// decided: "offset" for archives that "hexz commit --thin" or merge_overlay made, "hash"
    /// for those that were packed against their parent. FILE is an archive's file name without
    /// folders. Whatever isn't ambiguous is read as it is meant, whatever is decided.
    #[arg(long, value_name = "[FILE=]offset|hash", help_heading = "Snapshots")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) resolve_references: Vec<ReferenceChoice>,
    /// Read ranges that no block covers as zeros, as the Hexz tools do, not as I/O errors
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) zero_uncovered: bool,

    /// Open an archive only if it and all its parents are signed with this Ed25519 key: a
    /// file (32 bytes, 64 hexadecimal digits or PEM) or the digits [repeatable: one of them].
    ///
    /// A signature covers the master index (which index pages there are, and how large the
    /// disk is) and the metadata. It doesn't cover the header, the index pages or the blocks:
    /// whoever can write to the archive can still change what it reads as. --digest covers
    /// everything.
    #[arg(long, value_name = "FILE|HEX", help_heading = "Integrity")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) verify_key: Vec<OsString>,
    /// Open an archive only if it and all its parents are the files that these BLAKE3 are of:
    /// a list as of "hexz-nbd digest" or b3sum, or NAME=BLAKE3 [repeatable].
    ///
    /// Archives are told apart by their file names, without folders. One that isn't listed is
    /// refused. Each is read whole when it is opened, on all cores, and again when its file
    /// has changed. Whatever is read later is verified, too, so that a file that is written to
    /// while it is served gives I/O errors; that takes 128 KiB of memory for each GiB. The list
    /// is read anew with everything else (SIGHUP).
    #[arg(long, value_name = "FILE|NAME=BLAKE3", help_heading = "Integrity")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) digest: Vec<OsString>,
}

/// How they are read. All share one cache, and what is in it has been checked by what held
/// when it was read: so this stays as it is.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct ReadOptions {
    /// Memory for decoded blocks, index pages and answers on their way. The program takes up
    /// to 64 MiB more for itself and its connections, and what --digest needs
    #[arg(
        long, value_name = "SIZE", default_value = "256MiB",
        value_parser = size::<0, { u64::MAX }>, help_heading = "Snapshots"
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, 0, { u64::MAX }>")]
    cache_size: ByteSize,
    /// Don't compare decoded blocks with their BLAKE3; CRC-32 and length still have to fit
    #[arg(long, help_heading = "Snapshots")]
    pub(super) skip_hashes: bool,
}

impl ReadOptions {
    /// Returns the division of the memory budget, with `in_flight` bytes for replies in flight.
    pub(super) fn memory(&self, in_flight: u32) -> MemoryPlan {
        MemoryPlan::distribute(self.cache_size.as_u64(), in_flight)
    }
}

impl SnapshotOptions {
    /// Returns the choice of archives to serve.
    pub(crate) fn choice(&self) -> ExportSelection {
        ExportSelection {
            named: self.named.clone(),
            folder: self.export_dir.clone().map(ExportFolder::new),
            default: self.default_export.clone(),
        }
    }

    /// Returns the paths of the archives to serve.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.named.iter().map(|named| named.path.as_path())
    }

    /// Returns the folders that archives and their parents are read from.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.export_dir.iter().chain(&self.opening.parent_dir).map(PathBuf::as_path)
    }
}
