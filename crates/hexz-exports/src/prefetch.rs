//! Fetches parts of remote archives before clients ask for them: what a [`Trace`] names, or all.
//!
//! Stored bytes are brought into the caches of the archive's source, in memory and on disk; nothing
//! is decoded. All of it has the lowest priority and a limited rate.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytesize::ByteSize;
use futures_util::{StreamExt, stream};
use nbd_telemetry::escape;
use parking_lot::Mutex;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};

use super::blocks::Blocks;
use super::reader::{BlockError, BlockReader};
use super::trace::{MAX_TRACE_LENGTH, Trace, TracedRange};
use hexz_reader::storage::{FetchPriority, GROUP_LEN, is_url};
use hexz_reader::{OpenOptions, Snapshot, StoredBlock, StreamKind};

/// Maximum number of requests of one archive at the same time.
const CONCURRENCY: usize = 8;
/// Unit in which sources fetch and cache, in bytes.
const UNIT: u64 = GROUP_LEN;
/// Maximum number of units in one request.
const MAX_UNITS: u64 = 4;

/// Where the traces of remote archives are, and how they are used.
#[derive(Debug, Clone)]
pub struct PrefetchOptions {
    /// The place of traces; `None` if they aren't used.
    pub traces: Option<TracePlace>,
    /// Maximum rate of all archives together, in bytes per second.
    pub rate: u64,
    /// Maximum number of bytes for one archive, so that it doesn't evict what it has fetched.
    pub max_bytes: u64,
    /// True if nothing is ready before the archives that are opened first have been prefetched.
    pub ready_when_warm: bool,
}

/// Where the trace of the archive `NAME` is: in a file or object `NAME.trace`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TracePlace {
    /// Beside the archive.
    Beside,
    /// In a folder, given as a path or a URL.
    Folder(PathBuf),
}

/// Result of a prefetch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefetchSummary {
    /// Bytes that had to be fetched.
    pub fetched: u64,
    /// Bytes that were wanted, in whole units of 256 KiB.
    pub wanted: u64,
    /// True if more was wanted than may be prefetched.
    pub is_cut: bool,
}

/// Replays the traces of archives.
#[derive(Debug)]
pub(super) struct Prefetcher {
    options: PrefetchOptions,
    limit: RateLimiter,
    /// Number of archives that are being prefetched.
    in_progress: AtomicUsize,
    /// True once no archive was being prefetched when somebody asked.
    was_warm: AtomicBool,
}

/// Delays requests to a rate.
#[derive(Debug)]
struct RateLimiter {
    rate: u64,
    /// Time from which on the next request may be made.
    next: Mutex<Instant>,
}

impl RateLimiter {
    fn new(rate: u64) -> Self {
        Self { rate: rate.max(1), next: Mutex::new(Instant::now()) }
    }

    /// Waits until a request for `bytes` may be made.
    async fn wait(&self, bytes: u64) {
        #[expect(clippy::cast_precision_loss, reason = "a duration needn't be exact")]
        let time = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        let start = {
            let mut next = self.next.lock();
            let start = (*next).max(Instant::now());
            *next = start + time;
            start
        };
        sleep_until(start).await;
    }
}

/// Counts an archive as being prefetched.
struct InProgress(Arc<Prefetcher>);

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.in_progress.fetch_sub(1, Relaxed);
    }
}

impl Prefetcher {
    pub(super) fn new(options: PrefetchOptions) -> Self {
        let limit = RateLimiter::new(options.rate);
        Self { options, limit, in_progress: AtomicUsize::new(0), was_warm: AtomicBool::new(false) }
    }

    /// Returns true while clients are to wait until the first archives have been prefetched.
    pub(super) fn is_warming_up(&self) -> bool {
        if !self.options.ready_when_warm || self.was_warm.load(Relaxed) {
            return false;
        }
        let is_warm = self.in_progress.load(Relaxed) == 0;
        self.was_warm.store(is_warm, Relaxed);
        !is_warm
    }
}

impl BlockReader {
    /// Starts to prefetch what the trace of an archive names, if it is remote and there is a trace.
    /// Must be called in a tokio runtime.
    pub(super) fn start_prefetch(
        self: &Arc<Self>,
        snapshot: &Arc<Snapshot>,
        options: &OpenOptions,
    ) {
        let Some(prefetcher) = self.prefetcher.as_ref().filter(|_| snapshot.is_remote()) else {
            return;
        };
        let Some(place) = &prefetcher.options.traces else { return };
        prefetcher.in_progress.fetch_add(1, Relaxed);
        let in_progress = InProgress(Arc::clone(prefetcher));
        let path = place.path_for(snapshot.path());
        let (reader, options) = (Arc::clone(self), options.clone());
        // A snapshot that is closed before its trace has been read needn't be prefetched.
        let snapshot = Arc::downgrade(snapshot);
        tokio::spawn(async move {
            let shown = escape::path(&path).to_string();
            match load_trace(path, &options).await {
                Ok(Some(trace)) => reader.replay(&snapshot, &trace, &shown, &in_progress.0).await,
                Ok(None) => {}
                Err(error) => tracing::warn!(
                    reason = "trace_unusable",
                    "{shown}: {error}; nothing is prefetched"
                ),
            }
        });
    }

