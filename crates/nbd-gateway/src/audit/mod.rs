//! Audit events: who connected, from where and with which certificate, what was read, and who was
//! refused and why. They are separate from the log, and complete.
//!
//! [`Event`] lists what is recorded, and its serialization is a stable format. Events are emitted
//! through an [`Audit`], which passes them to a [`Sink`], if there is one.

mod event;
mod text;

use std::fmt;
use std::sync::Arc;

pub(crate) use event::rounded_seconds;
pub use event::{
    ActivityTotals, ClientCertificate, ClientNotAuthorized, ConnectionDismissed, ConnectionEnded,
    ConnectionInfo, ConnectionRefused, Event, ExportDenied, ExportMissing, HandshakeFailed,
    PolicyReloaded, ReadingStarted, ReloadFailed, ServiceStarted, ServiceStopped,
};
pub use text::{BoundedText, MAX_TEXT, Rfc3339Time};

/// Receiver of audit events. It is called where events happen, including on threads that serve
/// clients, so it must not block.
pub trait Sink: fmt::Debug + Send + Sync {
    /// Records an event. The sink itself must count events that it can't keep.
    fn record(&self, event: Event);
}

/// Handle for emitting audit events to a sink, if there is one.
#[derive(Debug, Clone, Default)]
pub struct Audit(Option<Arc<dyn Sink>>);

impl Audit {
    /// Creates a handle that discards all events.
    pub fn disabled() -> Self {
        Self(None)
    }

    /// Creates a handle that passes events to `sink`.
    pub fn with_sink(sink: Arc<dyn Sink>) -> Self {
        Self(Some(sink))
    }

    /// Returns true if there is a sink.
    pub fn is_enabled(&self) -> bool {
        self.0.is_some()
    }

    /// Emits an event. The closure runs only if there is a sink.
    pub fn emit(&self, event: impl FnOnce() -> Event) {
        if let Some(sink) = &self.0 {
            sink.record(event());
        }
    }
}
