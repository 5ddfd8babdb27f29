//! Scripts: how responses deviate from those of a correct server, and for which requests.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::log::LoggedRequest;
use crate::rule::Rule;

/// A duration for stalls that end only with the connection.
const FOREVER: Duration = Duration::from_secs(24 * 3600);

/// How one response deviates from a correct one. The default is a correct response.
///
/// Deviations can be combined, as far as that makes sense: `Behavior::delay(…).flip_bit(…)`.
#[derive(Debug, Clone, Default)]
pub struct Behavior {
    pub(crate) delay: Duration,
    /// Status and error code of an error response.
    pub(crate) error: Option<(u16, String)>,
    /// Headers that replace those of the same name, or remove them.
    pub(crate) headers: Vec<(String, Option<String>)>,
    pub(crate) etag: ETag,
    pub(crate) ignores_range: bool,
    pub(crate) ignores_conditions: bool,
    pub(crate) stall: Option<(u64, Duration)>,
    pub(crate) truncate_after: Option<u64>,
    pub(crate) length_change: i64,
    pub(crate) forged: Vec<(u64, Forgery)>,
    pub(crate) replacement: Option<Bytes>,
    pub(crate) gzip: bool,
    pub(crate) drops_connection: bool,
}

/// Change of an object's bytes at an offset.
#[derive(Debug, Clone)]
pub(crate) enum Forgery {
    FlipBit,
    Bytes(Bytes),
}

/// Entity tag of a response.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ETag {
    /// That of the object's version.
    #[default]
    Correct,
    /// That of the object's version, marked as weak.
    Weak,
    /// Another one, with its quotation marks.
    Other(String),
    /// None at all.
    Absent,
}

impl Behavior {
    /// Creates a correct response.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates an error response with a status and the S3 error code that belongs to it, such as
    /// 503 and `SlowDown`.
    #[must_use]
    pub fn status(status: u16) -> Self {
        let code = match status {
            400 => "BadRequest",
            401 | 403 => "AccessDenied",
            404 => "NoSuchKey",
            412 => "PreconditionFailed",
            416 => "InvalidRange",
            429 => "TooManyRequests",
            503 => "SlowDown",
            _ => "InternalError",
        };
        Self::error(status, code)
    }

    /// Creates an error response with a status and an S3 error code, such as
    /// `RequestTimeTooSkewed`.
    #[must_use]
    pub fn error(status: u16, code: &str) -> Self {
        Self { error: Some((status, code.to_owned())), ..Self::default() }
    }

    /// Creates the response to an expired session token: 400 `ExpiredToken`.
    #[must_use]
    pub fn expired_token() -> Self {
        Self::error(400, "ExpiredToken")
    }

    /// Creates a redirect (307).
    #[must_use]
    pub fn redirect(location: &str) -> Self {
        Self::error(307, "TemporaryRedirect").header("location", location)
    }

    /// Closes the connection instead of responding.
    #[must_use]
    pub fn drop_connection() -> Self {
        Self { drops_connection: true, ..Self::default() }
    }

