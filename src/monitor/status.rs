//! Status at one moment, in the format of `/status.json`.
//!
//! Members may be added. Existing ones keep their name and meaning as long as [`Status::format`]
//! stays the same. Times are Unix times in seconds, sizes are in bytes. `hexz-nbd top` reads the
//! status of other versions: missing members take their default, and unknown ones are ignored.

use std::borrow::Cow;

use hexz_exports::{ArchiveState, CatalogStatus, FolderArchive};
use nbd_gateway::{GatewayReport, LabelCounts};
use nbd_telemetry::escape;
use serde::{Deserialize, Serialize};

use super::problems::Problem;
use super::source::AuditCounts;
use super::stores::StoresStatus;

/// Status of the program and its gateway.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Status {
    /// Version of this format: 1.
    pub(crate) format: u32,
    /// Version of the program.
    pub(crate) version: Cow<'static, str>,
    /// Host name of the machine when the program started, if known.
    pub(crate) host: Option<String>,
    /// Process ID.
    pub(crate) pid: u32,
    /// Time of this status.
    pub(crate) now: f64,
    /// Time at which the program was started.
    pub(crate) started: f64,
    /// True if clients can be served.
    pub(crate) ready: bool,
    /// Reason why clients can't be served; `None` if they can.
    pub(crate) unready: Option<Cow<'static, str>>,
    /// Problems that an operator should know about, worst first.
    pub(crate) problems: Vec<Problem>,
    /// Report of the gateway, whose members are on the same level.
    #[serde(flatten)]
    pub(crate) gateway: GatewayReport,
    /// Archives that are served.
    pub(crate) archives: ArchivesStatus,
    /// Cache of decoded blocks.
    pub(crate) cache: CacheStatus,
    /// Reads from archives.
    pub(crate) storage: StorageStatus,
    /// Stores of remote archives; its members are on the same level, and absent without any.
    #[serde(flatten)]
    pub(crate) remote: StoresStatus,
    /// Number of requests that failed because a block couldn't be read or verified, by reason.
    pub(crate) verification_failures: LabelCounts,
    /// Number of archives that couldn't be opened, by reason.
    pub(crate) open_failures: LabelCounts,
    /// Memory use and limits.
    pub(crate) memory: MemoryStatus,
    /// Figures of the process.
    pub(crate) process: ProcessStatus,
    /// Counts of audit events; `None` without an audit log.
    pub(crate) audit: Option<AuditCounts>,
    /// Latest errors in the log, newest first.
    pub(crate) recent_errors: Vec<RecentError>,
}

impl Status {
    /// Parses a status in JSON. Newer formats are accepted: members that both versions have kept
    /// their meaning.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, String> {
        match serde_json::from_slice(json) {
            Ok(Self { format: 0, .. }) => Err("it has no format".to_owned()),
            parsed => parsed.map_err(|error| error.to_string()),
        }
    }
}

/// Archives that are served.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ArchivesStatus {
    /// Export folder; `None` if there is none.
    pub(crate) folder: Option<FolderStatus>,
    /// Archives that couldn't be opened the last time that this was tried; at most 100. Those of a
    /// folder are opened when a client asks for them.
    pub(crate) unavailable: Vec<UnavailableStatus>,
    /// Number of such archives.
    pub(crate) unavailable_count: u64,
}

/// The export folder.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct FolderStatus {
    /// Path or URL of the folder.
    pub(crate) path: String,
    /// Number of archives in it; `None` if it hasn't been read yet.
    pub(crate) archives: Option<u64>,
    /// The first archives in it by name, at most 100.
    pub(crate) contents: Vec<FolderArchiveStatus>,
    /// Files that look like archives but aren't served, each with the label of the reason.
    pub(crate) unserved: Vec<(String, Cow<'static, str>)>,
    /// Label of the reason for which it can't be read; `None` if it can.
    pub(crate) fault: Option<Cow<'static, str>>,
}

/// An archive in the export folder.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct FolderArchiveStatus {
    /// Name of its file and export.
    pub(crate) name: String,
    /// `open`, `closed`, `unavailable` (it couldn't be opened the last time), or `hidden` (an
    /// archive outside the folder is served under its name).
    pub(crate) state: Cow<'static, str>,
    /// Label of the reason for which it is unavailable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<Cow<'static, str>>,
}

/// An archive that couldn't be opened.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct UnavailableStatus {
    /// Name of its export.
    pub(crate) name: String,
    /// Label of the reason.
    pub(crate) reason: Cow<'static, str>,
    /// Description of the reason, with the path of the file.
    pub(crate) message: String,
}