    async fn replay(
        self: Arc<Self>,
        snapshot: &Weak<Snapshot>,
        trace: &Trace,
        path: &str,
        prefetcher: &Prefetcher,
    ) {
        let begun = Instant::now();
        let Some(opened) = snapshot.upgrade() else { return };
        let (stream, size) = (trace.source.stream, opened.size(trace.source.stream));
        if trace.source.size != size {
            tracing::warn!(
                reason = "trace_unusable",
                "{path}: it was recorded from a disk of {} bytes instead of {size}; nothing is \
                 prefetched",
                trace.source.size,
            );
            return;
        }
        let blocks = Blocks { stream, snapshot: opened, reader: self, client: Arc::default() };
        let result =
            blocks.prefetch(&trace.ranges, &prefetcher.limit, prefetcher.options.max_bytes);
        match result.await {
            Ok(PrefetchSummary { fetched, wanted, is_cut }) => tracing::info!(
                fetched,
                wanted,
                is_cut,
                "{path}: prefetched {} of {} in {:.1} s",
                ByteSize(fetched).display().iec(),
                ByteSize(wanted).display().iec(),
                begun.elapsed().as_secs_f64(),
            ),
            Err(error) => tracing::warn!(
                reason = error.label(),
                "{path}: the prefetch of its archive has ended early: {error}"
            ),
        }
    }
}

impl TracePlace {
    /// Returns the path of the trace of an archive.
    fn path_for(&self, archive: &Path) -> PathBuf {
        let mut path = match self {
            Self::Beside => OsString::from(archive),
            Self::Folder(folder) => folder.join(archive.file_name().unwrap_or_default()).into(),
        };
        path.push(".trace");
        path.into()
    }
}

/// Reads a trace. Returns `None` if there is none.
async fn load_trace(path: PathBuf, options: &OpenOptions) -> io::Result<Option<Trace>> {
    let options = options.clone();
    let read = spawn_blocking(move || read_trace(&path, &options)).await;
    read.map_err(io::Error::other).flatten()
}

