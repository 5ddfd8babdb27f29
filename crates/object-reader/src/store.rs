//! The interface of a store: single requests, whose responses are checked.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::listing::{ListedPages, ListingPage};
use crate::stores::Secret;

/// A store of objects, such as a bucket or an HTTP server.
///
/// Each call is one attempt, without retries. Only an implementation refreshes credentials that
/// were rejected as expired, and repeats the request once with the new ones. It also ends attempts
/// that make no progress: nobody else does, since a slow response is better than none.
pub trait Store: Debug + Send + Sync {
    /// Returns the name of the store for logs and metrics, such as `s3://golden`. It contains no
    /// secrets.
    fn label(&self) -> &str;

    /// Reads a part of the object `key`.
    ///
    /// The response has been checked: its range is the requested one, limited by the end of the
    /// object; there are as many bytes; and the version is `request.version`, if that is set.
    ///
    /// # Errors
    /// See [`StoreErrorKind`].
    fn get<'a>(
        &'a self,
        key: &'a str,
        request: &'a GetRequest,
    ) -> BoxFuture<'a, Result<Response, StoreError>>;

    /// Reads a part of the object `key`, and passes its bytes on while the rest of them arrives.
    ///
    /// The head of the response has been checked before: only bytes of the requested range and of
    /// the required version are passed on. An implementation that can't do that passes none on.
    ///
    /// # Errors
    /// As for [`get`](Self::get). Bytes that were passed on before are right nevertheless.
    fn get_streaming<'a>(
        &'a self,
        key: &'a str,
        request: &'a GetRequest,
        receiver: Arc<dyn ReceiveBytes>,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        drop(receiver);
        self.get(key, request)
    }

    /// Returns true if `version` is still the object's current version. Transfers no data.
    ///
    /// # Errors
    /// See [`StoreErrorKind`]. A replaced object isn't an error, a deleted one is `NotFound`.
    fn is_current<'a>(
        &'a self,
        key: &'a str,
        version: &'a Version,
    ) -> BoxFuture<'a, Result<bool, StoreError>>;

    /// Lists the objects whose keys consist of `prefix` (empty, or ending in a slash) and a name
    /// without a slash: those of the first page, or of the one called `page`.
    ///
    /// # Errors
    /// See [`StoreErrorKind`].
    fn list_page<'a>(
        &'a self,
        prefix: &'a str,
        page: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ListingPage, StoreError>>;

    /// Lists the objects of all pages, of which each is one attempt.
    ///
    /// # Errors
    /// See [`StoreErrorKind`].
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<Vec<ListedObject>, StoreError>> {
        async move {
            let mut pages = ListedPages::default();
            let mut next = None;
            loop {
                let page = self.list_page(prefix, next.as_deref()).await?;
                next = pages.add(page)?;
                if next.is_none() {
                    return Ok(pages.into_objects());
                }
            }
        }
        .boxed()
    }

    /// Replaces the query of the URLs of an HTTP server, such as a signature that expires. Has no
    /// effect on other stores.
    fn replace_query(&self, _query: &Secret) {}

    /// Returns the time at which the credentials in use expire, if they do and that is known.
    fn credentials_expiry(&self) -> Option<SystemTime> {
        None
    }
}

/// Receives the bytes of a response while it arrives.
pub trait ReceiveBytes: Send + Sync {
    /// Called whenever there are more bytes, with all of them so far. `offset` is the offset of the
    /// first one in the object. Must not block.
    fn receive(&self, offset: u64, so_far: &[u8]);
}

/// Part of an object, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ByteRange {
    /// The bytes from `start` up to, but not including, `end`. The end may lie beyond the object.
    Bounded(Range<u64>),
    /// As many bytes at the end of the object, or all of a shorter one.
    Suffix(u64),
}

