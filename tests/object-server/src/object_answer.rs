//! Correct responses to requests for objects, listings and directory indexes.

use bytes::Bytes;

use crate::answer::Answer;
use crate::body::Bytestream;
use crate::credentials::Issuer;
use crate::encoding::{http_date, query_pairs};
use crate::frontend::Respond;
use crate::listing;
use crate::log::LoggedRequest;
use crate::object::{Object, Objects};
use crate::range::{Selection, select};
use crate::script::Behavior;
use crate::server::Index;
use crate::signature;

/// The server's objects, and how they are served.
#[derive(Debug)]
pub(crate) struct ObjectResponder {
    pub(crate) objects: Objects,
    pub(crate) index: Index,
    pub(crate) is_s3: bool,
    pub(crate) issuer: Option<Issuer>,
    /// Domain below which host names are buckets.
    pub(crate) base_domain: Option<String>,
}

impl ObjectResponder {
    /// Returns the key of the object that a request names, with the bucket.
    fn key(&self, request: &LoggedRequest) -> String {
        let host = request.header("host").unwrap_or_default();
        let host = host.split(':').next().unwrap_or_default();
        let bucket = self
            .base_domain
            .as_ref()
            .and_then(|domain| host.strip_suffix(domain.as_str())?.strip_suffix('.'));
        let path = request.path.trim_start_matches('/');
        bucket.map_or_else(|| path.to_owned(), |bucket| format!("{bucket}/{path}"))
    }

    fn index(&self, key: &str, request: &LoggedRequest) -> Answer {
        let wants_json =
            request.header("accept").is_some_and(|accept| accept.contains("application/json"));
        match self.index {
            Index::Off => self.error(403, "Forbidden"),
            Index::Html if !wants_json => listing::html_index(&self.objects, key),
            _ => listing::json_index(&self.objects, key),
        }
    }

    /// Responds with an object, or the part of it that is asked for.
    fn object(&self, object: Object, request: &LoggedRequest, behavior: &Behavior) -> Answer {
        let modified = http_date(object.modified);
        if !behavior.ignores_conditions {
            match check_conditions(request, &object.etag, &modified) {
                Some(304) => return Answer::empty(304).with("etag", object.etag),
                Some(status) => return self.error(status, "PreconditionFailed"),
                None => {}
            }
        }
        let range = request.range.as_deref().filter(|_| !behavior.ignores_range);
        let range = range.filter(|_| {
            let condition = request.header("if-range");
            condition.is_none_or(|value| value == object.etag || value == modified)
        });
        let length = object.length;
        let (status, served) = match select(range, length) {
            Selection::Whole => (200, 0..length),
            Selection::Part(part) => (206, part),
            Selection::Unsatisfiable => {
                return self
                    .error(416, "InvalidRange")
                    .with("content-range", format!("bytes */{length}"));
            }
        };
        let mut answer = Answer::empty(status)
            .with("content-type", "application/octet-stream")
            .with("accept-ranges", "bytes")
            .with("last-modified", modified)
            .with("etag", object.etag.clone());
        if status == 206 {
            let (first, last) = (served.start, served.end - 1);
            answer = answer.with("content-range", format!("bytes {first}-{last}/{length}"));
        }
        answer.length = served.end - served.start;
        answer.body = Bytestream::Object(object, served.start);
        answer.served = Some(served);
        answer
    }
}

impl Respond for ObjectResponder {
    fn respond(&self, request: &LoggedRequest, _: &Bytes, behavior: &Behavior) -> Answer {
        if let Some(issuer) = &self.issuer
            && let Err((status, code)) = signature::authenticate(request, issuer)
        {
            return self.error(status, code);
        }
        if request.method != "GET" && request.method != "HEAD" {
            return self.error(405, "MethodNotAllowed").with("allow", "GET, HEAD");
        }
        let (key, query) = (self.key(request), query_pairs(&request.query));
        if self.is_s3 && query.iter().any(|(name, value)| name == "list-type" && value == "2") {
            return listing::list_objects(&self.objects, &key, &query);
        }
        match self.objects.get(&key) {
            Some(object) => self.object(object, request, behavior),
            None if self.is_s3 => self.error(404, "NoSuchKey"),
            None if key.is_empty() || key.ends_with('/') => self.index(&key, request),
            None if !self.objects.list(&format!("{key}/")).is_empty() => {
                self.error(301, "").with("location", format!("{}/", request.path))
            }
            None => self.error(404, "NotFound"),
        }
    }

    fn error(&self, status: u16, code: &str) -> Answer {
        if self.is_s3 { Answer::error(status, code) } else { Answer::html_error(status, code) }
    }

    fn replace(&self, request: &LoggedRequest, bytes: Bytes) {
        self.objects.insert(&self.key(request), Object::new(bytes));
    }
}

/// Returns the status of a request whose conditions forbid a normal response (RFC 9110, section
/// 13.2.2). Dates have to be equal, as nginx demands by default.
fn check_conditions(request: &LoggedRequest, etag: &str, modified: &str) -> Option<u16> {
    let lists = |header: &str| {
        let is_listed = |tag: &str| matches!(tag.trim(), "*") || tag.trim() == etag;
        request.header(header).map(|value| value.split(',').any(is_listed))
    };
    let is_unmodified = |header: &str| request.header(header).map(|value| value == modified);
    let holds = lists("if-match").or_else(|| is_unmodified("if-unmodified-since"));
    if holds == Some(false) {
        return Some(412);
    }
    let is_same = lists("if-none-match").or_else(|| is_unmodified("if-modified-since"));
    (is_same == Some(true)).then_some(304)
}
