//! Audit events of the built binary: what there has to be, what it promises, and where it fails.

mod events;
mod failures;
mod sandbox;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::wait_until;

const BASE: &str = "base-zstd.hxz";
const CHILD: &str = "child-zstd.hxz";

/// A folder for a file of events.
struct Record(TempDir);

impl Record {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("hexz-nbd-test-audit-").tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("audit.jsonl")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The events that are there by now, all of which have to be whole.
    fn events(&self) -> Vec<Value> {
        read(&self.path())
    }

    /// The first event of that name for which the rest holds.
    fn wait_for(&self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        wait_until(&format!("{name} is told"), || {
            let mut events = self.events().into_iter();
            found = events.find(|event| event["event"] == name && wanted(event));
            found.is_some()
        });
        found.unwrap()
    }

    fn wait_for_any(&self, name: &str) -> Value {
        self.wait_for(name, |_| true)
    }
}

fn read(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// Checks the numbers of all events of one run; says how many are lost.
fn assert_no_gaps(events: &[Value]) -> u64 {
    let (mut next, mut lost) = (1, 0);
    for event in events {
        let missing = if event["event"] == "lost" { event["count"].as_u64().unwrap() } else { 0 };
        assert_eq!(event["seq"].as_u64(), Some(next + missing), "{event}");
        assert_eq!(event["run"], events[0]["run"]);
        next += missing + 1;
        lost += missing;
    }
    lost
}