/// One request for a part of an object.
#[derive(Debug, Clone)]
pub struct GetRequest {
    /// The part.
    pub range: ByteRange,
    /// The only acceptable version; `None` for whichever is current.
    pub version: Option<Version>,
    /// True to ask caches on the way for a fresh response, since they delivered wrong bytes.
    pub bypass_caches: bool,
}

/// Checked response to a [`GetRequest`].
#[derive(Debug, Clone)]
pub struct Response {
    /// Version of the object, with its length.
    pub version: Version,
    /// Offset of the bytes in the object.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
}

/// Version of an object. Two responses belong to the same bytes only if their versions are equal.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Version {
    /// Length of the object, in bytes.
    pub length: u64,
    /// Entity tag with quotes, as sent; weak ones aren't used.
    pub etag: Option<String>,
    /// Version of the object in a bucket with versioning.
    pub version_id: Option<String>,
    /// Value of the header `Last-Modified`. It identifies the version only if there is no entity
    /// tag.
    pub last_modified: Option<String>,
}

/// Object in a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    /// Last component of the key.
    pub name: String,
    /// Version as far as the listing reveals it; `None` if it doesn't.
    pub version: Option<Version>,
}

/// Failure of a request.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct StoreError {
    /// Kind of failure, which decides what happens next.
    pub kind: StoreErrorKind,
    /// What happened, in words, without secrets: no query of a URL, no header.
    pub message: String,
    /// Time after which the store asks to try again.
    pub retry_after: Option<Duration>,
}

/// Kind of a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// No connection: the name can't be resolved, the server doesn't accept, TLS fails.
    Unreachable,
    /// The same, for longer than [`StoreConfig::connect_patience`](crate::StoreConfig) and without
    /// any connection before. Further attempts are pointless.
    NeverReached,
    /// The server was too slow: no response, or no more bytes.
    TimedOut,
    /// The connection broke, or the body is shorter or longer than announced.
    Interrupted,
    /// The server asks for fewer requests: status 429 or 503.
    Throttled,
    /// Another server error (5xx).
    ServerError,
    /// The credentials have expired or been revoked, and couldn't be renewed.
    CredentialsExpired,
    /// The credentials can't be obtained or aren't sufficient: status 401 or 403.
    Denied,
    /// The clock differs too much from the server's.
    ClockSkew,
    /// The object has another version than the required one.
    Changed,
    /// There is no such object or bucket.
    NotFound,
    /// The server can't be used: no ranges, no object identity, redirects, invalid responses.
    Unsupported,
}

impl StoreErrorKind {
    /// Returns the stable label for logs and metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unreachable | Self::NeverReached => "unreachable",
            Self::TimedOut => "timed_out",
            Self::Interrupted => "interrupted",
            Self::Throttled => "throttled",
            Self::ServerError => "server_error",
            Self::CredentialsExpired => "credentials_expired",
            Self::Denied => "denied",
            Self::ClockSkew => "clock_skew",
            Self::Changed => "changed",
            Self::NotFound => "not_found",
            Self::Unsupported => "unsupported",
        }
    }

    /// Returns true if the same request may succeed later.
    pub fn is_transient(self) -> bool {
        match self {
            Self::Unreachable
            | Self::TimedOut
            | Self::Interrupted
            | Self::Throttled
            | Self::ServerError => true,
            Self::NeverReached
            | Self::CredentialsExpired
            | Self::Denied
            | Self::ClockSkew
            | Self::Changed
            | Self::NotFound
            | Self::Unsupported => false,
        }
    }

    /// Returns true if the store rejects requests whatever they are for: because of the
    /// credentials, or the clock.
    pub fn is_rejection(self) -> bool {
        matches!(self, Self::CredentialsExpired | Self::Denied | Self::ClockSkew)
    }

    /// Returns true if the failure leaves open whether an object still has the version that it
    /// had.
    pub fn is_inconclusive(self) -> bool {
        !matches!(self, Self::Changed | Self::NotFound)
    }
}
