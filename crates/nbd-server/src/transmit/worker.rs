//! Processing of requests that have to wait, each in a task of its own.

use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use super::assembly::{Assembly, SegmentRun};
use super::metrics::RequestMetrics;
use super::reply_encoder::ReplyEncoder;
use super::send_queue::SendQueue;
use crate::budget::{ConnectionBudget, MemoryPermit, RESERVE};
use crate::error::Refusal;
use crate::wire::MAX_PAYLOAD;
use crate::wire::reply::{ErrorCode, Extent, MAX_EXTENTS};
use crate::{Export, Segment, SelectedContext, Span};

/// Maximum length of the pieces in which a long read is processed, in bytes. Each piece waits for
/// its turn among the connection's other requests and takes memory of its own, so a read of 32 MiB
/// is served like many short reads.
pub(super) const MAX_PIECE: u32 = 256 * 1024;

/// Alignment of the end of a piece, in bytes, unless it is the end of the read.
const PIECE_ALIGNMENT: u64 = 4096;

/// Maximum number of requests of one connection that are processed concurrently. The others wait,
/// so that a flood of requests does not delay all other clients.
const MAX_CONCURRENT_JOBS: usize = 8;

/// Error for data that does not fill the requested range exactly. Sending it would corrupt the
/// framing of all later replies.
pub(super) const DATA_MISMATCH: Refusal = Refusal::new(
    ErrorCode::IO,
    "internal server error: the export returned the wrong amount of data",
);

/// Work of a task.
#[derive(Debug)]
pub(super) enum Job {
    /// Read of this range; if `whole`, the reply has one content chunk.
    Read { span: Span, whole: bool },
    /// Preparation for reads of this range.
    Cache { offset: u64, length: u64 },
    /// Block status query.
    Status(StatusQuery),
}

/// Context shared by all tasks of one connection.
#[derive(Debug)]
pub(super) struct Worker<E> {
    export: Arc<E>,
    budget: Arc<ConnectionBudget>,
    permits: Semaphore,
}

impl<E: Export> Worker<E> {
    pub(super) fn new(export: Arc<E>, budget: Arc<ConnectionBudget>) -> Self {
        Self { export, budget, permits: Semaphore::new(MAX_CONCURRENT_JOBS) }
    }

    /// Processes a job and replies through `guard`.
    pub(super) async fn process(self: Arc<Self>, guard: ReplyGuard, job: Job) {
        match job {
            Job::Read { span, whole } if whole || guard.encoder.is_simple() => {
                self.read_whole(guard, span).await;
            }
            Job::Read { span, .. } => self.read_in_pieces(guard, span).await,
            Job::Cache { offset, length } => {
                let _permit = self.permit().await;
                match self.export.cache(offset, length).await {
                    Ok(()) => guard.finish(None, |encoder, out| encoder.done(out)),
                    Err(error) => guard.refuse(&error.into()),
                }
            }
            Job::Status(query) => self.status(guard, query).await,
        }
    }

    /// Waits for a permit to process a request of this connection.
    async fn permit(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed, so the permit is always granted.
        self.permits.acquire().await.ok()
    }

    async fn read_whole(&self, guard: ReplyGuard, span: Span) {
        let _permit = self.permit().await;
        let memory_permit = self.budget.acquire(span.length).await;
        let mut assembly = Assembly::new(span);
        let mut parts_valid = true;
        let part = |offset, segment| parts_valid &= assembly.add(offset, segment);
        if let Err(error) = self.export.read(span, part).await {
            return guard.refuse(&error.into());
        }
        if !parts_valid || !assembly.is_complete() {
            return guard.refuse(&DATA_MISMATCH);
        }
        let runs = assembly.take_all();
        let mut segments: Vec<Segment> = runs.into_iter().flat_map(|run| run.segments).collect();
        guard.finish(Some(memory_permit), |encoder, out| {
            encoder.data(out, span, true, true, &mut segments);
        });
    }

    async fn read_in_pieces(&self, guard: ReplyGuard, span: Span) {
        let mut at = span.offset;
        while at < span.end() {
            let _permit = self.permit().await;
            let wanted = piece_at(at, span.end(), MAX_PIECE).length;
            let (memory_permit, length) = self.budget.acquire_up_to(wanted, RESERVE).await;
            let piece = piece_at(at, span.end(), length);
            at = piece.end();
            match self.read_piece(&guard, piece).await {
                Ok(rest) if at < span.end() => {
                    guard.send_part(Some(memory_permit), |encoder, out| {
                        write_runs(rest, encoder, out, false);
                    });
                }
                Ok(rest) => {
                    return guard.finish(Some(memory_permit), |encoder, out| {
                        write_runs(rest, encoder, out, true);
                    });
                }
                Err(refusal) => return guard.refuse(&refusal),
            }
        }
    }

    /// Reads a piece, and sends parts of it before all of it has been read. Returns the rest, so
    /// that the caller can send it with or without the end of the reply.
    async fn read_piece(
        &self,
        guard: &ReplyGuard,
        piece: Span,
    ) -> Result<Vec<SegmentRun>, Refusal> {
        let mut assembly = Assembly::new(piece);
        let mut parts_valid = true;
        let part = |offset, segment| {
            parts_valid &= assembly.add(offset, segment);
            if parts_valid
                && !assembly.is_complete()
                && let Some(run) = assembly.take_around(offset)
            {
                guard.send_part(None, |encoder, out| write_runs(vec![run], encoder, out, false));
            }
        };
        self.export.read(piece, part).await?;
        if parts_valid && assembly.is_complete() {
            Ok(assembly.take_all())
        } else {
            Err(DATA_MISMATCH)
        }
    }