fn read_trace(path: &Path, options: &OpenOptions) -> io::Result<Option<Trace>> {
    let storage = match options.open_side_file(path, FetchPriority::Ahead) {
        Ok(storage) => storage,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // S3 answers like this for an object that doesn't exist, without permission to list.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && is_url(path) => {
            tracing::debug!("{}: no trace is used: {error}", escape::path(path));
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    if storage.length() > MAX_TRACE_LENGTH {
        let message = format!("a trace has at most {MAX_TRACE_LENGTH} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut bytes = vec![0; usize::try_from(storage.length()).unwrap_or_default()];
    storage.read_exact_at(&mut bytes, 0)?;
    let text = String::from_utf8(bytes).map_err(|error| io::Error::other(error.utf8_error()))?;
    text.parse().map(Some).map_err(io::Error::other)
}

/// Prefetches a snapshot: what its trace names, or else everything that clients could read. Local
/// archives have nothing to fetch.
///
/// # Errors
/// The trace can't be used, the store fails, or the index is damaged.
pub async fn prefetch(
    snapshot: &Arc<Snapshot>,
    open: &OpenOptions,
    options: &PrefetchOptions,
) -> Result<PrefetchSummary, PrefetchError> {
    let trace = match &options.traces {
        Some(place) => {
            let path = place.path_for(snapshot.path());
            let trace = load_trace(path.clone(), open).await;
            trace.map_err(|error| PrefetchError::Trace { path, error })?
        }
        None => None,
    };
    let limit = RateLimiter::new(options.rate);
    let parts = match trace {
        Some(trace) => vec![(trace.source.stream, trace.ranges)],
        None => {
            [StreamKind::Main, StreamKind::Auxiliary].map(|it| (it, whole(snapshot, it))).into()
        }
    };
    let mut summary = PrefetchSummary::default();
    for (stream, ranges) in parts {
        let (snapshot, reader) = (Arc::clone(snapshot), BlockReader::new(0));
        let blocks = Blocks { stream, snapshot, reader, client: Arc::default() };
        let max_bytes = options.max_bytes.saturating_sub(summary.wanted);
        let part = blocks.prefetch(&ranges, &limit, max_bytes).await;
        let part = part.map_err(|error| PrefetchError::Read {
            label: error.label(),
            message: error.to_string(),
        })?;
        summary.fetched += part.fetched;
        summary.wanted += part.wanted;
        summary.is_cut |= part.is_cut;
    }
    Ok(summary)
}

/// Returns all of a stream as a range.
fn whole(snapshot: &Snapshot, stream: StreamKind) -> Vec<TracedRange> {
    let length = snapshot.size(stream);
    vec![TracedRange { offset: 0, length, at: Duration::ZERO }]
}

/// Reason for which a snapshot can't be prefetched.
#[derive(Debug, thiserror::Error)]
pub enum PrefetchError {
    /// The trace can't be used.
    #[error("can't use the trace {}: {error}", escape::path(.path))]
    Trace {
        /// Path or URL of the trace.
        path: PathBuf,
        /// What is wrong with it.
        error: io::Error,
    },
    /// The archive can't be read.
    #[error("{message}")]
    Read {
        /// Stable label for logs and programs.
        label: &'static str,
        /// What failed.
        message: String,
    },
}

impl PrefetchError {
    /// Returns a stable label for logs and programs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Trace { .. } => "trace_unusable",
            Self::Read { label, .. } => label,
        }
    }
}

impl Blocks {
    /// Fetches the stored bytes of the blocks in `ranges` of the stream, in their order, at most
    /// `max_bytes`.
    async fn prefetch(
        &self,
        ranges: &[TracedRange],
        limit: &RateLimiter,
        max_bytes: u64,
    ) -> Result<PrefetchSummary, BlockError> {
        for archive in 0..=self.snapshot.parents().count() {
            if let Some(announcement) = self.snapshot.prefetch(archive, 0..0) {
                // From now on, other reads fetch only what they need.
                announcement.await.map_err(BlockError::Snapshot)?;
            }
        }
        let (units, is_cut) = self.stored_units(ranges, max_bytes / UNIT).await?;
        let wanted = units.len() as u64 * UNIT;
        let requests = stream::iter(merge(units)).map(async |(archive, range)| {
            limit.wait(range.end - range.start).await;
            match self.snapshot.prefetch(archive, range) {
                Some(prefetch) => prefetch.await.map_err(BlockError::Snapshot),
                None => Ok(0),
            }
        });
        let mut requests = pin!(requests.buffer_unordered(CONCURRENCY));
        let mut fetched = 0;
        while let Some(bytes) = requests.next().await {
            fetched += bytes?;
        }
        Ok(PrefetchSummary { fetched, wanted, is_cut })
    }

    /// Returns the units of remote archives that store the blocks in `ranges`, in order, and
    /// whether there are more than `most`. Fetches index pages.
    async fn stored_units(
        &self,
        ranges: &[TracedRange],
        most: u64,
    ) -> Result<(Vec<(usize, u64)>, bool), BlockError> {
        let (mut units, mut known) = (Vec::new(), HashSet::new());
        for range in ranges {
            let (mut at, end) = (range.offset, range.offset + range.length);
            while at < end {
                tokio::task::consume_budget().await;
                let located = self.locate(at, FetchPriority::Ahead).await;
                let block = located.map_err(|failure| failure.cause)?;
                at = block.end();
                let stored = self.stored(&block, FetchPriority::Ahead).await?;
                let is_remote =
                    |it: &StoredBlock| self.snapshot.is_archive_remote(it.chain_index());
                let Some(stored) = stored.filter(|it| it.length() > 0).filter(is_remote) else {
                    continue;
                };
                let (archive, offset) = (stored.chain_index(), stored.offset());
                for unit in offset / UNIT..(offset + u64::from(stored.length())).div_ceil(UNIT) {
                    if !known.insert((archive, unit)) {
                        continue;
                    }
                    if units.len() as u64 >= most {
                        return Ok((units, true));
                    }
                    units.push((archive, unit));
                }
            }
        }
        Ok((units, false))
    }
}

/// Merges units to requests: each takes along the units that follow it in the archive, if they are
/// wanted, too. Returns ranges of bytes.
fn merge(units: Vec<(usize, u64)>) -> Vec<(usize, Range<u64>)> {
    let mut left: HashSet<(usize, u64)> = units.iter().copied().collect();
    let mut requests = Vec::new();
    for (archive, first) in units {
        if !left.remove(&(archive, first)) {
            continue;
        }
        let mut end = first + 1;
        while end - first < MAX_UNITS && left.remove(&(archive, end)) {
            end += 1;
        }
        requests.push((archive, first * UNIT..end * UNIT));
    }
    requests
}
