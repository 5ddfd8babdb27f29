//! The facts about a client that access rules are evaluated against.

use super::identity::Identity;
use super::network::Peer;
use super::window::Timestamp;

/// A fact that may not be known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact<T> {
    /// The fact is known.
    Known(T),
    /// The fact isn't known yet.
    Pending,
}

/// Facts about a client and its request. They become known in steps: the address on accept, the
/// certificate with the TLS handshake, and the export with the client's request.
#[derive(Debug, Clone, Copy)]
pub struct AccessRequest<'a> {
    /// Origin of the connection.
    pub peer: Peer,
    /// Identity of the client; `None` if it has no certificate.
    pub identity: Fact<Option<&'a Identity>>,
    /// Canonical name of the export to be opened.
    pub export: Fact<&'a str>,
    /// Time at which the rules are evaluated.
    pub now: Timestamp,
}

impl<'a> AccessRequest<'a> {
    /// Creates the facts about a client that has just connected.
    pub fn from_peer(peer: Peer) -> Self {
        Self { peer, identity: Fact::Pending, export: Fact::Pending, now: Timestamp::now() }
    }

    /// Returns the facts with the client's identity, `None` for a client without a certificate.
    #[must_use]
    pub fn with_identity(self, identity: Option<&'a Identity>) -> Self {
        Self { identity: Fact::Known(identity), ..self }
    }

    /// Returns the facts with the export to be opened.
    #[must_use]
    pub fn with_export(self, export: &'a str) -> Self {
        Self { export: Fact::Known(export), ..self }
    }

    /// Returns the facts with another time of evaluation.
    #[must_use]
    pub fn at(self, now: Timestamp) -> Self {
        Self { now, ..self }
    }
}
