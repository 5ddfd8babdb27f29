//! The header that a load balancer sends in front of a client: the same comes of it however it
//! is cut into pieces, and not a byte of what follows is read with it.

use std::net::IpAddr;
use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use nbd_gateway::proxy::{HeaderError, ProxyHeader, ReadHeaderError, read_header};

use crate::script::{Script, run};

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    pieces: &'a [u8],
    written: Written<'a>,
    /// How many bytes of it never come, mostly none.
    cut: u8,
    tail: &'a [u8],
}

#[derive(Debug, Arbitrary)]
enum Written<'a> {
    Anything(&'a [u8]),
    Text(&'a str),
    Header {
        command: u8,
        kind: u8,
        addresses: [u8; 36],
        tlvs: Vec<(u8, &'a [u8])>,
        /// Where among the TLVs, and what is wrong with it.
        checksum: Option<(u8, u8)>,
        /// By how much the stated length is off, mostly by nothing.
        off: i8,
        flipped: Option<(u8, u8)>,
    },
}

/// What has to come of it.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Local(usize),
    Forwarded(IpAddr, usize),
    Cut,
    Version1,
    NoHeader,
    Refused,
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut bytes = input.written.bytes();
    if input.cut % 4 == 0 {
        bytes.truncate(bytes.len().saturating_sub(usize::from(input.cut) / 4));
    }
    bytes.extend(input.tail);
    let mut script = Script::new(&bytes, input.pieces);
    let read = run(read_header(&mut script, Duration::from_secs(3600)));
    let consumed = script.consumed();
    assert!(script.output.is_empty(), "nothing is said before it is known to whom");

    match (judge(&bytes), read) {
        (Verdict::Local(length), Ok(ProxyHeader::Local)) => assert_eq!(consumed, length),
        (Verdict::Forwarded(address, length), Ok(ProxyHeader::Forwarded(read))) => {
            assert_eq!((read, consumed), (address, length));
        }
        (Verdict::Cut, Err(ReadHeaderError::ClosedAtOnce)) => assert!(bytes.is_empty()),
        (Verdict::Cut, Err(ReadHeaderError::ClosedEarly(count))) => {
            assert_eq!((count, consumed), (bytes.len(), bytes.len()));
        }
        (Verdict::Version1, Err(ReadHeaderError::Invalid(HeaderError::Version1))) => {}
        (Verdict::NoHeader, Err(ReadHeaderError::Invalid(HeaderError::NotAHeader(start)))) => {
            let start = start.to_string();
            assert!(start.is_ascii() && start.bytes().all(|byte| byte >= b' '), "{start:?}");
        }
        (Verdict::Refused, Err(ReadHeaderError::Invalid(error))) => {
            let is_other = matches!(error, HeaderError::Version1 | HeaderError::NotAHeader(_));
            assert!(!is_other, "{error}");
        }
        (verdict, read) => panic!("{read:?} instead of {verdict:?}"),
    }
}

const SIGNATURE: [u8; 12] =
    [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];

/// The specification, from top to bottom.
fn judge(bytes: &[u8]) -> Verdict {
    if bytes.len() < 12 || bytes[..12] != SIGNATURE {
        return if SIGNATURE.starts_with(bytes) || b"PROXY"[..4].starts_with(bytes) {
            Verdict::Cut
        } else if bytes.starts_with(b"PROXY") {
            Verdict::Version1
        } else {
            Verdict::NoHeader
        };
    }
    if bytes.len() < 16 {
        return Verdict::Cut;
    }
    let (command, kind) = (bytes[12], bytes[13]);
    let length = usize::from(bytes[14]) * 256 + usize::from(bytes[15]);
    let end = 16 + length;
    let addresses = match (command, kind) {
        _ if length > 2048 => return Verdict::Refused,
        (0x20, _) if bytes.len() < end => return Verdict::Cut,
        (0x20, _) => return Verdict::Local(end),
        (0x21, 0x11) if length >= 12 => 12,
        (0x21, 0x21) if length >= 36 => 36,
        _ => return Verdict::Refused,
    };
    if bytes.len() < end {
        return Verdict::Cut;
    }
    let mut at = 16 + addresses;
    let mut checksums = Vec::new();
    while at < end {
        if at + 3 > end {
            return Verdict::Refused;
        }
        let value = usize::from(bytes[at + 1]) * 256 + usize::from(bytes[at + 2]);
        if at + 3 + value > end {
            return Verdict::Refused;
        }
        if bytes[at] == 3 {
            checksums.push((at + 3, value));
        }
        at += 3 + value;
    }
    match checksums[..] {
        [] => {}
        [(at, 4)] => {
            let mut blank = bytes[..end].to_vec();
            blank[at..at + 4].fill(0);
            if crc32c(&blank).to_be_bytes() != bytes[at..at + 4] {
                return Verdict::Refused;
            }
        }
        _ => return Verdict::Refused,
    }
    let address = if addresses == 12 {
        IpAddr::from(<[u8; 4]>::try_from(&bytes[16..20]).expect("4 bytes"))
    } else {
        IpAddr::from(<[u8; 16]>::try_from(&bytes[16..32]).expect("16 bytes"))
    };
    Verdict::Forwarded(address, end)
}

/// From the highest bit down, as polynomials are divided on paper.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut rest = u32::MAX;
    for byte in bytes {
        rest ^= u32::from(byte.reverse_bits()) << 24;
        for _ in 0..8 {
            rest = if rest >> 31 == 1 { rest << 1 ^ 0x1edc_6f41 } else { rest << 1 };
        }
    }
    !rest.reverse_bits()
}

