//! HTTP/1.1 client with a pool of connections. It follows no redirects and retries nothing, except
//! on a reused connection that the server had closed.

mod connect;
mod first_connection;
mod pool;
mod probe;
mod proxy;
mod tls;

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{ACCEPT_ENCODING, CONTENT_LENGTH, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, Uri};
use tokio::time::{Instant, timeout};

use crate::dial::Dial;
use crate::response::{RawResponse, check_head};
use crate::store::{GetRequest, ReceiveBytes, StoreError, StoreErrorKind};
use crate::url::bracketed;

use first_connection::FirstConnections;
use pool::{Pool, RequestSender};
pub(crate) use probe::{HttpProbe, ResponseObserver};
pub use probe::{ResponseHead, TlsFailure, TlsHandshake, TlsParameters};
pub use proxy::ProxyChoice;
pub(crate) use proxy::ProxyRules;

/// Maximum size of an error body that is read, in bytes.
pub(crate) const MAX_ERROR_BODY: usize = 4096;

/// Limits on the time for the parts of a request. There is none for the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Time to connect, including TLS and the proxy.
    pub connect: Duration,
    /// Time from the request to the end of the response's headers.
    pub first_byte: Duration,
    /// Time between two parts of the body.
    pub stall: Duration,
    /// Minimum rate of a body, in bytes per second: one that trickles would occupy its connection,
    /// and its place among the requests in flight, for hours.
    pub min_rate: u64,
    /// Time over which the rate is measured.
    pub rate_time: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            first_byte: Duration::from_secs(10),
            stall: Duration::from_secs(5),
            min_rate: 1024,
            rate_time: Duration::from_secs(30),
        }
    }
}

/// Server to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Origin {
    is_https: bool,
    /// Name or address without brackets.
    host: String,
    port: u16,
}

impl Origin {
    fn of(uri: &Uri) -> Option<Self> {
        let is_https = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        let port = uri.port_u16().unwrap_or(if is_https { 443 } else { 80 });
        Some(Self { is_https, host: host.to_ascii_lowercase(), port })
    }

    /// Returns the value of the header `Host`.
    fn host_header(&self) -> String {
        match (self.is_https, self.port) {
            (true, 443) | (false, 80) => bracketed(&self.host),
            _ => self.to_string(),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.port)
    }
}

/// Returns true for hosts to which plain HTTP stays on this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Explains the refusal of plain HTTP to `host`.
pub(crate) fn insecure_message(host: &str) -> String {
    format!(
        "plain http to {host} is refused, since others on the network can read and change it: use \
         https, or allow insecure stores explicitly"
    )
}

/// Settings of an [`HttpClient`].
pub(crate) struct HttpSettings<'a> {
    pub(crate) user_agent: &'a str,
    pub(crate) timeouts: Timeouts,
    pub(crate) connect_patience: Option<Duration>,
    pub(crate) ca_file: Option<&'a Path>,
    /// True if the server uses TLS; others, which issue credentials, may.
    pub(crate) requires_tls: bool,
    pub(crate) proxies: ProxyRules,
    pub(crate) allow_insecure: bool,
    pub(crate) dialer: Arc<dyn Dial>,
    /// Receives the heads of responses, for diagnostics.
    pub(crate) observer: Option<ResponseObserver>,
}

/// A client with a pool of connections.
pub(crate) struct HttpClient {
    user_agent: HeaderValue,
    timeouts: Timeouts,
    tls: Arc<rustls::ClientConfig>,
    proxies: ProxyRules,
    allow_insecure: bool,
    dialer: Arc<dyn Dial>,
    observer: Option<ResponseObserver>,
    pool: Arc<Pool>,
    /// `None` if all failures to connect are transient.
    first_connections: Option<FirstConnections>,
}

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpClient").field("timeouts", &self.timeouts).finish_non_exhaustive()
    }
}

/// A request for a part of an object whose bytes are passed on while they arrive.
#[derive(Clone)]
pub(crate) struct Streaming {
    request: GetRequest,
    receiver: Arc<dyn ReceiveBytes>,
}

impl Streaming {
    pub(crate) fn new(request: &GetRequest, receiver: &Arc<dyn ReceiveBytes>) -> Self {
        Self { request: request.clone(), receiver: Arc::clone(receiver) }
    }
}

/// Failure of an attempt, and whether it could be due to the connection being an old one.
struct AttemptError {
    is_stale_connection: bool,
    error: StoreError,
}

/// Maximum number of bytes of a body, and who receives them while they arrive.
type BodyUse<'a> = (usize, Option<&'a Streaming>);

