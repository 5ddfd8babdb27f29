//! Records what clients read of an export, as a [`Trace`](crate::Trace).

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nbd_server::{Export, Span};
use parking_lot::Mutex;

use super::snapshot::SnapshotExport;
use super::trace::{MAX_TRACE_RANGES, TraceSource, ranges_of, units_of};

/// Maximum number of recordings at the same time. Each takes a few MiB at most.
const MAX_RECORDINGS: usize = 4;
/// Interval at which new ranges are returned.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);

/// The recordings in progress.
#[derive(Debug, Default)]
pub(super) struct Recordings {
    /// True if there are any. Reads check it first.
    is_active: AtomicBool,
    active: Mutex<Vec<Arc<Recorded>>>,
}

/// A recording of what all clients read of the export of one name. It ends when it is dropped.
///
/// Created by [`BlockReader::record`](crate::BlockReader::record).
#[derive(Debug)]
pub struct Recording {
    recordings: Weak<Recordings>,
    recorded: Arc<Recorded>,
}

#[derive(Debug)]
struct Recorded {
    export: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The stream and the time of the first read.
    source: Option<(TraceSource, Instant)>,
    is_source_returned: bool,
    /// Units that were used.
    used: HashSet<u64>,
    /// Units that haven't been returned, with milliseconds since the first read.
    new: Vec<(u64, u64)>,
}

impl Recordings {
    /// Starts a recording. Returns `None` if there are too many.
    pub(super) fn start(self: &Arc<Self>, export: &str) -> Option<Recording> {
        let mut active = self.active.lock();
        if active.len() >= MAX_RECORDINGS {
            return None;
        }
        let recorded = Arc::new(Recorded { export: export.to_owned(), state: Mutex::default() });
        active.push(Arc::clone(&recorded));
        self.is_active.store(true, Relaxed);
        Some(Recording { recordings: Arc::downgrade(self), recorded })
    }

    /// Takes note of a read.
    #[inline]
    pub(super) fn note(&self, export: &SnapshotExport, span: Span) {
        if self.is_active.load(Relaxed) {
            self.note_active(export, span);
        }
    }

    #[cold]
    fn note_active(&self, export: &SnapshotExport, span: Span) {
        let active = self.active.lock();
        for recorded in active.iter().filter(|recorded| recorded.export == export.name()) {
            recorded.state.lock().note(export, span);
        }
    }
}

impl State {
    fn note(&mut self, export: &SnapshotExport, span: Span) {
        let now = Instant::now();
        let (source, begun) = self.source.get_or_insert_with(|| (export.trace_source(), now));
        // It was replaced by another disk.
        if source.size != export.size() {
            return;
        }
        let at =
            u64::try_from(now.saturating_duration_since(*begun).as_millis()).unwrap_or_default();
        for unit in units_of(span.offset, span.length.into()) {
            if self.used.len() >= MAX_TRACE_RANGES {
                return;
            }
            if self.used.insert(unit) {
                self.new.push((unit, at));
            }
        }
    }

    /// Returns the lines of a trace that are new.
    fn take(&mut self) -> String {
        let mut lines = String::new();
        let Some((source, _)) = &self.source else { return lines };
        if !std::mem::replace(&mut self.is_source_returned, true) {
            lines = source.to_string();
        }
        for range in ranges_of(std::mem::take(&mut self.new), source.size) {
            // Writing to a string can't fail.
            writeln!(lines, "{range}").unwrap_or_default();
        }
        lines
    }
}

impl Recording {
    /// Waits until something is read that wasn't read before, and returns whole lines of the trace:
    /// first its head, and what has been recorded so far.
    ///
    /// Cancellation: nothing is lost.
    pub async fn next(&mut self) -> String {
        loop {
            let lines = self.recorded.state.lock().take();
            if !lines.is_empty() {
                return lines;
            }
            tokio::time::sleep(FLUSH_INTERVAL).await;
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(recordings) = self.recordings.upgrade() {
            let mut active = recordings.active.lock();
            active.retain(|other| !Arc::ptr_eq(other, &self.recorded));
            recordings.is_active.store(!active.is_empty(), Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockReader, Trace};
    use hexz_reader::{OpenOptions, Snapshot, StreamKind};
    use nbd_server::Export;

    fn export() -> SnapshotExport {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/archives/fixed-64k-zstd.hxz");
        let snapshot = Snapshot::open(path.as_ref(), &OpenOptions::default()).unwrap();
        let reader = BlockReader::new(64 << 20);
        SnapshotExport::new("disk".into(), Arc::new(snapshot), StreamKind::Main, reader)
    }

    #[tokio::test(start_paused = true)]
    async fn first_uses_are_recorded_in_order_whether_cached_or_not() {
        let export = export();
        let read = async |offset, length| {
            let span = Span { offset, length };
            if !export.read_now(span, &mut Vec::new()) {
                export.read(span, |_, _| ()).await.unwrap();
            }
        };
        read(0, 1).await;
        let mut recording = export.reader().record("disk").unwrap();
        let mut other = export.reader().record("other").unwrap();
        let mut text = String::new();
        for (offset, length) in [(200_000, 4096), (0, 1), (70_000, 140_000), (5, 5)] {
            read(offset, length).await;
        }
        text += &recording.next().await;
        read(300_000, 65_536).await;
        text += &recording.next().await;
        let trace: Trace = text.parse().unwrap();
        assert_eq!((trace.source.export.as_str(), trace.source.size), ("disk", export.size()));
        let ranges: Vec<_> = trace.ranges.iter().map(|it| (it.offset, it.length)).collect();
        let unit = 65_536;
        assert_eq!(ranges[..2], [(3 * unit, unit), (0, 3 * unit)]);
        assert_eq!(ranges[2..], [(4 * unit, 2 * unit)]);
        let waited = tokio::time::timeout(Duration::from_secs(10), other.next()).await;
        assert!(waited.is_err());
    }

    #[test]
    fn recordings_are_limited_and_end_when_they_are_dropped() {
        let reader = BlockReader::new(0);
        let mut recordings: Vec<_> = (0..4).map(|_| reader.record("x").unwrap()).collect();
        assert!(reader.record("x").is_none());
        recordings.pop();
        assert!(reader.record("x").is_some());
        recordings.clear();
        assert!(!reader.recordings.is_active.load(Relaxed));
    }
}
