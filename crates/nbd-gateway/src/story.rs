//! Audit events of one connection: what happens to it, and always how it ended.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use tokio::time::Instant;

use super::access::{Identity, IdentityName, NameKind, Reason};
use super::admission::Route;
use super::connection::{Ending, Failure};
use super::live::Live;
use super::tls::Credentials;
use crate::audit::{
    ActivityTotals, Audit, BoundedText, ClientCertificate, ClientNotAuthorized,
    ConnectionDismissed, ConnectionEnded, ConnectionInfo, ConnectionRefused, Event, ExportDenied,
    ExportMissing, HandshakeFailed, ReadingStarted, Rfc3339Time,
};
use nbd_server::CloseReason;
use nbd_telemetry::escape;

/// Maximum number of names of one certificate in an event.
const MAX_NAMES: usize = 16;

/// Maximum number of events per connection about denied exports, and as many about missing ones.
/// Further requests are only counted: sending one costs the client less than the audit would have
/// to write.
pub(super) const MAX_DENIED: u64 = 16;

/// Audit of an admitted connection. Dropping it records the end of the connection, unless that has
/// been recorded.
pub(super) struct Story<'a> {
    audit: &'a Audit,
    live: &'a Arc<Live>,
    started: Instant,
    has_ended: bool,
}

/// Encryption of a client's stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Protection {
    /// TLS version as text, `none` in clear.
    pub(super) version: &'static str,
    /// IANA name of the cipher suite, if the stream is encrypted.
    pub(super) cipher: Option<&'static str>,
}

impl Protection {
    /// Returns the TLS version, if the stream is encrypted.
    pub(super) fn tls(self) -> Option<&'static str> {
        self.cipher.map(|_| self.version)
    }
}

impl<'a> Story<'a> {
    pub(super) fn new(audit: &'a Audit, live: &'a Arc<Live>, started: Instant) -> Self {
        Self { audit, live, started, has_ended: false }
    }

    /// Records how the connection ended.
    pub(super) fn end(mut self, ended: &Result<Ending, Failure>) {
        self.has_ended = true;
        self.audit.emit(|| self.ending(ended));
    }

    fn ending(&self, ended: &Result<Ending, Failure>) -> Event {
        let (who, duration) = (who(self.live), self.started.elapsed());
        let served = served(self.live);
        match ended {
            Err(Failure::TlsHandshake(failure)) => Event::HandshakeFailed(HandshakeFailed {
                connection: who,
                cause: failure.cause.label().into(),
                why: BoundedText::from_display(failure),
                duration,
            }),
            Err(Failure::NotAllowed { why, .. }) => Event::NotAllowed(ClientNotAuthorized {
                connection: who,
                why: BoundedText::from_display(why),
                duration,
            }),
            Err(Failure::Dismissed(why)) => Event::Dismissed(ConnectionDismissed {
                connection: who,
                activity: served,
                why: BoundedText::from_display(why),
                duration,
            }),
            other => {
                let (how, why) = match other {
                    Ok(Ending::LeftEarly) => ("left_early", None),
                    Ok(Ending::Served(summary)) => (how(summary.close_reason), None),
                    Err(failure @ Failure::ShutdownDeadline) => (failure.label(), None),
                    Err(failure) => (failure.label(), Some(BoundedText::from_display(failure))),
                };
                Event::Ended(ConnectionEnded {
                    connection: who,
                    activity: served,
                    how: how.into(),
                    why,
                    duration,
                })
            }
        }
    }
}

/// Returns the label for how transmission ended.
pub(super) fn how(close_reason: CloseReason) -> &'static str {
    match close_reason {
        CloseReason::ShutDown => "shutting_down",
        CloseReason::IdleTimeout => "idle",
        CloseReason::Disconnected | CloseReason::StreamClosed => "left",
    }
}

