//! All that there is to see at one moment, in the form of `/status.json`.
//!
//! Members may be added; what is there keeps its name and its meaning as long as
//! [`Status::format`] is the same. Times are seconds of the Unix clock, sizes are bytes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::observed::AuditReport;
use crate::gateway::Report;

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// The form that this has: 1.
    pub format: u32,
    /// This program's version.
    pub version: &'static str,
    /// Its process.
    pub pid: u32,
    /// When this was.
    pub now: f64,
    /// When it was started.
    pub started: f64,
    /// Whether clients can be served.
    pub ready: bool,
    /// Why not, if they can't.
    pub unready: Option<&'static str>,
    /// The front end.
    #[serde(flatten)]
    pub gateway: Report,
    /// Decoded blocks.
    pub cache: Cache,
    /// What is read from archives' files.
    pub storage: Storage,
    /// Requests that couldn't be answered because of what was read, or wasn't, by reason.
    pub verification_failures: BTreeMap<&'static str, u64>,
    /// Archives that couldn't be opened, by reason.
    pub open_failures: BTreeMap<&'static str, u64>,
    /// Memory.
    pub memory: Memory,
    /// Audit events; `None` if there are none.
    pub audit: Option<AuditReport>,
    /// The last errors that went to the log, the newest first.
    pub recent_errors: Vec<RecentError>,
}

/// Decoded blocks, and decoding them.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Cache {
    /// What is kept.
    pub bytes: u64,
    /// How much may be.
    pub capacity: u64,
    /// Blocks that clients asked for and that were here.
    pub hits: u64,
    /// Blocks that they had to wait for.
    pub misses: u64,
    /// Blocks that were decoded, also those that were read ahead.
    pub decoded_blocks: u64,
    /// How long these are.
    pub decoded_bytes: u64,
    /// How many seconds it took to read, check and decode them, over all threads.
    pub decode_seconds: f64,
}

/// Reads from archives' files.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Storage {
    /// How many.
    pub reads: u64,
    /// What they came to.
    pub bytes: u64,
}

/// Memory.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Memory {
    /// What the process has, if the kernel says.
    pub resident: Option<u64>,
    /// What `--cache-size` lets decoded blocks, index pages and answers take together.
    pub budget: u64,
    /// What answers on their way take of what connections share.
    pub in_flight: u64,
    /// How much they may.
    pub in_flight_limit: u64,
}

/// An error.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RecentError {
    /// When it was logged.
    pub at: f64,
    /// What the log says.
    pub message: String,
}
