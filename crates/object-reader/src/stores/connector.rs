//! Connects object_store to the HTTP client of this package.
//!
//! object_store builds and signs requests. The responses to requests for objects don't reach it:
//! they are captured, and judged by the same code as those of HTTP servers. Its own judgement
//! accepts less (a whole object as a response to a range), and its errors show URLs.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use hyper::header::{CACHE_CONTROL, HeaderValue};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient as CloudClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use parking_lot::Mutex;

use crate::http::{HttpClient, Streaming};
use crate::response::RawResponse;
use crate::store::StoreError;

/// Place for the response to one request. It travels in the request's extensions.
#[derive(Clone)]
pub(super) struct Capture {
    response: Arc<Mutex<Option<Result<RawResponse, StoreError>>>>,
    limit: usize,
    bypass_caches: bool,
    /// Receiver of what arrives.
    streaming: Option<Streaming>,
    /// True if object_store gets successful responses, since it parses them.
    forwards_success: bool,
}

impl Capture {
    /// Captures the response to a request for an object, with at most `limit` bytes.
    pub(super) fn of_object(
        limit: usize,
        bypass_caches: bool,
        streaming: Option<Streaming>,
    ) -> Self {
        let (response, forwards_success) = (Arc::default(), false);
        Self { response, limit, bypass_caches, streaming, forwards_success }
    }

    /// Captures only failures, of requests for listings.
    pub(super) fn of_listing(limit: usize) -> Self {
        let (response, streaming) = (Arc::default(), None);
        Self { response, limit, bypass_caches: false, streaming, forwards_success: true }
    }

    /// Takes the response. Returns `None` if no request was sent, or the response was forwarded.
    pub(super) fn take(&self) -> Option<Result<RawResponse, StoreError>> {
        self.response.lock().take()
    }
}

/// Creates clients for object_store.
#[derive(Debug, Clone)]
pub(super) struct Connector(pub(super) Arc<HttpClient>);

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<CloudClient> {
        Ok(CloudClient::new(self.clone()))
    }
}

/// Sentinel for responses that were captured.
#[derive(Debug)]
struct Captured;

impl fmt::Display for Captured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the response was captured")
    }
}

impl std::error::Error for Captured {}

#[async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        // This kind isn't retried.
        let captured = || HttpError::new(HttpErrorKind::Unknown, Captured);
        let (mut parts, body) = request.into_parts();
        let capture = parts.extensions.remove::<Capture>().ok_or_else(captured)?;
        if capture.bypass_caches {
            // Not part of the signature, which covers only the headers that it lists.
            parts.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        let body = body.as_bytes().cloned().unwrap_or_default();
        let request = hyper::Request::from_parts(parts, body);
        let streaming = capture.streaming.as_ref();
        let result = self.0.send_streaming(request, capture.limit, streaming).await;
        match result {
            Ok(raw) if capture.forwards_success && raw.status.is_success() && !raw.is_truncated => {
                let mut response = HttpResponse::new(HttpResponseBody::from(raw.body));
                *response.status_mut() = raw.status;
                *response.headers_mut() = raw.headers;
                Ok(response)
            }
            result => {
                *capture.response.lock() = Some(result);
                Err(captured())
            }
        }
    }
}
