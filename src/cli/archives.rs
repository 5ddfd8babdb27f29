//! Options for the archives that are served, and for opening and reading archives, which several
//! commands share.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::Args;
use hexz_exports::{ExportFolder, ExportSelection, MemoryPlan, NamedArchive};
use hexz_reader::ReferenceChoice;
use hexz_reader::limits::{DEFAULT_KDF_ITERATIONS, MAX_KDF_ITERATIONS};
use hexz_reader::storage::is_url;
use serde::Deserialize;

use super::values::{number, os_text, size};
use super::{from_file, location};

#[derive(Debug, Default, Clone, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct SnapshotOptions {
    /// Archives to serve: files, or URLs such as s3://BUCKET/KEY, gs://, az:// and https://. The
    /// export is called NAME, or like the file; an auxiliary stream is the export NAME/aux
    #[arg(
        required_unless_present_any = ["export_dir", "config"], value_name = "[NAME=]PATH",
        value_parser = os_text(location::named_archive)
    )]
    #[serde(skip)]
    pub(crate) named: Vec<NamedArchive>,
    /// Serve all .hxz and .hexz archives in this folder, or under this URL; a client's request opens
    /// them
    #[arg(
        long, value_name = "DIR|URL", value_parser = os_text(location::folder),
        help_heading = "Snapshots"
    )]
    #[serde(deserialize_with = "from_file::folder")]
    pub(crate) export_dir: Option<PathBuf>,
    /// Export for clients that request none [default: the snapshot, if there is only one]
    #[arg(long, value_name = "NAME", help_heading = "Snapshots")]
    pub(crate) default_export: Option<String>,
    /// Don't start if an archive of the command line or [exports] can't be opened, or the store of
    /// --export-dir doesn't respond
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
    /// Search this folder or URL for parent archives, besides the archive's own folder [repeatable]
    #[arg(
        long, value_name = "DIR|URL", value_parser = os_text(location::folder),
        help_heading = "Snapshots"
    )]
    #[serde(deserialize_with = "from_file::folders")]
    pub(crate) parent_dir: Vec<PathBuf>,
    /// Allow parent archives anywhere on this machine
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) allow_parent_anywhere: bool,
    /// File with the password of encrypted archives; a line break at its end is ignored
    #[arg(long, value_name = "FILE", help_heading = "Snapshots")]
    pub(crate) password_file: Option<PathBuf>,
    /// Maximum iterations of the key derivation of an encrypted archive. The Hexz tools use
    /// 600000; each million takes about 0.3 s of CPU time when the archive is opened
    #[arg(
        long, value_name = "N", default_value_t = DEFAULT_KDF_ITERATIONS,
        value_parser = number::<u32, 1, MAX_KDF_ITERATIONS>,
        help_heading = "Snapshots"
    )]
    #[serde(deserialize_with = "from_file::number::<_, _, 1, MAX_KDF_ITERATIONS>")]
    pub(crate) max_key_iterations: u32,
    /// Serve the bare stream of an archive that contains a packed directory
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) raw: bool,
    /// Resolve ambiguous references to parents, in all archives or in FILE [repeatable].
    ///
    /// Thin archives of Hexz 0.5 to 0.7 refer to blocks of a parent by offset or by hash, and
    /// don't record which. A block that differs between the two can't be read without this option:
    /// use "offset" for archives made by "hexz commit --thin" or merge_overlay, and "hash" for those
    /// packed against their parent. FILE is the archive's file name without folders. References that
    /// are not ambiguous aren't affected.
    #[arg(long, value_name = "[FILE=]offset|hash", help_heading = "Snapshots")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) resolve_references: Vec<ReferenceChoice>,
    /// Read ranges that no block covers as zeros, as the Hexz tools do, instead of I/O errors
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) zero_uncovered: bool,

    /// Open an archive only if it and all its parents are signed with this Ed25519 key: a file
    /// (32 bytes, 64 hexadecimal digits or PEM) or the digits [repeatable: any of the keys].
    ///
    /// The signature covers the master index (the list of index pages and the size of the disk)
    /// and the metadata, but not the header, the index pages or the blocks: a user who can write
    /// to the archive can still change its content. --digest covers everything.
    #[arg(long, value_name = "FILE|HEX", help_heading = "Integrity")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) verify_key: Vec<OsString>,
    /// Open an archive only if it and all its parents have these BLAKE3 digests: a list from
    /// "hexz-nbd digest" or b3sum, or NAME=BLAKE3 [repeatable].
    ///
    /// Archives are identified by their file names without folders; an archive that isn't listed
    /// is refused. Each is read completely when it is opened, on all cores, and again when its file
    /// has changed. Later reads are verified, too, so modifying a file while it is served causes
    /// I/O errors; this takes 128 KiB of memory per GiB. A reload (SIGHUP) reads the list again.
    #[arg(long, value_name = "FILE|NAME=BLAKE3", help_heading = "Integrity")]
    #[serde(deserialize_with = "from_file::list")]
    pub(crate) digest: Vec<OsString>,
}

/// Options for reading archives. They are fixed at startup, since all archives share one cache,
/// whose blocks have been verified by these options.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct ReadOptions {
    /// Memory for decoded blocks, index pages and replies in flight. The program needs up to
    /// 64 MiB more for itself and its connections, and the memory for --digest
    #[arg(
        long, value_name = "SIZE", default_value = "256MiB",
        value_parser = size::<0, { u64::MAX }>, help_heading = "Snapshots"
    )]
    #[serde(deserialize_with = "from_file::size::<_, _, 0, { u64::MAX }>")]
    cache_size: ByteSize,
    /// Don't verify the BLAKE3 of decoded blocks; CRC-32 and length are still verified
    #[arg(long, help_heading = "Snapshots")]
    pub(super) skip_hashes: bool,
}

impl ReadOptions {
    /// Returns the division of the memory budget, with `in_flight` bytes for replies in flight.
    /// The plan of a gateway with remote archives includes memory for what it fetches.
    pub(super) fn memory(&self, in_flight: u32, has_remote: bool) -> MemoryPlan {
        let plan = MemoryPlan::distribute(self.cache_size.as_u64(), in_flight);
        if has_remote { plan.with_fetched() } else { plan }
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
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> + Clone {
        self.named.iter().map(|named| named.path.as_path())
    }

    /// Returns the paths that are URLs: of archives, and of folders with archives or parents.
    pub(crate) fn urls(&self) -> impl Iterator<Item = &Path> + Clone {
        self.paths().chain(self.folders()).filter(|path| is_url(path))
    }

    /// Returns the folders that archives and their parents are read from.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &Path> + Clone {
        self.export_dir.iter().chain(&self.opening.parent_dir).map(PathBuf::as_path)
    }
}
