//! Tables of responses and their judgements.

use std::time::{Duration, UNIX_EPOCH};

use hyper::header::HeaderName;

use super::failure::parse_retry_after;
use super::*;
use StoreErrorKind as Kind;

const CONTENT: &str = "0123456789";

fn raw(status: u16, headers: &[(&str, &str)], body: &str) -> RawResponse {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value.parse().unwrap());
    }
    let status = StatusCode::from_u16(status).unwrap();
    RawResponse {
        status,
        headers: map,
        body: Bytes::copy_from_slice(body.as_bytes()),
        is_truncated: false,
    }
}

fn version(length: u64, etag: &str) -> Version {
    let etag = Some(etag.to_owned());
    Version { length, etag, version_id: None, last_modified: None }
}

fn request(range: ByteRange, version: Option<Version>) -> GetRequest {
    GetRequest { range, version, bypass_caches: false }
}

fn bounded(start: u64, end: u64) -> ByteRange {
    ByteRange::Bounded(start..end)
}

fn kind_of(raw: &RawResponse, request: &GetRequest) -> Option<StoreErrorKind> {
    check_get(raw, request, UNIX_EPOCH).err().map(|error| error.kind)
}

#[test]
fn content_ranges_are_parsed_strictly() {
    let part = |range, total| Some(ContentRange::Part { range, total });
    for (value, expected) in [
        ("bytes 0-3/10", part(0..4, 10)),
        ("Bytes 9-9/10", part(9..10, 10)),
        (" bytes  0-3/10 ", part(0..4, 10)),
        ("bytes */10", Some(ContentRange::Unsatisfied { total: 10 })),
        ("bytes */0", Some(ContentRange::Unsatisfied { total: 0 })),
        ("bytes 0--1/0", Some(ContentRange::Unsatisfied { total: 0 })),
        ("bytes 0-18446744073709551614/18446744073709551615", part(0..u64::MAX, u64::MAX)),
        ("bytes 0-18446744073709551615/18446744073709551615", None),
        ("bytes 0-10/10", None),
        ("bytes 4-3/10", None),
        ("bytes 3-2/10", None),
        ("bytes 0-3/*", None),
        ("bytes +0-3/10", None),
        ("bytes 0--3/10", None),
        ("bytes 0-3", None),
        ("bytes", None),
        ("lines 0-3/10", None),
        ("bytes -3/10", None),
        ("bytes 0-/10", None),
        ("", None),
    ] {
        assert_eq!(parse_content_range(value), expected, "{value:?}");
    }
}

#[test]
fn correct_responses_are_accepted() {
    let etag = ("etag", "\"1\"");
    for (status, part, range, offset, body) in [
        (206, "bytes 2-4/10", bounded(2, 5), 2, "234"),
        (206, "bytes 8-9/10", bounded(8, 100), 8, "89"),
        (206, "bytes 7-9/10", ByteRange::Suffix(3), 7, "789"),
        (206, "bytes 0-9/10", ByteRange::Suffix(100), 0, CONTENT),
        (200, "", bounded(0, 10), 0, CONTENT),
        (200, "", bounded(0, 100), 0, CONTENT),
        (200, "", ByteRange::Suffix(10), 0, CONTENT),
    ] {
        for pinned in [None, Some(version(10, "\"1\""))] {
            let headers = [etag, ("content-range", part)];
            let headers = if part.is_empty() { &headers[..1] } else { &headers[..] };
            let request = request(range.clone(), pinned);
            let response = check_get(&raw(status, headers, body), &request, UNIX_EPOCH).unwrap();
            assert_eq!(response.offset, offset);
            assert_eq!(response.bytes, body);
            assert_eq!(response.version, version(10, "\"1\""));
        }
    }
}