    /// Sends the response's headers this much later.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Adds a Retry-After header, in seconds.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        self.header("retry-after", &seconds.to_string())
    }

    /// Sets a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), Some(value.to_owned())));
        self
    }

    /// Leaves out a header, such as Last-Modified.
    #[must_use]
    pub fn without_header(mut self, name: &str) -> Self {
        self.headers.push((name.to_owned(), None));
        self
    }

    /// Sends this Content-Range header, whatever the body is.
    #[must_use]
    pub fn content_range(self, value: &str) -> Self {
        self.header("content-range", value)
    }

    /// Sends another entity tag. Conditions refer to the real one.
    #[must_use]
    pub fn etag(mut self, etag: ETag) -> Self {
        self.etag = etag;
        self
    }

    /// Responds to a range with the whole object (200).
    #[must_use]
    pub fn ignore_range(mut self) -> Self {
        self.ignores_range = true;
        self
    }

    /// Ignores If-Match, If-None-Match and the like.
    #[must_use]
    pub fn ignore_conditions(mut self) -> Self {
        self.ignores_conditions = true;
        self
    }

    /// Pauses after this many bytes of the body.
    #[must_use]
    pub fn pause_after(mut self, bytes: u64, pause: Duration) -> Self {
        self.stall = Some((bytes, pause));
        self
    }

    /// Sends this many bytes of the body, and nothing more.
    #[must_use]
    pub fn stall_after(self, bytes: u64) -> Self {
        self.pause_after(bytes, FOREVER)
    }

    /// Closes the connection after this many bytes of the body.
    #[must_use]
    pub fn truncate_after(mut self, bytes: u64) -> Self {
        self.truncate_after = Some(bytes);
        self
    }

    /// Sends a body, with a matching Content-Length, that lacks this many bytes of what its
    /// Content-Range promises.
    #[must_use]
    pub fn shorten_by(mut self, bytes: u32) -> Self {
        self.length_change = -i64::from(bytes);
        self
    }

    /// Sends a body, with a matching Content-Length, with this many zeros more than its
    /// Content-Range promises.
    #[must_use]
    pub fn lengthen_by(mut self, bytes: u32) -> Self {
        self.length_change = i64::from(bytes);
        self
    }

    /// Flips the lowest bit of the object's byte at `offset`, if the response contains it.
    #[must_use]
    pub fn flip_bit(mut self, offset: u64) -> Self {
        self.forged.push((offset, Forgery::FlipBit));
        self
    }

    /// Sends other bytes instead of the object's at `offset`, as far as the response contains
    /// them.
    #[must_use]
    pub fn forge(mut self, offset: u64, bytes: impl Into<Bytes>) -> Self {
        self.forged.push((offset, Forgery::Bytes(bytes.into())));
        self
    }

    /// Replaces the object once this response's headers are made: its body is still the old
    /// version's, later requests find the new one.
    #[must_use]
    pub fn then_replace_object(mut self, bytes: impl Into<Bytes>) -> Self {
        self.replacement = Some(bytes.into());
        self
    }

    /// Sends the body in gzip format, with `Content-Encoding: gzip`, whether or not the client
    /// accepts that.
    #[must_use]
    pub fn gzip(mut self) -> Self {
        self.gzip = true;
        self
    }

    /// Applies the forgeries to the bytes of an object from `offset` on.
    pub(crate) fn apply_forgeries(&self, offset: u64, bytes: Bytes) -> Bytes {
        let end = offset + bytes.len() as u64;
        let length = |forgery: &Forgery| match forgery {
            Forgery::FlipBit => 1,
            Forgery::Bytes(bytes) => bytes.len() as u64,
        };
        let overlaps = |(at, forgery): &&(u64, Forgery)| *at < end && at + length(forgery) > offset;
        if !self.forged.iter().any(|forged| overlaps(&forged)) {
            return bytes;
        }
        let mut changed = bytes.to_vec();
        for (at, forgery) in self.forged.iter().filter(overlaps) {
            for (position, byte) in (offset..).zip(&mut changed) {
                let Some(index) = position.checked_sub(*at) else { continue };
                match forgery {
                    Forgery::FlipBit if index == 0 => *byte ^= 1,
                    Forgery::FlipBit => {}
                    Forgery::Bytes(bytes) => {
                        let index = usize::try_from(index).unwrap_or(usize::MAX);
                        *byte = bytes.get(index).copied().unwrap_or(*byte);
                    }
                }
            }
        }
        changed.into()
    }
}

type Decide = dyn Fn(&LoggedRequest) -> Behavior + Send + Sync;

/// Decides on the behavior for each request. Clones share the rules' counters.
#[derive(Clone)]
pub struct Script(Source);

#[derive(Clone)]
enum Source {
    Rules(Arc<Vec<Rule>>),
    Function(Arc<Decide>),
}

impl Default for Script {
    fn default() -> Self {
        Self::new()
    }
}

impl Script {
    /// Creates a script without rules: all responses are correct.
    #[must_use]
    pub fn new() -> Self {
        Self(Source::Rules(Arc::default()))
    }

    /// Adds a rule. The first one that applies to a request decides. Has no effect on a script
    /// that is a function or has been cloned.
    #[must_use]
    pub fn rule(mut self, rule: Rule) -> Self {
        if let Source::Rules(rules) = &mut self.0
            && let Some(rules) = Arc::get_mut(rules)
        {
            rules.push(rule);
        }
        self
    }

    /// Creates a script for all requests alike.
    #[must_use]
    pub fn always(behavior: Behavior) -> Self {
        Self::new().rule(Rule::new(behavior))
    }

    /// Creates a script that calls a function for each request. The function must not block.
    #[must_use]
    pub fn from_fn(decide: impl Fn(&LoggedRequest) -> Behavior + Send + Sync + 'static) -> Self {
        Self(Source::Function(Arc::new(decide)))
    }

    pub(crate) fn behavior(&self, request: &LoggedRequest) -> Behavior {
        match &self.0 {
            Source::Function(decide) => decide(request),
            Source::Rules(rules) => rules
                .iter()
                .find(|rule| rule.applies_to(request))
                .map_or_else(Behavior::default, |rule| rule.behavior.clone()),
        }
    }
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Source::Rules(rules) => f.debug_tuple("Script").field(rules).finish(),
            Source::Function(_) => f.write_str("Script(function)"),
        }
    }
}
