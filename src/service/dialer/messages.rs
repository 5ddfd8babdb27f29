//! Messages between gateway and dialer. Each is a packet of its own (`SOCK_SEQPACKET`).
//!
//! The first ones, [`DialerStart`] and [`DialerReady`], are JSON; nobody who could be malicious has
//! a part in them. Those that follow have a fixed layout, with numbers in network byte order:
//!
//! ```text
//! request   id (4)  index of the target (2)
//! response  id (4)  code (1)  message, UTF-8
//! ```
//!
//! The code of a response is 0 if a connected socket is attached to it.

use std::io;

use nbd_sandbox::Mode;
use serde::{Deserialize, Serialize};

/// Maximum length of the JSON messages.
pub(super) const MAX_JSON_LENGTH: usize = 64 * 1024;
/// Maximum length of a response.
pub(super) const MAX_RESPONSE_LENGTH: usize = 512;

const ID_LENGTH: usize = 4;
const CONNECTED: u8 = 0;

/// A server that the gateway may connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DialTarget {
    /// Name or IP address, without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
}

/// First message to the dialer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DialerStart {
    /// Process ID of the gateway.
    pub(crate) parent: u32,
    #[serde(with = "SandboxMode")]
    pub(crate) mode: Mode,
    /// User to switch to, if any.
    pub(crate) user: Option<String>,
    /// The only servers that the dialer connects to.
    pub(crate) targets: Vec<DialTarget>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Mode")]
enum SandboxMode {
    Auto,
    Require,
    Off,
}

/// First message from the dialer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct DialerReady {
    /// Restrictions that are in force.
    pub(crate) enforced: Vec<String>,
    /// Restrictions that aren't available.
    pub(crate) missing: Vec<String>,
    /// Labels and texts of the remaining risks.
    pub(crate) notes: Vec<(String, String)>,
}

/// Request for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DialRequest {
    /// Number that the response repeats.
    pub(crate) id: u32,
    /// Index of the target in [`DialerStart::targets`].
    pub(crate) target: u16,
}

impl DialRequest {
    pub(super) const LENGTH: usize = ID_LENGTH + 2;

    pub(crate) fn encode(self) -> [u8; Self::LENGTH] {
        let ([a, b, c, d], [e, f]) = (self.id.to_be_bytes(), self.target.to_be_bytes());
        [a, b, c, d, e, f]
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (id, target) = bytes.split_first_chunk()?;
        let target = u16::from_be_bytes(target.try_into().ok()?);
        Some(Self { id: u32::from_be_bytes(*id), target })
    }
}

/// Response to a [`DialRequest`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DialResponse {
    pub(crate) id: u32,
    /// Success if a connected socket is attached.
    pub(crate) outcome: Result<(), DialError>,
}

impl DialResponse {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.id.to_be_bytes().to_vec();
        match &self.outcome {
            Ok(()) => bytes.push(CONNECTED),
            Err(DialError { kind, message }) => {
                bytes.push(kind.code());
                bytes.extend(message.bytes());
                bytes.truncate(MAX_RESPONSE_LENGTH);
            }
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk()?;
        let outcome = match rest.split_first()? {
            (&CONNECTED, []) => Ok(()),
            (&code, message) => {
                let kind = DialErrorKind::from_code(code)?;
                Err(DialError::new(kind, String::from_utf8_lossy(message)))
            }
        };
        Some(Self { id: u32::from_be_bytes(*id), outcome })
    }
}

/// Failure to connect, the content of the [`io::Error`] that `Dial` returns.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct DialError {
    kind: DialErrorKind,
    message: String,
}

impl DialError {
    pub(super) fn new(kind: DialErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// Returns the stable label for log fields.
    pub(crate) fn label(&self) -> &'static str {
        self.kind.label()
    }
}

impl From<DialError> for io::Error {
    fn from(error: DialError) -> Self {
        Self::new(error.kind.io_kind(), error)
    }
}