impl Written<'_> {
    fn bytes(&self) -> Vec<u8> {
        let (command, kind, addresses, tlvs, checksum, off, flipped) = match self {
            Self::Anything(bytes) => return bytes.to_vec(),
            Self::Text(text) => return format!("PROXY {text}\r\n").into_bytes(),
            Self::Header { command, kind, addresses, tlvs, checksum, off, flipped } => {
                (command, kind, addresses, tlvs, checksum, off, flipped)
            }
        };
        // Mostly what is understood.
        let command = if command % 8 == 0 { *command } else { 0x20 + u8::from(command % 8 > 2) };
        let kind = match kind % 4 {
            0 => *kind,
            1 => 0x21,
            _ => 0x11,
        };
        let mut block = addresses[..if kind == 0x11 { 12 } else { 36 }].to_vec();
        let mut sum_at = None;
        let place = checksum.map(|(place, _)| usize::from(place) % (tlvs.len() + 1));
        for number in 0..=tlvs.len() {
            if place == Some(number) {
                block.extend([3, 0, 4, 0, 0, 0, 0]);
                sum_at = Some(16 + block.len() - 4);
            }
            if let Some((kind, value)) = tlvs.get(number) {
                block.push(*kind);
                block.extend((value.len() as u16).to_be_bytes());
                block.extend(*value);
            }
        }
        let off = if off % 4 == 0 { i16::from(*off / 4) } else { 0 };
        let length = (block.len() as u16).wrapping_add_signed(off);
        let mut bytes = [&SIGNATURE[..], &[command, kind], &length.to_be_bytes(), &block].concat();
        if let (Some(at), Some((_, wrong))) = (sum_at, checksum) {
            let end = (16 + usize::from(length)).min(bytes.len());
            let wrong = if wrong % 4 == 0 { u32::from(*wrong) } else { 0 };
            let sum = crc32c(&bytes[..end]) ^ wrong;
            bytes[at..at + 4].copy_from_slice(&sum.to_be_bytes());
        }
        if let Some((at, bits)) = flipped
            && let Some(byte) = bytes.get_mut(usize::from(*at))
        {
            *byte ^= bits;
        }
        bytes
    }
}

#[test]
fn the_judge_is_right_itself() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    let header = [&SIGNATURE[..], &[0x21, 0x11, 0, 12, 192, 0, 2, 7, 0, 0, 0, 0, 0, 0, 0, 0]];
    assert_eq!(judge(&header.concat()), Verdict::Forwarded([192, 0, 2, 7].into(), 28));
    assert_eq!(judge(b"PROXY TCP4"), Verdict::Version1);
    assert_eq!(judge(b"PROX"), Verdict::Cut);
}
