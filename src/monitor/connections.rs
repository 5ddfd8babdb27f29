//! Accepts HTTP connections, and limits their number and their lifetime.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use hyper::Request;
use hyper::body::{Body, Incoming as RequestBody};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_io_timeout::TimeoutStream;

use super::responses::RequestHandler;
use nbd_gateway::listen::{AcceptFault, IncomingConnection, Listener};
use nbd_telemetry::RateLimit;

/// Maximum number of connections: enough for a Prometheus or two, and some browsers with two or
/// three each. Further ones are closed; clients retry.
const MAX_CONNECTIONS: usize = 16;

/// Timeout for receiving a request, from the end of the previous one. It is the idle timeout, too.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);

/// Maximum lifetime of a connection, however busy it is, and the time after it in which the last
/// response may still be read. Browsers and Prometheus reconnect on their own.
const MAX_LIFETIME: Duration = Duration::from_secs(300);

/// The same for a connection on which a trace is recorded.
const MAX_RECORDING: Duration = Duration::from_secs(3600);
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

/// Time that a client may leave a response unread without any progress.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum size of a request head, in bytes: the smallest value that hyper accepts.
const MAX_HEAD_BYTES: usize = 8192;

/// Maximum number of header fields in a request. Browsers send about twenty.
const MAX_HEADER_FIELDS: usize = 64;

/// Pause before the next attempt to accept when the system has no file descriptors left.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(200);

/// Accepts connections and answers requests until the sender of `stop` is dropped.
pub(super) async fn serve(
    listener: Listener,
    handler: Arc<RequestHandler>,
    mut stop: oneshot::Receiver<()>,
) {
    let faults = RateLimit::new(3, Duration::from_secs(10));
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = &mut stop => return,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(incoming) => match Arc::clone(&permits).try_acquire_owned() {
                Ok(permit) => {
                    connections.spawn(serve_connection(incoming, Arc::clone(&handler), permit));
                }
                Err(_) => tracing::debug!(
                    "monitor connection closed: the limit is {MAX_CONNECTIONS} connections"
                ),
            },
            Err(error) if AcceptFault::classify(&error) == AcceptFault::Connection => {}
            Err(error) => {
                if let Some(held_back) = faults.allow() {
                    tracing::error!(
                        reason = "monitor_accept_failed",
                        held_back = held_back.field(),
                        "the monitor can't accept connections: {error}"
                    );
                }
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

async fn serve_connection(
    incoming: IncomingConnection,
    handler: Arc<RequestHandler>,
    _permit: OwnedSemaphorePermit,
) {
    let ended = match incoming {
        IncomingConnection::Tcp(stream, _) => serve_requests(stream, &handler, true).await,
        IncomingConnection::Unix(stream) => serve_requests(stream, &handler, false).await,
        IncomingConnection::Pipes(stream) => serve_requests(stream, &handler, false).await,
        IncomingConnection::Vsock(stream, _) => serve_requests(stream, &handler, false).await,
    };
    if let Err(error) = ended {
        tracing::debug!("monitor connection failed: {error}");
    }
}

/// Answers the requests of one connection.
async fn serve_requests<S>(
    stream: S,
    handler: &RequestHandler,
    by_network: bool,
) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let is_recording = AtomicBool::new(false);
    let lifetime = || if is_recording.load(Relaxed) { MAX_RECORDING } else { MAX_LIFETIME };
    let respond = |request: Request<RequestBody>| {
        let response = handler.respond(&request, by_network);
        // Only traces end at a time that isn't known.
        is_recording.store(response.body().size_hint().exact().is_none(), Relaxed);
        std::future::ready(Ok::<_, Infallible>(response))
    };
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .max_headers(MAX_HEADER_FIELDS)
        .half_close(false);
    let stream = TokioIo::new(Box::pin(with_write_timeout(stream)));
    let mut connection = pin!(http.serve_connection(stream, service_fn(respond)));
    let begun = Instant::now();
    while begun.elapsed() < lifetime() {
        let left = lifetime().saturating_sub(begun.elapsed());
        if let Ok(ended) = tokio::time::timeout(left, &mut connection).await {
            return ended;
        }
    }
    connection.as_mut().graceful_shutdown();
    tokio::time::timeout(SHUTDOWN_TIMEOUT, connection).await.unwrap_or(Ok(()))
}

/// Wraps a stream whose writes fail once its reader has read nothing for [`WRITE_TIMEOUT`].
fn with_write_timeout<S: AsyncRead + AsyncWrite>(stream: S) -> TimeoutStream<S> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    stream
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn stalled_readers_time_out_and_slow_readers_do_not() {
        let (mut client, server) = tokio::io::duplex(16);
        let writing =
            tokio::spawn(
                async move { Box::pin(with_write_timeout(server)).write_all(&[1; 64]).await },
            );
        for _ in 0..3 {
            tokio::time::sleep(WRITE_TIMEOUT - Duration::from_secs(1)).await;
            client.read_exact(&mut [0; 16]).await.unwrap();
        }
        writing.await.unwrap().unwrap();

        let (_client, server) = tokio::io::duplex(16);
        let failed = Box::pin(with_write_timeout(server)).write_all(&[1; 64]).await;
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
