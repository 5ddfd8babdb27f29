//! The server's side of the greeting ("Newstyle negotiation").

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::SessionError;
use super::wire::handshake::{ClientFlags, Greeting, HandshakeFlags};

/// Sends the greeting and reads the client's flags. Reads no byte beyond them.
///
/// Must not be called again inside TLS: the greeting is sent once per connection.
///
/// # Errors
/// The stream failed, or the client set a flag that was not offered.
pub async fn greet<S>(stream: &mut S) -> Result<ClientFlags, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let offered = HandshakeFlags::FIXED_NEWSTYLE.with(HandshakeFlags::NO_ZEROES);
    stream.write_all(&Greeting { flags: offered }.encode()).await?;
    stream.flush().await?;

    let flags = ClientFlags(stream.read_u32().await?);
    // "the server MUST drop the TCP connection if the client sets an unknown flag, or a
    // flag that does not match something advertised by the server" ("Client flags")
    let known = ClientFlags::FIXED_NEWSTYLE.with(ClientFlags::NO_ZEROES);
    if !flags.without(known).is_empty() {
        return Err(SessionError::InvalidClientFlags(flags.0));
    }
    Ok(flags)
}
