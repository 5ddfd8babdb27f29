//! Opens a snapshot on demand, and reopens it when its file has been replaced.
//!
//! File access happens on blocking threads: a file system that hangs blocks only the clients that
//! ask for archives on it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use tokio::sync::{Mutex, oneshot};
use tokio::task::spawn_blocking;

use super::hints::Hints;
use super::reader::BlockReader;
use super::source::ArchiveSource;
use hexz_reader::storage::Stamp;
use hexz_reader::{Error, OpenOptions, Snapshot};

/// Time after which an archive that failed to open is retried although no file has changed, since
/// its parent may have appeared. Clients can't cause retries more often.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The same for an outage of a store, whose requests are limited anyway.
const RETRY_OUTAGE_AFTER: Duration = Duration::from_secs(1);

/// The same for failures caused by the file itself or by the password: a retry would repeat the
/// work, such as a key derivation, and fail again.
const RETRY_PERMANENT_AFTER: Duration = Duration::from_secs(300);

/// A snapshot that is opened on demand. One client at a time opens it; others that want the same
/// snapshot wait, those that want another one don't.
#[derive(Debug, Clone)]
pub(super) struct SnapshotSlot {
    source: Arc<ArchiveSource>,
    opened: Arc<Mutex<SlotState>>,
    /// The snapshot in `opened`, for comparisons and listings, which don't wait while another
    /// client checks or reopens it.
    latest: Arc<RwLock<Option<Arc<Snapshot>>>>,
}

#[derive(Debug, Clone, Default)]
enum SlotState {
    #[default]
    Closed,
    Open(Arc<Snapshot>),
    /// Opening it failed.
    Failed(Box<OpenFailure>),
}

#[derive(Debug, Clone)]
struct OpenFailure {
    /// Stamp of the file, if it existed.
    stamp: Option<Stamp>,
    /// The file that caused the failure, which may be a parent, and its stamp.
    cause: (Arc<Path>, Option<Stamp>),
    at: Instant,
    retry_after: Duration,
    reason: String,
    /// Stable label of the reason.
    label: &'static str,
    /// True if the failure can't be detected from header and index alone.
    is_hidden_from_index: bool,
    /// True if a store failed or rejected requests, which says nothing about the archive.
    is_outage: bool,
    /// True if that may be over at any time.
    is_store_down: bool,
}

impl OpenFailure {
    fn new(stamp: Option<Stamp>, error: &Error, options: &OpenOptions) -> Self {
        let retry_after = match error {
            error if error.is_permanent() => RETRY_PERMANENT_AFTER,
            error if error.is_outage() => RETRY_OUTAGE_AFTER,
            _ => RETRY_AFTER,
        };
        let cause = (Arc::clone(&error.path), options.stamp_of(&error.path));
        Self {
            stamp,
            cause,
            at: Instant::now(),
            retry_after,
            reason: error.to_string(),
            label: error.label(),
            is_hidden_from_index: error.is_hidden_from_index(),
            is_outage: error.is_outage(),
            is_store_down: error.is_store_down(),
        }
    }

    /// Returns true if a retry would fail the same way: no file has changed, and the last attempt
    /// was recent.
    fn would_repeat(&self, stamp: Option<Stamp>, options: &OpenOptions) -> bool {
        let (path, then) = &self.cause;
        self.stamp == stamp
            && self.at.elapsed() < self.retry_after
            && options.stamp_of(path) == *then
    }
}

/// Error of a slot without a snapshot. It carries the reason only the first time, and then none
/// until the reason changes, so clients can't flood the log.
pub(super) struct SlotUnavailable(pub(super) Option<OpenError>);

/// Error of opening an archive, with advice for the log.
pub(super) struct OpenError {
    pub(super) error: Error,
    pub(super) hint: Option<&'static str>,
}

impl SnapshotSlot {
    pub(super) fn new(source: ArchiveSource) -> Self {
        Self { source: Arc::new(source), opened: Arc::default(), latest: Arc::default() }
    }

    /// Creates an unopened slot with the same source.
    pub(super) fn unopened(&self) -> Self {
        Self { source: Arc::clone(&self.source), opened: Arc::default(), latest: Arc::default() }
    }

    /// Returns the source from which it is opened.
    pub(super) fn source(&self) -> &Arc<ArchiveSource> {
        &self.source
    }

    /// Returns the path of the archive.
    pub(super) fn path(&self) -> &Path {
        self.source.path()
    }

