//! A place for a snapshot: opened when it is asked for, and again when its file has been
//! replaced.
//!
//! Files are looked at off the runtime's threads: a file system that hangs holds up those
//! who ask for what is on it, and nobody else.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, oneshot};
use tokio::task::spawn_blocking;

use super::source::Source;
use crate::snapshot::{Error, OpenOptions, Snapshot};
use crate::storage::FileStamp;

/// When an archive that couldn't be opened is tried again though no file has changed: its
/// parent may have come. Clients can't make it more often than that.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The same where the file itself is the reason, or the password: trying again would take
/// the same work, a key derivation for example, and come to the same.
const RETRY_LASTING_AFTER: Duration = Duration::from_secs(300);

/// A place for a snapshot. It is opened by one client at a time; the others wait for it,
/// but not for those of other names.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    source: Arc<Source>,
    opened: Arc<Mutex<Opened>>,
    /// The snapshot in `opened`, for those who only compare with it: they don't wait while
    /// it is looked at, or opened anew, for somebody else.
    latest: Arc<RwLock<Option<Arc<Snapshot>>>>,
}

#[derive(Debug, Clone, Default)]
enum Opened {
    #[default]
    NotYet,
    Open(Arc<Snapshot>),
    /// It could not be opened.
    Failed(Box<Failed>),
}

#[derive(Debug, Clone)]
struct Failed {
    /// What its file was like, if there was one.
    stamp: Option<FileStamp>,
    /// The file that was the reason, and what it was like: this one or a parent.
    culprit: (Arc<Path>, Option<FileStamp>),
    at: Instant,
    retry_after: Duration,
    reason: String,
    /// True if header and index alone don't show what is wrong.
    is_beyond_index: bool,
}

impl Failed {
    fn new(stamp: Option<FileStamp>, error: &Error) -> Self {
        let retry_after = if error.is_lasting() { RETRY_LASTING_AFTER } else { RETRY_AFTER };
        let culprit = (Arc::clone(&error.path), FileStamp::of(&error.path));
        Self {
            stamp,
            culprit,
            at: Instant::now(),
            retry_after,
            reason: error.to_string(),
            is_beyond_index: error.is_beyond_index(),
        }
    }

    /// Returns true if trying again would come to the same: no file has changed, and it was
    /// tried a moment ago.
    fn is_known(&self, stamp: Option<FileStamp>) -> bool {
        let (path, then) = &self.culprit;
        self.stamp == stamp && self.at.elapsed() < self.retry_after && FileStamp::of(path) == *then
    }
}

/// Why a place has no snapshot. It comes with the reason once, and then without it until
/// there is another reason: clients can't fill the log with it.
pub(super) struct Unavailable(pub(super) Option<Error>);

impl Slot {
    pub(super) fn new(source: Source) -> Self {
        Self { source: Arc::new(source), opened: Arc::default(), latest: Arc::default() }
    }

    /// A place of the same source that hasn't been opened.
    pub(super) fn unopened(&self) -> Self {
        Self { source: Arc::clone(&self.source), opened: Arc::default(), latest: Arc::default() }
    }

    /// The source from which it is opened.
    pub(super) fn source(&self) -> &Arc<Source> {
        &self.source
    }

    /// Where the archive is.
    pub(super) fn path(&self) -> &Path {
        self.source.path()
    }

    /// A place whose snapshot is open already.
    pub(super) fn of(snapshot: Snapshot) -> Self {
        let slot = Self::new(Source::Path(snapshot.path().to_owned()));
        let snapshot = Arc::new(snapshot);
        slot.set_latest(Some(Arc::clone(&snapshot)));
        Self { opened: Arc::new(Mutex::new(Opened::Open(snapshot))), ..slot }
    }

    /// The snapshot, opened if it isn't, or isn't current.
    ///
    /// Opening goes on when nobody waits for it any more: to compare an archive with its digest
    /// can take longer than a client may, and the next one must not begin it once more. Keys
    /// that haven't been derived by then aren't: they wait for one another, and clients that
    /// come and go must not keep the processor busy.
    pub(super) async fn open(&self, options: &OpenOptions) -> Result<Arc<Snapshot>, Unavailable> {
        let mut opened = Arc::clone(&self.opened).lock_owned().await;
        let abandon = AbandonOnDrop(Arc::default());
        let slot = self.clone();
        let options = OpenOptions { is_abandoned: Arc::clone(&abandon.0), ..options.clone() };
        let (done, result) = oneshot::channel();
        spawn_blocking(move || {
            let (after, result) = look(opened.clone(), &slot.source, &options);
            slot.set_latest(match &after {
                Opened::Open(snapshot) => Some(Arc::clone(snapshot)),
                Opened::NotYet | Opened::Failed(_) => None,
            });
            *opened = after;
            // Whoever is answered may ask at once whether it has failed.
            drop(opened);
            // It is known from now on, so that nobody else would be told.
            if let Err(Err(Unavailable(Some(error)))) = done.send(result)
                && !error.is_transient()
            {
                tracing::error!("an export can't be served: {error}");
            }
        });
        // The program is ending, or opening panicked.
        result.await.unwrap_or(Err(Unavailable(None)))
    }