#[test]
fn empty_objects_are_accepted() {
    let size = "<Error><ActualObjectSize>0</ActualObjectSize></Error>";
    for empty in [
        raw(416, &[("content-range", "bytes */0")], "error page"),
        raw(416, &[], size),
        raw(416, &[], ""),
        raw(206, &[("content-range", "bytes 0--1/0")], ""),
    ] {
        check_empty(&empty);
    }
    let shorter = raw(416, &[("content-range", "bytes */5")], "");
    for (pinned, expected) in [(5, Kind::Unsupported), (6, Kind::Changed), (50, Kind::Changed)] {
        let request = request(bounded(5, 10), Some(version(pinned, "\"1\"")));
        assert_eq!(kind_of(&shorter, &request), Some(expected), "{pinned}");
    }
    assert_eq!(kind_of(&shorter, &request(bounded(0, 10), None)), Some(Kind::Unsupported));
}

fn check_empty(empty: &RawResponse) {
    for range in [bounded(0, 10), ByteRange::Suffix(10)] {
        let response = check_get(empty, &request(range.clone(), None), UNIX_EPOCH).unwrap();
        assert_eq!((response.version.length, response.bytes.len()), (0, 0));
        let pinned = version(0, "\"0\"");
        let pinned = request(range.clone(), Some(pinned));
        let response = check_get(empty, &pinned, UNIX_EPOCH).unwrap();
        assert_eq!(Some(response.version), pinned.version);
        let whole = raw(200, &[("etag", "\"0\""), ("content-length", "0")], "");
        assert!(check_get(&whole, &request(range.clone(), None), UNIX_EPOCH).is_ok());
        let other = request(range, Some(version(5, "\"1\"")));
        assert_eq!(kind_of(empty, &other), Some(Kind::Changed));
    }
    assert_eq!(kind_of(empty, &request(bounded(5, 10), None)), Some(Kind::Unsupported));
}

#[test]
fn wrong_parts_are_rejected() {
    let etag = ("etag", "\"1\"");
    let pinned = Some(version(10, "\"1\""));
    let range = |value| ("content-range", value);
    for (raw, expected) in [
        (raw(206, &[etag, range("bytes 2-5/10")], "2345"), Kind::Unsupported),
        (raw(206, &[etag, range("bytes 1-4/10")], "1234"), Kind::Unsupported),
        (raw(206, &[etag, range("bytes 2-4/*")], "234"), Kind::Unsupported),
        (raw(206, &[etag], "234"), Kind::Unsupported),
        (raw(206, &[etag, range("bytes 2-4/10")], "23"), Kind::Interrupted),
        (raw(206, &[etag, range("bytes 2-4/10")], "2345"), Kind::Interrupted),
        (
            raw(206, &[etag, range("bytes 2-4/10"), ("content-encoding", "gzip")], "234"),
            Kind::Unsupported,
        ),
        (raw(200, &[etag, ("content-encoding", "br")], "234"), Kind::Unsupported),
        (raw(200, &[etag, ("content-length", "10")], CONTENT), Kind::Unsupported),
        (raw(200, &[etag], "234"), Kind::Changed),
        (raw(206, &[("etag", "\"2\""), range("bytes 2-4/10")], "234"), Kind::Changed),
        (raw(206, &[range("bytes 2-4/10")], "234"), Kind::Changed),
        (raw(206, &[("etag", "W/\"1\""), range("bytes 2-4/10")], "234"), Kind::Changed),
        (raw(206, &[etag, range("bytes 2-4/11")], "234"), Kind::Changed),
        (raw(200, &[etag, ("content-length", "11")], ""), Kind::Changed),
        (raw(412, &[], ""), Kind::Changed),
        (raw(416, &[range("bytes */2")], ""), Kind::Changed),
        (raw(416, &[], ""), Kind::Changed),
        (raw(204, &[], ""), Kind::Unsupported),
    ] {
        if expected == Kind::Changed {
            let request = request(bounded(2, 5), pinned.clone());
            assert_eq!(kind_of(&raw, &request), Some(expected), "{raw:?}");
        } else {
            for pinned in [None, pinned.clone()] {
                let request = request(bounded(2, 5), pinned);
                assert_eq!(kind_of(&raw, &request), Some(expected), "{raw:?}");
            }
        }
    }
    let mut longer = raw(206, &[etag, range("bytes 2-4/10")], "234");
    longer.is_truncated = true;
    assert_eq!(kind_of(&longer, &request(bounded(2, 5), None)), Some(Kind::Interrupted));
}

