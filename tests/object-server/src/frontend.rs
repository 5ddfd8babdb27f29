//! The HTTP side of a server: connections, the log, and what a script changes about responses.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue, RANGE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

use crate::answer::Answer;
use crate::body::{Bytestream, ScriptedBody, gzip};
use crate::encoding::percent_decode;
use crate::listener::Listener;
use crate::log::{InProgress, LoggedRequest, RequestLog};
use crate::script::{Behavior, ETag, Script};

/// Maximum size of a request's body, in bytes.
const MAX_REQUEST_BODY: usize = 1 << 20;

/// Makes correct responses.
pub(crate) trait Respond: Send + Sync + 'static {
    /// Returns the response to a request; the behavior says which part of the request to ignore.
    fn respond(&self, request: &LoggedRequest, body: &Bytes, behavior: &Behavior) -> Answer;

    /// Returns an error response in the format of this server.
    fn error(&self, status: u16, code: &str) -> Answer {
        Answer::error(status, code)
    }

    /// Replaces the object that the request names.
    fn replace(&self, _request: &LoggedRequest, _bytes: Bytes) {}
}

/// A running HTTP server.
pub(crate) struct Frontend {
    pub(crate) log: RequestLog,
    pub(crate) listener: Listener,
    shared: Arc<Shared>,
}

/// State that all connections share.
struct Shared {
    responder: Arc<dyn Respond>,
    script: Mutex<Script>,
    log: RequestLog,
}

impl Frontend {
    pub(crate) fn start(
        address: SocketAddr,
        responder: Arc<dyn Respond>,
        tls: Option<TlsAcceptor>,
    ) -> io::Result<Self> {
        let log = RequestLog::default();
        let script = Mutex::new(Script::new());
        let shared = Arc::new(Shared { responder, script, log: log.clone() });
        let state = Arc::clone(&shared);
        let handler = move |stream| -> BoxFuture<'static, ()> {
            let (shared, tls) = (Arc::clone(&state), tls.clone());
            Box::pin(async move {
                match tls {
                    None => serve(shared, stream).await,
                    Some(acceptor) => {
                        if let Ok(stream) = acceptor.accept(stream).await {
                            serve(shared, stream).await;
                        }
                    }
                }
            })
        };
        let listener = Listener::start_at(address, Arc::new(handler))?;
        Ok(Self { log, listener, shared })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    pub(crate) fn set_script(&self, script: Script) {
        *self.shared.script.lock() = script;
    }
}

async fn serve<S>(shared: Arc<Shared>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| answer(Arc::clone(&shared), request));
    // It fails if the client leaves, and if the connection is dropped on purpose.
    drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
}

/// Answers a request. An error closes the connection.
async fn answer(
    shared: Arc<Shared>,
    request: Request<Incoming>,
) -> io::Result<Response<ScriptedBody>> {
    let (parts, body) = request.into_parts();
    let text = |name| parts.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let (request, entry) = shared.log.begin(LoggedRequest {
        number: 0,
        method: parts.method.to_string(),
        path: percent_decode(parts.uri.path()),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        range: text(RANGE).map(str::to_owned),
        headers: parts.headers.clone(),
        received: Instant::now(),
        status: 0,
        error: String::new(),
        served: None,
        bytes_sent: 0,
        duration: None,
    });
    let body = Limited::new(body, MAX_REQUEST_BODY).collect().await.map_err(io::Error::other)?;
    let script = shared.script.lock().clone();
    let behavior = script.behavior(&request);
    if behavior.delay > Duration::ZERO {
        tokio::time::sleep(behavior.delay).await;
    }
    if behavior.drops_connection {
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    let answer = match &behavior.error {
        Some((status, code)) => shared.responder.error(*status, code),
        None => shared.responder.respond(&request, &body.to_bytes(), &behavior),
    };
    if let Some(bytes) = &behavior.replacement {
        shared.responder.replace(&request, bytes.clone());
    }
    finish(answer, behavior, entry, request.method == "HEAD")
}

/// Turns an answer into a response, changed as the behavior demands.
fn finish(
    mut answer: Answer,
    behavior: Behavior,
    entry: InProgress,
    is_head: bool,
) -> io::Result<Response<ScriptedBody>> {
    entry.update(|entry| {
        entry.status = answer.status;
        entry.error.clone_from(&answer.code);
        entry.served.clone_from(&answer.served);
    });
    if behavior.gzip && !is_head {
        let length = usize::try_from(answer.length).map_err(io::Error::other)?;
        let plain = match &answer.body {
            Bytestream::Fixed(bytes) => bytes.clone(),
            Bytestream::Object(object, start) => {
                behavior.apply_forgeries(*start, object.read(*start, length)?)
            }
        };
        let compressed = gzip(&plain);
        answer.length = compressed.len() as u64;
        answer.body = Bytestream::Fixed(compressed);
        answer = answer.with("content-encoding", "gzip");
    }
    if answer.served.is_some() {
        answer.length = answer.length.saturating_add_signed(behavior.length_change);
    }
    let mut response = Response::builder().status(answer.status);
    let changes = behavior.headers.iter().map(|(name, value)| (name, value.clone()));
    let original = answer.headers.iter().filter_map(|(name, value)| {
        let value = if name == "etag" { etag(value, &behavior.etag)? } else { value.clone() };
        Some((name, Some(value)))
    });
    if let Some(headers) = response.headers_mut() {
        for (name, value) in original.chain(changes) {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(io::Error::other)?;
            match value {
                Some(value) => {
                    let value = HeaderValue::from_str(&value).map_err(io::Error::other)?;
                    headers.insert(name, value);
                }
                None => {
                    headers.remove(name);
                }
            }
        }
    }
    let body = ScriptedBody::new(answer.body, answer.length, behavior, entry);
    response.body(body).map_err(io::Error::other)
}

/// Returns the entity tag to send, if any.
fn etag(correct: &str, wanted: &ETag) -> Option<String> {
    match wanted {
        ETag::Correct => Some(correct.to_owned()),
        ETag::Weak => Some(format!("W/{correct}")),
        ETag::Other(other) => Some(other.clone()),
        ETag::Absent => None,
    }
}
