//! Options for the snapshots that are served, and for reading them.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use clap::Args;
use hexz_exports::Memory;
use hexz_exports::{Choice, Folder, Named};
use nbd_sandbox::Plan;

use super::opening::Opening;
use super::values::{os_text, size};

#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct Snapshots {
    /// The archives to serve. The export is called NAME, or like the file; an auxiliary
    /// stream is the export NAME/aux
    #[arg(
        required_unless_present = "export_dir", value_name = "[NAME=]PATH",
        value_parser = os_text(Named::parse)
    )]
    named: Vec<Named>,
    /// Serve every .hxz and .hexz archive in this folder too, found when it is asked for
    #[arg(long, value_name = "DIR", help_heading = "Snapshots")]
    export_dir: Option<PathBuf>,
    /// The export for clients that name none [default: the only snapshot, if it is one]
    #[arg(long, value_name = "NAME", help_heading = "Snapshots")]
    default_export: Option<String>,
    /// Don't start if one of the archives given here can't be opened
    #[arg(long, help_heading = "Snapshots")]
    pub(crate) strict: bool,

    #[command(flatten)]
    pub(crate) opening: Opening,
}

/// How they are read. All share one cache, and what is in it has been checked by what held
/// when it was read: so this stays as it is.
#[derive(Debug, Args)]
pub(super) struct Reading {
    /// Memory for decoded blocks, index pages and answers on their way. The program takes up
    /// to 64 MiB more for itself and its connections, and what --digest needs
    #[arg(
        long, value_name = "SIZE", default_value = "256MiB",
        value_parser = size, help_heading = "Snapshots"
    )]
    cache_size: ByteSize,
    /// Don't compare decoded blocks with their BLAKE3; CRC-32 and length still have to fit
    #[arg(long, help_heading = "Snapshots")]
    skip_hashes: bool,
}

impl Reading {
    /// Returns true if decoded blocks are verified against their hash.
    pub(super) fn verify_hashes(&self) -> bool {
        !self.skip_hashes
    }

    /// Returns the division of the memory budget, with `in_flight` bytes for replies in flight.
    pub(super) fn memory(&self, in_flight: u32) -> Memory {
        Memory::of(self.cache_size.as_u64(), in_flight)
    }
}

impl Snapshots {
    /// Returns the choice of archives to serve.
    pub(crate) fn choice(&self) -> Choice {
        Choice {
            named: self.named.clone(),
            folder: self.export_dir.clone().map(Folder::new),
            default: self.default_export.clone(),
        }
    }

    /// Replaces the archives to serve, which were a placeholder on the command line, by those of
    /// the configuration file.
    pub(crate) fn name(&mut self, named: Vec<Named>) {
        self.named = named;
    }

    /// Adds the files and folders that archives and their parents are read from.
    pub(super) fn add_to(&self, plan: Plan) -> Plan {
        Plan {
            files: self.named.iter().map(|named| named.path.clone()).collect(),
            folders: self.export_dir.iter().chain(&self.opening.parent_dir).cloned().collect(),
            anywhere: self.opening.allow_parent_anywhere,
            ..plan
        }
    }

    /// Returns the export for clients that name none.
    pub(crate) fn default_export(&self) -> Option<&str> {
        self.default_export.as_deref()
    }

    /// Returns the folder whose archives are served.
    pub(crate) fn export_dir(&self) -> Option<&Path> {
        self.export_dir.as_deref()
    }
}