#[test]
fn ignored_ranges_are_explained() {
    let mut whole = raw(200, &[("etag", "\"1\"")], "0123");
    whole.is_truncated = true;
    for range in [bounded(0, 4), bounded(2, 5), ByteRange::Suffix(4)] {
        let error = check_get(&whole, &request(range, None), UNIX_EPOCH).unwrap_err();
        assert_eq!(error.kind, Kind::Unsupported);
        assert!(error.message.contains("ignores ranges"), "{error}");
    }
}

#[test]
fn objects_are_identified_by_strong_tags_or_dates() {
    let part = ("content-range", "bytes 0-1/10");
    let date = ("last-modified", "Mon, 30 Nov 2026 10:00:00 GMT");
    let get = |headers: &[(&str, &str)]| {
        check_get(&raw(206, headers, "01"), &request(bounded(0, 2), None), UNIX_EPOCH)
    };
    let strong = get(&[part, date, ("etag", "\"1\"")]).unwrap().version;
    assert_eq!((strong.etag.as_deref(), strong.last_modified), (Some("\"1\""), None));
    let bare = get(&[part, ("etag", "1")]).unwrap().version;
    assert_eq!(bare.etag.as_deref(), Some("1"), "kept as sent");
    let weak = get(&[part, date, ("etag", "W/\"1\"")]).unwrap().version;
    assert_eq!((weak.etag, weak.last_modified.as_deref()), (None, Some(date.1)));
    let message = get(&[part, ("etag", "W/\"1\"")]).unwrap_err().message;
    assert!(message.contains("only a weak ETag and no Last-Modified"), "{message}");
    let message = get(&[part]).unwrap_err().message;
    assert!(message.contains("no ETag and no Last-Modified"), "{message}");

    for (header, value, expected) in [
        ("x-amz-version-id", "v1", Some("v1")),
        ("x-amz-version-id", "null", None),
        ("x-goog-generation", "17", Some("17")),
        ("x-ms-version-id", "2026", Some("2026")),
    ] {
        let version = get(&[part, ("etag", "\"1\""), (header, value)]).unwrap().version;
        assert_eq!(version.version_id.as_deref(), expected, "{header}");
    }

    let by_date = request(bounded(0, 2), Some(weak_version(date.1)));
    assert!(check_get(&raw(206, &[part, date], "01"), &by_date, UNIX_EPOCH).is_ok());
    let later = ("last-modified", "Mon, 30 Nov 2026 10:00:01 GMT");
    assert_eq!(kind_of(&raw(206, &[part, later], "01"), &by_date), Some(Kind::Changed));
    assert_eq!(kind_of(&raw(206, &[part], "01"), &by_date), Some(Kind::Changed));

    let mut other = version(10, "\"1\"");
    other.version_id = Some("v1".to_owned());
    let pinned = request(bounded(0, 2), Some(other));
    let same_tag = raw(206, &[part, ("etag", "\"1\""), ("x-amz-version-id", "v2")], "01");
    assert_eq!(kind_of(&same_tag, &pinned), Some(Kind::Changed));
}

fn weak_version(date: &str) -> Version {
    let last_modified = Some(date.to_owned());
    Version { length: 10, etag: None, version_id: None, last_modified }
}

