//! HTTP servers.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hyper::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, HeaderName, IF_MATCH, IF_NONE_MATCH,
    IF_UNMODIFIED_SINCE, RANGE,
};
use hyper::http::request::Builder;
use hyper::{Method, Request, StatusCode};
use parking_lot::RwLock;

use super::aws::sensitive;
use super::credentials::{Credential, Credentials, Loaded};
use super::{MAX_LISTING, Secret, head_was_refused, index, range_limit};
use crate::http::{HttpClient, Streaming};
use crate::listing::ListingPage;
use crate::response::{RawResponse, check_current, check_failure, check_get};
use crate::store::{
    ByteRange, GetRequest, ListedObject, ReceiveBytes, Response, Store, StoreError, StoreErrorKind,
    Version,
};
use crate::url::{StoreUrl, check_key, encode_path};

/// An HTTP server.
pub(super) struct HttpStore {
    label: String,
    url: StoreUrl,
    /// Query of each request.
    query: RwLock<Option<Secret>>,
    client: Arc<HttpClient>,
    credentials: Arc<Credentials>,
}

impl fmt::Debug for HttpStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpStore").field("label", &self.label).finish_non_exhaustive()
    }
}

impl HttpStore {
    pub(super) fn new(
        url: StoreUrl,
        client: Arc<HttpClient>,
        credentials: Arc<Credentials>,
    ) -> Self {
        let query = RwLock::new(url.query().cloned());
        Self { label: url.to_string(), url, query, client, credentials }
    }

    /// Sends a request. Renews rejected credentials once.
    async fn request(
        &self,
        method: Method,
        key: &str,
        headers: &[(HeaderName, String)],
        limit: usize,
        streaming: Option<&Streaming>,
    ) -> Result<RawResponse, StoreError> {
        check_key(key)
            .map_err(|error| StoreError::new(StoreErrorKind::Unsupported, error.to_string()))?;
        let mut url = format!("{}/{}", self.url, encode_path(key));
        if let Some(query) = &*self.query.read() {
            url.push('?');
            url.push_str(query.expose());
        }
        let send = |loaded: Arc<Loaded>| {
            let mut request = Request::builder().method(&method).uri(&url);
            for (name, value) in headers {
                request = request.header(name, value);
            }
            async move {
                let request = authorize(request, &loaded.credential)?.body(Bytes::new());
                let request = request.map_err(|_| {
                    StoreError::new(
                        StoreErrorKind::Unsupported,
                        "no request for this key can be made",
                    )
                })?;
                self.client.send_streaming(request, limit, streaming).await
            }
        };
        self.credentials.send_renewing(send).await
    }

    async fn get_range(
        &self,
        key: &str,
        request: &GetRequest,
        streaming: Option<&Streaming>,
    ) -> Result<Response, StoreError> {
        let limit = range_limit(&request.range)?;
        let range = match &request.range {
            ByteRange::Bounded(range) => format!("bytes={}-{}", range.start, range.end - 1),
            ByteRange::Suffix(length) => format!("bytes=-{length}"),
        };
        let mut headers = vec![(RANGE, range)];
        if let Some(version) = &request.version {
            match (&version.etag, &version.last_modified) {
                (Some(etag), _) => headers.push((IF_MATCH, etag.clone())),
                (None, Some(date)) => headers.push((IF_UNMODIFIED_SINCE, date.clone())),
                (None, None) => {}
            }
        }
        if request.bypass_caches {
            headers.push((CACHE_CONTROL, "no-cache".to_owned()));
        }
        let raw = self.request(Method::GET, key, &headers, limit, streaming).await?;
        check_get(&raw, request, SystemTime::now()).map_err(|error| self.without_query(error))
    }

    async fn check(&self, key: &str, version: &Version) -> Result<bool, StoreError> {
        // There is no condition for dates: an object may have been replaced by an older one.
        let mut headers = Vec::new();
        headers.extend(version.etag.clone().map(|etag| (IF_NONE_MATCH, etag)));
        let mut raw = self.request(Method::HEAD, key, &headers, 0, None).await?;
        if head_was_refused(&raw) {
            // Presigned URLs are valid for one method.
            headers.push((RANGE, "bytes=0-0".to_owned()));
            raw = self.request(Method::GET, key, &headers, 1, None).await?;
        }
        check_current(&raw, version, SystemTime::now()).map_err(|error| self.without_query(error))
    }

    async fn list_folder(&self, prefix: &str) -> Result<Vec<ListedObject>, StoreError> {
        let raw = self.request(Method::GET, prefix, &[], MAX_LISTING, None).await?;
        let unsupported = |reason: &str| {
            Err(StoreError::new(
                StoreErrorKind::Unsupported,
                format!(
                    "no listing of the folder: {reason}. Enable one (nginx: autoindex on; Apache: \
                     Options +Indexes), or name each object"
                ),
            ))
        };
        match raw.status {
            StatusCode::OK if raw.is_truncated => unsupported("it is longer than 8 MiB"),
            StatusCode::OK => {
                let body = String::from_utf8_lossy(&raw.body);
                let is_json = raw.header(CONTENT_TYPE).is_some_and(|it| it.contains("json"));
                let names = match is_json {
                    true => index::parse_json_index(&body),
                    false => index::parse_html_index(&body, prefix),
                };
                match names {
                    Ok(names) => Ok(names
                        .into_iter()
                        .map(|name| ListedObject { name, version: None })
                        .collect()),
                    Err(reason) => unsupported(reason),
                }
            }
            StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED => {
                unsupported(&format!("the server refuses (status {})", raw.status.as_u16()))
            }
            _ => Err(self.without_query(check_failure(&raw, false, SystemTime::now()))),
        }
    }

    /// Removes the message of a server that repeats the secret query.
    fn without_query(&self, error: StoreError) -> StoreError {
        match &*self.query.read() {
            Some(query) if error.message.contains(query.expose()) => {
                StoreError { message: "the server refused the request".to_owned(), ..error }
            }
            _ => error,
        }
    }
}

fn authorize(request: Builder, credential: &Credential) -> Result<Builder, StoreError> {
    let value = match credential {
        Credential::Bearer(token) => format!("Bearer {}", token.expose()),
        Credential::Basic(pair) => format!("Basic {}", STANDARD.encode(pair.expose())),
        _ => return Ok(request),
    };
    Ok(request.header(AUTHORIZATION, sensitive(&zeroize::Zeroizing::new(value))?))
}

impl Store for HttpStore {
    fn label(&self) -> &str {
        &self.label
    }

    fn get<'a>(
        &'a self,
        key: &'a str,
        request: &'a GetRequest,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        self.get_range(key, request, None).boxed()
    }

    fn get_streaming<'a>(
        &'a self,
        key: &'a str,
        request: &'a GetRequest,
        receiver: Arc<dyn ReceiveBytes>,
    ) -> BoxFuture<'a, Result<Response, StoreError>> {
        async move {
            let streaming = Streaming::new(request, &receiver);
            self.get_range(key, request, Some(&streaming)).await
        }
        .boxed()
    }

    fn is_current<'a>(
        &'a self,
        key: &'a str,
        version: &'a Version,
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        self.check(key, version).boxed()
    }

    fn list_page<'a>(
        &'a self,
        prefix: &'a str,
        _: Option<&'a str>,
    ) -> BoxFuture<'a, Result<ListingPage, StoreError>> {
        async move { Ok(ListingPage { objects: self.list_folder(prefix).await?, next: None }) }
            .boxed()
    }

    fn replace_query(&self, query: &Secret) {
        *self.query.write() = Some(query.clone());
    }
}
