//! Parser of PROXY headers ("2.2. Binary header format (version 2)"). No I/O.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Signature that starts every header.
pub(super) const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Length of the fixed part: signature, version and command, family and transport, and the length
/// of the rest.
const FIXED_LENGTH: usize = SIGNATURE.len() + 4;

/// Maximum length of what follows the first 16 bytes: addresses, and TLVs with further information
/// from the balancer. "This block is always smaller than an MSS", which is 1460 bytes in most
/// networks; the limit bounds the memory that a sender can make us hold.
pub(super) const MAX_LENGTH: u16 = 2048;

/// Content of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// The balancer connected on its own behalf, for example for a health check (`LOCAL`).
    Local,
    /// The balancer forwards a client with this address, taken from the header unchanged (`PROXY`).
    Forwarded(IpAddr),
}

/// Outcome of parsing the bytes received so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParseProgress {
    /// Number of further bytes that the header has at least; never 0.
    Incomplete(usize),
    /// The header is complete.
    Complete(ProxyHeader),
}

/// Reason for rejecting a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// A header of version 1, which is a line of text.
    #[error("version 1 is not supported (HAProxy: use send-proxy-v2 instead of send-proxy)")]
    Version1,
    /// The bytes aren't a PROXY header.
    #[error("received {0} instead (HAProxy: use send-proxy-v2)")]
    NotAHeader(UnexpectedStart),
    /// A version other than 2: "the receiver must only accept this value".
    #[error("unsupported version {0}")]
    Version(u8),
    /// An unknown command: "Receivers must drop connections presenting unexpected values here."
    #[error("unknown command {0:#x}")]
    Command(u8),
    /// The header announces more than 2048 bytes.
    #[error("{0} bytes of addresses and TLVs exceed the limit of {MAX_LENGTH} bytes")]
    TooLong(u16),
    /// The announced length is too short for the addresses of its family.
    #[error("the announced length of {0} bytes is too short for the addresses")]
    TooShort(u16),
    /// The balancer doesn't report the client's address.
    #[error("the address of the client is not specified (AF_UNSPEC)")]
    Unspecified,
    /// The client connected to a Unix socket of the balancer.
    #[error("the client is on a Unix socket of the load balancer and has no IP address")]
    Unix,
    /// The transport is a datagram protocol.
    #[error("the transport is a datagram protocol, expected TCP")]
    Datagram,
    /// An unknown family or transport: "other values are unspecified and … must be rejected as
    /// invalid by receivers".
    #[error("unknown address family and transport {0:#04x}")]
    Family(u8),
    /// The bytes after the addresses aren't a list of TLVs.
    #[error("the TLVs don't match the announced length")]
    Tlv,
    /// The checksum doesn't match: "the receiver MUST treat the TCP connection providing the header
    /// as invalid".
    #[error("checksum mismatch")]
    Checksum,
}

impl HeaderError {
    /// Returns the stable label for log fields and audit events.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Version1 => "version_1",
            Self::NotAHeader(_) => "not_a_header",
            Self::Version(_) => "unsupported_version",
            Self::Command(_) => "unknown_command",
            Self::TooLong(_) => "too_long",
            Self::TooShort(_) => "too_short",
            Self::Unspecified => "no_address",
            Self::Unix => "unix_client",
            Self::Datagram => "datagram",
            Self::Family(_) => "unknown_family",
            Self::Tlv => "malformed_tlv",
            Self::Checksum => "checksum_mismatch",
        }
    }
}

/// First bytes of something that isn't a header, to be shown in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnexpectedStart {
    bytes: [u8; SIGNATURE.len()],
    length: usize,
}

impl UnexpectedStart {
    fn of(bytes: &[u8]) -> Self {
        let mut start = Self { bytes: [0; SIGNATURE.len()], length: 0 };
        for (to, from) in start.bytes.iter_mut().zip(bytes) {
            *to = *from;
            start.length += 1;
        }
        start
    }
}

impl fmt::Display for UnexpectedStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        write!(f, "\"{}\"", bytes.escape_ascii())
    }
}