#[test]
fn failures_are_classified() {
    let code = |code: &str| format!("<Error><Code>{code}</Code><Message>Words.</Message></Error>");
    let azure_skew = "<Error><Code>AuthenticationFailed</Code><Message>Server failed to \
                      authenticate the request. Make sure the value of Authorization header is \
                      formed correctly including the signature.</Message>\
                      <AuthenticationErrorDetail>Request date header too old: 'Mon, 30 Nov 2026 \
                      09:00:00 GMT'</AuthenticationErrorDetail></Error>";
    for (status, headers, body, expected, words) in [
        (404, None, code("NoSuchKey"), Kind::NotFound, "NoSuchKey: Words."),
        (404, None, code("NoSuchBucket"), Kind::NotFound, "no such bucket"),
        (404, None, "<html>nginx".to_owned(), Kind::NotFound, "status 404 Not Found"),
        (410, None, String::new(), Kind::NotFound, "410"),
        (401, None, String::new(), Kind::Denied, "401"),
        (403, None, code("AccessDenied"), Kind::Denied, "AccessDenied: Words."),
        (403, None, code("InvalidAccessKeyId"), Kind::Denied, "InvalidAccessKeyId"),
        (403, None, code("SignatureDoesNotMatch"), Kind::Denied, "secret key"),
        (400, None, code("ExpiredToken"), Kind::CredentialsExpired, "expired"),
        (403, None, code("ExpiredToken"), Kind::CredentialsExpired, "expired"),
        (403, None, code("ExpiredTokenException"), Kind::CredentialsExpired, "expired"),
        (403, None, code("TokenRefreshRequired"), Kind::CredentialsExpired, "expired"),
        (400, None, code("InvalidToken"), Kind::CredentialsExpired, "expired"),
        (
            403,
            None,
            "<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>".into(),
            Kind::CredentialsExpired,
            "signed URL has expired",
        ),
        (
            403,
            Some(("date", "Mon, 30 Nov 2026 10:00:00 GMT")),
            code("RequestTimeTooSkewed"),
            Kind::ClockSkew,
            "server's time is Mon, 30 Nov 2026",
        ),
        (
            403,
            Some(("date", "Mon, 30 Nov 2026 10:00:00 GMT")),
            azure_skew.to_owned(),
            Kind::ClockSkew,
            "clock is wrong, synchronize it; the server's time is Mon, 30 Nov 2026",
        ),
        (
            400,
            None,
            "{\"error\":\"invalid_grant\",\"error_description\":\"Invalid JWT: Token must be a \
             short-lived token (60 minutes) and in a reasonable timeframe.\"}"
                .into(),
            Kind::ClockSkew,
            "clock",
        ),
        (
            403,
            None,
            "<Code>SignatureDoesNotMatch</Code><Message>Signature expired: 20261130T093000Z is now \
             earlier than 20261130T094500Z (20261130T100000Z - 15 min.)</Message>"
                .into(),
            Kind::ClockSkew,
            "clock",
        ),
        (
            400,
            None,
            "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region>\
            </Error>"
                .into(),
            Kind::Denied,
            "in the region eu-west-1",
        ),
        (429, None, String::new(), Kind::Throttled, "429"),
        (503, None, code("SlowDown"), Kind::Throttled, "SlowDown"),
        (
            503,
            Some(("x-ms-error-code", "ServerBusy")),
            String::new(),
            Kind::Throttled,
            "ServerBusy",
        ),
        (500, None, code("InternalError"), Kind::ServerError, "InternalError"),
        (502, None, String::new(), Kind::ServerError, "502"),
        (407, None, String::new(), Kind::Denied, "proxy requires"),
        (408, None, String::new(), Kind::TimedOut, "408"),
        (400, None, code("Odd"), Kind::Unsupported, "Odd"),
        (304, None, String::new(), Kind::Unsupported, "304"),
        (
            301,
            Some(("x-amz-bucket-region", "eu-central-1")),
            code("PermanentRedirect"),
            Kind::Unsupported,
            "eu-central-1",
        ),
        (
            302,
            Some(("location", "https://login.example/x?token=s3cret")),
            String::new(),
            Kind::Unsupported,
            "redirects to login.example,",
        ),
        (
            307,
            Some(("location", "/elsewhere?token=s3cret")),
            String::new(),
            Kind::Unsupported,
            "another path",
        ),
    ] {
        let headers: Vec<_> = headers.into_iter().collect();
        let raw = raw(status, &headers, &body);
        let error = check_failure(&raw, false, UNIX_EPOCH);
        assert_eq!(error.kind, expected, "{status} {body}");
        assert!(error.message.contains(words), "{status} {body}: {error}");
        assert!(!error.message.contains("s3cret"), "{error}");
        assert_eq!(kind_of(&raw, &request(bounded(0, 1), None)), Some(expected));
    }
}

