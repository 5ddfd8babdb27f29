//! Builds audit events from what is known about a connection.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use nbd_telemetry::escape;

use super::StreamEncryption;
use crate::access::{Identity, IdentityName, NameKind, Reason};
use crate::audit::{
    ActivityTotals, BoundedText, ClientCertificate, ClientNotAuthorized, ConnectionDismissed,
    ConnectionEnded, ConnectionInfo, ConnectionRefused, Event, ExportDenied, ExportMissing,
    HandshakeFailed, ReadingStarted, Rfc3339Time,
};
use crate::outcome::{ConnectionFailure, ConnectionOutcome, LEFT_EARLY, Refusal, close_label};
use crate::registry::RegistryEntry;
use crate::route::Route;
use crate::tls::Credentials;

/// Maximum number of names of one certificate in an event.
const MAX_NAMES: usize = 16;

/// Builds the event for the end of a connection.
pub(super) fn ended(
    entry: &RegistryEntry,
    duration: Duration,
    outcome: &Result<ConnectionOutcome, ConnectionFailure>,
) -> Event {
    let connection = connection_info(entry);
    let activity = activity_totals(entry);
    match outcome {
        Err(ConnectionFailure::TlsHandshake(failure)) => Event::HandshakeFailed(HandshakeFailed {
            connection,
            cause: failure.cause.label().into(),
            why: BoundedText::from_display(failure),
            duration,
        }),
        Err(ConnectionFailure::NotAllowed { why, .. }) => {
            let (cause, why) = (why.label().into(), BoundedText::from_display(why));
            Event::NotAllowed(ClientNotAuthorized { connection, cause, why, duration })
        }
        Err(ConnectionFailure::Dismissed(why)) => {
            let (cause, why) = (why.label().into(), BoundedText::from_display(why));
            Event::Dismissed(ConnectionDismissed { connection, activity, cause, why, duration })
        }
        other => {
            let (how, why) = match other {
                Ok(ConnectionOutcome::LeftEarly) => (LEFT_EARLY, None),
                Ok(ConnectionOutcome::Served(stats)) => (close_label(stats.close_reason), None),
                Err(failure @ ConnectionFailure::ShutdownDeadline) => (failure.label(), None),
                Err(failure) => (failure.label(), Some(BoundedText::from_display(failure))),
            };
            let cause = other.as_ref().err().and_then(ConnectionFailure::cause).map(Into::into);
            let how = how.into();
            Event::Ended(ConnectionEnded { connection, activity, how, cause, why, duration })
        }
    }
}

/// Builds the event for a connection whose task was dropped.
pub(super) fn dropped(entry: &RegistryEntry, duration: Duration) -> Event {
    Event::Ended(ConnectionEnded {
        connection: connection_info(entry),
        activity: activity_totals(entry),
        how: "dropped".into(),
        cause: None,
        why: None,
        duration,
    })
}

/// Builds the event for a connection that was refused.
pub(super) fn refused(id: u64, route: Route, refusal: &Refusal) -> Event {
    Event::Refused(ConnectionRefused {
        connection: route_info(id, route),
        reason: refusal.label().into(),
        cause: refusal.cause().map(Into::into),
        why: BoundedText::from_display(refusal),
    })
}

/// Builds the event for a client that starts reading, with the rule that allows it and the number
/// of its policy.
pub(super) fn reading(
    entry: &RegistryEntry,
    encryption: StreamEncryption,
    export: &str,
    (rule, policy): (Reason, u64),
) -> Event {
    let certificate = entry.credentials().as_deref().and_then(certificate);
    Event::Reading(ReadingStarted {
        connection: connection_info(entry),
        certificate,
        tls: encryption.tls().map(Into::into),
        cipher: encryption.cipher.map(Into::into),
        export: export.into(),
        rule: BoundedText::from_display(rule),
        policy,
    })
}

/// Builds the event for a request for an export that the client may not open.
pub(super) fn export_denied(entry: &RegistryEntry, export: &str, why: &Reason) -> Event {
    let connection = connection_info(entry);
    Event::ExportDenied(ExportDenied {
        connection,
        export: export.into(),
        cause: why.label().into(),
        why: BoundedText::from_display(why),
    })
}

/// Builds the event for a request for an export that doesn't exist.
pub(super) fn export_missing(entry: &RegistryEntry, name: &[u8], reason: &str) -> Event {
    let export = BoundedText::from_display(escape::unicode(OsStr::from_bytes(name)));
    Event::ExportMissing(ExportMissing {
        connection: connection_info(entry),
        export,
        reason: reason.into(),
    })
}

fn route_info(id: u64, route: Route) -> ConnectionInfo {
    ConnectionInfo {
        id,
        peer: BoundedText::from_display(route.peer),
        via: route.via.map(BoundedText::from_display),
        ..ConnectionInfo::default()
    }
}

fn connection_info(entry: &RegistryEntry) -> ConnectionInfo {
    let credentials = entry.credentials();
    let names = credentials.as_deref().map(Credentials::identity).map(Identity::names);
    let names = names.unwrap_or_default();
    let hash = names.iter().find(|name| name.kind == NameKind::Sha256);
    ConnectionInfo {
        identity: names.first().map(name_text),
        sha256: hash.map(|hash| hash.text.as_str().into()),
        ..route_info(entry.id, entry.route)
    }
}

fn activity_totals(entry: &RegistryEntry) -> ActivityTotals {
    let denied = Some(entry.denied()).filter(|count| *count > 0);
    let missing = Some(entry.missing()).filter(|count| *count > 0);
    let Some(export) = entry.export() else {
        return ActivityTotals { denied, missing, ..ActivityTotals::default() };
    };
    let done = entry.activity.totals();
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
        names: names.take(MAX_NAMES).map(name_text).collect(),
        issuer: details.issuer.into(),
        serial: details.serial.into(),
        not_after: Rfc3339Time::from_unix(details.not_after.0),
    })
}

/// Returns a name unescaped; escaping happens when the line is written.
fn name_text(name: &IdentityName) -> BoundedText {
    BoundedText::from(format!("{}{}", name.kind.prefix(), name.text))
}
