//! The header as bytes ("2.2. Binary header format (version 2)"). No I/O.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// With what each header begins.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Signature, version and command, family and transport, and the length of what follows.
const HEAD: usize = SIGNATURE.len() + 4;

/// How much may follow the first 16 bytes: addresses, and TLVs with what else the balancer
/// knows. "This block is always smaller than an MSS", of 1460 bytes in most networks, and
/// nobody should make us keep more.
pub const MAX_LENGTH: u16 = 2048;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// The balancer has connected for itself, as to see whether this program lives (`LOCAL`).
    Local,
    /// It forwards a client with this address, as it stands there (`PROXY`).
    Forwarded(IpAddr),
}

/// How far one has come with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// At least so many bytes more belong to it; never none.
    More(usize),
    /// It is all there.
    Done(Header),
}

/// What is wrong with a header; "it" is who sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Version 1, a line of text.
    #[error("it sent one of version 1 (HAProxy: send-proxy-v2 instead of send-proxy)")]
    Version1,
    /// Something else.
    #[error("it sent {0} (HAProxy: send-proxy-v2; if it is no load balancer, don't name it)")]
    NoHeader(Start),
    /// "the receiver must only accept this value", which is 2.
    #[error("it sent one of version {0}")]
    Version(u8),
    /// "Receivers must drop connections presenting unexpected values here."
    #[error("it sent one that has the unknown command {0:#x}")]
    Command(u8),
    /// More than anybody needs.
    #[error(
        "it sent one that announces {0} bytes of addresses and TLVs, of which {MAX_LENGTH} are allowed"
    )]
    TooLong(u16),
    /// The addresses don't fit into it.
    #[error("it sent one that announces {0} bytes, which its addresses don't fit into")]
    TooShort(u16),
    /// A client whose address the balancer doesn't say.
    #[error(
        "it sent one that doesn't say the client's address (AF_UNSPEC), so that nobody can judge it"
    )]
    Unspecified,
    /// A client on a Unix socket of the balancer.
    #[error(
        "it sent one that forwards a client of a Unix socket, which has no address to be judged by"
    )]
    Unix,
    /// UDP.
    #[error("it sent one that forwards datagrams; NBD is spoken over TCP")]
    Datagram,
    /// "other values are unspecified and … must be rejected as invalid by receivers"
    #[error("it sent one that has the unknown family and transport {0:#04x}")]
    Family(u8),
    /// What follows the addresses is no list of TLVs.
    #[error("it sent one that has TLVs which don't fit into its length")]
    Tlv,
    /// "the receiver MUST treat the TCP connection providing the header as invalid"
    #[error("it sent one that has a checksum which isn't its own")]
    Checksum,
}

/// How something begins that is no header, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    bytes: [u8; SIGNATURE.len()],
    length: usize,
}

impl Start {
    fn of(bytes: &[u8]) -> Self {
        let mut start = Self { bytes: [0; SIGNATURE.len()], length: 0 };
        for (to, from) in start.bytes.iter_mut().zip(bytes) {
            *to = *from;
            start.length += 1;
        }
        start
    }
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        write!(f, "\"{}\"", bytes.escape_ascii())
    }
}

/// Reads the header that `bytes` begin with, as far as they go. Whoever asks for no more than
/// [`Step::More`] says never has a byte of what follows the header.
///
/// # Errors
/// It isn't one, or none by which a client could be judged.
pub fn parse(bytes: &[u8]) -> Result<Step, HeaderError> {
    let Some((signature, rest)) = bytes.split_first_chunk() else {
        return if SIGNATURE.starts_with(bytes) {
            Ok(Step::More(HEAD - bytes.len()))
        } else {
            something_else(bytes)
        };
    };
    if *signature != SIGNATURE {
        return something_else(bytes);
    }
    let Some((&[version_and_command, kind, high, low], rest)) = rest.split_first_chunk() else {
        return Ok(Step::More(HEAD - bytes.len()));
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
        return Ok(Step::More(usize::from(length) - rest.len()));
    };
    let Some(family) = family else {
        // "The receiver … must use the real connection endpoints and discard the protocol block
        // including the family which is ignored."
        return Ok(Step::Done(Header::Local));
    };
    let (source, tlvs) = family.split(block).ok_or(HeaderError::TooShort(length))?;
    if let Some(checksum) = checksum(tlvs)? {
        let head = [version_and_command, kind, high, low];
        let before = block.len() - checksum.left;
        let header = SIGNATURE.iter().chain(&head).chain(block).copied();
        let field = HEAD + before..HEAD + before + 4;
        // "replace the 32 bits of the checksum field in the received PROXY header with all '0's"
        let blanked =
            header.enumerate().map(|(at, byte)| if field.contains(&at) { 0 } else { byte });
        if crc32c(blanked) != checksum.value {
            return Err(HeaderError::Checksum);
        }
    }
    Ok(Step::Done(Header::Forwarded(source)))
}

/// What there is instead of a header of version 2, as soon as that is clear.
fn something_else(bytes: &[u8]) -> Result<Step, HeaderError> {
    const VERSION_1: &[u8] = b"PROXY";
    if bytes.starts_with(VERSION_1) {
        return Err(HeaderError::Version1);
    }
    if VERSION_1.starts_with(bytes) {
        return Ok(Step::More(VERSION_1.len() - bytes.len()));
    }
    Err(HeaderError::NoHeader(Start::of(bytes)))
}

/// Addresses that a client can be judged by.
#[derive(Debug, Clone, Copy)]
enum Family {
    V4,
    V6,
}

impl Family {
    /// The family that a header with so many bytes is of.
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

    /// The source's address, and what is behind both addresses and ports.
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

/// A checksum that a header has.
struct Checksum {
    value: u32,
    /// How many bytes there are from its beginning to the header's end.
    left: usize,
}

/// Goes through the TLVs, of which only a checksum means anything here.
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
            // With two of them, it isn't clear of what.
            if found.replace(checksum).is_some() {
                return Err(HeaderError::Checksum);
            }
        }
        tlvs = behind;
    }
    Ok(found)
}

/// CRC-32C (Castagnoli), bit by bit: some microseconds for each connection that has one.
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
