//! Counters of one connection: the only ones, from which its metrics and statistics are derived.

use std::mem::take;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Refusal;
use crate::wire::request::Request;
use crate::{RequestCounts, SessionMetrics, Span};

/// Counters of one connection. The clock is read and the session's metrics are updated once for all
/// requests that arrived together (a batch), not once per request.
#[derive(Debug)]
pub(super) struct ConnectionMetrics {
    session: Arc<SessionMetrics>,
    /// Arrival of the current batch.
    pub(super) arrived: Instant,
    /// Requests received on this connection, by command.
    requests: RequestCounts,
    /// Total length of the valid reads among them, in bytes.
    requested_bytes: u64,
    /// Number of reads of this batch that were answered immediately, and their total bytes of data.
    answered_reads: u64,
    answered_bytes: u64,
}

impl ConnectionMetrics {
    /// Creates counters that are published to `session`.
    pub(super) fn new(session: Arc<SessionMetrics>) -> Self {
        Self {
            session,
            arrived: Instant::now(),
            requests: RequestCounts::default(),
            requested_bytes: 0,
            answered_reads: 0,
            answered_bytes: 0,
        }
    }

    /// Returns the number of requests received.
    pub(super) fn requests(&self) -> u64 {
        self.requests.total()
    }

    /// Returns the total length of the valid reads, in bytes.
    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested_bytes
    }

    /// Counts a request that was accepted.
    pub(super) fn count_request(&mut self, request: &Request) {
        self.requests.count(request.command);
    }

    /// Counts a valid read of `bytes` bytes.
    pub(super) fn count_read(&mut self, bytes: u32) {
        self.requested_bytes += u64::from(bytes);
    }

    /// Counts a read that was answered immediately with `bytes` bytes of data.
    pub(super) fn count_answered_read(&mut self, bytes: u32) {
        self.answered_reads += 1;
        self.answered_bytes += u64::from(bytes);
    }

    /// Counts a request that was answered immediately with an error.
    pub(super) fn count_refusal(&self, refusal: &Refusal) {
        self.session.add_error(refusal.code);
    }

    /// Counts a request that the rate limit delayed by `waited`.
    pub(super) fn count_throttled(&self, waited: Duration) {
        self.session.add_throttled(waited);
    }

    /// Returns the metrics record of a request that will be answered later; `span` is given for
    /// reads.
    pub(super) fn request_metrics(&self, span: Option<Span>) -> RequestMetrics {
        let bytes = span.map(|span| span.length.into());
        RequestMetrics { session: Arc::clone(&self.session), arrived: self.arrived, bytes }
    }

    /// Publishes the number of requests in flight.
    pub(super) fn publish_in_flight(&self, requests: u64) {
        self.session.set_in_flight(requests);
    }

    /// Publishes the counters once the whole batch has been processed.
    pub(super) fn publish(&mut self) {
        let (reads, bytes) = (take(&mut self.answered_reads), take(&mut self.answered_bytes));
        if reads > 0 {
            self.session.add_reads(reads, bytes, self.arrived.elapsed());
        }
        self.session.set_requests(self.requests);
    }
}

/// Metrics record of one request, written when its reply is complete.
#[derive(Debug)]
pub(super) struct RequestMetrics {
    pub(super) session: Arc<SessionMetrics>,
    pub(super) arrived: Instant,
    /// Length of the read in bytes; `None` for other requests.
    pub(super) bytes: Option<u64>,
}

impl RequestMetrics {
    /// Records that the reply is complete: a success, or the error given.
    pub(super) fn record(&self, refusal: Option<&Refusal>) {
        if let Some(refusal) = refusal {
            self.session.add_error(refusal.code);
        }
        if let Some(bytes) = self.bytes {
            let bytes = if refusal.is_some() { 0 } else { bytes };
            self.session.add_reads(1, bytes, self.arrived.elapsed());
        }
    }
}
