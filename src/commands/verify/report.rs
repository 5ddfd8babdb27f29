//! Prints the findings to the standard output, as text or as JSON.

use std::fmt::Write as _;
use std::io::{self, Write, stdout};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use hexz_reader::{Error, Fault, VerifyStats};
use nbd_telemetry::escape;
use serde_json::{Value, json};

use crate::commands::output::mebibytes_per_second;
use crate::hints;

/// Reporter of the findings in one archive.
pub(super) struct Reporter {
    archive: PathBuf,
    is_json: bool,
}

impl Reporter {
    pub(super) fn new(path: &Path, is_json: bool) -> Self {
        Self { archive: path.to_owned(), is_json }
    }

    /// Reports that the archive can't be opened, in JSON only: people read it in the log.
    pub(super) fn unopened(&self, error: &Error) -> io::Result<()> {
        if !self.is_json {
            return Ok(());
        }
        print_json(&json!({
            "event": "unopened",
            "archive": escape::unicode(&self.archive),
            "file": escape::unicode(&*error.path),
            "reason": error.kind.label(),
            "problem": error.kind.to_string(),
        }))
    }

    /// Reports a fault with all ranges that it affects.
    pub(super) fn fault(&self, fault: &Fault) -> io::Result<()> {
        if self.is_json {
            return print_json(&self.fault_json(fault));
        }
        let mut text = format!(
            "FAULT in {}: {} [{}]\n",
            escape::path(&self.archive),
            escape::text(&hints::with_hint(&fault.error)),
            fault.error.kind.label()
        );
        for range in &fault.ranges {
            let (stream, last) = (fault.stream, range.end.saturating_sub(1));
            // Writing to a string can't fail.
            let _infallible =
                writeln!(text, "  can't be read: {stream} stream, bytes {} to {last}", range.start);
        }
        stdout().write_all(text.as_bytes())
    }

    fn fault_json(&self, fault: &Fault) -> Value {
        let ranges: Vec<Value> = fault
            .ranges
            .iter()
            .map(|range| json!({ "offset": range.start, "length": range.end - range.start }))
            .collect();
        json!({
            "event": "fault",
            "archive": escape::unicode(&self.archive),
            "file": escape::unicode(&*fault.error.path),
            "file_offset": fault.error.offset,
            "reason": fault.error.kind.label(),
            "problem": fault.error.kind.to_string(),
            "stream": fault.stream.to_string(),
            "blocks": fault.blocks,
            "bytes": fault.bytes(),
            "ranges": ranges,
        })
    }

    /// Reports the verdict and its numbers. `size` is the length of both streams, in bytes.
    pub(super) fn summary(&self, stats: &VerifyStats, size: u64, took: Duration) -> io::Result<()> {
        let seconds = took.as_secs_f64();
        if self.is_json {
            return print_json(&json!({
                "event": "summary",
                "archive": escape::unicode(&self.archive),
                "is_complete": stats.is_complete,
                "is_sound": stats.is_complete && stats.faults == 0,
                "faults": stats.faults,
                "size": size,
                "bytes": stats.bytes,
                "unreadable_bytes": stats.unreadable,
                "blocks": stats.blocks,
                "zero_blocks": stats.zeros,
                "blocks_in_parents": stats.in_parents,
                "shared_blocks": stats.shared,
                "seconds": seconds,
            }));
        }
        let faults = if stats.faults == 1 { "fault" } else { "faults" };
        let verdict = match (stats.is_complete, stats.faults) {
            (true, 0) => "sound".to_owned(),
            (true, count) => {
                format!("{count} {faults}, {} of {size} bytes can't be read", stats.unreadable)
            }
            (false, count) => {
                format!("stopped after {} of {size} bytes, {count} {faults} so far", stats.bytes)
            }
        };
        let checked = ByteSize::b(stats.bytes).display().iec();
        writeln!(
            stdout(),
            "{}: {verdict}\n  checked {checked} in {} blocks: {} of zeros, {} in parents, {} that \
             share a stored copy; {seconds:.1} s, {:.0} MiB/s",
            escape::path(&self.archive),
            stats.blocks,
            stats.zeros,
            stats.in_parents,
            stats.shared,
            mebibytes_per_second(stats.bytes, took),
        )
    }
}

fn print_json(object: &Value) -> io::Result<()> {
    writeln!(stdout(), "{}", escape::json(&object.to_string()))
}
