//! Reasons for which connections are refused, fail, or end, each with its stable label.

use std::net::IpAddr;

use nbd_server::{CloseReason, SessionError, SessionStats};

use crate::access::Reason;
use crate::admission::slots::LimitReached;
use crate::policy::Dismissal;
use crate::proxy::ReadHeaderError;
use crate::registry::RegistryEntry;
use crate::tls::{CredentialsError, HandshakeFailure};

/// Reason for closing a connection before a byte is sent to it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("{0}")]
    Access(Reason),
    #[error("remote clients are not admitted without TLS")]
    NotLocal,
    #[error("{0}")]
    LimitReached(#[from] LimitReached),
    #[error("connection rate limit of the address exceeded")]
    ConnectionRate,
    #[error("no valid PROXY header of version 2 from the load balancer: {0}")]
    ProxyHeader(#[from] ReadHeaderError),
    #[error("the PROXY header names {0}, which can't be the address of a client")]
    ForwardedAddress(IpAddr),
}

impl Refusal {
    /// Returns the stable label that counters and audit events use.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Access(_) => "address",
            Self::NotLocal => "not_local",
            Self::LimitReached(limit) => limit.label(),
            Self::ConnectionRate => "connection_rate",
            Self::ProxyHeader(_) => "proxy_header",
            Self::ForwardedAddress(_) => "proxy_address",
        }
    }

    /// Returns the stable label of the cause, if the reason has several.
    pub(crate) fn cause(&self) -> Option<&'static str> {
        match self {
            Self::Access(reason) => Some(reason.label()),
            Self::ProxyHeader(error) => Some(error.label()),
            Self::NotLocal
            | Self::LimitReached(_)
            | Self::ConnectionRate
            | Self::ForwardedAddress(_) => None,
        }
    }
}

/// Outcome of a connection that didn't fail.
#[derive(Debug)]
pub(crate) enum ConnectionOutcome {
    /// The client left before it chose an export, as `nbdinfo --list` does.
    LeftEarly,
    /// The client chose an export, and transmission ended normally.
    Served(SessionStats),
}

/// Label for the end of a connection that chose no export.
pub(crate) const LEFT_EARLY: &str = "left_early";

/// Returns the label for how transmission ended.
pub(crate) fn close_label(close_reason: CloseReason) -> &'static str {
    match close_reason {
        CloseReason::ShutDown => "shutting_down",
        CloseReason::IdleTimeout => "idle",
        CloseReason::Disconnected | CloseReason::StreamClosed => "left",
    }
}

/// Reason for closing an admitted connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectionFailure {
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("TLS handshake failed: {0}")]
    TlsHandshake(#[from] HandshakeFailure),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("{client} is not authorized: {why}")]
    NotAllowed { client: String, why: Reason },
    #[error("no longer authorized: {0}")]
    Dismissed(#[from] Dismissal),
    #[error(
        "TLS key limit reached: with TLS 1.2 and AES-GCM, a key may protect 2^24 records and can't \
         be replaced; reconnect, or use TLS 1.3 or ChaCha20-Poly1305, which have no limit"
    )]
    TlsKeyLimit,
    #[error("internal error: the handshake task panicked")]
    Panicked,
    #[error("{0} timed out")]
    Deadline(&'static str),
    #[error("{0}")]
    LimitReached(#[from] LimitReached),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("requests were in flight at the shutdown deadline")]
    ShutdownDeadline,
}

impl ConnectionFailure {
    /// Returns the failure for a connection that is still open at the shutdown deadline.
    pub(crate) fn at_shutdown_deadline(entry: &RegistryEntry) -> Self {
        // A client whose requests are all answered just hasn't closed the connection.
        if entry.is_busy() { Self::ShutdownDeadline } else { Self::ShuttingDown }
    }

    /// Returns the stable label that counters, logs and audit events use.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Session(_) => "session",
            Self::TlsHandshake(_) => "tls_handshake",
            Self::TlsKeyLimit => "tls_key_limit",
            Self::Panicked => "panicked",
            Self::Credentials(_) => "credentials",
            Self::NotAllowed { .. } => "not_allowed",
            Self::Dismissed(_) => "dismissed",
            Self::Deadline(_) => "deadline",
            Self::LimitReached(limit) => limit.label(),
            Self::ShuttingDown => "shutting_down",
            Self::ShutdownDeadline => "dropped",
        }
    }

    /// Returns the stable label of the cause, if the reason has several.
    pub(crate) fn cause(&self) -> Option<&'static str> {
        match self {
            Self::Session(error) => Some(error.label()),
            Self::TlsHandshake(failure) => Some(failure.cause.label()),
            Self::Credentials(error) => Some(error.label()),
            Self::NotAllowed { why, .. } => Some(why.label()),
            Self::Dismissed(dismissal) => Some(dismissal.label()),
            Self::TlsKeyLimit
            | Self::Panicked
            | Self::Deadline(_)
            | Self::LimitReached(_)
            | Self::ShuttingDown
            | Self::ShutdownDeadline => None,
        }
    }
}