impl From<CatalogStatus> for ArchivesStatus {
    fn from(status: CatalogStatus) -> Self {
        let folder = status.folder.map(|folder| FolderStatus {
            path: escape::path(&folder.path).to_string(),
            archives: folder.archives.map(|count| count as u64),
            contents: folder.contents.into_iter().map(Into::into).collect(),
            unserved: folder
                .unserved
                .into_iter()
                .map(|(name, why)| (escape::name(&name).to_string(), why.into()))
                .collect(),
            fault: folder.fault.map(|fault| fault.label().into()),
        });
        let unavailable = status.unavailable.into_iter().map(|it| UnavailableStatus {
            name: it.name,
            reason: it.reason.into(),
            message: it.message,
        });
        Self {
            folder,
            unavailable: unavailable.collect(),
            unavailable_count: status.unavailable_count as u64,
        }
    }
}

impl From<FolderArchive> for FolderArchiveStatus {
    fn from(archive: FolderArchive) -> Self {
        let (state, reason) = match archive.state {
            ArchiveState::Open => ("open", None),
            ArchiveState::Closed => ("closed", None),
            ArchiveState::Unavailable(reason) => ("unavailable", Some(reason.into())),
            ArchiveState::Hidden => ("hidden", None),
        };
        Self { name: archive.name, state: state.into(), reason }
    }
}

/// Cache of decoded blocks, and decoding.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct CacheStatus {
    /// Bytes of decoded blocks in the cache.
    pub(crate) bytes: u64,
    /// Maximum size of the cache.
    pub(crate) capacity: u64,
    /// Number of blocks that clients asked for and that were in the cache.
    pub(crate) hits: u64,
    /// Number of blocks that clients asked for and had to wait for.
    pub(crate) misses: u64,
    /// Number of blocks that were decoded, including readahead.
    pub(crate) decoded_blocks: u64,
    /// Decoded size of these blocks.
    pub(crate) decoded_bytes: u64,
    /// Seconds spent reading, verifying and decoding them, summed over all threads.
    pub(crate) decode_seconds: f64,
}

/// Reads from archive files.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StorageStatus {
    /// Number of reads.
    pub(crate) reads: u64,
    /// Number of bytes read.
    pub(crate) bytes: u64,
}

/// Memory use and limits of the program.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MemoryStatus {
    /// Resident memory of the process, if the kernel reports it.
    pub(crate) resident: Option<u64>,
    /// Memory that decoded blocks, index pages and replies share (`--cache-size`).
    pub(crate) budget: u64,
    /// Bytes of the shared memory budget that are held by replies in flight.
    pub(crate) in_flight: u64,
    /// Size of the budget for replies in flight.
    pub(crate) in_flight_limit: u64,
}

/// Figures of the process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessStatus {
    /// CPU time of all threads in seconds, in user and system mode.
    pub(crate) cpu_seconds: f64,
    /// Size of the address space in bytes, if the kernel reports it.
    pub(crate) virtual_memory: Option<u64>,
    /// Number of open file descriptors, if the kernel reports it.
    pub(crate) open_fds: Option<u64>,
    /// Maximum number of open file descriptors; `None` if it is unlimited.
    pub(crate) max_fds: Option<u64>,
}

/// An error in the log. Errors that differ in numbers only are counted as one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RecentError {
    /// Time at which it was last logged.
    pub(crate) at: f64,
    /// Time at which it was first logged.
    pub(crate) first: f64,
    /// Number of times.
    pub(crate) count: u64,
    /// Latest message in the log, with its fields; long ones are cut.
    pub(crate) message: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::stores::StoreStatus;

    #[test]
    fn missing_and_unknown_members_are_tolerated() {
        let status = Status::parse(
            br#"{ "format": 2, "tls": null, "audit": null, "weather": ["fine"],
                 "exports": [{ "name": "a", "size": null, "requests": { "read": 2, "other": 3 },
                   "read_seconds": { "buckets": [[0.5, 1]] } }] }"#,
        );
        let export = &status.unwrap().gateway.exports[0];
        assert_eq!((export.requests.total(), export.read_seconds.buckets[0]), (5, (0.5, 1)));
        for other in ["[]", "{}", "7", r#"{ "format": "1" }"#, "{"] {
            assert!(Status::parse(other.as_bytes()).is_err(), "{other}");
        }
    }

    #[test]
    fn a_status_survives_serialization() {
        let mut status = Status { format: 1, version: "1".into(), ..Status::default() };
        status.gateway.listen.push("x".to_owned());
        status.open_failures.insert("io".into(), 7);
        status.remote.stores.push(StoreStatus { breaker: "open".into(), ..Default::default() });
        status.remote.read_wait_seconds.insert("breaker".into(), 1.5);
        let json = serde_json::to_string(&status).unwrap();
        let parsed = Status::parse(json.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), json);
        assert!(parsed.remote.stores[0].is_down());
    }

    #[test]
    fn members_about_stores_are_absent_without_any() {
        let json = serde_json::to_value(Status { format: 1, ..Status::default() }).unwrap();
        for member in ["stores", "fetched", "read_wait_seconds", "remote"] {
            assert!(json.get(member).is_none(), "{member}");
        }
        let status = Status::parse(br#"{ "format": 1, "stores": [{ "name": "s3://golden" }] }"#);
        let remote = status.unwrap().remote;
        assert!(!remote.stores[0].is_down() && remote.fetched.is_none());
    }
}
