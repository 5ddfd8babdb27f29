//! The audit of one run: opened before the sandbox is entered, begun behind it, and ended last.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hexz_nbd::audit::{Audit, Event, Recorder, StartError, Stop, Target, TargetError, Text};

use hexz_nbd::monitor::AuditReport;

use crate::cli::{AuditOptions, Where};

/// What all that is queued may take at the least, when the program ends.
const AT_LEAST: Duration = Duration::from_secs(1);

/// Why there is no audit.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuditError {
    #[error("can't use --audit: {0}")]
    Target(#[from] TargetError),
    #[error("--audit - and --stdio both want the standard output: name a file")]
    Taken,
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Who writes events, if anybody wants them.
#[derive(Debug, Clone)]
pub(crate) struct Record(Option<Arc<Recorder>>);

/// Opens the file.
pub(crate) fn open(options: &AuditOptions, stdio: bool) -> Result<Option<Target>, AuditError> {
    Ok(match options.place() {
        None => None,
        Some(Where::StandardOutput) if stdio => return Err(AuditError::Taken),
        Some(Where::StandardOutput) => Some(Target::standard_output()?),
        Some(Where::File(path)) => Some(Target::open(path)?),
    })
}

/// Whether it could be opened.
pub(crate) fn check(options: &AuditOptions, stdio: bool) -> Result<(), AuditError> {
    match options.place() {
        Some(Where::StandardOutput) if stdio => Err(AuditError::Taken),
        Some(Where::File(path)) => Ok(Target::check(path)?),
        None | Some(Where::StandardOutput) => Ok(()),
    }
}

impl Record {
    /// Starts the thread that writes.
    pub(crate) fn start(target: Option<Target>) -> Result<Self, AuditError> {
        Ok(Self(target.map(Recorder::start).transpose()?))
    }

    /// For those who have something to tell.
    pub(crate) fn audit(&self) -> Audit {
        match &self.0 {
            Some(recorder) => Audit::to(Arc::clone(recorder) as Arc<_>),
            None => Audit::none(),
        }
    }

    /// Opens the file anew, as those who rotate logs want it.
    pub(crate) fn reopen(&self) {
        if let Some(recorder) = &self.0 {
            recorder.reopen();
        }
    }

    /// How many events there were, if there are to be any.
    pub(crate) fn counts(&self) -> Option<impl Fn() -> AuditReport + Send + Sync + use<>> {
        let recorder = self.0.clone()?;
        Some(move || AuditReport { written: recorder.written(), lost: recorder.lost() })
    }

    /// Writes all that has been told, until that time if it takes so long.
    pub(crate) fn finish(self, failure: Option<Text>, until: Instant) {
        let how = if failure.is_some() { "failed" } else { "told" };
        self.audit().tell(|| Event::Stop(Stop { how: how.into(), why: failure }));
        let Some(recorder) = self.0 else { return };
        let left = until.saturating_duration_since(Instant::now()).max(AT_LEAST);
        let unwritten = recorder.finish(left);
        let lost = recorder.lost();
        if unwritten > 0 || lost > 0 {
            tracing::error!(unwritten, lost, "audit: not all events are written");
        }
    }
}