    /// Creates a slot for a snapshot that is already open.
    pub(super) fn of(snapshot: Snapshot) -> Self {
        let slot = Self::new(ArchiveSource::Path(snapshot.path().to_owned()));
        let snapshot = Arc::new(snapshot);
        slot.set_latest(Some(Arc::clone(&snapshot)));
        Self { opened: Arc::new(Mutex::new(SlotState::Open(snapshot))), ..slot }
    }

    /// Returns the snapshot, opening it if it isn't open or isn't current.
    ///
    /// Cancellation: opening continues if the caller is dropped. Verifying an archive's digest
    /// can take longer than a client may wait, and the next client must not start it again. A
    /// key derivation that is still queued is skipped, so that clients that come and go don't
    /// keep the processor busy.
    pub(super) async fn open(
        &self,
        options: &OpenOptions,
        reader: &Arc<BlockReader>,
    ) -> Result<Arc<Snapshot>, SlotUnavailable> {
        let mut opened = Arc::clone(&self.opened).lock_owned().await;
        let abandon = AbandonOnDrop(Arc::default());
        let slot = self.clone();
        let options = OpenOptions { is_abandoned: Arc::clone(&abandon.0), ..options.clone() };
        let reader = Arc::clone(reader);
        let (done, result) = oneshot::channel();
        spawn_blocking(move || {
            let before = slot.latest();
            let (after, result) = revalidate(opened.clone(), &slot.source, &options, reader.hints);
            slot.set_latest(match &after {
                SlotState::Open(snapshot) => Some(Arc::clone(snapshot)),
                SlotState::Closed | SlotState::Failed(_) => None,
            });
            if let SlotState::Open(snapshot) = &after
                && before.is_none_or(|before| before.id() != snapshot.id())
            {
                reader.start_prefetch(snapshot, &options);
            }
            *opened = after;
            // Release the lock first: the caller may call `has_failed` as soon as it has the
            // result.
            drop(opened);
            // The caller is gone and the reason won't be reported again, so it is logged here.
            if let Err(Err(SlotUnavailable(Some(OpenError { error, hint })))) = done.send(result)
                && !error.is_transient()
            {
                tracing::error!(reason = error.label(), hint, "export can't be served: {error}");
            }
        });
        // The runtime is shutting down, or opening panicked.
        result.await.unwrap_or(Err(SlotUnavailable(None)))
    }

    /// Returns the snapshot that was opened last, whether or not it is current.
    pub(super) fn latest(&self) -> Option<Arc<Snapshot>> {
        self.latest.read().clone()
    }

    /// Returns true if the last attempt to open it failed because of the archive, and not because
    /// its store failed or rejected requests; false while one is in progress.
    pub(super) fn has_failed(&self) -> bool {
        self.opened
            .try_lock()
            .is_ok_and(|opened| matches!(&*opened, SlotState::Failed(failed) if !failed.is_outage))
    }

    /// Returns label and text of the reason for which the last attempt to open it failed, unless its
    /// store was down.
    pub(super) fn failure(&self) -> Option<(&'static str, String)> {
        match &*self.opened.try_lock().ok()? {
            SlotState::Failed(failed) if !failed.is_store_down => {
                Some((failed.label, failed.reason.clone()))
            }
            _ => None,
        }
    }

    /// Forgets that the last attempt to open it failed, if the file that caused this has changed.
    /// Blocking.
    pub(super) fn forget_outdated_failure(&self, options: &OpenOptions) {
        let Ok(mut opened) = self.opened.try_lock() else { return };
        if let SlotState::Failed(failed) = &*opened
            && options.stamp_of(&failed.cause.0) != failed.cause.1
        {
            *opened = SlotState::Closed;
        }
    }

    /// Returns true if opening failed with this file stamp, and inspecting header and index can't
    /// show that it would succeed now.
    pub(super) fn has_failed_with(&self, stamp: Stamp) -> bool {
        self.opened.try_lock().is_ok_and(|opened| match &*opened {
            SlotState::Failed(failed) if failed.stamp == Some(stamp) => {
                failed.is_hidden_from_index || failed.at.elapsed() < RETRY_AFTER
            }
            _ => false,
        })
    }

    /// Closes the snapshot, unless it is being opened. Sessions that read it continue.
    pub(super) fn close(&self) {
        if let Ok(mut opened) = self.opened.try_lock()
            && matches!(*opened, SlotState::Open(_))
        {
            *opened = SlotState::Closed;
            self.set_latest(None);
        }
    }

    /// Returns true unless it is being opened or checked.
    pub(super) fn is_idle(&self) -> bool {
        self.opened.try_lock().is_ok()
    }

    fn set_latest(&self, snapshot: Option<Arc<Snapshot>>) {
        *self.latest.write() = snapshot;
    }
}

