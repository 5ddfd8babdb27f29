//! The facts about a client that access rules are evaluated against.

use super::identity::Identity;
use super::network::Peer;
use super::window::Moment;

/// A fact that may not be known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known<T> {
    /// The fact is known.
    Known(T),
    /// The fact isn't known yet.
    NotYet,
}

/// Facts about a client and its request. They become known in steps: the address on accept, the
/// certificate with the TLS handshake, and the export with the client's request.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Origin of the connection.
    pub peer: Peer,
    /// Identity of the client; `None` if it has no certificate.
    pub identity: Known<Option<&'a Identity>>,
    /// Canonical name of the export to be opened.
    pub export: Known<&'a str>,
    /// Time at which the rules are evaluated.
    pub now: Moment,
}

impl<'a> Facts<'a> {
    /// Creates the facts about a client that has just connected.
    pub fn of_peer(peer: Peer) -> Self {
        Self { peer, identity: Known::NotYet, export: Known::NotYet, now: Moment::now() }
    }

    /// Returns the facts with the client's identity, `None` for a client without a certificate.
    #[must_use]
    pub fn with_identity(self, identity: Option<&'a Identity>) -> Self {
        Self { identity: Known::Known(identity), ..self }
    }

    /// Returns the facts with the export to be opened.
    #[must_use]
    pub fn with_export(self, export: &'a str) -> Self {
        Self { export: Known::Known(export), ..self }
    }

    /// Returns the facts with another time of evaluation.
    #[must_use]
    pub fn at(self, now: Moment) -> Self {
        Self { now, ..self }
    }
}
