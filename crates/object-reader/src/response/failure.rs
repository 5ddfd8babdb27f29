//! Classification of responses other than success.

use std::time::{Duration, SystemTime};

use hyper::Uri;
use hyper::header::{DATE, LOCATION, RETRY_AFTER};

use super::{RawResponse, parse_number};
use crate::store::{StoreError, StoreErrorKind};

/// Maximum length of a server's words in a message, in characters.
const MAX_QUOTED: usize = 200;

/// Returns true if a response rejects the credentials in a way that fresh ones may cure.
pub(crate) fn rejects_credentials(raw: &RawResponse) -> bool {
    match raw.status.as_u16() {
        401 => true,
        400 | 403 => {
            let body = String::from_utf8_lossy(&raw.body);
            let code = error_code(raw, &body);
            let is_rejected =
                is_expiry(code) || matches!(code, "InvalidAccessKeyId" | "AuthenticationFailed");
            is_rejected && !is_clock_skew(code, &body)
        }
        _ => false,
    }
}

fn is_expiry(code: &str) -> bool {
    matches!(
        code,
        "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired" | "InvalidToken"
    )
}

/// Returns true if a server rejects a request because of the time at which it was signed.
fn is_clock_skew(code: &str, body: &str) -> bool {
    /// Azure, Google's token service and AWS's.
    const WORDS: [&str; 4] = [
        "Request date header too old",
        "Token must be a short-lived token",
        "Signature not yet current",
        "is now earlier than",
    ];
    code == "RequestTimeTooSkewed" || WORDS.iter().any(|words| body.contains(words))
}

fn error_code<'a>(raw: &'a RawResponse, body: &'a str) -> &'a str {
    xml_text(body, "Code").or_else(|| raw.header("x-ms-error-code")).unwrap_or("")
}

/// Classifies a response other than success.
pub(crate) fn check_failure(raw: &RawResponse, is_pinned: bool, now: SystemTime) -> StoreError {
    let body = String::from_utf8_lossy(&raw.body);
    let code = error_code(raw, &body);
    let status = raw.status;
    let (kind, advice) = classify(raw, code, &body, is_pinned);
    let mut message = format!("status {}", status.as_u16());
    if let Some(reason) = status.canonical_reason().filter(|_| code.is_empty()) {
        message = format!("{message} {reason}");
    } else {
        message = format!("{message} {}", quoted(code));
    }
    if !advice.is_empty() {
        message = format!("{message}: {advice}");
    } else if let Some(words) = xml_text(&body, "Message").filter(|words| !has_signature(words)) {
        message = format!("{message}: {}", quoted(words.lines().next().unwrap_or("")));
    }
    let retry_after = raw.header(RETRY_AFTER).and_then(|value| parse_retry_after(value, now));
    StoreError { kind, message, retry_after }
}

fn classify(
    raw: &RawResponse,
    code: &str,
    body: &str,
    is_pinned: bool,
) -> (StoreErrorKind, String) {
    use StoreErrorKind as Kind;
    let owned = |(kind, advice): (Kind, &str)| (kind, advice.to_owned());
    match code {
        _ if is_expiry(code) => {
            return owned((Kind::CredentialsExpired, "the credentials have expired"));
        }
        _ if is_clock_skew(code, body) => {
            let server = quoted(raw.header(DATE).unwrap_or("unknown"));
            let advice = format!(
                "this machine's clock is wrong, synchronize it; the server's time is {server}"
            );
            return (Kind::ClockSkew, advice);
        }
        "SlowDown"
        | "Throttling"
        | "ThrottlingException"
        | "TooManyRequests"
        | "RequestLimitExceeded"
        | "ServerBusy" => return owned((Kind::Throttled, "")),
        "SignatureDoesNotMatch" => {
            let advice = "the secret key is wrong, or a proxy changes signed requests";
            return owned((Kind::Denied, advice));
        }
        "AuthorizationHeaderMalformed" => {
            let region = xml_text(body, "Region");
            let advice =
                region.map(|it| format!("the bucket is in the region {}: set that", quoted(it)));
            return (Kind::Denied, advice.unwrap_or_default());
        }
        _ => {}
    }
    let has_expired = ["Request has expired", "Signed expiry time", "not valid in the specified"];
    let (kind, advice) = match raw.status.as_u16() {
        401 | 403 if has_expired.iter().any(|words| body.contains(words)) => {
            (Kind::CredentialsExpired, "the signed URL has expired")
        }
        401 | 403 => (Kind::Denied, ""),
        407 => (Kind::Denied, "the proxy requires other credentials"),
        404 | 410 if code == "NoSuchBucket" || code == "ContainerNotFound" => {
            (Kind::NotFound, "there is no such bucket")
        }
        404 | 410 => (Kind::NotFound, ""),
        408 => (Kind::TimedOut, ""),
        412 | 416 if is_pinned => (Kind::Changed, "the object was replaced"),
        429 | 503 => (Kind::Throttled, ""),
        300..=399 => return (Kind::Unsupported, redirect_advice(raw)),
        500..=599 => (Kind::ServerError, ""),
        _ => (Kind::Unsupported, ""),
    };
    owned((kind, advice))
}

/// Explains a redirect, which isn't followed.
fn redirect_advice(raw: &RawResponse) -> String {
    if let Some(region) = raw.header("x-amz-bucket-region") {
        return format!("the bucket is in the region {}: set that", quoted(region));
    }
    let location = raw.header(LOCATION).and_then(|value| value.parse::<Uri>().ok());
    match location.as_ref().and_then(Uri::host) {
        Some(host) => format!(
            "the server redirects to {}, which isn't followed: use that URL if you trust it",
            quoted(host)
        ),
        None => "the server redirects to another path, which isn't followed".to_owned(),
    }
}

/// Returns true if a server's words repeat the query of a signed URL.
fn has_signature(words: &str) -> bool {
    let words = words.to_ascii_lowercase();
    ["sig=", "signature=", "token="].iter().any(|name| words.contains(name))
}

/// Parses the header `Retry-After`: seconds or a date (RFC 9110, section 10.2.3).
pub(super) fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if let Some(seconds) = parse_number(value) {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or(Duration::ZERO))
}

/// Returns the text of the first XML element `name` without attributes. Entities aren't resolved.
pub(crate) fn xml_text<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once(&format!("</{name}>"))?;
    let text = text.trim();
    (!text.is_empty() && !text.contains('<')).then_some(text)
}

/// Returns a server's words for a message: escaped, and shortened.
pub(crate) fn quoted(words: &str) -> String {
    let mut escaped: String = words.chars().take(MAX_QUOTED).flat_map(escape_unprintable).collect();
    if words.chars().nth(MAX_QUOTED).is_some() {
        escaped.push('…');
    }
    escaped
}

fn escape_unprintable(c: char) -> impl Iterator<Item = char> {
    let (plain, escaped) = match c {
        '"' | '\'' | '\\' => (Some(c), None),
        _ => (None, Some(c.escape_debug())),
    };
    plain.into_iter().chain(escaped.into_iter().flatten())
}
