//! Routes HTTP requests to their responses.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use hexz_exports::Recording;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Body, Frame};
use hyper::header::{
    ACCEPT, ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST,
    HeaderMap, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode, Uri};
use percent_encoding::percent_decode_str;

use super::host::is_host_allowed;
use super::metrics::Format;
use super::page::StatusPage;
use super::source::StatusSource;
use crate::cli::HostName;

const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const HTML: &str = "text/html; charset=utf-8";

/// A response. Its body is complete, except that of a trace.
pub(super) type HttpResponse = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Handler of HTTP requests.
#[derive(Debug)]
pub(super) struct RequestHandler {
    names: Vec<HostName>,
    observed: Arc<StatusSource>,
    page: StatusPage,
}

/// Resource that a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Resource {
    Page,
    Status,
    Metrics(Format),
    Health,
    Readiness,
    /// What clients read of an export from now on.
    Trace(String),
}

/// Status and text of the response to a request that is refused.
type RequestRefusal = (StatusCode, &'static str);

const METHOD_NOT_ALLOWED: RequestRefusal =
    (StatusCode::METHOD_NOT_ALLOWED, "method not allowed: use GET or HEAD\n");
const HAS_BODY: RequestRefusal =
    (StatusCode::PAYLOAD_TOO_LARGE, "request bodies are not accepted\n");
/// The host name isn't this machine's.
const UNKNOWN_HOST: RequestRefusal = (
    StatusCode::MISDIRECTED_REQUEST,
    "unknown host name: use an address or localhost, or allow the name with --monitor-name\n",
);
const NOT_FOUND: RequestRefusal = (
    StatusCode::NOT_FOUND,
    "not found: try /, /status.json, /metrics, /healthz, /readyz or /trace?export=NAME\n",
);
const NO_EXPORT: RequestRefusal =
    (StatusCode::BAD_REQUEST, "name the export: /trace?export=NAME, in UTF-8\n");
const TOO_MANY_RECORDINGS: RequestRefusal = (
    StatusCode::SERVICE_UNAVAILABLE,
    "too many traces are being recorded: try again when one has ended\n",
);

impl RequestHandler {
    pub(super) fn new(names: Vec<HostName>, observed: Arc<StatusSource>) -> Self {
        Self { names, observed, page: StatusPage::new() }
    }

    /// Returns the response to a request. `by_network` is false for requests over sockets that no
    /// browser can reach, such as Unix sockets; their host isn't checked.
    pub(super) fn respond(&self, request: &Request<impl Body>, by_network: bool) -> HttpResponse {
        match self.route(request, by_network) {
            Ok(resource) => self.serve(resource),
            Err(refusal) => refuse(refusal),
        }
    }

    fn route(
        &self,
        request: &Request<impl Body>,
        by_network: bool,
    ) -> Result<Resource, RequestRefusal> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(METHOD_NOT_ALLOWED);
        }
        if !request.body().is_end_stream() {
            return Err(HAS_BODY);
        }
        if by_network && !self.is_host_accepted(request) {
            return Err(UNKNOWN_HOST);
        }
        match request.uri().path() {
            "/" => Ok(Resource::Page),
            "/status.json" => Ok(Resource::Status),
            "/metrics" => Ok(Resource::Metrics(format(request.headers()))),
            "/healthz" => Ok(Resource::Health),
            "/readyz" => Ok(Resource::Readiness),
            "/trace" => export_of(request.uri()).map(Resource::Trace).ok_or(NO_EXPORT),
            _ => Err(NOT_FOUND),
        }
    }

    /// Returns true if every host that the request names, in its `Host` field or its target, is
    /// this machine. Browsers always name one.
    fn is_host_accepted(&self, request: &Request<impl Body>) -> bool {
        let in_header = request.headers().get_all(HOST).iter().map(|value| value.to_str().ok());
        let in_target = request.uri().authority().map(|authority| Some(authority.as_str()));
        in_header
            .chain(in_target)
            .all(|host| host.is_some_and(|host| is_host_allowed(host, &self.names)))
    }

    fn serve(&self, resource: Resource) -> HttpResponse {
        let ok = StatusCode::OK;
        match resource {
            Resource::Page => {
                let mut response = complete_response(ok, HTML, self.page.html());
                response.headers_mut().insert(CONTENT_SECURITY_POLICY, self.page.policy().clone());
                response
            }
            Resource::Status => match serde_json::to_vec(&self.observed.status()) {
                Ok(json) => complete_response(ok, JSON, json),
                Err(error) => internal_error(&error),
            },
            Resource::Metrics(format) => match format.encode(self.observed.status()) {
                Ok(text) => complete_response(ok, format.content_type(), text),
                Err(error) => internal_error(&error),
            },
            Resource::Health => health_response(self.observed.unhealthy_reason()),
            Resource::Readiness => health_response(self.observed.unready_reason()),
            Resource::Trace(export) => match self.observed.record(&export) {
                Some(recording) => {
                    build_response(ok, TEXT, StreamBody::new(frames(recording)).boxed_unsync())
                }
                None => refuse(TOO_MANY_RECORDINGS),
            },
        }
    }
}

