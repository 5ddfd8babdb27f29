//! Option for the audit log.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;

#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub(crate) struct AuditOptions {
    /// Append audit events to this file, or write them to the standard output with -: clients,
    /// their addresses and certificates, what they read, refusals and their reasons; one JSON
    /// object per line. SIGHUP reopens the file. See docs/audit.md
    #[arg(long, value_name = "FILE", help_heading = "Monitoring")]
    audit: Option<PathBuf>,
}

/// Destination of audit events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AuditDestination<'a> {
    StandardOutput,
    File(&'a Path),
}

impl AuditOptions {
    pub(crate) fn destination(&self) -> Option<AuditDestination<'_>> {
        self.audit.as_deref().map(|path| match path.to_str() {
            Some("-") => AuditDestination::StandardOutput,
            _ => AuditDestination::File(path),
        })
    }

    /// Returns the audit file, if events go to a file.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self.destination()? {
            AuditDestination::File(path) => Some(path),
            AuditDestination::StandardOutput => None,
        }
    }
}
