//! The part of `/status.json` that is shown here. The server may be older or newer than this
//! program: missing members take their default, and unknown ones are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// Status of a server. Times are Unix times in seconds, sizes are in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ServerStatus {
    pub(super) format: u64,
    pub(super) version: String,
    pub(super) pid: u64,
    pub(super) now: f64,
    pub(super) started: f64,
    pub(super) ready: bool,
    pub(super) unready: Option<String>,
    pub(super) listen: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    pub(super) tls: Tls,
    pub(super) connections: Vec<Connection>,
    pub(super) connections_total: ConnectionsTotal,
    pub(super) exports: Vec<Export>,
    pub(super) cache: Cache,
    pub(super) verification_failures: BTreeMap<String, u64>,
    pub(super) open_failures: BTreeMap<String, u64>,
    pub(super) memory: Memory,
    pub(super) reloads: Reloads,
    pub(super) audit: Option<Audit>,
    pub(super) recent_errors: Vec<LoggedError>,
}

impl ServerStatus {
    /// Parses an answer. Newer formats are accepted: members that are shown here have either kept
    /// their names or are missing.
    pub(super) fn parse(answer: &[u8]) -> Result<Self, String> {
        let status: Self = serde_json::from_slice(answer).map_err(|error| error.to_string())?;
        if status.format == 0 {
            return Err("it says no format".to_owned());
        }
        Ok(status)
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Tls {
    pub(super) certificate_expires: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) state: String,
    pub(super) peer: String,
    pub(super) via: Option<String>,
    pub(super) identity: Option<String>,
    pub(super) export: Option<String>,
    pub(super) tls: Option<String>,
    pub(super) since: f64,
    pub(super) requests: u64,
    pub(super) bytes: u64,
    pub(super) in_flight: u64,
    pub(super) errors: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct ConnectionsTotal {
    pub(super) negotiating: u64,
    pub(super) reading: u64,
    pub(super) accepted: u64,
    pub(super) refused: BTreeMap<String, u64>,
    pub(super) failed: BTreeMap<String, u64>,
    pub(super) handshake_failures: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Export {
    pub(super) name: String,
    pub(super) size: Option<u64>,
    pub(super) readers: u64,
    pub(super) requests: BTreeMap<String, u64>,
    pub(super) bytes: u64,
    pub(super) errors: u64,
    pub(super) read_seconds: Histogram,
}

impl Export {
    /// Returns the number of requests of all kinds.
    pub(super) fn total_requests(&self) -> u64 {
        self.requests.values().fold(0, |sum, many| sum.saturating_add(*many))
    }
}

/// Histogram of latencies: the total count, and cumulative counts by upper limit, in ascending
/// order.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Histogram {
    pub(super) count: u64,
    pub(super) buckets: Vec<(Limit, u64)>,
}

/// Upper limit of a bucket, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(from = "serde_json::Value")]
pub(super) struct Limit(pub(super) f64);

impl From<serde_json::Value> for Limit {
    /// Treats anything but a number as infinity. JSON has none, so the last limit may be null or a
    /// string.
    fn from(value: serde_json::Value) -> Self {
        Self(value.as_f64().unwrap_or(f64::INFINITY))
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Cache {
    pub(super) bytes: u64,
    pub(super) capacity: u64,
    pub(super) hits: u64,
    pub(super) misses: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Memory {
    pub(super) resident: Option<u64>,
    pub(super) budget: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Reloads {
    pub(super) failed: u64,
    pub(super) last_error: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Audit {
    pub(super) lost: u64,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct LoggedError {
    pub(super) at: f64,
    pub(super) message: String,
}

fn or_default<'a, T: Deserialize<'a> + Default, D: Deserializer<'a>>(
    source: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(source)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_unknown_members_are_tolerated() {
        let status = ServerStatus::parse(
            br#"{ "format": 2, "tls": null, "audit": null, "weather": ["fine"],
                 "exports": [{ "name": "a", "size": null, "requests": { "read": 2, "other": 3 },
                   "read_seconds": { "buckets": [[0.5, 1], [null, 2], ["+Inf", 2]] } }] }"#,
        )
        .unwrap();
        assert_eq!(status.exports[0].total_requests(), 5);
        let limits = status.exports[0].read_seconds.buckets.iter().map(|bucket| bucket.0.0);
        assert_eq!(limits.collect::<Vec<_>>(), [0.5, f64::INFINITY, f64::INFINITY]);
        for other in ["[]", "{}", "7", r#"{ "format": "1" }"#, "{"] {
            assert!(ServerStatus::parse(other.as_bytes()).is_err(), "{other}");
        }
    }
}
