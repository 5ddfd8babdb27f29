//! Writes audit events from a thread of its own, so that threads that serve clients never wait for
//! a disk or for the reader of a pipe.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use parking_lot::{Condvar, Mutex};

use super::line::EventLine;
use super::queue::{LineBatch, LineQueue};
use super::target::AuditTarget;
use nbd_gateway::audit::{Event, Sink};
use nbd_telemetry::RateLimit;

/// Maximum time that written lines stay in the page cache alone; a power failure loses no more than
/// that.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);

/// Time that events are gathered after a write. A flood then takes few writes, and rarely wakes the
/// writer.
const GATHER_TIME: Duration = Duration::from_millis(1);

/// Delay before a failed write is retried.
const RETRY_DELAY: Duration = Duration::from_millis(250);

/// Delay before a write to a full pipe is retried.
const PIPE_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Sink that writes events as lines to a [`Target`].
#[derive(Debug)]
pub(crate) struct Recorder {
    shared: Arc<RecorderState>,
}

/// Reason why the recorder can't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecorderStartError {
    /// The writer thread can't be created.
    #[error("can't start the audit thread: {0}")]
    Thread(#[source] io::Error),
    /// The system has no random numbers, which name this run.
    #[error("the system provides no random numbers")]
    Random,
}

#[derive(Debug)]
struct RecorderState {
    state: Mutex<WriterQueue>,
    /// Wakes the writer: there is something to do.
    work: Condvar,
    /// Wakes [`Recorder::finish`]: the writer has ended.
    ended: Condvar,
    written: AtomicU64,
    lost: AtomicU64,
    /// Rate limit on log lines about lost events.
    loss_log_limit: RateLimit,
}

#[derive(Debug)]
struct WriterQueue {
    queue: LineQueue,
    /// True if the writer waits for lines and nothing else.
    is_idle: bool,
    reopen: bool,
    /// Deadline for writing everything that is queued.
    finish_by: Option<Instant>,
    has_ended: bool,
}

impl Recorder {
    /// Starts a thread that writes to `target`.
    ///
    /// # Errors
    /// The thread can't be created, or the system has no random numbers.
    pub(crate) fn start(target: AuditTarget) -> Result<Arc<Self>, RecorderStartError> {
        let shared = Arc::new(RecorderState {
            state: Mutex::new(WriterQueue {
                queue: LineQueue::new(run()?),
                is_idle: false,
                reopen: false,
                finish_by: None,
                has_ended: false,
            }),
            work: Condvar::new(),
            ended: Condvar::new(),
            written: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            loss_log_limit: RateLimit::new(1, Duration::from_secs(10)),
        });
        let writer = Writer {
            shared: Arc::clone(&shared),
            target,
            batch: LineBatch::default(),
            is_last_before_reopen: false,
            gather_until: None,
            retry_at: None,
            is_failing: false,
            length_at_failure: None,
            unsynced_since: None,
            error_log_limit: RateLimit::new(1, Duration::from_secs(60)),
        };
        std::thread::Builder::new()
            .name("audit".to_owned())
            .spawn(|| writer.run())
            .map_err(RecorderStartError::Thread)?;
        Ok(Arc::new(Self { shared }))
    }

    /// Requests that the path be opened again, after log rotation. Events recorded before go to the
    /// old file, unless that can't be written.
    pub(crate) fn reopen(&self) {
        self.shared.state.lock().reopen = true;
        self.shared.work.notify_one();
    }

    /// Writes all recorded events and stops the writer, within `patience`. Returns the number of
    /// events that could not be written.
    pub(crate) fn finish(&self, patience: Duration) -> u64 {
        let until = Instant::now() + patience;
        let mut state = self.shared.state.lock();
        state.finish_by = Some(until);
        self.shared.work.notify_one();
        while !state.has_ended && !self.shared.ended.wait_until(&mut state, until).timed_out() {}
        state.queue.line_count().saturating_sub(self.written())
    }

    /// Returns the number of events written as complete lines.
    pub(crate) fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Returns the number of events lost because there was no room to queue them.
    pub(crate) fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

/// Stops the writer. Queued events are still written if that is possible at once.
impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.state.lock().finish_by.get_or_insert_with(Instant::now);
        self.shared.work.notify_one();
    }
}

impl Sink for Recorder {
    fn record(&self, event: Event) {
        let shared = &self.shared;
        let line = EventLine::new(&event);
        let mut state = shared.state.lock();
        let is_kept = match &line {
            Ok(line) if matches!(event, Event::Stop(_)) => state.queue.push_last(line),
            Ok(line) => state.queue.push(line),
            Err(_) => {
                state.queue.count_lost(1);
                false
            }
        };
        let wake = std::mem::take(&mut state.is_idle);
        drop(state);
        if wake {
            shared.work.notify_one();
        }
        if is_kept {
            return;
        }
        let lost = shared.lost.fetch_add(1, Ordering::Relaxed) + 1;
        if shared.loss_log_limit.allow().is_some() {
            let reason = "audit_events_lost";
            tracing::error!(reason, lost, "audit: events lost, because the queue is full");
        }
    }
}

/// Returns a random name for this run of the program.
fn run() -> Result<String, RecorderStartError> {
    let mut bytes = [0; 8];
    SystemRandom::new().fill(&mut bytes).map_err(|_| RecorderStartError::Random)?;
    Ok(format!("{:016x}", u64::from_be_bytes(bytes)))
}

