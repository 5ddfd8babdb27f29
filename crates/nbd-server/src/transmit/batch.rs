//! Metrics of requests that arrived together.

use std::mem::take;
use std::sync::Arc;
use std::time::Instant;

use super::reply_guard::RequestMetrics;
use crate::wire::request::Request;
use crate::{RequestCounts, SessionMetrics, Span};

/// Requests that arrived together. The clock is read and the metrics are updated once per batch,
/// not once per request.
#[derive(Debug)]
pub(super) struct RequestBatch {
    pub(super) metrics: Arc<SessionMetrics>,
    /// Time of arrival.
    pub(super) arrived: Instant,
    /// Total number of requests on this connection, by command.
    requests: RequestCounts,
    /// Number of reads of this batch that were answered immediately, and their total bytes of data.
    reads: u64,
    bytes: u64,
}

impl RequestBatch {
    pub(super) fn new(metrics: Arc<SessionMetrics>) -> Self {
        let requests = RequestCounts::default();
        Self { metrics, arrived: Instant::now(), requests, reads: 0, bytes: 0 }
    }

    /// Counts a request that was accepted.
    pub(super) fn count(&mut self, request: &Request) {
        self.requests.count(request.command);
    }

    /// Counts a read that was answered immediately with `bytes` bytes of data.
    pub(super) fn count_answered_read(&mut self, bytes: u32) {
        self.reads += 1;
        self.bytes += u64::from(bytes);
    }

    /// Returns the metrics record of a request that will be answered later; `span` is given for
    /// reads.
    pub(super) fn request_metrics(&self, span: Option<Span>) -> RequestMetrics {
        let bytes = span.map(|span| span.length.into());
        RequestMetrics { session: Arc::clone(&self.metrics), arrived: self.arrived, bytes }
    }

    /// Publishes the metrics once the whole batch has been processed.
    pub(super) fn publish(&mut self) {
        let (reads, bytes) = (take(&mut self.reads), take(&mut self.bytes));
        if reads > 0 {
            self.metrics.add_reads(reads, bytes, self.arrived.elapsed());
        }
        self.metrics.set_requests(self.requests);
    }
}