    async fn status(&self, guard: ReplyGuard, query: StatusQuery) {
        /// Refusal of a reply without extents, with which a client would make no progress.
        const NO_EXTENTS: Refusal =
            Refusal::new(ErrorCode::IO, "internal server error: the export returned no extents");
        let _permit = self.permit().await;
        let (mut memory_permit, memory) =
            self.budget.acquire_up_to(query.memory(), MIN_STATUS_MEMORY).await;
        let mut answers = Vec::with_capacity(query.contexts.len());
        for context in &query.contexts {
            let StatusQuery { offset, length, .. } = query;
            let max_extents = query.max_extents(memory);
            match self.export.extents(context.position, offset, length, max_extents).await {
                Ok(extents) if extents.is_empty() => return guard.refuse(&NO_EXTENTS),
                Ok(extents) => answers.push((context.id, extents)),
                Err(error) => return guard.refuse(&error.into()),
            }
        }
        let extents: usize = answers.iter().map(|(_, extents)| extents.len()).sum();
        memory_permit.shrink_to(extents * EXTENT_SIZE);
        guard.finish(Some(memory_permit), |encoder, out| encoder.status(out, &answers));
    }
}

/// Returns the piece of a read that starts at `at` and is at most `most` bytes long.
fn piece_at(at: u64, end: u64, most: u32) -> Span {
    let mut until = at + u64::from(most);
    until -= until % PIECE_ALIGNMENT;
    let until = if until > at { until.min(end) } else { end.min(at + u64::from(most)) };
    // Cannot overflow: no longer than `most`, which fits in 32 bits.
    Span { offset: at, length: u32::try_from(until - at).unwrap_or(most) }
}

/// Writes the data that was read, and ends the reply if it is the `last` part.
fn write_runs(runs: Vec<SegmentRun>, encoder: ReplyEncoder, out: &mut SendQueue, last: bool) {
    let mut left = runs.len();
    if left == 0 && last {
        encoder.done(out);
    }
    for mut run in runs {
        left -= 1;
        encoder.data(out, run.span, false, last && left == 0, &mut run.segments);
    }
}

/// A validated block status request.
#[derive(Debug)]
pub(super) struct StatusQuery {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// True if at most one extent per context is wanted.
    pub(super) single_extent: bool,
    pub(super) contexts: Vec<SelectedContext>,
}

/// Memory needed for one extent, in bytes.
const EXTENT_SIZE: usize = size_of::<Extent>();

/// Memory that always suffices for a reply to a block status request, if an incomplete one, in
/// bytes.
const MIN_STATUS_MEMORY: u32 = RESERVE / 4;

impl StatusQuery {
    /// Returns the maximum length of the payload of a block status request for some of `contexts`,
    /// in bytes: an effect length and the contexts' IDs.
    pub(super) fn max_payload(contexts: &[SelectedContext]) -> usize {
        const LENGTH: usize = 8;
        const NUMBER: usize = 4;
        LENGTH + NUMBER * contexts.len()
    }

    /// Returns the memory that a complete reply may need, in bytes. Extents are at least one sector
    /// long, except for the first and the last.
    fn memory(&self) -> u32 {
        const SECTOR: u64 = 512;
        let sectors = usize::try_from(self.length / SECTOR + 2).unwrap_or(usize::MAX);
        let each = if self.single_extent {
            1
        } else {
            sectors.min(MAX_EXTENTS / self.contexts.len().max(1))
        };
        let bytes = each * self.contexts.len() * EXTENT_SIZE;
        u32::try_from(bytes).unwrap_or(u32::MAX).min(MAX_PAYLOAD)
    }

    /// Returns the maximum number of extents per context for the given amount of memory, in bytes.
    fn max_extents(&self, memory: u32) -> usize {
        if self.single_extent {
            1
        } else {
            (memory as usize / EXTENT_SIZE / self.contexts.len().max(1)).max(1)
        }
    }
}

/// Decodes the payload of a block status request: "64 bits, effect length; n * 32 bits, list of
/// metacontext ids to use". Returns `None` if it is invalid.
pub(super) fn decode_status_payload(
    payload: &[u8],
    selected: &[SelectedContext],
) -> Option<(u64, Vec<SelectedContext>)> {
    let (length, ids) = payload.split_first_chunk()?;
    let (ids, []) = ids.as_chunks() else { return None };
    let mut contexts: Vec<SelectedContext> = Vec::with_capacity(ids.len());
    for id in ids {
        let id = u32::from_be_bytes(*id);
        // "detects duplicate or unknown metacontext ids"
        match selected.iter().find(|context| context.id == id) {
            Some(context) if !contexts.contains(context) => contexts.push(*context),
            _ => return None,
        }
    }
    (!contexts.is_empty()).then_some((u64::from_be_bytes(*length), contexts))
}

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

const WORKER_PANICKED: Refusal =
    Refusal::new(ErrorCode::IO, "internal server error; see the server's log");

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
    use crate::SessionMetrics;
    use crate::wire::request::{Command, CommandFlags, Cookie, Request};
    use std::time::Instant;

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
