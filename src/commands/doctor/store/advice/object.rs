//! Advice on how an object is sent: redirects, encoding, identity, ranges and conditions.

use object_reader::{Response, ResponseHead, StoreError, StoreErrorKind, Version};

use super::{Client, Server, failed};
use crate::commands::doctor::report::{Outcome, Step, escape_and_cut};
use crate::commands::doctor::store::Context;

/// Names of steps.
const OBJECT: &str = "object";
const IDENTITY: &str = "identity";
pub(crate) const RANGES: &str = "ranges";
pub(crate) const CONDITIONS: &str = "conditions";
const ENCODING: &str = "encoding";

/// Builds the step for an object that can't be used, named after what is wrong with it.
pub(crate) fn unreadable(
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let Some(head) = head else { return failed(OBJECT, error, None, context) };
    let found = escape_and_cut(&error.message);
    let has_identity = ["etag", "last-modified"].iter().any(|name| {
        head.header(name).is_some_and(|value| *name != "etag" || !value.starts_with("W/"))
    });
    let region = head.header("x-amz-bucket-region").map(escape_and_cut);
    let is_signed_for_other_region = error.message.contains("the bucket is in the region");
    let step = match (head.status(), region) {
        (300..=399, Some(region)) => return wrong_region(found, region),
        (300..=399, None) => return redirected(found, head),
        (400..=403 | 405..=499, Some(region)) if is_signed_for_other_region => {
            return wrong_region(found, region);
        }
        (200 | 206, _) if error.kind == StoreErrorKind::Unsupported => match encoding_of(head) {
            Some(encoding) => return compressed(&encoding),
            None if !has_identity => no_identity(found, head),
            None if head.status() == 200 => no_ranges(found),
            None => Step::bad(RANGES, "wrong_range", found).advise(
                Server,
                "the header Content-Range must be that of the requested range; check caches and \
                 proxies on the way",
            ),
        },
        _ => return failed(OBJECT, error, Some(head), context),
    };
    step.detail("status", head.status())
}

fn redirected(found: String, head: &ResponseHead) -> Step {
    let step = Step::bad(OBJECT, "redirected", found).detail("status", head.status());
    match head.redirect_host().map(|host| escape_and_cut(&host)) {
        Some(host) => step.detail("host", host.clone()).advise(
            Client,
            format!(
                "redirects aren't followed, since they would lead elsewhere: if you trust {host}, \
                 use it in the URL or in --store-endpoint"
            ),
        ),
        None => step.advise(
            Client,
            "redirects aren't followed: use the URL that it redirects to (curl -I URL shows it)",
        ),
    }
}

fn wrong_region(found: String, region: String) -> Step {
    let advice = format!("set --store-region {region}");
    Step::bad(OBJECT, "wrong_region", found).detail("region", region).advise(Client, advice)
}

fn encoding_of(head: &ResponseHead) -> Option<String> {
    let encoding = head.header("content-encoding")?;
    (!encoding.is_empty() && !encoding.eq_ignore_ascii_case("identity"))
        .then(|| escape_and_cut(encoding))
}

fn compressed(encoding: &str) -> Step {
    Step::bad(ENCODING, "compressed", format!("the response is compressed: {encoding}"))
        .detail("encoding", encoding)
        .advise(
            Server,
            "archives must be sent as they are: switch compression off for them (nginx: gzip off; \
             CDNs: no automatic compression), and don't store them with a Content-Encoding",
        )
}

fn no_identity(found: String, head: &ResponseHead) -> Step {
    Step::bad(IDENTITY, "no_identity", found)
        .detail("weak_etag", head.header("etag").is_some())
        .advise(
            Server,
            "send a strong ETag, or at least Last-Modified (nginx: etag on; Apache: FileETag MTime \
             Size): without them, parts of two versions could be mixed",
        )
}

fn no_ranges(found: String) -> Step {
    Step::bad(RANGES, "no_ranges", found).advise(
        Server,
        "enable range requests for archives (nginx: max_ranges not 0; Apache: MaxRanges), and let \
         caches and proxies pass the header Range",
    )
}

pub(crate) fn readable(object: &Response, head: Option<&ResponseHead>) -> Step {
    let length = object.version.length;
    let mut step = Step::good(OBJECT, format!("readable, {length} bytes")).detail("length", length);
    if let Some(head) = head {
        step = step.detail("status", head.status());
        for name in ["server", "via", "x-cache"] {
            if let Some(value) = head.header(name).filter(|value| !value.is_empty()) {
                let value = escape_and_cut(value);
                step = step.line(format!("{name}: {value}")).detail(name, value);
            }
        }
    }
    step
}