/// State of the writer thread.
struct Writer {
    shared: Arc<RecorderState>,
    target: AuditTarget,
    batch: LineBatch,
    /// True if a reopen was requested when this batch was taken, so that it is the last one for the
    /// old file.
    is_last_before_reopen: bool,
    /// Time until which lines are gathered before the next write.
    gather_until: Option<Instant>,
    /// Time of the next attempt after a failed write.
    retry_at: Option<Instant>,
    /// True if the log reports that writing fails.
    is_failing: bool,
    /// Length of the file at a failure in the middle of a line.
    length_at_failure: Option<u64>,
    unsynced_since: Option<Instant>,
    error_log_limit: RateLimit,
}

/// Next action of the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WriterAction {
    Write,
    Sync,
    Reopen,
    Stop,
}

impl Writer {
    fn run(mut self) {
        loop {
            match self.next_action() {
                WriterAction::Write => self.write(),
                WriterAction::Sync => self.sync(),
                WriterAction::Reopen => self.reopen(),
                WriterAction::Stop => break,
            }
        }
        self.sync();
        self.shared.state.lock().has_ended = true;
        self.shared.ended.notify_all();
    }

    /// Waits until there is something to do.
    fn next_action(&mut self) -> WriterAction {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        loop {
            let now = Instant::now();
            // Events recorded before the reopen belong in the old file, if it can be written.
            let is_stuck = self.retry_at.is_some();
            let all_is_written =
                self.batch.is_done() && (self.is_last_before_reopen || state.queue.is_empty());
            if state.reopen && (is_stuck || all_is_written) {
                state.reopen = false;
                self.is_last_before_reopen = false;
                return WriterAction::Reopen;
            }
            let is_urgent = state.reopen || state.finish_by.is_some();
            self.gather_until = self.gather_until.filter(|&until| now < until && !is_urgent);
            let may_take = self.batch.is_done() && self.gather_until.is_none();
            if may_take && !state.queue.is_empty() {
                let emptied = std::mem::take(&mut self.batch).into_bytes();
                self.batch = state.queue.take_batch(emptied);
                self.is_last_before_reopen = state.reopen;
            }
            if !self.batch.is_done() && self.retry_at.is_none_or(|at| at <= now) {
                return WriterAction::Write;
            }
            let sync_at = self.unsynced_since.map(|since| since + SYNC_INTERVAL);
            if sync_at.is_some_and(|at| at <= now) {
                return WriterAction::Sync;
            }
            match state.finish_by {
                Some(_) if self.batch.is_done() => return WriterAction::Stop,
                Some(until) if until <= now => return WriterAction::Stop,
                _ => {}
            }
            let times = [self.gather_until, self.retry_at, sync_at, state.finish_by];
            let wake_at = times.into_iter().flatten().min();
            state.is_idle = may_take;
            match wake_at {
                Some(at) => drop(shared.work.wait_until(&mut state, at)),
                None => shared.work.wait(&mut state),
            }
            state.is_idle = false;
        }
    }

    fn write(&mut self) {
        // The rest of a line is useful only behind its start, which may have been truncated away.
        if self.length_at_failure.take().is_some_and(|before| self.target.length() != Some(before))
        {
            self.batch.rewind_to_line_start();
            self.target.start_new_line();
        }
        let at_line = self.batch.is_at_line_start();
        match self.target.write(self.batch.rest(), at_line) {
            Ok(bytes) => {
                self.retry_at = None;
                let lines = self.batch.advance(bytes);
                self.shared.written.fetch_add(lines, Ordering::Relaxed);
                let now = Instant::now();
                self.unsynced_since.get_or_insert(now);
                self.gather_until = Some(now + GATHER_TIME);
                if std::mem::take(&mut self.is_failing) {
                    tracing::info!("audit: {} is writable again", self.target);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.retry_at = Some(Instant::now() + PIPE_RETRY_DELAY);
            }
            Err(error) => {
                self.retry_at = Some(Instant::now() + RETRY_DELAY);
                self.length_at_failure = if at_line { None } else { self.target.length() };
                if !self.is_failing
                    && let Some(held_back) = self.error_log_limit.allow()
                {
                    self.is_failing = true;
                    tracing::error!(
                        reason = "audit_write_failed",
                        held_back = held_back.field(),
                        "audit: can't write to {}, events are queued: {error}",
                        self.target
                    );
                }
            }
        }
    }

    fn sync(&mut self) {
        if self.unsynced_since.take().is_none() {
            return;
        }
        if let Err(error) = self.target.sync()
            && let Some(held_back) = self.error_log_limit.allow()
        {
            tracing::error!(
                reason = "audit_sync_failed",
                held_back = held_back.field(),
                "audit: can't sync {}: {error}",
                self.target
            );
        }
    }

    fn reopen(&mut self) {
        self.sync();
        match self.target.reopen() {
            Ok(false) => {}
            Ok(true) => {
                self.batch.rewind_to_line_start();
                self.length_at_failure = None;
                self.retry_at = None;
                tracing::info!("audit: reopened {} after rotation", self.target);
            }
            Err(error) => tracing::error!(
                reason = "audit_reopen_failed",
                "audit: can't reopen the file, still writing to the old one: {error}"
            ),
        }
    }
}

#[cfg(test)]
#[path = "recorder_tests.rs"]
mod tests;
