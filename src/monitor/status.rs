//! Status at one moment, in the format of `/status.json`.
//!
//! Members may be added. Existing ones keep their name and meaning as long as [`Status::format`]
//! stays the same. Times are Unix times in seconds, sizes are in bytes. `hexz-nbd top` reads the
//! status of other versions: missing members take their default, and unknown ones are ignored.

use std::borrow::Cow;

use nbd_gateway::{GatewayReport, LabelCounts};
use serde::{Deserialize, Serialize};

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
    /// Report of the gateway, whose members are on the same level.
    #[serde(flatten)]
    pub(crate) gateway: GatewayReport,
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

/// An error in the log.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RecentError {
    /// Time at which it was logged.
    pub(crate) at: f64,
    /// Message in the log, with its fields; long ones are cut.
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
