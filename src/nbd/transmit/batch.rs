//! Requests that arrived together, and what is noted of them for whoever watches.

use std::mem::take;
use std::sync::Arc;
use std::time::Instant;

use super::ticket::Noted;
use crate::nbd::wire::request::Request;
use crate::nbd::{Activity, Requests, Span};

/// Requests that arrived together. The clock is asked twice for all of them, and what they were
/// is noted at once.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) activity: Arc<Activity>,
    /// When they came.
    pub(super) arrived: Instant,
    /// All that ever came, by what they asked for.
    requests: Requests,
    /// Reads of this batch that were answered at once, and with how many bytes.
    reads: u64,
    bytes: u64,
}

impl Batch {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        let requests = Requests::default();
        Self { activity, arrived: Instant::now(), requests, reads: 0, bytes: 0 }
    }

    /// A request has been taken in.
    pub(super) fn count(&mut self, request: &Request) {
        self.requests.count(request.command);
    }

    /// A read has been answered at once, with so many bytes.
    pub(super) fn answered(&mut self, bytes: u32) {
        self.reads += 1;
        self.bytes += u64::from(bytes);
    }

    /// A request, a read of `span` if it is one, will be answered later.
    pub(super) fn later(&self, span: Option<Span>) -> Noted {
        let bytes = span.map(|span| span.length.into());
        Noted { activity: Arc::clone(&self.activity), arrived: self.arrived, bytes }
    }

    /// All of them have been looked at.
    pub(super) fn note(&mut self) {
        let (reads, bytes) = (take(&mut self.reads), take(&mut self.bytes));
        if reads > 0 {
            self.activity.add_reads(reads, bytes, self.arrived.elapsed());
        }
        self.activity.set_requests(self.requests);
    }
}