impl HttpClient {
    /// Creates a client. Errors are about the user agent and the CA certificates.
    pub(crate) fn new(settings: HttpSettings<'_>) -> Result<Self, String> {
        Ok(Self {
            user_agent: HeaderValue::from_str(settings.user_agent)
                .map_err(|_| "the user agent isn't a valid header value".to_owned())?,
            timeouts: settings.timeouts,
            tls: tls::client_config(settings.ca_file, settings.requires_tls)?,
            proxies: settings.proxies,
            allow_insecure: settings.allow_insecure,
            dialer: settings.dialer,
            observer: settings.observer,
            pool: Arc::default(),
            first_connections: settings.connect_patience.map(FirstConnections::new),
        })
    }

    /// Sends a request, and reads the body of a successful response up to `limit` bytes, that of
    /// another up to [`MAX_ERROR_BODY`]. Dropping the future closes the connection.
    ///
    /// # Errors
    /// `Unreachable`, `TimedOut`, `Interrupted`, or `Unsupported` if the response isn't HTTP.
    pub(crate) async fn send(
        &self,
        request: Request<Bytes>,
        limit: usize,
    ) -> Result<RawResponse, StoreError> {
        self.send_streaming(request, limit, None).await
    }

    /// Sends a request like [`send`](Self::send), and passes on what arrives.
    pub(crate) async fn send_streaming(
        &self,
        request: Request<Bytes>,
        limit: usize,
        streaming: Option<&Streaming>,
    ) -> Result<RawResponse, StoreError> {
        let allow_plain = self.allow_insecure;
        let response = self.send_with(request, (limit, streaming), allow_plain).await;
        if let Some(observer) = &self.observer {
            observer.observe(&response);
        }
        response
    }

    /// Sends a request to a metadata service, which has no TLS.
    pub(crate) async fn send_to_metadata_service(
        &self,
        request: Request<Bytes>,
        limit: usize,
    ) -> Result<RawResponse, StoreError> {
        self.send_with(request, (limit, None), true).await
    }

    async fn send_with(
        &self,
        request: Request<Bytes>,
        body_use: BodyUse<'_>,
        allow_plain: bool,
    ) -> Result<RawResponse, StoreError> {
        let (mut parts, body) = request.into_parts();
        let Some(origin) = Origin::of(&parts.uri) else {
            return Err(StoreError::new(StoreErrorKind::Unsupported, "invalid URL of a store"));
        };
        if !origin.is_https && !allow_plain && !is_loopback(&origin.host) {
            let message = insecure_message(&origin.host);
            return Err(StoreError::new(StoreErrorKind::Unsupported, message));
        }
        let host = HeaderValue::from_str(&origin.host_header())
            .map_err(|_| StoreError::new(StoreErrorKind::Unsupported, "invalid host"))?;
        parts.headers.insert(HOST, host);
        parts.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        parts.headers.insert(USER_AGENT, self.user_agent.clone());
        let proxy = self.proxies.proxy_for(origin.is_https, &origin.host);
        if let (false, Some(proxy)) = (origin.is_https, proxy) {
            // The absolute form of the URI stays, for the proxy.
            connect::authorize(proxy, &mut parts.headers);
        } else if let Some(path) = parts.uri.path_and_query() {
            parts.uri = Uri::from(path.clone());
        }
        let request = Request::from_parts(parts, Full::new(body));

        if let Some(connection) = self.pool.take(&origin).await {
            match self.attempt(connection, request.clone(), body_use, &origin).await {
                Err(attempt) if attempt.is_stale_connection => {}
                result => return result.map_err(|attempt| attempt.error),
            }
        }
        let connecting = timeout(self.timeouts.connect, self.connect(&origin, proxy)).await;
        let mut connection = connecting.unwrap_or_else(|_| {
            let limit = self.timeouts.connect.as_secs_f32();
            let message = format!("no connection to {origin} within {limit} s");
            Err(StoreError::new(StoreErrorKind::TimedOut, message))
        });
        if let Some(first_connections) = &self.first_connections {
            first_connections.judge(&origin, &mut connection);
        }
        let connection = connection?;
        let result = self.attempt(connection, request, body_use, &origin).await;
        result.map_err(|attempt| attempt.error)
    }

