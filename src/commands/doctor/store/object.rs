//! The object: permission to read it, ranges, identity, and conditional requests.

use object_reader::{ByteRange, Response, StoreError, StoreErrorKind, Version};

use super::super::report::{Report, Step};
use super::{Session, advice, with_timeout};

/// Size of the first read, in bytes: as for the gateway, the header and more.
const FIRST_READ: u64 = 256 * 1024;
/// Size of further reads, in bytes.
pub(super) const SMALL_READ: u64 = 4096;

const OTHER_VERSION: &str = "two responses have different versions";

/// Reads the object, and adds the steps of that. Returns the beginning of the object.
pub(super) async fn examine(session: &Session, report: &mut Report) -> Result<Response, Step> {
    let key = session.url.key();
    let first = session.get(key, ByteRange::Bounded(0..FIRST_READ), None).await;
    if let Some(step) = first.head.as_ref().and_then(|head| advice::clock(head, session)) {
        let is_reason =
            matches!(&first.result, Err(StoreError { kind: StoreErrorKind::ClockSkew, .. }));
        if is_reason && !step.reasons.is_empty() {
            return Err(step);
        }
        report.add(step);
    }
    let head = first.head.as_ref();
    let object =
        first.result.map_err(|error| advice::unreadable(&error, head, &session.context()))?;
    report.add(advice::readable(&object, head).took(first.took));
    report.add(advice::encoding(head));
    report.add(advice::identity(&object.version, head));
    report.add(ranges(session, &object).await?);
    report.add(conditions(session, &object.version).await?);
    Ok(object)
}

/// Requests a range in the middle, and one that is counted from the end.
async fn ranges(session: &Session, object: &Response) -> Result<Step, Step> {
    let length = object.version.length;
    if length < 2 {
        return Ok(Step::good(advice::RANGES, "the object is too short to check them"));
    }
    let start = length / 2;
    let middle = ByteRange::Bounded(start..length.min(start + SMALL_READ));
    let middle = session.get(session.url.key(), middle, None).await;
    let took = middle.took;
    let read = match middle.result {
        Ok(read) if read.version == object.version => read,
        Ok(_) => return Err(advice::unstable_identity(advice::RANGES, OTHER_VERSION)),
        Err(error) => {
            return Err(advice::range_failed(&error, middle.head.as_ref(), &session.context()));
        }
    };
    let end = start + read.bytes.len() as u64;
    let step = Step::good(advice::RANGES, format!("bytes {start} to {end} arrive as requested"))
        .detail("start", start)
        .detail("end", end)
        .took(took);
    let suffix = ByteRange::Suffix(SMALL_READ);
    let suffix = session.get(session.url.key(), suffix, None).await;
    let no_suffix = |reason: &str| advice::no_suffix(step.clone(), reason).detail("suffix", false);
    Ok(match suffix.result {
        Ok(read) if read.version == object.version => {
            step.line(format!("so do the last {}", read.bytes.len())).detail("suffix", true)
        }
        // Such is the response if the range is taken to be invalid.
        Ok(read) if read.bytes.is_empty() => no_suffix("the response is empty"),
        Ok(_) => {
            return Err(advice::unstable_identity(advice::RANGES, OTHER_VERSION));
        }
        Err(error) => no_suffix(&error.message),
    })
}

/// Requests the object on the condition that it is another version, and asks whether the version is
/// current.
async fn conditions(session: &Session, version: &Version) -> Result<Step, Step> {
    let key = session.url.key();
    let other = Version {
        etag: version.etag.as_ref().map(|_| "\"hexz-nbd-doctor\"".to_owned()),
        version_id: None,
        last_modified: version
            .last_modified
            .as_ref()
            .map(|_| "Thu, 01 Jan 1970 00:00:01 GMT".to_owned()),
        length: version.length,
    };
    let denied = session.get(key, ByteRange::Bounded(0..1), Some(other)).await;
    let status = denied.head.as_ref().map(|head| head.status());
    let step = match &denied.result {
        Err(error) if error.kind != StoreErrorKind::Changed => advice::conditions_failed(error),
        _ => advice::conditions(version, status),
    };
    let store = session.store.store();
    let current = with_timeout(session.timeout, store.is_current(key, version)).await;
    let status = session.store.take_response().map(|head| head.status());
    match current {
        Ok(true) => Ok(advice::revalidated(step, status)),
        Ok(false) => Err(advice::unstable_identity(
            advice::CONDITIONS,
            "the version of the object is another one in the response to HEAD",
        )),
        Err(error) => Ok(advice::not_revalidated(step, &error)),
    }
}