/// Parses the header at the start of `bytes`, which may be incomplete. A caller that reads no more
/// bytes than [`ParseProgress::Incomplete`] asks for never consumes a byte behind the header.
///
/// # Errors
/// The bytes aren't a header, or the header has no address that access rules can be applied to.
pub(super) fn parse(bytes: &[u8]) -> Result<ParseProgress, HeaderError> {
    let Some((signature, rest)) = bytes.split_first_chunk() else {
        return if SIGNATURE.starts_with(bytes) {
            Ok(ParseProgress::Incomplete(FIXED_LENGTH - bytes.len()))
        } else {
            classify_other(bytes)
        };
    };
    if *signature != SIGNATURE {
        return classify_other(bytes);
    }
    let Some((&[version_and_command, kind, high, low], rest)) = rest.split_first_chunk() else {
        return Ok(ParseProgress::Incomplete(FIXED_LENGTH - bytes.len()));
    };
    // "The highest four bits contains the version. … it must always be sent as \x2"
    if version_and_command >> 4 != 2 {
        return Err(HeaderError::Version(version_and_command >> 4));
    }
    let length = u16::from_be_bytes([high, low]);
    if length > MAX_LENGTH {
        return Err(HeaderError::TooLong(length));
    }
    let family = match version_and_command & 0xf {
        0 => None,
        1 => Some(Family::of(kind, length)?),
        command => return Err(HeaderError::Command(command)),
    };
    // "The receiver must not start to parse an address before the whole address block is
    // received."
    let Some(block) = rest.get(..length.into()) else {
        return Ok(ParseProgress::Incomplete(usize::from(length) - rest.len()));
    };
    let Some(family) = family else {
        // "The receiver … must use the real connection endpoints and discard the protocol block
        // including the family which is ignored."
        return Ok(ParseProgress::Complete(ProxyHeader::Local));
    };
    let (source, tlvs) = family.split(block).ok_or(HeaderError::TooShort(length))?;
    if let Some(checksum) = checksum(tlvs)? {
        let head = [version_and_command, kind, high, low];
        let before = block.len() - checksum.left;
        let header = SIGNATURE.iter().chain(&head).chain(block).copied();
        let field = FIXED_LENGTH + before..FIXED_LENGTH + before + 4;
        // "replace the 32 bits of the checksum field in the received PROXY header with all '0's"
        let blanked =
            header.enumerate().map(|(at, byte)| if field.contains(&at) { 0 } else { byte });
        if crc32c(blanked) != checksum.value {
            return Err(HeaderError::Checksum);
        }
    }
    Ok(ParseProgress::Complete(ProxyHeader::Forwarded(source)))
}

/// Identifies what was sent instead of a header of version 2, as soon as that is clear.
fn classify_other(bytes: &[u8]) -> Result<ParseProgress, HeaderError> {
    const VERSION_1: &[u8] = b"PROXY";
    if bytes.starts_with(VERSION_1) {
        return Err(HeaderError::Version1);
    }
    if VERSION_1.starts_with(bytes) {
        return Ok(ParseProgress::Incomplete(VERSION_1.len() - bytes.len()));
    }
    Err(HeaderError::NotAHeader(UnexpectedStart::of(bytes)))
}

/// Address families that access rules can be applied to.
#[derive(Debug, Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl Family {
    /// Returns the family of a header that announces `length` bytes.
    fn of(kind: u8, length: u16) -> Result<Self, HeaderError> {
        let (family, needed) = match (kind >> 4, kind & 0xf) {
            (0..=3, 2) => return Err(HeaderError::Datagram),
            (0, 0 | 1) | (1..=3, 0) => return Err(HeaderError::Unspecified),
            (1, 1) => (Self::V4, 2 * 4 + 2 * 2),
            (2, 1) => (Self::V6, 2 * 16 + 2 * 2),
            (3, 1) => return Err(HeaderError::Unix),
            _ => return Err(HeaderError::Family(kind)),
        };
        if length < needed { Err(HeaderError::TooShort(length)) } else { Ok(family) }
    }

    /// Splits a block into the source address and what follows both addresses and ports.
    fn split(self, block: &[u8]) -> Option<(IpAddr, &[u8])> {
        match self {
            Self::V4 => {
                let (source, rest) = block.split_first_chunk::<4>()?;
                let (_, tlvs) = rest.split_first_chunk::<8>()?;
                Some((Ipv4Addr::from(*source).into(), tlvs))
            }
            Self::V6 => {
                let (source, rest) = block.split_first_chunk::<16>()?;
                let (_, tlvs) = rest.split_first_chunk::<20>()?;
                Some((Ipv6Addr::from(*source).into(), tlvs))
            }
        }
    }
}

/// A checksum TLV of a header.
struct Checksum {
    value: u32,
    /// Number of bytes from the start of its value to the end of the header.
    left: usize,
}

/// Validates the TLVs and returns the checksum, the only one that is used.
fn checksum(mut tlvs: &[u8]) -> Result<Option<Checksum>, HeaderError> {
    const PP2_TYPE_CRC32C: u8 = 0x03;
    let mut found = None;
    while !tlvs.is_empty() {
        let (&[kind, high, low], rest) = tlvs.split_first_chunk().ok_or(HeaderError::Tlv)?;
        let length = u16::from_be_bytes([high, low]).into();
        let (value, behind) = rest.split_at_checked(length).ok_or(HeaderError::Tlv)?;
        if kind == PP2_TYPE_CRC32C {
            let value = value.try_into().map_err(|_| HeaderError::Checksum)?;
            let checksum = Checksum { value: u32::from_be_bytes(value), left: rest.len() };
            // With two checksums, it isn't clear what each of them covers.
            if found.replace(checksum).is_some() {
                return Err(HeaderError::Checksum);
            }
        }
        tlvs = behind;
    }
    Ok(found)
}

/// Computes the CRC-32C (Castagnoli), bit by bit: it takes some microseconds for each connection
/// whose header has a checksum.
fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    !bytes.fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            let reduced = crc >> 1;
            if crc & 1 == 0 { reduced } else { reduced ^ POLYNOMIAL }
        })
    })
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
