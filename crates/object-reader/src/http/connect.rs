//! Opening of connections, directly or through a proxy, and explanations of their failures.

use std::error::Error;
use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use hyper::client::conn::http1;
use hyper::header::{HeaderMap, HeaderValue, PROXY_AUTHORIZATION};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::pool::RequestSender;
use super::proxy::Proxy;
use super::{HttpClient, Origin, tls};
use crate::store::{StoreError, StoreErrorKind};

/// Maximum size of a response's headers, in bytes.
const MAX_HEADERS: usize = 16 * 1024;

impl HttpClient {
    /// Opens a connection, without a limit on the time.
    pub(super) async fn connect(
        &self,
        origin: &Origin,
        proxy: Option<&Proxy>,
    ) -> Result<RequestSender, StoreError> {
        let stream = match proxy {
            None => self.dial(&origin.host, origin.port, &origin.to_string()).await?,
            Some(proxy) => {
                let name = format!("the proxy {proxy}");
                let mut stream = self.dial(&proxy.host, proxy.port, &name).await?;
                if origin.is_https {
                    open_tunnel(&mut stream, proxy, origin).await?;
                }
                stream
            }
        };
        if !origin.is_https {
            return handshake(stream, origin).await;
        }
        let name = ServerName::try_from(origin.host.clone()).map_err(|_| {
            unreachable_error(format!("{} isn't a name that a certificate can have", origin.host))
        })?;
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let stream = connector
            .connect(name, stream)
            .await
            .map_err(|error| unreachable_error(tls::explain(&error, &origin.host)))?;
        handshake(stream, origin).await
    }

    async fn dial(&self, host: &str, port: u16, name: &str) -> Result<TcpStream, StoreError> {
        let stream = self.dialer.dial(host, port).await.map_err(|error| {
            let kind = match error.kind() {
                // The dialer may not connect there, now or later.
                io::ErrorKind::PermissionDenied => StoreErrorKind::Unsupported,
                _ => StoreErrorKind::Unreachable,
            };
            StoreError::new(kind, format!("no connection to {name}: {error}"))
        })?;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY can't be set");
        }
        Ok(stream)
    }
}

fn unreachable_error(message: String) -> StoreError {
    StoreError::new(StoreErrorKind::Unreachable, message)
}

async fn handshake<S>(stream: S, origin: &Origin) -> Result<RequestSender, StoreError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (connection, driver) = http1::Builder::new()
        .max_buf_size(MAX_HEADERS)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| request_error(&error, origin))?;
    tokio::spawn(async move {
        // The request in flight reports the same error.
        if let Err(error) = driver.await {
            tracing::trace!(%error, "connection to a store failed");
        }
    });
    Ok(connection)
}

/// Adds the proxy's credentials to the headers.
pub(super) fn authorize(proxy: &Proxy, headers: &mut HeaderMap) {
    let authorization = proxy.authorization.as_ref();
    if let Some(Ok(mut value)) = authorization.map(|it| HeaderValue::from_str(it.expose())) {
        value.set_sensitive(true);
        headers.insert(PROXY_AUTHORIZATION, value);
    }
}

/// Asks a proxy for a tunnel, and reads its response.
pub(super) async fn open_tunnel<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    proxy: &Proxy,
    origin: &Origin,
) -> Result<(), StoreError> {
    let interrupted = |error: io::Error| {
        unreachable_error(format!("the proxy {proxy} closed the connection: {error}"))
    };
    let mut request = zeroize::Zeroizing::new(String::with_capacity(1024));
    request.push_str(&format!("CONNECT {origin} HTTP/1.1\r\nHost: {origin}\r\n"));
    if let Some(authorization) = &proxy.authorization {
        request.push_str("Proxy-Authorization: ");
        request.push_str(authorization.expose());
        request.push_str("\r\n");
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await.map_err(interrupted)?;

    let mut response = BytesMut::with_capacity(1024);
    let end = loop {
        if stream.read_buf(&mut response).await.map_err(interrupted)? == 0 {
            return Err(interrupted(io::ErrorKind::UnexpectedEof.into()));
        }
        if let Some(at) = response.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if response.len() > MAX_HEADERS {
            return Err(unreachable_error(format!(
                "the response of the proxy {proxy} is too long"
            )));
        }
    };
    let status = response.strip_prefix(b"HTTP/1.").and_then(|rest| rest.get(2..5));
    match status {
        // The server speaks after the client's first TLS message, so there are no other bytes.
        Some([b'2', ..]) if end == response.len() => Ok(()),
        Some(b"407") => Err(StoreError::new(
            StoreErrorKind::Denied,
            format!("the proxy {proxy} requires other credentials (status 407)"),
        )),
        Some(status) if status.iter().all(u8::is_ascii_digit) => Err(unreachable_error(format!(
            "the proxy {proxy} refused a connection to {origin} (status {})",
            String::from_utf8_lossy(status)
        ))),
        _ => Err(unreachable_error(format!("{proxy} isn't an HTTP proxy: it sent something else"))),
    }
}

/// Returns the I/O error that caused a failed request.
pub(super) fn io_error(error: &hyper::Error) -> Option<&io::Error> {
    let mut source = error.source();
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Some(error);
        }
        source = error.source();
    }
    None
}

/// Describes a failed request.
pub(super) fn request_error(error: &hyper::Error, origin: &Origin) -> StoreError {
    if error.is_parse_too_large() {
        let message = format!("the headers of {origin}'s response are longer than 16 KiB");
        return StoreError::new(StoreErrorKind::Unsupported, message);
    }
    if error.is_parse() {
        let message = format!("{origin} didn't respond with valid HTTP/1.1: {error}");
        return StoreError::new(StoreErrorKind::Unsupported, message);
    }
    let message = match io_error(error) {
        Some(cause) if cause.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            tls::explain(cause, &origin.host)
        }
        Some(cause) => format!("the connection to {origin} broke: {cause}"),
        None => format!("{origin} closed the connection: {error}"),
    };
    StoreError::new(StoreErrorKind::Interrupted, message)
}
