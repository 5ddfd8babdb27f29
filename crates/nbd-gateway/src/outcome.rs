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
    #[error("it is on another machine, and there is no TLS")]
    NotLocal,
    #[error("{0}")]
    LimitReached(#[from] LimitReached),
    #[error("its address begins connections more often than allowed (--connection-rate)")]
    ConnectionRate,
    #[error(
        "it is in --proxy-from, so that a PROXY header of version 2 has to come first, but {0}"
    )]
    ProxyHeader(#[from] ReadHeaderError),
    #[error("it is in --proxy-from, and forwards {0}, which is no client's address")]
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
}

/// Outcome of a connection that didn't fail.
#[derive(Debug)]
pub(crate) enum ConnectionOutcome {
    /// The client left before it chose an export, as `nbdinfo --list` does.
    LeftEarly,
    /// The client chose an export, and transmission ended normally.
    Served(SessionStats),
}

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
    #[error("the TLS handshake failed: {0}")]
    TlsHandshake(#[from] HandshakeFailure),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("{client} may not come in: {why}")]
    NotAllowed { client: String, why: Reason },
    #[error("it may not stay: {0}")]
    Dismissed(#[from] Dismissal),
    #[error(
        "its TLS keys are used up: with TLS 1.2 and AES-GCM they may protect 2^24 records and can't \
         be replaced; it can connect again, and isn't limited with ChaCha20-Poly1305 or TLS 1.3"
    )]
    TlsKeyLimit,
    #[error("its handshake panicked; this is a fault of this program")]
    Panicked,
    #[error("{0} took longer than allowed")]
    Deadline(&'static str),
    #[error("{0}")]
    LimitReached(#[from] LimitReached),
    #[error("this server is shutting down")]
    ShuttingDown,
    #[error("it was still busy at the shutdown deadline (--shutdown-timeout)")]
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
}