impl Drop for Story<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            self.audit.emit(|| {
                Event::Ended(ConnectionEnded {
                    connection: who(self.live),
                    activity: served(self.live),
                    how: "dropped".into(),
                    why: None,
                    duration: self.started.elapsed(),
                })
            });
        }
    }
}

/// Records that a connection was refused.
pub(super) fn refused(
    audit: &Audit,
    id: u64,
    route: Route,
    reason: &str,
    why: &impl std::fmt::Display,
) {
    audit.emit(|| {
        let who = route_of(id, route);
        Event::Refused(ConnectionRefused {
            connection: who,
            reason: reason.into(),
            why: BoundedText::from_display(why),
        })
    });
}

/// Builds the event for a client that starts reading, with the rule that allows it and the number
/// of its policy.
pub(super) fn reading(
    live: &Live,
    protection: Protection,
    export: &str,
    (rule, policy): (&Reason, u64),
) -> Event {
    let certificate = live.credentials().as_deref().and_then(certificate);
    Event::Reading(ReadingStarted {
        connection: who(live),
        certificate,
        tls: protection.cipher.map(|_| protection.version.into()),
        cipher: protection.cipher.map(Into::into),
        export: export.into(),
        rule: BoundedText::from_display(rule),
        policy,
    })
}

/// Builds the event for a request for an export that the client may not open.
pub(super) fn export_denied(live: &Live, export: &str, why: &Reason) -> Event {
    let who = who(live);
    Event::ExportDenied(ExportDenied {
        connection: who,
        export: export.into(),
        why: BoundedText::from_display(why),
    })
}

/// Builds the event for a request for an export that doesn't exist.
pub(super) fn export_missing(live: &Live, name: &[u8], reason: &str) -> Event {
    let export = BoundedText::from_display(escape::unicode(OsStr::from_bytes(name)));
    Event::ExportMissing(ExportMissing { connection: who(live), export, reason: reason.into() })
}

fn route_of(id: u64, route: Route) -> ConnectionInfo {
    ConnectionInfo {
        id,
        peer: BoundedText::from_display(route.peer),
        via: route.via.map(BoundedText::from_display),
        ..ConnectionInfo::default()
    }
}

fn who(live: &Live) -> ConnectionInfo {
    let credentials = live.credentials();
    let names = credentials.as_deref().map(Credentials::identity).map(Identity::names);
    let names = names.unwrap_or_default();
    let hash = names.iter().find(|name| name.kind == NameKind::Sha256);
    ConnectionInfo {
        identity: names.first().map(plain),
        sha256: hash.map(|hash| hash.text.as_str().into()),
        ..route_of(live.id, live.route)
    }
}

fn served(live: &Live) -> ActivityTotals {
    let denied = Some(live.denied()).filter(|count| *count > 0);
    let missing = Some(live.missing()).filter(|count| *count > 0);
    let Some(export) = live.export() else {
        return ActivityTotals { denied, missing, ..ActivityTotals::default() };
    };
    let done = live.activity.totals();
    ActivityTotals {
        export: Some(export.into()),
        requests: Some(done.requests.total()),
        bytes: Some(done.bytes),
        errors: Some(done.errors.total()),
        denied,
        missing,
    }
}

/// Describes the client's certificate. Returns `None` if it can't be parsed.
fn certificate(credentials: &Credentials) -> Option<ClientCertificate> {
    let details = credentials.details()?;
    let names = credentials.identity().names().iter();
    let names = names.filter(|name| name.kind != NameKind::Sha256);
    Some(ClientCertificate {
        subject: details.subject.into(),
        names: names.take(MAX_NAMES).map(plain).collect(),
        issuer: details.issuer.into(),
        serial: details.serial.into(),
        not_after: Rfc3339Time::from_unix(details.not_after.0),
    })
}

/// Returns a name unescaped; escaping happens when the line is written.
fn plain(name: &IdentityName) -> BoundedText {
    BoundedText::from(format!("{}{}", name.kind.prefix(), name.text))
}
