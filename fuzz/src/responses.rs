//! Responses of stores: `Content-Range`, and whether a response is taken for a part of an object.
//!
//! Whatever is taken must be exactly the part that was asked for, of a version that can be told
//! from others. What an honest server sends has to be taken.

use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use bytes::Bytes;
use object_reader::{
    ByteRange, ContentRange, GetRequest, Response, StoreError, Version, judge_response,
    parse_content_range,
};

/// Longer bodies show nothing new, in bytes.
const MAX_BODY: u64 = 64;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    range: Range,
    pinned: Option<Pinned<'a>>,
    status: Status,
    content_range: Option<Written<'a>>,
    etag: Option<&'a [u8]>,
    last_modified: Option<&'a [u8]>,
    other: Option<(Header, &'a [u8])>,
    body: &'a [u8],
    is_truncated: bool,
    /// Length of the object, and its tag, for a response as it should be.
    honest: (u8, u8),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Range {
    Bounded(u8, u8),
    Far(u64, u8),
    Suffix(u8),
}

#[derive(Debug, Arbitrary)]
struct Pinned<'a> {
    length: u8,
    etag: Option<&'a str>,
    last_modified: Option<&'a str>,
    version: Option<&'a str>,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Status {
    Partial,
    Whole,
    Unsatisfied,
    Other(u16),
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Header {
    Length,
    Encoding,
    Version,
    RetryAfter,
    Location,
    ErrorCode,
    Date,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum Written<'a> {
    Part(u8, u8, u8),
    Large(u64, u64, u64),
    Unsatisfied(u64),
    Text(&'a str),
    Bytes(&'a [u8]),
}

pub fn check(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    if let Some(written) = &input.content_range
        && let Ok(text) = std::str::from_utf8(&written.bytes())
    {
        assert_eq!(parse_content_range(text), content_range(text), "{text:?}");
    }
    let request = input.request();
    match input.response(&request) {
        Ok(response) => input.assert_right(&request, &response),
        Err(error) => assert_fit(&error),
    }
    check_honest(&request, input.honest);
}

impl Range {
    fn byte_range(self) -> ByteRange {
        match self {
            Self::Bounded(start, length) => {
                let (start, length) = (u64::from(start) % 80, u64::from(length) % 80 + 1);
                ByteRange::Bounded(start..start + length)
            }
            Self::Far(start, length) => {
                ByteRange::Bounded(start..start.saturating_add(u64::from(length)))
            }
            Self::Suffix(length) => ByteRange::Suffix(u64::from(length) % 80 + 1),
        }
    }
}

impl Written<'_> {
    fn bytes(&self) -> Vec<u8> {
        match *self {
            Self::Part(start, length, total) => {
                let (start, end) = (start % 80, u32::from(start % 80) + u32::from(length % 80));
                format!("bytes {start}-{end}/{}", total % 80).into_bytes()
            }
            Self::Large(first, last, total) => format!("bytes {first}-{last}/{total}").into_bytes(),
            Self::Unsatisfied(total) => format!("bytes */{total}").into_bytes(),
            Self::Text(text) => format!("bytes {text}").into_bytes(),
            Self::Bytes(bytes) => bytes.to_vec(),
        }
    }
}

impl Input<'_> {
    fn request(&self) -> GetRequest {
        let version = self.pinned.as_ref().map(|pinned| Version {
            length: u64::from(pinned.length) % 80,
            etag: pinned.etag.map(str::to_owned),
            version_id: pinned.version.map(str::to_owned),
            last_modified: pinned.last_modified.map(str::to_owned),
        });
        GetRequest { range: self.range.byte_range(), version, bypass_caches: false }
    }

    fn response(&self, request: &GetRequest) -> Result<Response, StoreError> {
        let content_range = self.content_range.as_ref().map(Written::bytes);
        let mut headers: Vec<(&str, &[u8])> = Vec::new();
        headers.extend(content_range.as_ref().map(|it| ("content-range", it.as_slice())));
        headers.extend(self.etag.map(|it| ("etag", it)));
        headers.extend(self.last_modified.map(|it| ("last-modified", it)));
        if let Some((header, value)) = self.other {
            let name = match header {
                Header::Length => "content-length",
                Header::Encoding => "content-encoding",
                Header::Version => "x-amz-version-id",
                Header::RetryAfter => "retry-after",
                Header::Location => "location",
                Header::ErrorCode => "x-ms-error-code",
                Header::Date => "date",
            };
            headers.push((name, value));
        }
        let status = match self.status {
            Status::Partial => 206,
            Status::Whole => 200,
            Status::Unsatisfied => 416,
            Status::Other(status) => status,
        };
        let body = Bytes::copy_from_slice(self.body);
        judge_response(status, &headers, body, self.is_truncated, request)
    }

    /// Checks what is taken: everything that was asked for, nothing else, of the pinned version.
    fn assert_right(&self, request: &GetRequest, response: &Response) {
        let Response { version, offset, bytes } = response;
        let total = version.length;
        let expected = match request.range {
            // Nothing of an empty object.
            _ if total == 0 => 0..0,
            ByteRange::Bounded(ref range) => range.start..range.end.min(total),
            ByteRange::Suffix(length) => total.saturating_sub(length)..total,
        };
        assert_eq!((*offset, offset + bytes.len() as u64), (expected.start, expected.end));
        assert!(bytes.is_empty() || **bytes == *self.body, "other bytes than those sent");
        assert!(bytes.is_empty() || !self.is_truncated, "a part of the body was taken for all");
        if let Some(pinned) = &request.version {
            assert_eq!(version, pinned);
        } else if !bytes.is_empty() {
            assert!(version.etag.is_some() || version.last_modified.is_some(), "{version:?}");
            assert!(!version.etag.as_ref().is_some_and(|tag| tag.starts_with("W/")));
        }
        if let Some((Header::Encoding, value)) = self.other
            && !bytes.is_empty()
            && value.iter().all(|byte| (b' '..=b'~').contains(byte))
        {
            let value = value.trim_ascii();
            assert!(value.is_empty() || value.eq_ignore_ascii_case(b"identity"), "{value:?}");
        }
    }
}

/// Words of a server become part of a line of a log.
fn assert_fit(error: &StoreError) {
    assert!(error.message.len() < 4096, "{}", error.message.len());
    assert!(!error.message.chars().any(char::is_control), "{:?}", error.message);
    assert!(error.retry_after.is_none_or(|time| time <= Duration::from_secs(u64::MAX)));
}

/// Checks that the response of a correct server is taken, if the range lies in the object.
fn check_honest(request: &GetRequest, (length, tag): (u8, u8)) {
    let total = u64::from(length) % MAX_BODY + 1;
    let object: Vec<u8> = (0..=u8::MAX).take(usize::try_from(total).unwrap_or(0)).collect();
    let range = match request.range {
        ByteRange::Bounded(ref range) if range.start < range.end.min(total) => {
            range.start..range.end.min(total)
        }
        ByteRange::Bounded(_) => return,
        ByteRange::Suffix(length) => total.saturating_sub(length)..total,
    };
    let etag = format!("\"{tag}\"");
    let content_range = format!("bytes {}-{}/{total}", range.start, range.end - 1);
    let headers = [("etag", etag.as_bytes()), ("content-range", content_range.as_bytes())];
    let body = object[range.start as usize..range.end as usize].to_vec();
    let unpinned = GetRequest { version: None, ..request.clone() };
    let answer =
        |request: &GetRequest| judge_response(206, &headers, body.clone().into(), false, request);
    let first = answer(&unpinned).expect("an honest response");
    assert_eq!((first.offset, &*first.bytes), (range.start, &*body));
    assert_eq!(first.version.etag.as_deref(), Some(&*etag));
    let pinned = GetRequest { version: Some(first.version.clone()), ..unpinned.clone() };
    assert_eq!(answer(&pinned).expect("the same version").bytes, first.bytes);
    let other = Version { etag: Some("\"other\"".to_owned()), ..first.version };
    let changed = GetRequest { version: Some(other), ..unpinned };
    assert_eq!(answer(&changed).expect_err("another version").kind.label(), "changed");
}

/// Reads `Content-Range` (RFC 9110, section 14.4), character by character. Other units than bytes,
/// and unknown lengths, are of no use. The content of an empty object has no range.
fn content_range(text: &str) -> Option<ContentRange> {
    let text = text.trim();
    let space = text.find(' ')?;
    if text[..space].to_lowercase() != "bytes" || !text[..space].is_ascii() {
        return None;
    }
    let rest = text[space + 1..].trim();
    let slash = rest.find('/')?;
    let total = number(&rest[slash + 1..])?;
    if total == 0 || &rest[..slash] == "*" {
        return Some(ContentRange::Unsatisfied { total });
    }
    let dash = rest[..slash].find('-')?;
    let (first, last) = (number(&rest[..dash])?, number(&rest[dash + 1..slash])?);
    let is_sound = first <= last && last < total;
    is_sound.then(|| ContentRange::Part { range: first..last + 1, total })
}

fn number(digits: &str) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.chars().try_fold(0_u64, |number, digit| {
        let digit = "0123456789".find(digit)? as u64;
        number.checked_mul(10)?.checked_add(digit)
    })
}

#[test]
fn the_judge_is_right_where_it_is_plain() {
    let part = ContentRange::Part { range: 0..10, total: 100 };
    assert_eq!(content_range("bytes 0-9/100"), Some(part));
    assert_eq!(content_range("bytes */5"), Some(ContentRange::Unsatisfied { total: 5 }));
    for wrong in ["bytes 0-9/*", "bytes 9-0/100", "items 0-9/100", "bytes +0-9/100", "bytes 0-9"] {
        assert_eq!(content_range(wrong), None, "{wrong}");
    }
}
