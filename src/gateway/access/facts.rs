//! What is known of a client when it is judged.

use super::identity::Identity;
use super::network::Peer;
use super::window::Moment;

/// Something that may not have turned out yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known<T> {
    /// It has.
    Known(T),
    /// It hasn't.
    NotYet,
}

/// What is known of a client. It comes out bit by bit: first its address, with the TLS
/// handshake its certificate, and at last which export it wants.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Where it comes from.
    pub peer: Peer,
    /// Who it is; `None` is somebody without a certificate.
    pub identity: Known<Option<&'a Identity>>,
    /// The canonical name of the export that it wants to open.
    pub export: Known<&'a str>,
    /// When.
    pub now: Moment,
}

impl<'a> Facts<'a> {
    /// A client that has just connected.
    pub fn of_peer(peer: Peer) -> Self {
        Self { peer, identity: Known::NotYet, export: Known::NotYet, now: Moment::now() }
    }

    /// The same client, now that it is known who it is.
    #[must_use]
    pub fn with_identity(self, identity: Option<&'a Identity>) -> Self {
        Self { identity: Known::Known(identity), ..self }
    }

    /// The same client, now that it is known what it wants.
    #[must_use]
    pub fn with_export(self, export: &'a str) -> Self {
        Self { export: Known::Known(export), ..self }
    }

    /// The same client at another time.
    #[must_use]
    pub fn at(self, now: Moment) -> Self {
        Self { now, ..self }
    }
}