    async fn attempt(
        &self,
        mut connection: RequestSender,
        request: Request<Full<Bytes>>,
        (limit, streaming): BodyUse<'_>,
        origin: &Origin,
    ) -> Result<RawResponse, AttemptError> {
        let sending = timeout(self.timeouts.first_byte, connection.send_request(request)).await;
        let response = match sending {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                return Err(AttemptError {
                    is_stale_connection: error.is_closed()
                        || error.is_canceled()
                        || error.is_incomplete_message()
                        || connect::io_error(&error).is_some(),
                    error: connect::request_error(&error, origin),
                });
            }
            Err(_) => {
                self.pool.clear(origin);
                let limit = self.timeouts.first_byte.as_secs_f32();
                let message = format!("no response from {origin} within {limit} s");
                let error = StoreError::new(StoreErrorKind::TimedOut, message);
                return Err(AttemptError { is_stale_connection: false, error });
            }
        };
        let (parts, body) = response.into_parts();
        let announced = content_length(&parts.headers);
        // The beginning of an error body is of use, that of an object isn't.
        let collected = if !parts.status.is_success() {
            self.collect(body, announced, MAX_ERROR_BODY, origin, |_| ()).await
        } else if announced.is_some_and(|length| length > limit as u64) {
            Ok((Bytes::new(), !body.is_end_stream()))
        } else {
            let begin = |streaming: &Streaming| {
                check_head(parts.status, &parts.headers, &streaming.request)
            };
            let offset = streaming.and_then(begin);
            let pass_on = |so_far: &[u8]| {
                if let (Some(streaming), Some(offset)) = (streaming, offset) {
                    streaming.receiver.receive(offset, so_far);
                }
            };
            self.collect(body, announced, limit, origin, pass_on).await
        };
        let (body, is_truncated) =
            collected.map_err(|error| AttemptError { is_stale_connection: false, error })?;
        if !is_truncated {
            self.pool.put(origin.clone(), connection);
        }
        Ok(RawResponse { status: parts.status, headers: parts.headers, body, is_truncated })
    }

    /// Reads a body up to `limit` bytes, and calls `pass_on` with what there is so far. Returns it
    /// with true if it is longer.
    async fn collect(
        &self,
        mut body: Incoming,
        announced: Option<u64>,
        limit: usize,
        origin: &Origin,
        pass_on: impl Fn(&[u8]),
    ) -> Result<(Bytes, bool), StoreError> {
        let length = announced.map_or(0, |length| usize::try_from(length).unwrap_or(usize::MAX));
        let mut collected = BytesMut::with_capacity(length.min(limit));
        let mut measured = (Instant::now(), 0);
        loop {
            let frame = match timeout(self.timeouts.stall, body.frame()).await {
                Ok(None) => return Ok((collected.freeze(), false)),
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => {
                    let received = collected.len();
                    let detail = match announced {
                        Some(announced) => format!("{received} of {announced}"),
                        None => format!("{received}"),
                    };
                    let reason = connect::request_error(&error, origin).message;
                    let message = format!("the response broke off after {detail} bytes: {reason}");
                    return Err(StoreError::new(StoreErrorKind::Interrupted, message));
                }
                Err(_) => {
                    let seconds = self.timeouts.stall.as_secs_f32();
                    let received = collected.len();
                    let message = format!(
                        "{origin} stalled: no more data for {seconds} s after {received} bytes"
                    );
                    return Err(StoreError::new(StoreErrorKind::TimedOut, message));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            let free = limit.saturating_sub(collected.len());
            collected.extend_from_slice(data.get(..free).unwrap_or(&data));
            if data.len() > free {
                return Ok((collected.freeze(), true));
            }
            pass_on(&collected);
            let (since, before) = measured;
            let (time, received) = (since.elapsed(), collected.len());
            if time >= self.timeouts.rate_time {
                let recent = received - before;
                let least = u128::from(self.timeouts.min_rate) * time.as_millis() / 1000;
                if (recent as u128) < least {
                    let seconds = time.as_secs_f32();
                    let message = format!(
                        "{origin} is too slow: {recent} bytes in {seconds:.1} s, after {before} bytes"
                    );
                    return Err(StoreError::new(StoreErrorKind::TimedOut, message));
                }
                measured = (Instant::now(), received);
            }
        }
    }
}

/// Returns the announced length of a body.
pub(crate) fn content_length(headers: &hyper::HeaderMap) -> Option<u64> {
    let value = headers.get(CONTENT_LENGTH)?.to_str().ok()?;
    value.bytes().all(|digit| digit.is_ascii_digit()).then(|| value.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_taken_from_urls() {
        for (uri, host, port, header) in [
            ("https://H.example/k", "h.example", 443, "h.example"),
            ("https://h:443/k", "h", 443, "h"),
            ("http://h:443/k", "h", 443, "h:443"),
            ("http://h/k", "h", 80, "h"),
            ("http://[fd00::1]:8080/k", "fd00::1", 8080, "[fd00::1]:8080"),
            ("https://[fd00::1]/k", "fd00::1", 443, "[fd00::1]"),
        ] {
            let origin = Origin::of(&uri.parse().unwrap()).unwrap();
            assert_eq!((origin.host.as_str(), origin.port), (host, port), "{uri}");
            assert_eq!(origin.host_header(), header, "{uri}");
        }
        assert!(Origin::of(&"ftp://h/k".parse().unwrap()).is_none());
        assert!(Origin::of(&"/k".parse().unwrap()).is_none());
    }

    #[test]
    fn loopback_hosts_are_recognized() {
        for (host, expected) in
            [("localhost", true), ("127.9.9.9", true), ("::1", true), ("localhost.evil", false)]
        {
            assert_eq!(is_loopback(host), expected, "{host}");
        }
    }
}
