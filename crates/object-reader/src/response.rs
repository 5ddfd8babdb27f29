//! Judgement of responses, for all kinds of stores. Nothing here does I/O.

use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{
    CONTENT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED,
};

use crate::http::content_length;
use crate::store::{ByteRange, GetRequest, Response, StoreError, StoreErrorKind, Version};

mod failure;
#[cfg(test)]
mod tests;

pub(crate) use failure::{check_failure, quoted, rejects_credentials, xml_text};

/// Maximum length of an entity tag or a version, in bytes.
const MAX_TAG: usize = 1024;

/// Headers that contain the version of an object in a bucket with versioning.
const VERSION_HEADERS: [&str; 3] = ["x-amz-version-id", "x-goog-generation", "x-ms-version-id"];

impl StoreError {
    /// Creates an error without a time to wait.
    pub(crate) fn new(kind: StoreErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retry_after: None }
    }
}

/// Response as received.
#[derive(Debug, Clone, Default)]
pub(crate) struct RawResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// Body, or a part of it.
    pub(crate) body: Bytes,
    /// True if the body is longer than what has been read.
    pub(crate) is_truncated: bool,
}

impl RawResponse {
    /// Returns the value of a header, if it is visible ASCII.
    pub(crate) fn header(&self, name: impl hyper::header::AsHeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Value of the header `Content-Range` (RFC 9110, section 14.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContentRange {
    /// A part of an object with `total` bytes.
    Part {
        /// The part, which lies within the object and isn't empty.
        range: Range<u64>,
        /// Length of the object, in bytes.
        total: u64,
    },
    /// No part: the requested range lies beyond the end of an object with `total` bytes.
    Unsatisfied {
        /// Length of the object, in bytes.
        total: u64,
    },
}

/// Parses the value of the header `Content-Range`. Returns `None` if it is invalid, has another
/// unit than bytes, or doesn't state the length of the object.
pub fn parse_content_range(value: &str) -> Option<ContentRange> {
    let (unit, rest) = value.trim().split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim().split_once('/')?;
    let total = parse_number(total)?;
    // Some servers describe the content of an empty object as 0--1/0.
    if range == "*" || total == 0 {
        return Some(ContentRange::Unsatisfied { total });
    }
    let (first, last) = range.split_once('-')?;
    let range = parse_number(first)?..parse_number(last)?.checked_add(1)?;
    (range.start < range.end && range.end <= total).then_some(ContentRange::Part { range, total })
}

fn parse_number(digits: &str) -> Option<u64> {
    // `parse` alone would accept a sign.
    digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Checks a response that is given by its parts, for fuzzing. Headers that can't be sent are left
/// out.
///
/// # Errors
/// See [`StoreErrorKind`].
pub fn judge_response(
    status: u16,
    headers: &[(&str, &[u8])],
    body: Bytes,
    is_truncated: bool,
    request: &GetRequest,
) -> Result<Response, StoreError> {
    let header = |(name, value): &(&str, &[u8])| {
        let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some((name, HeaderValue::from_bytes(value).ok()?))
    };
    let raw = RawResponse {
        status: StatusCode::from_u16(status).unwrap_or_default(),
        headers: headers.iter().filter_map(header).collect(),
        body,
        is_truncated,
    };
    check_get(&raw, request, SystemTime::UNIX_EPOCH)
}

/// Checks the response to a request for a part of an object.
pub(crate) fn check_get(
    raw: &RawResponse,
    request: &GetRequest,
    now: SystemTime,
) -> Result<Response, StoreError> {
    match raw.status {
        StatusCode::PARTIAL_CONTENT => check_partial(raw, request),
        StatusCode::OK => check_whole(raw, request),
        StatusCode::RANGE_NOT_SATISFIABLE => check_unsatisfied(raw, request),
        _ => Err(check_failure(raw, request.version.is_some(), now)),
    }
}

/// Checks the head of the response to a request for a part of an object. Returns the offset of the
/// first byte, if the body is going to be exactly the requested part of the required version.
pub(crate) fn check_head(
    status: StatusCode,
    headers: &HeaderMap,
    request: &GetRequest,
) -> Option<u64> {
    let is_checkable = status == StatusCode::PARTIAL_CONTENT && request.version.is_some();
    let content_range = headers.get(CONTENT_RANGE).filter(|_| is_checkable)?.to_str().ok()?;
    let (_, range) = check_range(headers, content_range, request).ok()?;
    (content_length(headers)? == range.end - range.start).then_some(range.start)
}

/// Checks the response to a conditional request for the headers of an object. Returns true if
/// `version` is the current one.
pub(crate) fn check_current(
    raw: &RawResponse,
    version: &Version,
    now: SystemTime,
) -> Result<bool, StoreError> {
    let length = match raw.status {
        StatusCode::NOT_MODIFIED => return Ok(true),
        StatusCode::PRECONDITION_FAILED => return Ok(false),
        StatusCode::OK => content_length(&raw.headers),
        StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
            match raw.header(CONTENT_RANGE).and_then(parse_content_range) {
                Some(ContentRange::Part { total, .. } | ContentRange::Unsatisfied { total }) => {
                    Some(total)
                }
                None => None,
            }
        }
        _ => return Err(check_failure(raw, false, now)),
    };
    let current = version_of(&raw.headers, length.unwrap_or(version.length));
    let lacks_identity = raw.status == StatusCode::RANGE_NOT_SATISFIABLE && !has_identity(&current);
    Ok(if lacks_identity {
        current.length == version.length
    } else {
        difference(version, &current).is_none()
    })
}

/// Status 206: exactly the requested range, limited by the end of the object.
fn check_partial(raw: &RawResponse, request: &GetRequest) -> Result<Response, StoreError> {
    let Some(value) = raw.header(CONTENT_RANGE) else {
        check_encoding(&raw.headers)?;
        return unsupported("the server sent a part (status 206) without the header Content-Range");
    };
    let is_empty = parse_content_range(value) == Some(ContentRange::Unsatisfied { total: 0 });
    if is_empty && raw.body.is_empty() {
        check_encoding(&raw.headers)?;
        return check_unsatisfied(raw, request);
    }
    let (version, range) = check_range(&raw.headers, value, request)?;
    let length = range.end - range.start;
    if raw.is_truncated || raw.body.len() as u64 != length {
        let received = raw.body.len();
        let more = if raw.is_truncated { "more than " } else { "" };
        return Err(StoreError::new(
            StoreErrorKind::Interrupted,
            format!("the server announced {length} bytes and sent {more}{received}"),
        ));
    }
    Ok(Response { version, offset: range.start, bytes: raw.body.clone() })
}

/// Checks the headers of a response with status 206. Returns the version of the object, and the
/// range of the part.
fn check_range(
    headers: &HeaderMap,
    content_range: &str,
    request: &GetRequest,
) -> Result<(Version, Range<u64>), StoreError> {
    check_encoding(headers)?;
    let Some(ContentRange::Part { range, total }) = parse_content_range(content_range) else {
        return unsupported(format!("invalid header Content-Range: {}", quoted(content_range)));
    };
    let version = check_version(headers, total, request)?;
    let expected = match request.range {
        ByteRange::Bounded(ref wanted) => wanted.start..wanted.end.min(total),
        ByteRange::Suffix(length) => total.saturating_sub(length)..total,
    };
    if range != expected {
        return unsupported(format!(
            "the server sent the range {}-{} instead of {}-{} (of {total} bytes)",
            range.start, range.end, expected.start, expected.end
        ));
    }
    Ok((version, range))
}

/// Status 200: acceptable only for requests that cover the whole object.
fn check_whole(raw: &RawResponse, request: &GetRequest) -> Result<Response, StoreError> {
    check_encoding(&raw.headers)?;
    let received = raw.body.len() as u64;
    let length = content_length(&raw.headers).or((!raw.is_truncated).then_some(received));
    if let (Some(length), Some(_)) = (length, &request.version) {
        // A replaced object matters more than what else is wrong.
        check_version(&raw.headers, length, request)?;
    }
    let covers_all = !raw.is_truncated
        && match request.range {
            ByteRange::Bounded(ref range) => range.start == 0 && range.end >= received,
            ByteRange::Suffix(length) => length >= received,
        };
    if !covers_all {
        return unsupported(
            "the server ignores ranges: it sent the whole object (status 200). Enable range \
             requests (Accept-Ranges: bytes), and let proxies and caches pass the header Range",
        );
    }
    let version = check_version(&raw.headers, received, request)?;
    Ok(Response { version, offset: 0, bytes: raw.body.clone() })
}

/// Status 416, or 206 with nothing: acceptable only for an empty object.
fn check_unsatisfied(raw: &RawResponse, request: &GetRequest) -> Result<Response, StoreError> {
    let body = String::from_utf8_lossy(&raw.body);
    let start = match request.range {
        ByteRange::Bounded(ref range) => range.start,
        ByteRange::Suffix(_) => 0,
    };
    let total = match raw.header(CONTENT_RANGE).and_then(parse_content_range) {
        Some(ContentRange::Unsatisfied { total }) => Some(total),
        // S3 says so in the body.
        _ => xml_text(&body, "ActualObjectSize").and_then(parse_number),
    };
    let (pinned, beyond_end) = match &request.version {
        Some(pinned) => (Some(pinned), start >= pinned.length),
        None => (None, start > 0),
    };
    if start == 0 && total.unwrap_or(0) == 0 && pinned.is_none_or(|it| it.length == 0) {
        let version = version_of(&raw.headers, 0);
        let version = match pinned {
            // Few servers send the entity tag with this status.
            Some(pinned) if !has_identity(&version) => pinned.clone(),
            Some(_) => check_version(&raw.headers, 0, request)?,
            None => version,
        };
        return Ok(Response { version, offset: 0, bytes: Bytes::new() });
    }
    let length = total.map_or("fewer".to_owned(), |total| format!("{total}"));
    match pinned {
        // MinIO answers so instead of 412.
        Some(pinned) if !beyond_end || total.is_some_and(|total| total != pinned.length) => {
            Err(StoreError::new(
                StoreErrorKind::Changed,
                format!(
                    "the object was replaced: it has {length} bytes instead of {} (status 416)",
                    pinned.length
                ),
            ))
        }
        _ => unsupported(format!(
            "the requested range lies beyond the end of the object, which has {length} bytes"
        )),
    }
}

fn unsupported<T>(message: impl Into<String>) -> Result<T, StoreError> {
    Err(StoreError::new(StoreErrorKind::Unsupported, message))
}

fn check_encoding(headers: &HeaderMap) -> Result<(), StoreError> {
    let Some(encoding) = headers.get(CONTENT_ENCODING) else { return Ok(()) };
    let encoding = String::from_utf8_lossy(encoding.as_bytes());
    if encoding.is_empty() || encoding.eq_ignore_ascii_case("identity") {
        return Ok(());
    }
    unsupported(format!(
        "the server or a cache compresses the object (Content-Encoding: {}): switch that off",
        quoted(&encoding)
    ))
}

/// Returns the version of a response, which is the required one if there is one.
fn check_version(
    headers: &HeaderMap,
    length: u64,
    request: &GetRequest,
) -> Result<Version, StoreError> {
    let version = version_of(headers, length);
    if let Some(pinned) = &request.version {
        return match difference(pinned, &version) {
            None => Ok(pinned.clone()),
            Some(difference) => Err(StoreError::new(
                StoreErrorKind::Changed,
                format!("the object was replaced: {difference}"),
            )),
        };
    }
    if has_identity(&version) {
        return Ok(version);
    }
    let weak = headers.get(ETAG).is_some();
    let tag = if weak { "only a weak ETag" } else { "no ETag" };
    unsupported(format!(
        "the server sends {tag} and no Last-Modified, so that a replaced object couldn't be noticed"
    ))
}

fn has_identity(version: &Version) -> bool {
    version.etag.is_some() || version.last_modified.is_some()
}

/// Extracts the version of an object. Weak entity tags (RFC 9110, section 8.8.1) don't identify
/// bytes; `Last-Modified` is kept only if there is no other identity.
fn version_of(headers: &HeaderMap, length: u64) -> Version {
    let value = |name: &str| {
        let value = headers.get(name)?.to_str().ok()?.trim();
        (!value.is_empty() && value.len() <= MAX_TAG).then(|| value.to_owned())
    };
    let etag = value(ETAG.as_str()).filter(|tag| !tag.starts_with("W/"));
    let last_modified = if etag.is_none() { value(LAST_MODIFIED.as_str()) } else { None };
    // Objects from before versioning was enabled have the version "null", which is overwritten.
    let version_id = VERSION_HEADERS.iter().find_map(|name| value(name)).filter(|id| id != "null");
    Version { length, etag, version_id, last_modified }
}

/// Describes how an object differs from the pinned version.
fn difference(pinned: &Version, current: &Version) -> Option<String> {
    let differs = |what: &str, current: &str, pinned: &str| {
        Some(format!("{what} {} instead of {}", quoted(current), quoted(pinned)))
    };
    if current.length != pinned.length {
        return Some(format!("{} bytes instead of {}", current.length, pinned.length));
    }
    match (&pinned.etag, &current.etag) {
        (Some(pinned), Some(current)) if pinned != current => {
            return differs("ETag", current, pinned);
        }
        (Some(pinned), None) => return differs("ETag", "none", pinned),
        _ => {}
    }
    if pinned.etag.is_none() && pinned.last_modified != current.last_modified {
        let value = |it: &Option<String>| it.clone().unwrap_or_else(|| "none".to_owned());
        return differs(
            "Last-Modified",
            &value(&current.last_modified),
            &value(&pinned.last_modified),
        );
    }
    match (&pinned.version_id, &current.version_id) {
        (Some(pinned), Some(current)) if pinned != current => differs("version", current, pinned),
        _ => None,
    }
}
