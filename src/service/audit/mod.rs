//! Manages the audit of one run: opened before the sandbox is entered, started after that, and
//! finished last.

#[cfg(test)]
mod documented;
mod line;
mod queue;
mod recorder;
mod target;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_gateway::audit::{Audit, BoundedText, Event, ServiceStopped};

use recorder::{Recorder, RecorderStartError};
pub(crate) use target::AuditTarget;
use target::TargetError;

use crate::monitor::AuditCounts;

use crate::cli::{AuditDestination, AuditOptions};
use crate::exit_status::{self, ExitStatus};

/// Minimum time to write queued events when the program ends.
const MIN_FLUSH_TIME: Duration = Duration::from_secs(1);

/// Reason for which auditing can't start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuditError {
    #[error("can't use --audit: {0}")]
    Target(#[from] TargetError),
    #[error("--audit - and --stdio both use standard output: give --audit a file")]
    StandardOutputTaken,
    #[error(transparent)]
    Start(#[from] RecorderStartError),
}

impl ExitStatus for AuditError {
    fn exit_status(&self) -> u8 {
        match self {
            Self::StandardOutputTaken => exit_status::USAGE,
            Self::Target(_) | Self::Start(_) => exit_status::AUDIT,
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::StandardOutputTaken => "audit_stdout_taken",
            Self::Target(error) => error.label(),
            Self::Start(_) => "audit_thread",
        }
    }
}

/// Handle of the recorder, if auditing is enabled.
#[derive(Debug, Clone)]
pub(crate) struct AuditHandle(Option<Arc<Recorder>>);

/// Opens the target of the audit.
pub(crate) fn open(options: &AuditOptions, stdio: bool) -> Result<Option<AuditTarget>, AuditError> {
    Ok(match options.destination() {
        None => None,
        Some(AuditDestination::StandardOutput) if stdio => {
            return Err(AuditError::StandardOutputTaken);
        }
        Some(AuditDestination::StandardOutput) => Some(AuditTarget::standard_output()?),
        Some(AuditDestination::File(path)) => Some(AuditTarget::open(path)?),
    })
}

/// Checks that the target could be opened.
pub(crate) fn check(options: &AuditOptions, stdio: bool) -> Result<(), AuditError> {
    match options.destination() {
        Some(AuditDestination::StandardOutput) if stdio => Err(AuditError::StandardOutputTaken),
        Some(AuditDestination::File(path)) => Ok(AuditTarget::check(path)?),
        None | Some(AuditDestination::StandardOutput) => Ok(()),
    }
}

impl AuditHandle {
    /// Starts the thread that writes events.
    pub(crate) fn start(target: Option<AuditTarget>) -> Result<Self, AuditError> {
        Ok(Self(target.map(Recorder::start).transpose()?))
    }

    /// Returns the handle for reporting events.
    pub(crate) fn audit(&self) -> Audit {
        match &self.0 {
            Some(recorder) => Audit::with_sink(Arc::clone(recorder) as Arc<_>),
            None => Audit::disabled(),
        }
    }

    /// Reopens the file, for log rotation.
    pub(crate) fn reopen(&self) {
        if let Some(recorder) = &self.0 {
            recorder.reopen();
        }
    }

    /// Returns a function that reads the event counters, if auditing is enabled.
    pub(crate) fn counts(&self) -> Option<impl Fn() -> AuditCounts + Send + Sync + use<>> {
        let recorder = self.0.clone()?;
        Some(move || AuditCounts { written: recorder.written(), lost: recorder.lost() })
    }

    /// Records the end of the program, and writes all queued events, until `until` at the latest
    /// but for at least [`MIN_FLUSH_TIME`].
    pub(crate) fn finish(self, failure: Option<BoundedText>, until: Instant) {
        let how = if failure.is_some() { "failed" } else { "told" };
        self.audit().emit(|| Event::Stop(ServiceStopped { how: how.into(), why: failure }));
        let Some(recorder) = self.0 else { return };
        let left = until.saturating_duration_since(Instant::now()).max(MIN_FLUSH_TIME);
        let unwritten = recorder.finish(left);
        let lost = recorder.lost();
        if unwritten > 0 || lost > 0 {
            let reason = "audit_events_unwritten";
            tracing::error!(reason, unwritten, lost, "audit: not all events were written");
        }
    }
}
