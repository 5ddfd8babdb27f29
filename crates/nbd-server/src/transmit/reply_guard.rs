//! Guard that ensures a reply to a request processed in a task of its own.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::reply_encoder::ReplyEncoder;
use super::send_queue::SendQueue;
use crate::SessionMetrics;
use crate::budget::MemoryPermit;
use crate::error::Refusal;
use crate::wire::reply::ErrorCode;

/// Guard for the reply to one request that is processed in a task of its own. If the task panics,
/// the guard replies with an I/O error, so that no client waits forever. If the task is canceled,
/// there is no reply: the connection is ending, and the client would treat an error reply as a
/// failure of the disk.
#[derive(Debug)]
pub(super) struct ReplyGuard {
    pub(super) encoder: ReplyEncoder,
    replies: mpsc::UnboundedSender<SendQueue>,
    metrics: RequestMetrics,
    is_pending: bool,
}

/// Metrics record of one request, written when its reply is complete.
#[derive(Debug)]
pub(super) struct RequestMetrics {
    pub(super) session: Arc<SessionMetrics>,
    pub(super) arrived: Instant,
    /// Length of the read in bytes; `None` for other requests.
    pub(super) bytes: Option<u64>,
}

const WORKER_PANICKED: Refusal =
    Refusal::new(ErrorCode::IO, "the server failed; its log says how, and it is its fault");

impl ReplyGuard {
    pub(super) fn new(
        encoder: ReplyEncoder,
        replies: mpsc::UnboundedSender<SendQueue>,
        metrics: RequestMetrics,
    ) -> Self {
        Self { encoder, replies, metrics, is_pending: true }
    }

    /// Sends a part of the reply that is not the last one. `permit` is released once it has been
    /// sent.
    pub(super) fn send_part(
        &self,
        permit: Option<MemoryPermit>,
        write: impl FnOnce(ReplyEncoder, &mut SendQueue),
    ) {
        self.send(permit, false, write);
    }

    /// Sends the whole reply, or its last part.
    pub(super) fn finish(
        mut self,
        permit: Option<MemoryPermit>,
        write: impl FnOnce(ReplyEncoder, &mut SendQueue),
    ) {
        self.is_pending = false;
        self.metrics.record(None);
        self.send(permit, true, write);
    }

    /// Replies with an error.
    pub(super) fn refuse(mut self, refusal: &Refusal) {
        self.is_pending = false;
        self.metrics.record(Some(refusal));
        self.send(None, true, |encoder, out| encoder.refuse(out, refusal));
    }

    fn send(
        &self,
        permit: Option<MemoryPermit>,
        last: bool,
        write: impl FnOnce(ReplyEncoder, &mut SendQueue),
    ) {
        let mut reply = SendQueue::default();
        write(self.encoder, &mut reply);
        reply.push_marker(permit, last);
        // The receiver is gone if the connection has failed; the reply is then not needed.
        self.replies.send(reply).unwrap_or_default();
    }
}

impl RequestMetrics {
    fn record(&self, refusal: Option<&Refusal>) {
        if let Some(refusal) = refusal {
            self.session.add_error(refusal.code);
        }
        if let Some(bytes) = self.bytes {
            let bytes = if refusal.is_some() { 0 } else { bytes };
            self.session.add_reads(1, bytes, self.arrived.elapsed());
        }
    }
}

impl Drop for ReplyGuard {
    fn drop(&mut self) {
        if self.is_pending && std::thread::panicking() {
            self.metrics.record(Some(&WORKER_PANICKED));
            self.send(None, true, |encoder, out| encoder.refuse(out, &WORKER_PANICKED));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplyMode;
    use crate::wire::request::{Command, CommandFlags, Cookie, Request};

    fn guard(metrics: &Arc<SessionMetrics>) -> ReplyGuard {
        guard_with(metrics, mpsc::unbounded_channel().0)
    }

    fn guard_with(
        metrics: &Arc<SessionMetrics>,
        replies: mpsc::UnboundedSender<SendQueue>,
    ) -> ReplyGuard {
        let request = Request {
            flags: CommandFlags::default(),
            command: Command::READ,
            cookie: Cookie(1),
            offset: 0,
            length: 512,
        };
        let session = Arc::clone(metrics);
        let request_metrics = RequestMetrics { session, arrived: Instant::now(), bytes: Some(512) };
        ReplyGuard::new(ReplyEncoder::new(&request, ReplyMode::Simple), replies, request_metrics)
    }

    #[tokio::test]
    async fn each_reply_is_counted_once() {
        let metrics = Arc::new(SessionMetrics::default());
        let counted = || {
            let done = metrics.totals();
            (done.errors.total(), done.read_latency.count(), done.bytes)
        };
        guard(&metrics).finish(None, |encoder, out| encoder.done(out));
        assert_eq!(counted(), (0, 1, 512));
        guard(&metrics).refuse(&WORKER_PANICKED);
        assert_eq!(counted(), (1, 2, 512));
        // The connection has ended, which is not counted as an error.
        drop(guard(&metrics));
        assert_eq!(counted(), (1, 2, 512));
        let panics = guard(&metrics);
        let task = async move {
            let _guard = panics;
            panic!("as an export may");
        };
        assert!(tokio::spawn(task).await.is_err());
        assert_eq!(counted(), (2, 3, 512));
    }

    /// Regression test: the client was sent an error if the runtime shut down before its connection
    /// ended.
    #[tokio::test]
    async fn canceled_task_sends_no_reply() {
        let metrics = Arc::new(SessionMetrics::default());
        let (replies, mut answers) = mpsc::unbounded_channel();
        let (canceled, panics) =
            (guard_with(&metrics, replies.clone()), guard_with(&metrics, replies));
        let waits = tokio::spawn(async move {
            let _guard = canceled;
            std::future::pending::<()>().await;
        });
        tokio::task::yield_now().await;
        waits.abort();
        assert!(waits.await.unwrap_err().is_cancelled());
        assert!(answers.try_recv().is_err());
        let task = async move {
            let _guard = panics;
            panic!("as an export may");
        };
        assert!(tokio::spawn(task).await.is_err());
        assert!(answers.try_recv().is_ok());
    }
}