/// Sets a flag when the caller that waits for a snapshot is gone.
struct AbandonOnDrop(Arc<AtomicBool>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns the new state of a slot: reopens the archive unless the previous state still holds.
fn revalidate(
    before: SlotState,
    source: &ArchiveSource,
    options: &OpenOptions,
    hints: Hints,
) -> (SlotState, Result<Arc<Snapshot>, SlotUnavailable>) {
    let stamp = options.stamp_of(source.path());
    let known_reason = match before {
        SlotState::Open(snapshot) if snapshot.is_current() => {
            return (SlotState::Open(Arc::clone(&snapshot)), Ok(snapshot));
        }
        SlotState::Failed(failed) if failed.would_repeat(stamp, options) => {
            return (SlotState::Failed(failed), Err(SlotUnavailable(None)));
        }
        SlotState::Failed(failed) if failed.stamp == stamp => Some(failed.reason),
        _ => None,
    };
    let unavailable = |error: Error| {
        let hint = hints.for_open_error(&error);
        SlotUnavailable(Some(OpenError { error, hint }))
    };
    match source.open(options) {
        Ok(snapshot) => {
            snapshot.log_remarks(hints.for_remark);
            let snapshot = Arc::new(snapshot);
            (SlotState::Open(Arc::clone(&snapshot)), Ok(snapshot))
        }
        // It says nothing about the file.
        Err(error) if error.is_transient() => (SlotState::Closed, Err(unavailable(error))),
        Err(error) => {
            let failed = Box::new(OpenFailure::new(stamp, &error, options));
            let is_new = known_reason.is_none_or(|known| known != failed.reason);
            let failure = if is_new { unavailable(error) } else { SlotUnavailable(None) };
            (SlotState::Failed(failed), Err(failure))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hexz_reader::ErrorKind;

    fn error(path: &Path, kind: ErrorKind) -> Error {
        Error { path: Arc::from(path), offset: None, kind }
    }

    /// Detecting a wrong password takes a key derivation, which clients must not be able to
    /// repeat at will.
    #[test]
    fn a_permanent_failure_is_not_retried_until_a_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let [own, parent] = ["own.hxz", "parent.hxz"].map(|name| folder.path().join(name));
        std::fs::write(&own, "own").unwrap();
        std::fs::write(&parent, "parent").unwrap();
        let options = OpenOptions::default();
        let stamp = options.stamp_of(&own);
        let long_ago = Instant::now().checked_sub(RETRY_AFTER * 2).unwrap();

        let mut wrong =
            OpenFailure::new(stamp, &error(&parent, ErrorKind::WrongPassword), &options);
        wrong.at = long_ago;
        assert!(wrong.would_repeat(stamp, &options));
        assert!(!wrong.would_repeat(None, &options));
        std::fs::write(&parent, "another parent").unwrap();
        assert!(!wrong.would_repeat(stamp, &options));

        let missing =
            ErrorKind::ParentMissing { name: "x".into(), tried: vec![], is_outside: false };
        let mut missing = OpenFailure::new(stamp, &error(&own, missing), &options);
        assert!(missing.would_repeat(stamp, &options));
        missing.at = long_ago;
        assert!(!missing.would_repeat(stamp, &options));
    }

    /// Keys are derived one after another. A client that leaves before its turn causes no work.
    #[tokio::test]
    async fn an_abandoned_open_derives_no_key() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/archives/encrypted-zstd.hxz");
        let slot = SnapshotSlot::new(ArchiveSource::Path(path.into()));
        let password = hexz_reader::Password::new(b"not this one".to_vec());
        let options = OpenOptions { password: Some(password.into()), ..OpenOptions::default() };
        let reader = BlockReader::new(0);

        // Occupies the only thread on which keys are derived.
        let (release, held) = std::sync::mpsc::channel::<()>();
        let (occupy, occupied) = std::sync::mpsc::channel::<()>();
        let background = Arc::clone(&options.background);
        let occupy_and_wait = move || {
            occupy.send(()).unwrap();
            held.recv()
        };
        let busy = std::thread::spawn(move || background.run(occupy_and_wait).unwrap());
        occupied.recv().unwrap();
        let waited =
            tokio::time::timeout(Duration::from_millis(50), slot.open(&options, &reader)).await;
        assert!(waited.is_err());
        release.send(()).unwrap();
        busy.join().unwrap().unwrap();

        assert!(matches!(*slot.opened.lock().await, SlotState::Closed));
        let again = slot.open(&options, &reader).await;
        let Err(SlotUnavailable(Some(failure))) = again else { panic!("it was opened") };
        assert_eq!(failure.error.label(), "wrong_password");
    }
}