    /// The snapshot that was opened last, be it current or not.
    pub(super) fn latest(&self) -> Option<Arc<Snapshot>> {
        self.latest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it couldn't be opened the last time. One that is being opened may be.
    pub(super) fn has_failed(&self) -> bool {
        self.opened.try_lock().is_ok_and(|opened| matches!(*opened, Opened::Failed(_)))
    }

    /// Returns true if its file was like that when it couldn't be opened, and looking at header
    /// and index can't show that it could be by now.
    pub(super) fn has_failed_as(&self, stamp: FileStamp) -> bool {
        self.opened.try_lock().is_ok_and(|opened| match &*opened {
            Opened::Failed(failed) if failed.stamp == Some(stamp) => {
                failed.is_beyond_index || failed.at.elapsed() < RETRY_AFTER
            }
            _ => false,
        })
    }

    /// Closes the snapshot, if nobody is opening it just now. Whoever reads it goes on.
    pub(super) fn close(&self) {
        if let Ok(mut opened) = self.opened.try_lock()
            && matches!(*opened, Opened::Open(_))
        {
            *opened = Opened::NotYet;
            self.set_latest(None);
        }
    }

    fn set_latest(&self, snapshot: Option<Arc<Snapshot>>) {
        *self.latest.write().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }
}

/// Sets the flag when whoever waits for a snapshot has gone.
struct AbandonOnDrop(Arc<AtomicBool>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Looks whether what is known of a place is still so, and opens it anew if not.
fn look(
    before: Opened,
    source: &Source,
    options: &OpenOptions,
) -> (Opened, Result<Arc<Snapshot>, Unavailable>) {
    let stamp = FileStamp::of(source.path());
    let known_reason = match before {
        Opened::Open(snapshot) if snapshot.is_current() => {
            return (Opened::Open(Arc::clone(&snapshot)), Ok(snapshot));
        }
        Opened::Failed(failed) if failed.is_known(stamp) => {
            return (Opened::Failed(failed), Err(Unavailable(None)));
        }
        Opened::Failed(failed) if failed.stamp == stamp => Some(failed.reason),
        _ => None,
    };
    match source.open(options) {
        Ok(snapshot) => {
            snapshot.log_oddities();
            let snapshot = Arc::new(snapshot);
            (Opened::Open(Arc::clone(&snapshot)), Ok(snapshot))
        }
        // It says nothing about the file.
        Err(error) if error.is_transient() => (Opened::NotYet, Err(Unavailable(Some(error)))),
        Err(error) => {
            let failed = Box::new(Failed::new(stamp, &error));
            let is_new = known_reason.is_none_or(|known| known != failed.reason);
            (Opened::Failed(failed), Err(Unavailable(is_new.then_some(error))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Problem;

    fn error(path: &Path, problem: Problem) -> Error {
        Error { path: Arc::from(path), offset: None, problem }
    }

    /// A wrong password takes a key derivation to find out: clients can't have it done again and
    /// again.
    #[test]
    fn a_lasting_failure_is_known_until_a_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let [own, parent] = ["own.hxz", "parent.hxz"].map(|name| folder.path().join(name));
        std::fs::write(&own, "own").unwrap();
        std::fs::write(&parent, "parent").unwrap();
        let stamp = FileStamp::of(&own);
        let long_ago = Instant::now().checked_sub(RETRY_AFTER * 2).unwrap();

        let mut wrong = Failed::new(stamp, &error(&parent, Problem::WrongPassword));
        wrong.at = long_ago;
        assert!(wrong.is_known(stamp));
        assert!(!wrong.is_known(None));
        std::fs::write(&parent, "another parent").unwrap();
        assert!(!wrong.is_known(stamp));

        let missing = Problem::ParentMissing { name: "x".into(), tried: vec![], elsewhere: false };
        let mut missing = Failed::new(stamp, &error(&own, missing));
        assert!(missing.is_known(stamp));
        missing.at = long_ago;
        assert!(!missing.is_known(stamp));
    }

    /// Keys are derived one after another. A client that leaves before its turn causes no work.
    #[tokio::test]
    async fn an_abandoned_open_derives_no_key() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/archives/encrypted-zstd.hxz");
        let slot = Slot::new(Source::Path(path.into()));
        let password = crate::snapshot::Password::new(b"not this one".to_vec());
        let options = OpenOptions { password: Some(password.into()), ..OpenOptions::default() };

        // Occupies the only thread on which keys are derived.
        let (release, held) = std::sync::mpsc::channel::<()>();
        let background = Arc::clone(&options.background);
        let busy = std::thread::spawn(move || background.run(move || held.recv()).unwrap());
        let waited = tokio::time::timeout(Duration::from_millis(50), slot.open(&options)).await;
        assert!(waited.is_err());
        release.send(()).unwrap();
        busy.join().unwrap().unwrap();

        assert!(matches!(*slot.opened.lock().await, Opened::NotYet));
        let again = slot.open(&options).await;
        assert!(
            matches!(again, Err(Unavailable(Some(error))) if error.problem.label() == "wrong_password")
        );
    }
}
