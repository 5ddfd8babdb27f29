//! Performs the TLS handshake of a connection.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::ServerTls;
use super::failure::{HandshakeFailure, HandshakeStage};
use super::records::{self, RecordCountingStream};

/// Maximum time for a client to read the alert after a failed handshake.
const LINGER: Duration = Duration::from_secs(1);

/// A stream whose TLS handshake is complete.
pub(crate) struct EncryptedStream<S> {
    pub(crate) stream: TlsStream<RecordCountingStream<S>>,
    /// Token that is cancelled when the keys are nearly used up and can't be replaced: TLS 1.2 with
    /// AES-GCM.
    pub(crate) keys_exhausted: CancellationToken,
}

/// Performs the TLS handshake.
///
/// # Errors
/// The handshake failed; the client has been sent an alert with the reason, if it still reads.
pub(crate) async fn handshake<S>(
    stream: S,
    tls: &ServerTls,
) -> Result<EncryptedStream<S>, HandshakeFailure>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let stream = RecordCountingStream::new(stream);
    let mut hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream);
    let hello = match (&mut hello).await {
        Ok(hello) => hello,
        Err(error) => {
            let failure = HandshakeFailure::from_io(&error, HandshakeStage::Hello);
            if let Some(stream) = hello.take_io() {
                close_after_alert(stream).await;
            }
            return Err(failure);
        }
    };
    match hello.into_stream(tls.config().clone()).into_fallible().await {
        Ok(mut stream) => {
            let (below, session) = stream.get_mut();
            let limit = session.negotiated_cipher_suite().and_then(records::record_limit);
            let keys_exhausted = limit.map(|limit| below.set_limit(limit)).unwrap_or_default();
            Ok(EncryptedStream { stream, keys_exhausted })
        }
        Err((error, stream)) => {
            let failure = HandshakeFailure::from_io(&error, HandshakeStage::CertificateSent);
            close_after_alert(stream).await;
            Err(failure)
        }
    }
}

/// Closes the stream so that the client can read the alert. Closing while bytes from the client are
/// unread would reset the connection, and the alert would be lost.
async fn close_after_alert<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let read_on = async {
        stream.shutdown().await?;
        let mut scratch = [0; 1024];
        while stream.read(&mut scratch).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // The handshake has failed already; an error here changes nothing.
    if let Ok(Err(error)) = tokio::time::timeout(LINGER, read_on).await {
        tracing::trace!("can't close the stream after a failed TLS handshake: {error}");
    }
}