/// Reason of a [`DialError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DialErrorKind {
    /// The server isn't in the list.
    NotAllowed,
    /// The name has no address, or the resolver failed.
    Unresolved,
    /// The name has only addresses that names must not have.
    AddressRefused,
    /// No address accepted the connection.
    ConnectFailed,
    /// No address responded in time.
    ConnectTimedOut,
    /// The configuration of the resolver was replaced by a file that the sandbox doesn't permit.
    ResolverReplaced,
    /// The dialer didn't respond in time.
    DialerSilent,
    /// The dialer has ended.
    DialerGone,
    /// The dialer passed something else than a TCP connection.
    UnusableSocket,
}

impl DialErrorKind {
    const ALL: [Self; 9] = [
        Self::NotAllowed,
        Self::Unresolved,
        Self::AddressRefused,
        Self::ConnectFailed,
        Self::ConnectTimedOut,
        Self::ResolverReplaced,
        Self::DialerSilent,
        Self::DialerGone,
        Self::UnusableSocket,
    ];

    fn code(self) -> u8 {
        self as u8 + 1
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }

    fn label(self) -> &'static str {
        match self {
            Self::NotAllowed => "store_not_allowed",
            Self::Unresolved => "store_unresolved",
            Self::AddressRefused => "store_address_refused",
            Self::ConnectFailed => "store_connect_failed",
            Self::ConnectTimedOut => "store_connect_timeout",
            Self::ResolverReplaced => "resolver_config_replaced",
            Self::DialerSilent => "dialer_silent",
            Self::DialerGone => "dialer_gone",
            Self::UnusableSocket => "dialer_socket_unusable",
        }
    }

    fn io_kind(self) -> io::ErrorKind {
        match self {
            Self::NotAllowed | Self::AddressRefused => io::ErrorKind::PermissionDenied,
            Self::Unresolved | Self::ResolverReplaced => io::ErrorKind::NotFound,
            Self::ConnectFailed => io::ErrorKind::ConnectionRefused,
            Self::ConnectTimedOut | Self::DialerSilent => io::ErrorKind::TimedOut,
            Self::DialerGone => io::ErrorKind::NotConnected,
            Self::UnusableSocket => io::ErrorKind::InvalidData,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_decoded_as_encoded() {
        let request = DialRequest { id: 0x0102_0304, target: 0x0506 };
        assert_eq!(request.encode(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(DialRequest::decode(&request.encode()), Some(request));
        for wrong in [&[][..], &[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5, 6, 7]] {
            assert_eq!(DialRequest::decode(wrong), None);
        }
    }

    #[test]
    fn responses_are_decoded_as_encoded() {
        let failures = DialErrorKind::ALL.map(|kind| Err(DialError::new(kind, "no such host")));
        for outcome in failures.into_iter().chain([Ok(())]) {
            let response = DialResponse { id: 7, outcome };
            assert_eq!(DialResponse::decode(&response.encode()), Some(response));
        }
    }

    #[test]
    fn malformed_responses_are_rejected() {
        for wrong in [&[][..], &[0, 0, 0], &[0, 0, 0, 1], &[0, 0, 0, 1, 10], &[0, 0, 0, 1, 0, 1]] {
            assert_eq!(DialResponse::decode(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn long_messages_are_truncated() {
        let outcome = Err(DialError::new(DialErrorKind::Unresolved, "é".repeat(1000)));
        let bytes = DialResponse { id: 1, outcome }.encode();
        assert_eq!(bytes.len(), MAX_RESPONSE_LENGTH);
        assert!(DialResponse::decode(&bytes).is_some());
    }

    #[test]
    fn labels_are_distinct() {
        let labels: std::collections::BTreeSet<_> =
            DialErrorKind::ALL.iter().map(|kind| kind.label()).collect();
        assert_eq!(labels.len(), DialErrorKind::ALL.len());
    }
}
