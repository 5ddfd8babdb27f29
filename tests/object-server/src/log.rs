//! The log of all requests.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::HeaderMap;
use parking_lot::Mutex;

/// A request, and what became of it.
#[derive(Debug, Clone)]
pub struct LoggedRequest {
    /// Position in the log since the server's start, from 0; clearing the log doesn't reset it.
    pub number: u64,
    /// Request method.
    pub method: String,
    /// Decoded path, with the bucket and without the query.
    pub path: String,
    /// Query string, as it was sent.
    pub query: String,
    /// Range header.
    pub range: Option<String>,
    /// All headers.
    pub headers: HeaderMap,
    /// Time of arrival.
    pub received: Instant,
    /// Status of the response; 0 until there is one, and if the connection was dropped instead.
    pub status: u16,
    /// S3 error code of the response; empty if it isn't an error.
    pub error: String,
    /// Part of the object that the body contains, if it is an object's.
    pub served: Option<Range<u64>>,
    /// Bytes of the body that were handed to the connection.
    pub bytes_sent: u64,
    /// Time from arrival to the end of the response; `None` while it is in progress.
    pub duration: Option<Duration>,
}

impl LoggedRequest {
    /// Returns the value of a header, if it is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns the range that a header `bytes=a-b` or `bytes=a-` asks for.
    #[must_use]
    pub fn requested_range(&self) -> Option<Range<u64>> {
        let (first, last) = self.range.as_ref()?.strip_prefix("bytes=")?.split_once('-')?;
        let end =
            if last.is_empty() { u64::MAX } else { last.parse::<u64>().ok()?.checked_add(1)? };
        Some(first.parse().ok()?..end)
    }

    /// Returns true for a successful GET of an object.
    #[must_use]
    pub fn is_data(&self) -> bool {
        self.method == "GET" && self.served.is_some()
    }
}

/// Sums over a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Number of requests.
    pub requests: usize,
    /// Number of successful GETs of objects.
    pub data_requests: usize,
    /// Bytes of objects that were sent.
    pub data_bytes: u64,
    /// Number of responses with a status of 400 or more.
    pub errors: usize,
    /// Maximum number of requests in progress at one time.
    pub max_concurrency: usize,
}

/// A handle to the log of a server. Clones refer to the same log.
#[derive(Debug, Clone, Default)]
pub struct RequestLog(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    entries: Vec<LoggedRequest>,
    /// Number of entries that were cleared.
    cleared: u64,
    in_progress: usize,
    max_concurrency: usize,
}

impl State {
    fn entry(&mut self, number: u64) -> Option<&mut LoggedRequest> {
        let index = usize::try_from(number.checked_sub(self.cleared)?).ok()?;
        self.entries.get_mut(index)
    }
}

impl RequestLog {
    /// Returns a copy of all entries, in order of arrival.
    #[must_use]
    pub fn entries(&self) -> Vec<LoggedRequest> {
        self.0.lock().entries.clone()
    }

    /// Returns the entries whose path contains `part`.
    #[must_use]
    pub fn entries_for(&self, part: &str) -> Vec<LoggedRequest> {
        let state = self.0.lock();
        state.entries.iter().filter(|entry| entry.path.contains(part)).cloned().collect()
    }

    /// Forgets all entries, and the maximum of requests in progress.
    pub fn clear(&self) {
        let mut state = self.0.lock();
        state.cleared += state.entries.len() as u64;
        state.entries.clear();
        state.max_concurrency = state.in_progress;
    }

    /// Returns the sums over all entries.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let state = self.0.lock();
        let data = || state.entries.iter().filter(|entry| entry.is_data());
        Totals {
            requests: state.entries.len(),
            data_requests: data().count(),
            data_bytes: data().map(|entry| entry.bytes_sent).sum(),
            errors: state.entries.iter().filter(|entry| entry.status >= 400).count(),
            max_concurrency: state.max_concurrency,
        }
    }

    /// Returns the number of aligned chunks of this size from which at least one byte was served.
    #[must_use]
    pub fn distinct_chunks(&self, chunk_size: u64) -> usize {
        let state = self.0.lock();
        let chunk_size = chunk_size.max(1);
        let chunks = state.entries.iter().filter(|entry| entry.is_data()).flat_map(|entry| {
            let served = entry.served.clone().unwrap_or_default();
            let chunks = served.start / chunk_size..served.end.div_ceil(chunk_size);
            chunks.map(|chunk| (entry.path.as_str(), chunk))
        });
        chunks.collect::<HashSet<_>>().len()
    }

    /// Adds a request. Its number is set, and it ends when the returned guard is dropped.
    pub(crate) fn begin(&self, mut request: LoggedRequest) -> (LoggedRequest, InProgress) {
        let mut state = self.0.lock();
        request.number = state.cleared + state.entries.len() as u64;
        state.entries.push(request.clone());
        state.in_progress += 1;
        state.max_concurrency = state.max_concurrency.max(state.in_progress);
        let number = request.number;
        (request, InProgress { log: self.clone(), number })
    }
}

/// A request that is being answered.
#[derive(Debug)]
pub(crate) struct InProgress {
    log: RequestLog,
    number: u64,
}

impl InProgress {
    /// Changes the request's entry, unless it has been cleared.
    pub(crate) fn update(&self, change: impl FnOnce(&mut LoggedRequest)) {
        if let Some(entry) = self.log.0.lock().entry(self.number) {
            change(entry);
        }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut state = self.log.0.lock();
        state.in_progress -= 1;
        if let Some(entry) = state.entry(self.number) {
            entry.duration = Some(entry.received.elapsed());
        }
    }
}