/// Builds the step about the encoding of a response that could be used.
pub(crate) fn encoding(head: Option<&ResponseHead>) -> Step {
    let step = Step::good(ENCODING, "none, as it should be");
    match head.and_then(|head| head.header("age")).map(escape_and_cut) {
        Some(age) => {
            step.line(format!("from a cache, where it was for {age} s")).detail("age", age)
        }
        None => step,
    }
}

pub(crate) fn identity(version: &Version, head: Option<&ResponseHead>) -> Step {
    let step = match (&version.etag, &version.last_modified) {
        (Some(etag), _) => {
            let etag = escape_and_cut(etag);
            Step::good(IDENTITY, format!("ETag {etag}")).detail("etag", etag)
        }
        (None, modified) => {
            let is_weak = head.and_then(|head| head.header("etag")).is_some();
            let (reason, tag) = match is_weak {
                true => ("weak_etag", "only a weak ETag"),
                false => ("no_etag", "no ETag"),
            };
            let modified = modified.as_deref().map(escape_and_cut).unwrap_or_default();
            Step::warning(IDENTITY, reason, format!("{tag}; Last-Modified {modified} is used"))
                .detail("last_modified", modified)
                .advise(
                    Server,
                    "send a strong ETag (nginx: etag on, and gzip off, which weakens it): a \
                     replacement within the same second isn't noticed otherwise",
                )
        }
    };
    match &version.version_id {
        Some(id) => {
            let id = escape_and_cut(id);
            step.line(format!("version {id}")).detail("version", id)
        }
        None => step,
    }
}

/// Builds the step for a range that can't be had, although the first one could.
pub(crate) fn range_failed(
    error: &StoreError,
    head: Option<&ResponseHead>,
    context: &Context,
) -> Step {
    let step = unreadable(error, head, context);
    if step.name == OBJECT { failed(RANGES, error, head, context) } else { step }
}

pub(crate) fn no_suffix(step: Step, reason: &str) -> Step {
    step.problem(Outcome::Warning, "no_suffix_ranges")
        .line(format!("not so the last bytes: {}", escape_and_cut(reason)))
        .advise(
            Server,
            "support suffix ranges (Range: bytes=-4096): without them, opening an archive takes one \
             request more",
        )
}

/// Builds the step for a response with another version than the one before.
pub(crate) fn unstable_identity(name: &'static str, found: &str) -> Step {
    Step::bad(name, "unstable_identity", found)
        .advise(
            Server,
            "the ETag must be the same in all responses and on all servers behind a load balancer \
             (Apache: FileETag MTime Size, without INode; the same modification times everywhere)",
        )
        .advise(Server, "or the object was replaced just now: try again")
}

/// Builds the step for a condition that isn't met. `status` is that of the response.
pub(crate) fn conditions(version: &Version, status: Option<u16>) -> Step {
    let condition = if version.etag.is_some() { "If-Match" } else { "If-Unmodified-Since" };
    let is_honoured = matches!(status, Some(412 | 416));
    let step = match is_honoured {
        true => Step::good(CONDITIONS, format!("{condition} is honoured")),
        false => {
            Step::good(CONDITIONS, format!("{condition} is ignored; the gateway compares versions"))
        }
    };
    step.detail("if_match", is_honoured).detail("status", status)
}

pub(crate) fn conditions_failed(error: &StoreError) -> Step {
    let found = format!("a conditional request fails: {}", escape_and_cut(&error.message));
    Step::bad(CONDITIONS, "condition_failed", found)
        .advise(Server, "let it, and proxies on the way, accept the header If-Match with GET")
}

/// Adds that the version could be confirmed. `status` is that of the response.
pub(crate) fn revalidated(step: Step, status: Option<u16>) -> Step {
    let is_honoured = status == Some(304);
    let line = match is_honoured {
        true => "so is If-None-Match (status 304)",
        false => "HEAD shows the version",
    };
    step.line(line).detail("if_none_match", is_honoured)
}

pub(crate) fn not_revalidated(step: Step, error: &StoreError) -> Step {
    step.problem(Outcome::Warning, "no_revalidation")
        .line(format!("HEAD fails: {}", escape_and_cut(&error.message)))
        .advise(Server, "permit HEAD: without it, replaced archives aren't noticed")
}
