//! What has to be known afterwards: who came in, from where, with which certificate, what it
//! read, and who was kept out, and why. Apart from the log, whole, and one JSON object a line.
//!
//! [`Event`] is what can happen; `docs/audit.md` says what each member means. Whoever has
//! something to tell has an [`Audit`], which hands it to a [`Sink`]: to [`Recorder`], which
//! writes lines into a [`Target`] from a thread of its own, or to one of your own.

mod event;
mod line;
mod queue;
mod recorder;
mod target;

use std::fmt;
use std::sync::Arc;

pub use event::{
    Certificate, Dismissed, Ended, Event, ExportDenied, ExportMissing, HandshakeFailed, NotAllowed,
    Reading, Refused, Reload, ReloadFailed, Served, Start, Stop, Who,
};
pub use line::{MAX_TEXT, Text, Time};
pub use recorder::{Recorder, StartError};
pub use target::{Target, TargetError};

/// Takes events. It is called wherever they happen, also on the threads that serve clients:
/// it must not wait for anything.
pub trait Sink: fmt::Debug + Send + Sync {
    /// Takes one. What it can't keep it has to count itself.
    fn take(&self, event: Event);
}

/// To whom events are told, if to anybody.
#[derive(Debug, Clone, Default)]
pub struct Audit(Option<Arc<dyn Sink>>);

impl Audit {
    /// Nobody wants to know.
    pub fn none() -> Self {
        Self(None)
    }

    /// This sink wants to.
    pub fn to(sink: Arc<dyn Sink>) -> Self {
        Self(Some(sink))
    }

    /// Whether anybody wants to know.
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Tells an event, which isn't made unless somebody wants to know.
    pub fn tell(&self, event: impl FnOnce() -> Event) {
        if let Some(sink) = &self.0 {
            sink.take(event());
        }
    }
}