#[test]
fn server_words_are_escaped_and_shortened() {
    let body = format!("<Code>A\u{1b}[31m\n</Code><Message>{}\nx</Message>", "ä".repeat(300));
    let message = check_failure(&raw(400, &[], &body), false, UNIX_EPOCH).message;
    assert!(message.contains("A\\u{1b}[31m: ää"), "{message}");
    assert!(message.chars().count() < 250 && message.ends_with('…'), "{message}");
}

#[test]
fn repeated_signatures_are_not_shown() {
    for query in ["sv=1&amp;sig=s3cret", "?X-Amz-Signature=s3cret", "x-goog-signature=s3cret"] {
        let body = format!("<Code>Odd</Code><Message>invalid: {query}</Message>");
        assert_eq!(
            check_failure(&raw(400, &[], &body), false, UNIX_EPOCH).message,
            "status 400 Odd"
        );
    }
}

#[test]
fn waiting_times_are_parsed() {
    let now = UNIX_EPOCH + Duration::from_secs(784_111_777);
    for (value, expected) in [
        ("120", Some(120)),
        ("0", Some(0)),
        ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
        ("Sun, 06 Nov 1994 08:48:37 GMT", Some(0)),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
    ] {
        assert_eq!(parse_retry_after(value, now), expected.map(Duration::from_secs), "{value}");
    }
    let error = check_failure(&raw(503, &[("retry-after", "7")], ""), false, now);
    assert_eq!(error.retry_after, Some(Duration::from_secs(7)));
}

#[test]
fn current_versions_are_recognized() {
    let pinned = version(10, "\"1\"");
    let etag = ("etag", "\"1\"");
    for (raw, expected) in [
        (raw(304, &[], ""), Ok(true)),
        (raw(200, &[etag, ("content-length", "10")], ""), Ok(true)),
        (raw(200, &[etag], ""), Ok(true)),
        (raw(200, &[etag, ("content-length", "11")], ""), Ok(false)),
        (raw(200, &[("etag", "\"2\""), ("content-length", "10")], ""), Ok(false)),
        (raw(206, &[etag, ("content-range", "bytes 0-0/10")], "0"), Ok(true)),
        (raw(206, &[etag, ("content-range", "bytes 0-0/11")], "0"), Ok(false)),
        (raw(416, &[("content-range", "bytes */0")], ""), Ok(false)),
        (raw(412, &[], ""), Ok(false)),
        (raw(404, &[], ""), Err(Kind::NotFound)),
        (raw(403, &[], ""), Err(Kind::Denied)),
        (raw(503, &[], ""), Err(Kind::Throttled)),
    ] {
        let judged = check_current(&raw, &pinned, UNIX_EPOCH).map_err(|error| error.kind);
        assert_eq!(judged, expected, "{raw:?}");
    }
}

#[test]
fn rejected_credentials_are_recognized() {
    for (status, code, expected) in [
        (401, "", true),
        (400, "ExpiredToken", true),
        (403, "InvalidAccessKeyId", true),
        (403, "AuthenticationFailed", true),
        (403, "AccessDenied", false),
        (403, "SignatureDoesNotMatch", false),
        (404, "NoSuchKey", false),
        (206, "ExpiredToken", false),
    ] {
        let body = format!("<Code>{code}</Code>");
        // Other credentials don't help.
        let skewed = format!("{body}<X>Request date header too old: 'Mon, 30 Nov 2026'</X>");
        assert!(status == 401 || !rejects_credentials(&raw(status, &[], &skewed)));
        assert_eq!(rejects_credentials(&raw(status, &[], &body)), expected, "{status} {code}");
    }
}