/// Returns the export that a query names.
fn export_of(uri: &Uri) -> Option<String> {
    let mut pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    let (_, name) = pairs.find(|(key, _)| *key == "export")?;
    let name = percent_decode_str(name).decode_utf8().ok()?;
    (!name.is_empty()).then(|| name.into_owned())
}

/// Returns the lines of a trace while it is recorded.
fn frames(recording: Recording) -> impl stream::Stream<Item = Result<Frame<Bytes>, Infallible>> {
    stream::unfold(recording, async |mut recording| {
        let lines = recording.next().await;
        Some((Ok(Frame::data(lines.into())), recording))
    })
}

/// Returns the exposition format to use: OpenMetrics if the client asks for it by name, or else the
/// text format, which every client reads.
fn format(headers: &HeaderMap) -> Format {
    let wants_newer = headers.get_all(ACCEPT).iter().any(|value| {
        value.to_str().is_ok_and(|value| value.contains("application/openmetrics-text"))
    });
    if wants_newer { Format::OpenMetrics } else { Format::Text }
}

fn health_response(problem: Option<&'static str>) -> HttpResponse {
    match problem {
        None => complete_response(StatusCode::OK, TEXT, "ok\n"),
        Some(why) => complete_response(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
    }
}

fn refuse(refusal: RequestRefusal) -> HttpResponse {
    let (status, text) = refusal;
    let mut response = complete_response(status, TEXT, text);
    if refusal == METHOD_NOT_ALLOWED {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    if refusal == METHOD_NOT_ALLOWED || refusal == HAS_BODY {
        // A body may follow, which isn't read.
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn internal_error(error: &dyn std::fmt::Display) -> HttpResponse {
    complete_response(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("internal error: {error}\n"))
}

/// Builds a response with the headers that all of them have: they forbid browsers to guess the
/// content type, to embed or share the response with other sites, and to cache it.
fn complete_response(
    status: StatusCode,
    kind: &'static str,
    body: impl Into<Bytes>,
) -> HttpResponse {
    build_response(status, kind, Full::new(body.into()).boxed_unsync())
}

fn build_response(
    status: StatusCode,
    kind: &'static str,
    body: UnsyncBoxBody<Bytes, Infallible>,
) -> HttpResponse {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE, kind),
        (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::RecentErrors;
    use hexz_exports::BlockReader;
    use http_body_util::Empty;

    fn handler() -> RequestHandler {
        let observed = StatusSource::new(0, BlockReader::new(0), RecentErrors::default());
        RequestHandler::new(vec!["monitor.example.org".parse().unwrap()], Arc::new(observed))
    }

    fn request(target: &str, host: Option<&str>) -> Request<Empty<Bytes>> {
        let mut request = Request::new(Empty::new());
        *request.uri_mut() = target.parse().unwrap();
        if let Some(host) = host {
            request.headers_mut().insert(HOST, host.parse().unwrap());
        }
        request
    }

    #[test]
    fn requests_for_other_hosts_are_refused() {
        let handler = handler();
        let status =
            |target, host, by_network| handler.respond(&request(target, host), by_network).status();
        for host in [None, Some("localhost"), Some("[::1]:1"), Some("monitor.example.org")] {
            assert_eq!(status("/healthz", host, true), 200);
        }
        assert_eq!(status("/healthz", Some("evil.example"), true), 421);
        assert_eq!(status("http://evil.example/healthz", Some("localhost"), true), 421);
        assert_eq!(status("/healthz", Some("evil.example"), false), 200);
    }

    #[test]
    fn resources_are_served() {
        let handler = handler();
        for (target, code, kind) in [
            ("/", 200, HTML),
            ("/status.json?x", 200, JSON),
            ("/metrics", 200, Format::Text.content_type()),
            ("/healthz", 200, TEXT),
            ("/readyz", 503, TEXT),
            ("/trace?export=a%2Fb", 200, TEXT),
            ("/trace?x&export=a", 200, TEXT),
            ("/trace", 400, TEXT),
            ("/trace?export=", 400, TEXT),
            ("/trace?export=%ff", 400, TEXT),
            ("//", 404, TEXT),
            ("/../etc/passwd", 404, TEXT),
            ("/metrics/", 404, TEXT),
        ] {
            let response = handler.respond(&request(target, None), true);
            assert_eq!((response.status().as_u16(), target), (code, target));
            assert_eq!(response.headers()[CONTENT_TYPE], kind);
            assert_eq!(response.headers()[X_CONTENT_TYPE_OPTIONS], "nosniff");
            let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap();
            assert!(policy.starts_with("default-src 'none'"), "{policy}");
        }
    }

    #[test]
    fn other_methods_and_bodies_are_refused() {
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS] {
            let mut request = request("/metrics", None);
            *request.method_mut() = method;
            let response = handler().respond(&request, true);
            assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
            assert_eq!(response.headers()[ALLOW], "GET, HEAD");
        }
        let body = Request::new(Full::new(Bytes::from_static(b"x")));
        assert_eq!(handler().respond(&body, true).status(), 413);
    }
}
