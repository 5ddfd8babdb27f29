//! Audit events. Existing names of events and members don't change; new ones may be added.

use std::time::Duration;

use serde::{Serialize, Serializer};

use super::text::{BoundedText, Rfc3339Time};

/// An audit event.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The program starts serving.
    Start(ServiceStarted),
    /// The program ends.
    Stop(ServiceStopped),
    /// A reload activated another policy.
    Reload(PolicyReloaded),
    /// A reload failed; the configuration stays as it was.
    ReloadFailed(ReloadFailed),
    /// A connection was closed before a byte was sent to it.
    Refused(ConnectionRefused),
    /// A client starts reading an export.
    Reading(ReadingStarted),
    /// A client asked for an export that it may not open. It may go on and ask for another one.
    /// Only a limited number of these events is recorded per connection.
    ExportDenied(ExportDenied),
    /// A client asked for an export that doesn't exist. It may go on and ask for another one. Only
    /// a limited number of these events is recorded per connection.
    ExportMissing(ExportMissing),
    /// A connection ended because its TLS handshake failed.
    HandshakeFailed(HandshakeFailed),
    /// A connection was closed because the authenticated client isn't authorized.
    NotAllowed(ClientNotAuthorized),
    /// A connection was closed because the client is no longer authorized.
    Dismissed(ConnectionDismissed),
    /// A connection ended in any other way.
    Ended(ConnectionEnded),
    /// Events are missing just before this one. Created by sinks that may lose events.
    Lost {
        /// Number of missing events.
        count: u64,
    },
}

/// Members of [`Event::Start`].
#[derive(Debug, Clone, Serialize)]
pub struct ServiceStarted {
    /// Version of this program.
    pub version: BoundedText,
    /// ID of the process.
    pub pid: u32,
    /// Addresses that it listens on.
    pub listen: Vec<BoundedText>,
    /// True if TLS is required.
    pub tls: bool,
    /// Number of the policy; 0 at the start.
    pub policy: u64,
    /// Description of the clients that are admitted.
    pub open_to: BoundedText,
}

/// Members of [`Event::Stop`].
#[derive(Debug, Clone, Serialize)]
pub struct ServiceStopped {
    /// Label: `told` for a requested shutdown, or `failed`.
    pub how: BoundedText,
    /// Error message, if it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<BoundedText>,
}

/// Members of [`Event::Reload`].
#[derive(Debug, Clone, Serialize)]
pub struct PolicyReloaded {
    /// Number of the new policy.
    pub policy: u64,
    /// Description of the clients that are admitted.
    pub open_to: BoundedText,
    /// Number of connections that are dismissed.
    pub dropped: usize,
}

/// Members of [`Event::ReloadFailed`].
#[derive(Debug, Clone, Serialize)]
pub struct ReloadFailed {
    /// Error message.
    pub why: BoundedText,
}

/// The connection that an event is about, and what is known about its client.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ConnectionInfo {
    /// Number of the connection, unique within this run.
    pub id: u64,
    /// Address of the client, or `unix`.
    pub peer: BoundedText,
    /// Load balancer that forwarded the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<BoundedText>,
    /// Most specific name in the client's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<BoundedText>,
    /// SHA-256 hash of the client's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<BoundedText>,
}

/// Members of [`Event::Refused`].
#[derive(Debug, Clone, Serialize)]
pub struct ConnectionRefused {
    /// The connection.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Stable label, as in the counters.
    pub reason: BoundedText,
    /// Stable label of the cause, if the reason has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<BoundedText>,
    /// Message for people.
    pub why: BoundedText,
}

/// Description of a client's certificate.
#[derive(Debug, Clone, Serialize)]
pub struct ClientCertificate {
    /// Subject, in the notation of RFC 4514.
    pub subject: BoundedText,
    /// Alternative and common names, such as `dns:backup.example.org`.
    pub names: Vec<BoundedText>,
    /// Issuer, in the notation of RFC 4514.
    pub issuer: BoundedText,
    /// Serial number, in hexadecimal digits.
    pub serial: BoundedText,
    /// End of validity.
    pub not_after: Rfc3339Time,
}

/// Members of [`Event::Reading`].
#[derive(Debug, Clone, Serialize)]
pub struct ReadingStarted {
    /// The client that reads.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Certificate of the client, if it presented one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<ClientCertificate>,
    /// TLS version, if the connection is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<BoundedText>,
    /// IANA name of the cipher suite, if the connection is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cipher: Option<BoundedText>,
    /// Name of the export.
    pub export: BoundedText,
    /// Description of the rule that allows it.
    pub rule: BoundedText,
    /// Number of the policy that contains this rule.
    pub policy: u64,
}

/// Members of [`Event::ExportDenied`].
#[derive(Debug, Clone, Serialize)]
pub struct ExportDenied {
    /// The client that asked.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Name of the export.
    pub export: BoundedText,
    /// Stable label of the cause.
    pub cause: BoundedText,
    /// Description of the rule that denies it, or of the lack of one that allows it.
    pub why: BoundedText,
}

/// Members of [`Event::ExportMissing`].
#[derive(Debug, Clone, Serialize)]
pub struct ExportMissing {
    /// The client that asked.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Name that it asked for.
    pub export: BoundedText,
    /// Label of the reason.
    pub reason: BoundedText,
}

/// Members of [`Event::HandshakeFailed`].
#[derive(Debug, Clone, Serialize)]
pub struct HandshakeFailed {
    /// The connection.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Stable label, as in the counters.
    pub cause: BoundedText,
    /// Message for people.
    pub why: BoundedText,
    /// Duration of the connection, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// Members of [`Event::NotAllowed`].
#[derive(Debug, Clone, Serialize)]
pub struct ClientNotAuthorized {
    /// The client.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Stable label of the cause.
    pub cause: BoundedText,
    /// Description of the rule that denies it, or of the lack of one that allows it.
    pub why: BoundedText,
    /// Duration of the connection, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// Activity of a client over its whole connection.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ActivityTotals {
    /// Name of the chosen export, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<BoundedText>,
    /// Number of requests, if it chose an export.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Bytes of data in replies to reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Number of requests that were answered with an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<u64>,
    /// Number of requests for exports that it may not open, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub denied: Option<u64>,
    /// Number of requests for exports that don't exist, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<u64>,
}

/// Members of [`Event::Dismissed`].
#[derive(Debug, Clone, Serialize)]
pub struct ConnectionDismissed {
    /// The client.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Activity of the client.
    #[serde(flatten)]
    pub activity: ActivityTotals,
    /// Stable label of the cause.
    pub cause: BoundedText,
    /// Message for people.
    pub why: BoundedText,
    /// Duration of the connection, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// Members of [`Event::Ended`].
#[derive(Debug, Clone, Serialize)]
pub struct ConnectionEnded {
    /// The client.
    #[serde(flatten)]
    pub connection: ConnectionInfo,
    /// Activity of the client.
    #[serde(flatten)]
    pub activity: ActivityTotals,
    /// Stable label for how the connection ended.
    pub how: BoundedText,
    /// Stable label of the cause, if the reason has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<BoundedText>,
    /// Message for people, unless the client just left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<BoundedText>,
    /// Duration of the connection, in seconds.
    #[serde(serialize_with = "seconds")]
    pub duration: Duration,
}

/// Returns a duration in seconds, rounded to microseconds.
pub(crate) fn rounded_seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e6
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(rounded_seconds(*duration))
}
