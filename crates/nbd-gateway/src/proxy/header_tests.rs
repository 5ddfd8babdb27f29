use proptest::prelude::*;

use super::*;

/// Builds a header from version and command, family and transport, and the block that follows.
fn header(version_and_command: u8, kind: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[version_and_command, kind], &length, block].concat()
}

/// Addresses and ports of a connection from 192.0.2.7:50000 to 198.51.100.1:10809.
const V4: [u8; 12] = [192, 0, 2, 7, 198, 51, 100, 1, 0xc3, 0x50, 0x2a, 0x39];

fn v6(source: &str) -> Vec<u8> {
    let [source, to] = [source, "2001:db8::1"].map(|text| text.parse::<Ipv6Addr>().unwrap());
    [&source.octets()[..], &to.octets(), &[0xc3, 0x50, 0x2a, 0x39]].concat()
}

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    [&[kind][..], &u16::try_from(value.len()).unwrap().to_be_bytes(), value].concat()
}

fn forwarded(address: &str) -> Result<ParseProgress, HeaderError> {
    Ok(ParseProgress::Complete(ProxyHeader::Forwarded(address.parse().unwrap())))
}

#[test]
fn golden_headers_are_parsed() {
    let sent =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\xc0\x00\x02\x07\xc6\x33\x64\x01\xc3\x50\x2a\x39";
    assert_eq!(parse(sent), forwarded("192.0.2.7"));
    assert_eq!(parse(&header(0x21, 0x11, &V4)), forwarded("192.0.2.7"));
    assert_eq!(parse(&header(0x21, 0x21, &v6("2001:db8::7"))), forwarded("2001:db8::7"));
    // Canonicalizing addresses is left to the gateway.
    assert_eq!(parse(&header(0x21, 0x21, &v6("::ffff:1.2.3.4"))), forwarded("::ffff:1.2.3.4"));
    assert_eq!(
        parse(b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00"),
        Ok(ParseProgress::Complete(ProxyHeader::Local))
    );
}

/// "discard the protocol block including the family which is ignored"
#[test]
fn local_headers_ignore_family_and_block() {
    for (kind, block) in [(0x11, &V4[..]), (0xff, b"anything"), (0x31, &[0; 216]), (0x22, b"")] {
        assert_eq!(
            parse(&header(0x20, kind, block)),
            Ok(ParseProgress::Complete(ProxyHeader::Local))
        );
    }
}

#[test]
fn headers_without_a_usable_address_are_rejected() {
    for (command, kind, block, error) in [
        (0x21, 0x00, &[][..], HeaderError::Unspecified),
        (0x21, 0x01, &V4, HeaderError::Unspecified),
        (0x21, 0x10, &V4, HeaderError::Unspecified),
        (0x21, 0x31, &[0; 216], HeaderError::Unix),
        (0x21, 0x12, &V4, HeaderError::Datagram),
        (0x21, 0x32, &[0; 216], HeaderError::Datagram),
        (0x21, 0x13, &V4, HeaderError::Family(0x13)),
        (0x21, 0x41, &V4, HeaderError::Family(0x41)),
        (0x21, 0xff, &V4, HeaderError::Family(0xff)),
        (0x22, 0x11, &V4, HeaderError::Command(2)),
        (0x2f, 0x11, &V4, HeaderError::Command(15)),
        (0x11, 0x11, &V4, HeaderError::Version(1)),
        (0x31, 0x11, &V4, HeaderError::Version(3)),
        (0x01, 0x11, &V4, HeaderError::Version(0)),
        (0x21, 0x11, &V4[..11], HeaderError::TooShort(11)),
        (0x21, 0x21, &[0; 35], HeaderError::TooShort(35)),
        (0x21, 0x11, b"", HeaderError::TooShort(0)),
    ] {
        let bytes = header(command, kind, block);
        assert_eq!(parse(&bytes), Err(error), "{command:x} {kind:x}");
        // The error is reported before the announced bytes have arrived.
        assert_eq!(parse(&bytes[..16]), Err(error), "{command:x} {kind:x}");
    }
}

#[test]
fn other_protocols_are_detected_at_their_first_bytes() {
    for line in ["PROXY TCP4 192.0.2.7 198.51.100.1 50000 10809\r\n", "PROXY UNKNOWN\r\n", "PROXY"]
    {
        assert_eq!(parse(line.as_bytes()), Err(HeaderError::Version1));
    }
    assert_eq!(parse(b"PRO"), Ok(ParseProgress::Incomplete(2)));
    for (sent, said) in [
        (&b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\x55\x44"[..], r"\x16\x03\x01\x02\x00"),
        (b"\0\0\0\x03", r#""\x00\x00\x00\x03""#),
        (b"GET / HTTP/1.1\r\n", r#""GET / HTTP/1""#),
        (b"PROGRAM", r#""PROGRAM""#),
        (b"\r\n\r\n\0\r\nQUIT\r", r"QUIT\r"),
        (b"\r\n\r\nx", r"\r\n\r\nx"),
    ] {
        let error = parse(sent).unwrap_err();
        assert!(matches!(error, HeaderError::NotAHeader(_)), "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[test]
fn header_length_is_capped() {
    let most = usize::from(MAX_LENGTH);
    let filler = tlv(0x04, &vec![0; most - V4.len() - 3]);
    let bytes = header(0x21, 0x11, &[&V4[..], &filler].concat());
    assert_eq!(parse(&bytes), forwarded("192.0.2.7"));
    for (length, command) in [(MAX_LENGTH + 1, 0x21), (u16::MAX, 0x21), (u16::MAX, 0x20)] {
        let mut bytes = header(command, 0x11, b"");
        bytes[14..].copy_from_slice(&length.to_be_bytes());
        assert_eq!(parse(&bytes), Err(HeaderError::TooLong(length)));
    }
}

#[test]
fn complete_tlvs_are_skipped_and_broken_ones_rejected() {
    let ssl = [&[7, 0, 0, 0, 0][..], &tlv(0x21, b"TLSv1.3")].concat();
    let several = [tlv(0x01, b"nbd"), tlv(0x20, &ssl), tlv(0x04, b""), tlv(0xe0, b"x")].concat();
    let with = |tlvs: &[u8]| parse(&header(0x21, 0x11, &[&V4[..], tlvs].concat()));
    assert_eq!(with(&several), forwarded("192.0.2.7"));
    for broken in [&[1][..], &[1, 0], &[1, 0, 1], &[1, 0, 5, 1, 2, 3, 4], &[4, 0, 0, 9]] {
        assert_eq!(with(broken), Err(HeaderError::Tlv));
    }
}

/// Checks the examples of RFC 3720, B.4, and the usual check value of the CRC.
#[test]
fn checksum_is_crc32c() {
    assert_eq!(crc32c([0; 32].into_iter()), 0x8a91_36aa);
    assert_eq!(crc32c([0xff; 32].into_iter()), 0x62a8_ab43);
    assert_eq!(crc32c(b"123456789".iter().copied()), 0xe306_9283);
}

/// Builds a header with a valid checksum, and TLVs around it.
fn with_checksum(before: &[u8], behind: &[u8]) -> Vec<u8> {
    let block = [&V4[..], before, &tlv(0x03, &[0; 4]), behind].concat();
    let mut bytes = header(0x21, 0x11, &block);
    let at = 16 + V4.len() + before.len() + 3;
    let value = crc32c(bytes.iter().copied());
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    bytes
}

#[test]
fn checksum_is_verified_if_present() {
    let noop = tlv(0x04, b"abc");
    for (before, behind) in [(&[][..], &[][..]), (&noop, &[]), (&[], &noop), (&noop, &noop)] {
        let bytes = with_checksum(before, behind);
        assert_eq!(parse(&bytes), forwarded("192.0.2.7"));
        for at in 16..bytes.len() {
            for bit in 0..8 {
                let mut other = bytes.clone();
                other[at] ^= 1 << bit;
                // Changing the TLV's type turns the checksum into a TLV that is ignored.
                let is_none = at == 16 + V4.len() + before.len();
                assert!(is_none || parse(&other).is_err(), "byte {at}, bit {bit}");
            }
        }
    }
    let two = with_checksum(&[], &tlv(0x03, &[0; 4]));
    assert_eq!(parse(&two), Err(HeaderError::Checksum));
    let short = header(0x21, 0x11, &[&V4[..], &tlv(0x03, &[0; 3])].concat());
    assert_eq!(parse(&short), Err(HeaderError::Checksum));
}

proptest! {
    /// However the header is split, the result is the same, and no byte behind it is requested.
    #[test]
    fn parsing_never_asks_for_bytes_behind_the_header(
        source: [u8; 4],
        value in proptest::collection::vec(any::<u8>(), 0..300),
        behind in proptest::collection::vec(any::<u8>(), 0..50),
        local: bool,
    ) {
        let command = if local { 0x20 } else { 0x21 };
        let block = [&source[..], &V4[4..], &tlv(0xe1, &value)].concat();
        let whole = header(command, 0x11, &block);
        let expected = match local {
            true => ProxyHeader::Local,
            false => ProxyHeader::Forwarded(source.into()),
        };
        for length in 0..whole.len() {
            match parse(&whole[..length]) {
                Ok(ParseProgress::Incomplete(more)) => prop_assert!((1..=whole.len() - length).contains(&more)),
                other => prop_assert!(false, "{length}: {other:?}"),
            }
        }
        let sent = [whole, behind].concat();
        prop_assert_eq!(parse(&sent), Ok(ParseProgress::Complete(expected)));
    }

    /// Any input is parsed, rejected, or incomplete.
    #[test]
    fn junk_is_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let judged = parse(&bytes);
        let is_start = SIGNATURE.starts_with(&bytes) || b"PROXY".starts_with(bytes.as_slice());
        prop_assert_eq!(matches!(judged, Ok(ParseProgress::Incomplete(_))), is_start);
        prop_assert!(is_start || judged.is_err());
    }
}
